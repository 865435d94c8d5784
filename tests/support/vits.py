"""Tiny ViTs of every kind that a HydraViT can be made from."""

import torch
from support.models import spread
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNModel,
)

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
VIT = SIZES | {"intermediate_size": 64}
SHAPES = {
    "plain": {},
    "no biases of the projections": {"qkv_bias": False},
    "rectangles": {"image_size": (8, 24), "patch_size": (2, 8)},
    "gray, one layer": {"num_channels": 1, "num_hidden_layers": 1, "hidden_act": "relu"},
}
CLASSIFIERS = {
    "vit": (ViTForImageClassification, ViTConfig, VIT),
    "vit_msn": (ViTMSNForImageClassification, ViTMSNConfig, VIT),
}
ENCODERS = {
    "vit": (ViTModel, ViTConfig, VIT),
    "vit_msn": (ViTMSNModel, ViTMSNConfig, VIT),
    "dinov2": (Dinov2Model, Dinov2Config, SIZES),
    "vit_mae": (ViTMAEModel, ViTMAEConfig, VIT | {"mask_ratio": 0.0}),
}


def make(model_class, config_class, sizes: dict, **options):
    return spread(model_class(config_class(**sizes | options))).eval()


def make_images(config) -> torch.Tensor:
    size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
    return torch.randn(3, config.num_channels, *size)


def to_timm(vit) -> dict[str, torch.Tensor]:
    """The parameters of a ViT by the names that timm gives them, its projections stacked."""
    names = {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.layernorm": "norm",
        "classifier": "head",
    }
    for index in range(vit.config.num_hidden_layers):
        layer, block = f"vit.layers.{index}", f"blocks.{index}"
        names |= {f"{layer}.layernorm_before": f"{block}.norm1", f"{layer}.layernorm_after": f"{block}.norm2"}
        names |= {f"{layer}.attention.o_proj": f"{block}.attn.proj"}
        names |= {f"{layer}.mlp.{linear}": f"{block}.mlp.{linear}" for linear in ("fc1", "fc2")}
    parameters, renamed = {name: tensor.clone() for name, tensor in vit.state_dict().items()}, {}
    for name, tensor in parameters.items():
        if any(f"attention.{letter}_proj" in name for letter in "kv"):
            continue
        if "attention.q_proj" in name:
            stacked = [parameters[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            new = name.replace("vit.layers", "blocks").replace("attention.q_proj", "attn.qkv")
            renamed[new] = torch.cat(stacked)
            continue
        layer, _, part = name.rpartition(".")
        renamed[names[name] if name in names else f"{names[layer]}.{part}"] = tensor
    return renamed
