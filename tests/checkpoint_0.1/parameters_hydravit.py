# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Parameters by name: what of each belongs to a width, and how it becomes that of a wider model or of a ViT.

This file travels with each saved checkpoint as remote code, beside the model's.
"""

import math
import re

import torch
from torch import nn
from transformers import DeiTPreTrainedModel, PreTrainedConfig, PreTrainedModel, ViTPreTrainedModel
from transformers.utils import logging

from .configuration_hydravit import HydraViTConfig

logger = logging.get_logger(__name__)

# Arguments that mean the same in `HydraViTConfig` and `ViTConfig`
SHARED_WITH_VIT = (
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


def count_heads(stored: dict, config: HydraViTConfig) -> int | None:
    """The heads that a checkpoint holds, by the shape of its class token; None where it has none."""
    name = next((name for name in stored if re.fullmatch(r"(hydravit\.)?embeddings\.cls_token", name)), None)
    if name is None:
        return None
    width = stored[name].shape[-1]
    if width % config.head_dim:
        raise ValueError(
            f"The checkpoint is {width} channels wide, which is no multiple of head_dim={config.head_dim}."
        )
    return width // config.head_dim


def width_dims(name: str, ndim: int) -> tuple[int, ...]:
    """The dimensions of a parameter that grow with the heads; the leading block is their leading part.

    The others are labels, tokens, input channels and pixels of a patch. A classifier of one dimension more than usual
    is the stack of `SeparateClassifiers`.
    """
    if name == "classifier.weight":
        return (1,) if ndim == 2 else (0, 2)
    if name == "classifier.bias":
        return () if ndim == 1 else (0,)
    name = name.removeprefix("hydravit.")
    if name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        return (2,)
    if name == "embeddings.patch_embeddings.projection.weight":
        return (0,)
    return tuple(range(ndim))


def leading_blocks(stored: dict, config: HydraViTConfig) -> dict[str, torch.Tensor]:
    """The parts of a checkpoint that belong to the heads of `config` (all of it, where it has no more).

    `stored` maps the parameters' names to tensors, or to anything with a `shape` that gives a tensor when sliced.
    """
    held = count_heads(stored, config)
    blocks = {}
    for name, tensor in stored.items():
        if ".recycling." in f".{name}" and not config.token_recycling:
            continue
        shape = list(tensor.shape)
        for dim in width_dims(name, len(shape)):
            shape[dim] = min(shape[dim], shape[dim] * config.num_attention_heads // held)
        if name.startswith("classifier.") and config.separate_classifiers:
            shape[0] = min(tensor.shape[0], len(config.subnetwork_heads))
        blocks[name] = tensor[tuple(slice(size) for size in shape)]
    return blocks


def interpolate_positions(positions: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Position embeddings (1, N, D) of one grid of patches for another one, by bicubic interpolation (as DeiT does)."""
    if new_grid == grid:
        return positions
    patches = positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)


def at_grid(blocks: dict, grid: tuple[int, int], new_grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The parameters with their position embeddings, where they are of `grid`, interpolated to another one."""
    tokens = 1 + math.prod(grid)
    return {
        name: interpolate_positions(block, grid, new_grid)
        if name.endswith("embeddings.position_embeddings") and block.shape[1] == tokens
        else block
        for name, block in blocks.items()
    }


def grow(model: PreTrainedModel, blocks: dict) -> dict[str, torch.Tensor]:
    """The parameters of a newly initialised model that `blocks` has the leading block of, with that block filled in."""
    held, heads = count_heads(blocks, model.config), model.config.num_attention_heads
    if held < heads:
        logger.warning(
            f"The checkpoint has {held} heads: heads {held + 1} to {heads} and all that belongs to them are newly "
            f"initialized. Train the model before you run more than {held} heads."
        )
    prefix = f"{model.base_model_prefix}."
    parameters = model.state_dict()
    names = {name.removeprefix(prefix): name for name in parameters}
    grown = {}
    for stored_name, block in blocks.items():
        name = names.get(stored_name.removeprefix(prefix), stored_name)
        parameter = parameters.get(name, block)
        dims = width_dims(name, block.ndim)
        if parameter.ndim == block.ndim and all(
            old == new or (old < new and dim in dims)
            for dim, (old, new) in enumerate(zip(block.shape, parameter.shape, strict=True))
        ):
            parameter[tuple(slice(size) for size in block.shape)].copy_(block)
            grown[name] = parameter
        else:
            grown[name] = block  # other labels, other patches, fewer classifiers: what loads this says so
    return grown


def assemble(model_class: type[PreTrainedModel], config: PreTrainedConfig, parameters: dict, **options):
    """A model with copies of the given parameters, and none that is initialised first."""
    with torch.device("meta"):
        model = model_class(config, **options)
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in parameters.items()}
    model.load_state_dict(copies, assign=True)
    return model


def vit_tensors(vit: ViTPreTrainedModel | DeiTPreTrainedModel, config: HydraViTConfig) -> dict:
    """The parameters of a stock ViT or DeiT under the names that they have here."""
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
