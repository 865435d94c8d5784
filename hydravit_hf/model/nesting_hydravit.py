# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Which block of each parameter belongs to a width, and how to copy it into another model.

Every parameter of the k-head subnetwork is a leading block of the full one. This file knows along which dimensions. It
travels with each saved checkpoint as remote code.
"""

import math
import re

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_hydravit import HydraViTConfig

logger = logging.get_logger(__name__)


def count_heads(stored: dict, config: HydraViTConfig) -> int | None:
    """Count the heads that a checkpoint holds, by the shape of its class token. None if it has no class token."""
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
    """The dimensions of a parameter that grow with the number of heads.

    The other dimensions are labels, tokens, input channels and the pixels of a patch. A classifier with one dimension
    more than usual is the stack of `SeparateClassifiers`. The parts of a quantized weight have the weight's dimensions.

    Examples:
        >>> from hydravit_hf.model.nesting_hydravit import width_dims
        >>> width_dims("hydravit.layers.0.mlp.fc1.weight", 2), width_dims("classifier.weight", 2)
        ((0, 1), (1,))
    """
    name = re.sub(r"[.]_weight_\w+$", ".weight", name.removeprefix("hydravit."))
    if name == "classifier.weight":
        return (1,) if ndim == 2 else (0, 2)
    if name == "classifier.bias":
        return () if ndim == 1 else (0,)
    if name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        return (2,)
    if name == "embeddings.patch_embeddings.projection.weight":
        return (0,)
    return tuple(range(ndim))


def leading_block(tensor: torch.Tensor, dims: tuple[int, ...], num_heads: int, held: int) -> torch.Tensor:
    """View the block of a tensor that belongs to the leading `num_heads` of the heads that it holds. `dims` grow with
    the number of heads."""
    sizes = [size * num_heads // held if dim in dims else size for dim, size in enumerate(tensor.shape)]
    return tensor[tuple(map(slice, sizes))]


def leading_shapes(stored: dict, config: HydraViTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the blocks that belong to the heads of `config`. A checkpoint with fewer heads is taken whole."""
    held = count_heads(stored, config)
    shapes = {}
    for name, tensor in stored.items():
        if ".recycling." in f".{name}" and not config.token_recycling:
            continue
        shape = list(tensor.shape)
        for dim in width_dims(name, len(shape)):
            if shape[dim] > 1:  # a scale that a whole row shares belongs to every width
                shape[dim] = min(shape[dim], shape[dim] * config.num_attention_heads // held)
        if name.removeprefix("hydravit.").startswith("classifier.") and config.separate_classifiers:
            shape[0] = min(tensor.shape[0], len(config.subnetwork_heads))
        shapes[name] = tuple(shape)
    return shapes


def leading_blocks(stored: dict, config: HydraViTConfig) -> dict[str, torch.Tensor]:
    """Cut the blocks that belong to the heads of `config` out of a checkpoint. One with fewer heads is taken whole.

    Args:
        stored: Tensors by the names of the parameters, or objects with a `shape` that give a tensor when sliced.
        config: The configuration of the model that the blocks are for.
    """
    shapes = leading_shapes(stored, config)
    return {name: stored[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}


def interpolate_positions(positions: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Interpolate position embeddings, (1, N, D), from one grid of patches to another, bicubically as DeiT does."""
    if new_grid == grid:
        return positions
    patches = positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)


def fit_positions_to_grid(blocks: dict, grid: tuple[int, int], new_grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Interpolate the position embeddings among `blocks`, if they are those of `grid`, to another grid."""
    tokens = 1 + math.prod(grid)
    return {
        name: interpolate_positions(block, grid, new_grid)
        if name.endswith("embeddings.position_embeddings") and block.shape[1] == tokens
        else block
        for name, block in blocks.items()
    }


def fill_leading_blocks(model: PreTrainedModel, blocks: dict) -> dict[str, torch.Tensor]:
    """Copy `blocks` into the leading blocks of a newly initialised model, and return its parameters under their names
    in `blocks`. It warns if the model has more heads. A block that fits no parameter is returned as it is, so that the
    caller's loading reports it."""
    held, heads = count_heads(blocks, model.config), model.config.num_attention_heads
    if held < heads:
        logger.warning(
            f"The checkpoint has {held} heads: heads {held + 1} to {heads} and all that belongs to them are newly "
            f"initialized. Train the model before you run more than {held} heads."
        )
    prefix = f"{model.base_model_prefix}."
    parameters = model.state_dict()
    names = {name.removeprefix(prefix): name for name in parameters}
    filled = {}
    for stored_name, block in blocks.items():
        name = names.get(stored_name.removeprefix(prefix), stored_name)
        parameter = parameters.get(name, block)
        dims = width_dims(name, block.ndim)
        if parameter.ndim == block.ndim and all(
            old == new or (old < new and dim in dims)
            for dim, (old, new) in enumerate(zip(block.shape, parameter.shape, strict=True))
        ):
            parameter[tuple(slice(size) for size in block.shape)].copy_(block)
            filled[name] = parameter
        else:
            filled[name] = block  # other labels, other patches or fewer classifiers
    return filled


def own_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters of a model that can be cut into blocks.

    Raises:
        ValueError: They are offloaded, or wrapped by an adapter, a pruning mask or another parametrization.
    """
    parameters = model.state_dict()
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("Parameters of this model are offloaded (on the meta device): load it without a `device_map`.")
    with torch.device("meta"):
        names = type(model)(model.config).state_dict().keys()
    if added := sorted(parameters.keys() - names):
        raise ValueError(
            f"This model has parameters of an adapter, a pruning mask or the like, such as '{added[0]}': merge or "
            "remove it first (an adapter of a `PeftModel` with its `merge_and_unload()`)."
        )
    return parameters


def assemble(model_class: type[PreTrainedModel], config: PreTrainedConfig, parameters: dict, **options):
    """Build a model from copies of `parameters`, without initialising any weights first."""
    with torch.device("meta"):
        model = model_class(config, **options)
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in parameters.items()}
    model.load_state_dict(copies, assign=True)
    return model
