# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Reads the plain Vision Transformers of transformers and timm as the arguments and parameters of a HydraViT.

A plain ViT has a class token, learned positions, a layer norm before each attention and MLP, and one more at the end.
Tables say what each library calls its parameters. This file travels with each saved checkpoint as remote code.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, logging

from .configuration_hydravit import grid_of

logger = logging.get_logger(__name__)

# Arguments that mean the same in `HydraViTConfig` and in the configurations of transformers' ViTs
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
SUPPORTED = ("vit", "deit", "vit_mae", "vit_msn", "dinov2")  # `model_type`s of transformers
PREFIXES = r"(?:(?:module|timm_model|vit|deit|dinov2)\.)*"  # what wraps the parameters of an encoder
# Original name -> name here, without "hydravit.". "qkv_proj" is the stack of three projections.
TRANSFORMERS_KEYS = {
    # ViT, DeiT, ViTMAE and ViTMSN
    r"embeddings\.(cls_token|position_embeddings|distillation_token)": r"embeddings.\1",
    r"embeddings\.patch_embeddings\.projection\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"layers\.(\d+)\.attention\.([qkvo]_proj)\.(weight|bias)": r"layers.\1.attention.\2.\3",
    r"layers\.(\d+)\.(layernorm_before|layernorm_after|mlp\.fc1|mlp\.fc2)\.(weight|bias)": r"layers.\1.\2.\3",
    r"layernorm\.(weight|bias)": r"layernorm.\1",
    r"(?:cls_)?classifier\.(weight|bias)": r"classifier.\1",
    # DINOv2
    r"encoder\.layer\.(\d+)\.norm1\.(weight|bias)": r"layers.\1.layernorm_before.\2",
    r"encoder\.layer\.(\d+)\.norm2\.(weight|bias)": r"layers.\1.layernorm_after.\2",
    r"encoder\.layer\.(\d+)\.attention\.([qkvo]_proj)\.(weight|bias)": r"layers.\1.attention.\2.\3",
    r"encoder\.layer\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)": r"layers.\1.mlp.\2.\3",
}
TIMM_KEYS = {
    r"cls_token": r"embeddings.cls_token",
    r"pos_embed": r"embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"layers.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"layers.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"layers.\1.attention.qkv_proj.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"layers.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)": r"layers.\1.mlp.\2.\3",
    r"norm\.(weight|bias)": r"layernorm.\1",
    r"head\.(weight|bias)": r"classifier.\1",
}
# What a HydraViT has no place for: LayerScale multiplies the output of a layer, and is folded into it
FOLDED_KEYS = {
    r"dist_token": r"embeddings.distillation_token",
    r"(?:encoder\.layer|blocks)\.(\d+)\.(?:layer_scale1\.lambda1|ls1\.gamma)": r"layers.\1.attention.o_proj.scale",
    r"(?:encoder\.layer|blocks)\.(\d+)\.(?:layer_scale2\.lambda1|ls2\.gamma)": r"layers.\1.mlp.fc2.scale",
}
KEYS = TRANSFORMERS_KEYS | TIMM_KEYS | FOLDED_KEYS
# Parameters that no classifier of images needs
LEFT_BEHIND = r"(embeddings\.)?mask_token|pooler\..*|decoder\..*|distillation_classifier\..*|head_dist\..*"
# Part of a model type or of the name of a parameter -> why the model is no plain ViT
REASONS = {
    r"hydravit": "it is a HydraViT already",
    r"dinov3|rope": "its positions are rotary",
    r"clip|norm_pre|pre_layernorm|pre_layrnorm": "it normalises the patches before the first layer",
    r"siglip|attn_pool": "it has no class token and pools the patches by attention",
    r"swin|downsample": "it attends within windows and merges patches",
    r"beit|data2vec|rel_pos|relative_position": "it adds relative positions to the attention",
    r"register|reg_token": "it has register tokens",
    r"weights_in|w12|fc1_[gx]": "its MLP is gated (SwiGLU)",
    r"[qk]_norm": "it normalises queries and keys",
    r"fc_norm": "its classifier reads the mean of the patches instead of the class token",
}
TIMM_HEAD_DIM = 64  # of most `vit_*` and `deit_*` models; weights alone don't tell it


@dataclass
class Source:
    """A plain ViT: the arguments of `HydraViTConfig` that it gives, and its parameters by their names in a HydraViT."""

    arguments: dict
    tensors: dict[str, torch.Tensor]
    training: bool = False

    @property
    def class_token(self) -> torch.Tensor:
        """The class token, (1, 1, D). Its width, device and precision are those of the ViT."""
        return self.tensors["hydravit.embeddings.cls_token"]


def read_source(vit, head_dim: int | None = None) -> Source:
    """Read a plain ViT of any supported kind.

    Args:
        vit: A model of transformers or timm, its state dict by timm's names, or its path or Hub id.
        head_dim: Channels of one head, if `vit` is a state dict, which doesn't tell. None means 64.

    Raises:
        TypeError: `vit` is no model, no state dict and no path.
        ValueError: `vit` is no plain ViT; the message says why.
        OSError: There is no such path or id.
    """
    if isinstance(vit, Source):
        return vit
    if isinstance(vit, (str, Path)):
        return _read_path(vit)
    if isinstance(vit, PreTrainedModel) and vit.config.model_type == "timm_wrapper":
        vit = vit.timm_model
    if isinstance(vit, PreTrainedModel):
        _check_model_type(vit.config.model_type)
        return _plain(Source(_arguments_of(vit.config), rename(vit.state_dict()), vit.training))
    if isinstance(vit, nn.Module) and type(vit).__module__.startswith("timm."):
        return _plain(_read_timm_model(vit))
    if isinstance(vit, Mapping):
        tensors = rename(vit)
        return _plain(Source(arguments_by_shapes(tensors, head_dim or TIMM_HEAD_DIM), tensors))
    raise TypeError(
        f"`vit` must be a ViT of transformers or timm, its state dict, or its path or Hub id, not {type(vit).__name__}."
    )


def rename(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the parameters of a ViT by `KEYS`, and split stacked projections.

    Raises:
        ValueError: A parameter has no place in a plain ViT.
    """
    tensors = {}
    for original, tensor in state_dict.items():
        name = re.sub(f"^{PREFIXES}", "", original)
        renamed = find_name(name, KEYS)
        if renamed is not None:
            tensors[renamed] = tensor
        elif not re.fullmatch(LEFT_BEHIND, name):
            raise ValueError(f"This is no plain ViT: {_reason(name) or f'it holds {original!r}'}.")
    if "hydravit.embeddings.cls_token" not in tensors:
        raise ValueError("This is no plain ViT: it has no class token.")
    return split_projections(tensors)


def find_name(original: str, keys: dict[str, str]) -> str | None:
    """Find the name that a parameter has in a `HydraViTForImageClassification`. None if no pattern of `keys` fits."""
    pattern = next((pattern for pattern in keys if re.fullmatch(pattern, original)), None)
    if pattern is None:
        return None
    name = re.sub(pattern, keys[pattern], original)
    return name if name.startswith("classifier.") else f"hydravit.{name}"


def split_projections(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Split each stack of query, key and value projections into the three."""
    split = {}
    for name, tensor in tensors.items():
        if "qkv_proj" not in name:
            split[name] = tensor
            continue
        if not tensor.ndim or len(tensor) % 3:
            raise ValueError(f"'{name}' has the shape {tuple(tensor.shape)}, and should hold three projections.")
        for projection, third in zip("qkv", tensor.tensor_split(3), strict=True):
            split[name.replace("qkv_proj", f"{projection}_proj")] = third
    return split


def places_of_labels(wanted: dict[int, str], given: dict[int, str]) -> list[int] | None:
    """The places that the wanted labels have among the given ones, if these are the same in another order."""
    wanted, given = ([labels[index] for index in sorted(labels)] for labels in (wanted, given))
    if wanted == given or sorted(wanted) != sorted(given) or len(set(given)) < len(given):
        return None
    return [given.index(label) for label in wanted]


def read_timm_config(path: str | Path) -> dict | None:
    """The configuration of a timm model's folder or Hub id, such as `timm/vit_base_patch16_224.augreg_in21k_ft_in1k`.
    None if the folder is that of a model of transformers."""
    config, _ = PreTrainedConfig.get_config_dict(path)
    return config if _is_of_timm(config) else None


def _is_of_timm(config: dict) -> bool:
    return config.get("model_type") == "timm_wrapper" or ("pretrained_cfg" in config and "architecture" in config)


def _read_path(path: str | Path) -> Source:
    config, _ = PreTrainedConfig.get_config_dict(path)
    if _is_of_timm(config):
        return _read_timm_folder(path, config)
    _check_model_type(config.get("model_type"))
    is_classifier = "ForImageClassification" in (config.get("architectures") or [""])[0]
    return read_source((AutoModelForImageClassification if is_classifier else AutoModel).from_pretrained(path))


def _read_timm_folder(path: str | Path, config: dict) -> Source:
    architecture = config.get("architecture", "")
    if not re.match("(vit|deit)", architecture):
        raise ValueError(f"'{path}' is no plain ViT: its architecture is '{architecture}' of timm.")
    if config.get("global_pool", "token") != "token":
        raise ValueError(f"'{path}' is no plain ViT: {REASONS['fc_norm']}.")
    tensors = rename(load_file(cached_file(path, SAFE_WEIGHTS_NAME)))
    arguments = arguments_by_shapes(tensors, TIMM_HEAD_DIM)
    if labels := config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names"):
        del arguments["num_labels"]
        arguments["id2label"] = dict(enumerate(labels))
        arguments["label2id"] = {label: index for index, label in enumerate(labels)}
    return _plain(Source(arguments, tensors))


def _check_model_type(model_type: str | None):
    if model_type in SUPPORTED:
        return
    reason = _reason(str(model_type)) or f"models of the type '{model_type}' are not supported"
    raise ValueError(f"This is no plain ViT: {reason}. Supported are {', '.join(SUPPORTED)} and timm's vit_*, deit_*.")


def _reason(name: str) -> str | None:
    return next((reason for pattern, reason in REASONS.items() if re.search(pattern, name)), None)


def _arguments_of(config: PreTrainedConfig) -> dict:
    """The arguments of `HydraViTConfig` that the configuration of a ViT of transformers gives."""
    if config.model_type == "dinov2":
        intermediate_size = int(config.hidden_size * config.mlp_ratio)
    else:
        intermediate_size = config.intermediate_size
    arguments = {name: getattr(config, name) for name in SHARED_ARGUMENTS}
    return arguments | _proportions(config.hidden_size, config.num_attention_heads, intermediate_size)


def _proportions(width: int, num_heads: int, intermediate_size: int) -> dict:
    if width % num_heads or intermediate_size % width:
        raise ValueError(
            f"The ViT's intermediate_size={intermediate_size} must be a multiple of its hidden_size={width}, and that "
            f"of its num_attention_heads={num_heads}."
        )
    return {
        "num_attention_heads": num_heads,
        "head_dim": width // num_heads,
        "mlp_ratio": intermediate_size // width,
    }


def arguments_by_shapes(tensors: dict[str, torch.Tensor], head_dim: int) -> dict:
    """The arguments of `HydraViTConfig` that follow from the shapes of the weights, for square images.

    Raises:
        ValueError: A weight that tells a size is missing or has another number of dimensions.
    """
    patches = "hydravit.embeddings.patch_embeddings.projection.weight"
    width, channels, *patch_size = _shape_of(tensors, patches, 4)
    if width % head_dim:
        raise ValueError(f"The ViT is {width} channels wide, no multiple of head_dim={head_dim}: give its `head_dim`.")
    # The tokens are a square of patches, and up to two more: those of class and distillation
    side = math.isqrt(_shape_of(tensors, "hydravit.embeddings.position_embeddings", 3)[1])
    is_square = patch_size[0] == patch_size[1]
    arguments = {
        "num_hidden_layers": len([name for name in tensors if name.endswith("layernorm_before.weight")]),
        "image_size": side * patch_size[0] if is_square else (side * patch_size[0], side * patch_size[1]),
        "patch_size": patch_size[0] if is_square else tuple(patch_size),
        "num_channels": channels,
        "qkv_bias": "hydravit.layers.0.attention.q_proj.bias" in tensors,
        "num_labels": _shape_of(tensors, "classifier.weight", 2)[0] if "classifier.weight" in tensors else 2,
    }
    intermediate_size = _shape_of(tensors, "hydravit.layers.0.mlp.fc1.weight", 2)[0]
    return arguments | _proportions(width, width // head_dim, intermediate_size)


def _shape_of(tensors: dict[str, torch.Tensor], name: str, num_dimensions: int) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"The ViT lacks '{name}'.")
    shape = tensors[name].shape
    if len(shape) != num_dimensions:
        raise ValueError(f"'{name}' has the shape {tuple(shape)}, and should have {num_dimensions} dimensions.")
    return shape


def _read_timm_model(vit: nn.Module) -> Source:
    if getattr(vit, "global_pool", "token") != "token":
        raise ValueError(f"This is no plain ViT: {REASONS['fc_norm']}.")
    tensors = rename(vit.state_dict())
    head_dim = vit.embed_dim // vit.blocks[0].attn.num_heads
    arguments = arguments_by_shapes(tensors, head_dim)
    arguments |= {"image_size": tuple(vit.patch_embed.img_size), "layer_norm_eps": vit.norm.eps}
    return Source(arguments, tensors, vit.training)


def _plain(source: Source) -> Source:
    """Fold LayerScale into the layers before it, and give the class token alone a position beside the patches."""
    tensors = source.tensors
    for name in [name for name in tensors if name.endswith(".scale")]:
        layer, scale = name.removesuffix(".scale"), tensors.pop(name)
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] * scale[:, None]
        tensors[f"{layer}.bias"] = tensors[f"{layer}.bias"] * scale
    positions = tensors["hydravit.embeddings.position_embeddings"]
    if tensors.pop("hydravit.embeddings.distillation_token", None) is not None:
        logger.warning("HydraViT has no distillation token: that of the DeiT is left behind, and so its logits differ.")
        positions = torch.cat((positions[:, :1], positions[:, 2:]), dim=1)
    elif positions.shape[1] == math.prod(grid_of(source.arguments["image_size"], source.arguments["patch_size"])):
        positions = nn.functional.pad(positions, (0, 0, 1, 0))  # timm's `no_embed_class`: the class token has none
    tensors["hydravit.embeddings.position_embeddings"] = positions
    return source
