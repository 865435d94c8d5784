# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Quantized weights that are cut like all others, and one error for those that can't be cut.

torchao stores a weight as integers, (outputs, inputs), and scales: one for each output channel, (outputs, 1), or one
for each group of input channels, (outputs, groups). The leading block of the integers, with the scales that belong to
it, is the weight of a narrow width. If each group lies within a head, it has the very bits that quantizing this width
alone gives. Other quantizers put layers of their own in place of the `Prefix...` layers, and these run at full width
only.

Files hold the parts of a weight as tensors of their own, such as `q_proj._weight_qdata` and `q_proj._weight_scale`. The
metadata say how they belong together. This file travels with each saved checkpoint as remote code.
"""

import json
from enum import Enum

import torch
from torch import nn
from transformers import PreTrainedModel

ADVICE = (
    "quantize with torchao (`from_pretrained(..., quantization_config=TorchAoConfig(...))`), which works at every "
    "width, or quantize the stock ViT of one width, `model.to_vit(k)`."
)


def check_method(quantization_config):
    """Check the quantization of a load, given or saved, before anything is loaded.

    Raises:
        ValueError: It is not torchao's.
    """
    if quantization_config is None:
        return
    if isinstance(quantization_config, dict):
        method = quantization_config.get("quant_method")
    else:
        method = quantization_config.quant_method
    if isinstance(method, Enum):
        method = method.value
    if method != "torchao":
        raise ValueError(f"A HydraViT can't be quantized by '{method}', which knows no widths: {ADVICE}")


def refuse_layer(layer: nn.Module, replaced: nn.Module):
    """Raise an error if a quantized layer takes the place of a `Prefix...` layer.

    Raises:
        ValueError: `layer` is another kind of linear layer or convolution, which can't be cut.
    """
    kinds = (nn.Linear, nn.Conv2d)
    if isinstance(layer, kinds) and type(layer) not in kinds and not isinstance(layer, type(replaced)):
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        raise ValueError(
            f"A {type(replaced).__name__} can't be replaced by a {kind}, which runs at full width only: {ADVICE}"
        )


def refuse_qconfig():
    """Raise the error for `torch.ao.quantization`, which would leave all `Prefix...` layers as they are."""
    raise ValueError(f"A HydraViT can't be quantized by `torch.ao.quantization`, which knows no widths: {ADVICE}")


def is_quantized(module: nn.Module) -> bool:
    """Whether torchao has quantized weights of a module."""
    return any(map(_is_of_torchao, module.parameters()))


def _is_of_torchao(weight: torch.Tensor) -> bool:
    return type(weight).__module__.partition(".")[0] == "torchao"  # which need not be installed


def cut_weight(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Cut the leading block out of a matrix, which torchao may have quantized.

    Raises:
        ValueError: It is quantized in a way that can't be cut.
    """
    if torch.compiler.is_compiling() or not _is_of_torchao(weight):
        return weight[:rows, :columns]
    try:
        if torch.is_inference_mode_enabled():  # torchao's weights can't be cut in this mode
            with torch.inference_mode(False), torch.no_grad():
                return weight[:rows, :columns]
        return weight[:rows, :columns]
    except (AssertionError, NotImplementedError) as error:
        raise ValueError(f"A weight can't be cut to {columns} channels: {_groups(weight)}") from error


def _groups(weight: torch.Tensor, head_dim: int | None = None) -> str:
    size = "head_dim" if head_dim is None else f"head_dim={head_dim}"
    return (
        f"it is quantized in a way that belongs to its full width ({type(weight).__name__}). Take torchao's groups of "
        f"a size that divides {size}, or its `Int8WeightOnlyConfig` or `Int8DynamicActivationInt8WeightConfig`, which "
        "have one scale for each row."
    )


@torch.no_grad()
def check_groups(model: PreTrainedModel):
    """Check that the quantized weights of a model can be cut at every head.

    Raises:
        ValueError: A scale belongs to a group that is cut in two, or torchao can't cut weights of this kind.
    """
    config = model.config
    if config.num_attention_heads == 1:
        return
    for name, weight in model.named_parameters():
        if not _is_of_torchao(weight):
            continue
        rows, width = weight[: config.head_dim], weight.shape[1] // config.num_attention_heads
        try:
            whole = rows.dequantize()
            widths = range(width, weight.shape[1], width)
            fits = all(torch.equal(rows[:, :columns].dequantize(), whole[:, :columns]) for columns in widths)
        except (AssertionError, NotImplementedError, RuntimeError, ValueError):  # torchao raises all of these
            fits = False
        if not fits:
            raise ValueError(f"'{name}' can't be cut to fewer heads: {_groups(weight, config.head_dim)}")


def cut_metadata(metadata: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Fit what torchao saved about its weights to blocks of these `shapes`: no group is larger than its block.

    Raises:
        ValueError: A group would be cut in two.
    """
    cut = {}
    for name, text in metadata.items():
        layer, _, parameter = name.rpartition(".")
        values = f"{layer}._{parameter}_qdata"
        if values in shapes:
            entry = json.loads(text)
            groups = [min(sizes) for sizes in zip(entry["_data"]["block_size"], shapes[values], strict=True)]
            scales = shapes[f"{layer}._{parameter}_scale"]
            if any(size != group * scale for size, group, scale in zip(shapes[values], groups, scales, strict=True)):
                raise ValueError(
                    f"'{name}' is quantized in groups of {groups}, which can't be cut to {shapes[values]}: quantize it "
                    "again, in groups whose size divides `head_dim`."
                )
            entry["_data"]["block_size"] = groups
            text = json.dumps(entry)
        cut[name] = text
    return cut


def restore_weights(blocks: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, torch.Tensor]:
    """Put the quantized weights of a width together from their parts.

    Args:
        blocks: The leading blocks of what a file holds, under the names of the file.
        metadata: The metadata of that file.

    Raises:
        ValueError: The metadata do not say how the parts belong together, or a group would be cut in two.
    """
    try:  # transformers demands what remote code imports, unless it is guarded
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    except ImportError as error:
        raise ImportError("Quantized weights need the package torchao: `pip install torchao`.") from error
    if "tensor_names" not in metadata:
        raise ValueError("The configuration says that torchao has quantized the weights, and their file does not.")
    metadata = cut_metadata(metadata, {name: tuple(block.shape) for name, block in blocks.items()})
    names = [name for name in json.loads(metadata["tensor_names"]) if name in blocks or _has_parts(name, blocks)]
    weights, rest = unflatten_tensor_state_dict(blocks, metadata | {"tensor_names": json.dumps(names)})
    return weights | rest


def _has_parts(name: str, stored: dict) -> bool:
    layer, _, parameter = name.rpartition(".")
    return f"{layer}._{parameter}_qdata" in stored


def carry_quantizer(model: PreTrainedModel, cut: PreTrainedModel):
    """Mark what was cut out of a quantized model as quantized, so that it can be saved. Returns it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        cut.hf_quantizer, cut.is_quantized, cut.quantization_method = quantizer, True, model.quantization_method
        quantizer.postprocess_model(cut)
    return cut
