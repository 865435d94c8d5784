# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion from a stock ViT or DeiT of transformers, and to a stock ViT.

This file travels with each saved checkpoint as remote code.
"""

import re

import torch
from transformers import (
    AutoModelForImageClassification,
    DeiTPreTrainedModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    ViTPreTrainedModel,
)
from transformers.utils import logging

from .configuration_hydravit import HydraViTConfig, grid_of
from .nesting_hydravit import assemble, fill_leading_blocks, fit_positions_to_grid, leading_blocks, own_parameters

logger = logging.get_logger(__name__)

# Arguments that mean the same in `HydraViTConfig` and `ViTConfig`
SHARED_ARGUMENTS = (
    "num_attention_heads",
    "num_hidden_layers",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "hidden_act",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "id2label",
    "label2id",
    "problem_type",
)


class ViTConversionMixin:
    """Adds `from_vit` and `to_vit` to the models."""

    @classmethod
    def from_vit(cls, vit_or_deit, num_attention_heads: int = 12, **config_kwargs):
        """Start from a published ViT or DeiT (paper, "initialised from DeiT-tiny").

        A DeiT's distillation token is left behind with a warning, because a HydraViT has none.

        Args:
            vit_or_deit: A ViT or DeiT of transformers, with or without classifier, or its path or Hub id.
            num_attention_heads: Number of heads that the new model holds. The given heads fill its leading block. If
                it holds more, the others are newly initialised, with a warning. If it holds fewer, it takes the leading
                ones.
            config_kwargs: Further arguments of `HydraViTConfig`. Another `num_labels` gives a new classifier. Another
                `image_size` interpolates the position embeddings.

        Raises:
            TypeError: The model is not a ViT or DeiT.
            ValueError: The model's MLP is not a multiple of its width.

        Example:
            >>> from transformers import ViTConfig, ViTForImageClassification
            >>> from hydravit_hf import HydraViTForImageClassification
            >>> sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 192, "num_hidden_layers": 2}
            >>> vit = ViTForImageClassification(ViTConfig(**sizes))
            >>> model = HydraViTForImageClassification.from_vit(vit, num_attention_heads=3)
            >>> model.config.head_dim, model.config.subnetwork_heads
            (16, [3])
        """
        if not isinstance(vit_or_deit, PreTrainedModel):
            vit_or_deit = AutoModelForImageClassification.from_pretrained(vit_or_deit)
        vit = vit_or_deit
        config = cls.config_class(**_arguments_of(vit, config_kwargs), num_attention_heads=num_attention_heads)
        blocks = leading_blocks(_tensors_of(vit, config), config)
        grid = grid_of(vit.config.image_size, vit.config.patch_size)
        blocks = fit_positions_to_grid(blocks, grid, config.patch_grid)
        model = cls(config)
        missing = model.load_state_dict(fill_leading_blocks(model, blocks), strict=False)[0]
        if missing:
            logger.warning(f"The ViT has no {', '.join(missing)} that fits: newly initialized.")
        return model.to(vit.device, vit.dtype).train(vit.training)

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
        return vit.train(self.training)


def _arguments_of(vit: PreTrainedModel, overrides: dict) -> dict:
    """The arguments of `HydraViTConfig` that a stock ViT or DeiT gives, without the number of heads."""
    if not isinstance(vit, (ViTPreTrainedModel, DeiTPreTrainedModel)):
        raise TypeError(f"`vit_or_deit` must be a ViT or DeiT of transformers, not {type(vit).__name__}.")
    config = vit.config
    if config.hidden_size % config.num_attention_heads or config.intermediate_size % config.hidden_size:
        raise ValueError(
            f"The ViT's intermediate_size={config.intermediate_size} must be a multiple of its hidden_size="
            f"{config.hidden_size}, and that of its num_attention_heads={config.num_attention_heads}."
        )
    arguments = {name: getattr(config, name) for name in SHARED_ARGUMENTS if name != "num_attention_heads"}
    if "num_labels" in overrides:
        del arguments["id2label"], arguments["label2id"]
    arguments["head_dim"] = config.hidden_size // config.num_attention_heads
    arguments["mlp_ratio"] = config.intermediate_size // config.hidden_size
    return arguments | overrides


def _tensors_of(vit: PreTrainedModel, config: HydraViTConfig) -> dict[str, torch.Tensor]:
    """The parameters of a stock ViT or DeiT, under the names that a HydraViT gives them."""
    tensors = {f"hydravit.{name}": tensor for name, tensor in vit.base_model.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not re.search("pooler|mask_token", name)}
    if tensors.pop("hydravit.embeddings.distillation_token", None) is not None:
        logger.warning("HydraViT has no distillation token: that of the DeiT is left behind, and so its logits differ.")
        positions = tensors["hydravit.embeddings.position_embeddings"]
        tensors["hydravit.embeddings.position_embeddings"] = torch.cat((positions[:, :1], positions[:, 2:]), dim=1)
    for name, tensor in vit.state_dict().items():
        match = re.fullmatch("(?:cls_)?(classifier[.](?:weight|bias))", name)
        if match and len(tensor) == config.num_labels:
            if config.separate_classifiers:
                tensor = tensor.expand(len(config.subnetwork_heads), *tensor.shape)
            tensors[match[1]] = tensor
    return tensors
