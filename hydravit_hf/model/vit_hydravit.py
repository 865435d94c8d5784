# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion from a stock ViT or DeiT of transformers, and to a stock ViT.

This file travels with each saved checkpoint as remote code.
"""

import re

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.utils import logging

from .configuration_hydravit import grid_of
from .nesting_hydravit import assemble, fill_leading_blocks, fit_positions_to_grid, leading_blocks, own_parameters
from .quantization_hydravit import carry_quantizer
from .sources_hydravit import SHARED_ARGUMENTS, places_of_labels, read_source

logger = logging.get_logger(__name__)


class ViTConversionMixin:
    """Adds `from_vit` and `to_vit` to the models."""

    @classmethod
    def from_vit(cls, vit_or_deit, num_attention_heads: int = 12, **config_kwargs):
        """Start from a published ViT (paper, "initialised from DeiT-tiny").

        The leading heads are those that the ViT happens to have first. `hydravit_hf.elastify` orders them by what they
        contribute. LayerScale is folded into the weights. A DeiT's distillation token is left behind with a warning,
        because a HydraViT has none.

        Args:
            vit_or_deit: A ViT, DeiT, ViTMAE, ViTMSN or DINOv2 of transformers, or a `vit_*` or `deit_*` of timm, with
                or without classifier: the model, its path or its Hub id. A state dict is enough for timm.
            num_attention_heads: Number of heads that the new model holds. The given heads fill its leading block. If
                it holds more, the others are newly initialised, with a warning. If it holds fewer, it takes the leading
                ones.
            config_kwargs: Further arguments of `HydraViTConfig`. Another `num_labels` gives a new classifier. An
                `id2label` with the ViT's labels in another order reorders its classifier. Another `image_size`
                interpolates the position embeddings. A state dict needs `head_dim` if it is not 64.

        Raises:
            TypeError: `vit_or_deit` is no model, no state dict and no path.
            ValueError: `vit_or_deit` is no plain ViT (the message names the reason) or lacks parameters, or its MLP is
                not a multiple of its width.

        Examples:
            >>> from transformers import ViTConfig, ViTForImageClassification
            >>> from hydravit_hf import HydraViTForImageClassification
            >>> sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 192, "num_hidden_layers": 2}
            >>> vit = ViTForImageClassification(ViTConfig(**sizes))
            >>> model = HydraViTForImageClassification.from_vit(vit, num_attention_heads=3)
            >>> model.config.head_dim, model.config.subnetwork_heads
            (16, [3])
        """
        source = read_source(vit_or_deit, config_kwargs.get("head_dim"))
        arguments, tensors = source.arguments, source.tensors
        given_labels = arguments.get("id2label", {})
        if "num_labels" in config_kwargs:
            arguments = {name: value for name, value in arguments.items() if name not in ("id2label", "label2id")}
        config = cls.config_class(**arguments | config_kwargs | {"num_attention_heads": num_attention_heads})
        classifier = tensors.get("classifier.weight")
        if classifier is None or tuple(classifier.shape) != (config.num_labels, source.class_token.shape[-1]):
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
        else:
            if places := places_of_labels(config.id2label, given_labels):
                tensors |= {name: tensors[name][places] for name in ("classifier.weight", "classifier.bias")}
            if config.separate_classifiers:
                for name in ("classifier.weight", "classifier.bias"):
                    tensors[name] = tensors[name].expand(len(config.subnetwork_heads), *tensors[name].shape)
        grid = grid_of(arguments["image_size"], arguments["patch_size"])
        blocks = fit_positions_to_grid(leading_blocks(tensors, config), grid, config.patch_grid)
        model = cls(config)
        missing, unexpected = model.load_state_dict(fill_leading_blocks(model, blocks), strict=False)
        if lost := [name for name in missing if not re.search("classifier[.]|recycling[.]", name)]:
            raise ValueError(f"The ViT lacks {', '.join(lost)}.")
        if unknown := [name for name in unexpected if not name.startswith("classifier.")]:
            raise ValueError(f"The HydraViT has no {', '.join(unknown)}, which the ViT has: check the arguments.")
        if missing:
            logger.warning(f"The ViT has no {', '.join(missing)} that fits: newly initialized.")
        return model.to(source.class_token.device, source.class_token.dtype).train(source.training)

    @torch.inference_mode(False)  # as in `extract_subnetwork`
    def to_vit(self, num_heads: int | None = None):
        """Convert the subnetwork with the leading `num_heads` heads (None: the default width) to a stock ViT.

        The result is a `ViTForImageClassification`, or a `ViTModel` without pooling layer for a `HydraViTModel`. It
        gives equal outputs and needs no custom code. It has no drop path, which the stock model lacks.

        Raises:
            ValueError: `num_heads` is not from 1 to the heads held or takes several passes (token recycling), or the
                parameters are offloaded or adapted.
        """
        if num_heads is None:
            num_heads = self.config.num_heads_active or self.config.num_attention_heads
        config = self.config.resized(self.config.check_num_heads(num_heads))
        if config.token_recycling:
            raise ValueError(
                f"{num_heads} heads of this model are the passes of {config.subnetwork_heads} heads, as it "
                f"recycles tokens; a ViT is one pass, and so can only be its first stage, {config.subnetwork_heads[0]}."
            )
        shared = {name: getattr(config, name) for name in SHARED_ARGUMENTS}
        vit_config = ViTConfig(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, **shared)
        vit_config.dtype = self.dtype
        blocks = leading_blocks(own_parameters(self), config)
        if config.separate_classifiers:
            blocks |= {name: block[-1] for name, block in blocks.items() if name.startswith("classifier.")}
        blocks = {re.sub("^hydravit[.]", "vit.", name): block for name, block in blocks.items()}
        if self.base_model is self:
            vit = assemble(ViTModel, vit_config, blocks, add_pooling_layer=False)
        else:
            vit = assemble(ViTForImageClassification, vit_config, blocks)
        return carry_quantizer(self, vit).train(self.training)
