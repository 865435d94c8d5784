# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA (https://arxiv.org/abs/2106.09685) of the `Prefix...` layers: one adapter for every width.

An adapter adds scale x B A to a weight. The leading block of B A is the product of B's leading rows and A's leading
columns, so the adapter is cut exactly like the weight. DoRA (https://arxiv.org/abs/2402.09353) also rescales each row
of the sum by the norm of that row. Every width uses the norm of the whole row, so that merging an adapter and cutting
the model afterwards gives what the unmerged model computes.

PEFT puts layers of its own around those of the model. `adopt` turns such a layer into one that cuts. Its parameters
and their names stay PEFT's, so what is saved is an ordinary adapter. The network imports this file when an adapter is
added. This file travels with each saved checkpoint as remote code.
"""

import re

import torch
from torch import nn
from transformers.utils import logging

from .nesting_hydravit import width_dims
from .recycling_hydravit import TokenRecycling

try:  # transformers demands what remote code imports, unless it is guarded
    from peft.tuners.lora import Conv2d, Linear, ParamWrapper
    from peft.tuners.lora.torchao import TorchaoLoraLinear
    from peft.tuners.lora.variants import DoraConv2dVariant, DoraLinearVariant
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import load_peft_weights
    from peft.utils.integrations import dequantize_module_weight
except ImportError as error:
    raise ImportError("An adapter needs the package PEFT: `pip install peft`.") from error

logger = logging.get_logger(__name__)

# The name of an adapter's tensor: the adapted layer, the part of the adapter, and the parameter
_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save", "original_module", "base_layer")
_NAME = re.compile(rf"(.*)\.({'|'.join(_PARTS)})\b(?:.*\.(weight|bias))?")


class _PrefixLora:
    """Uses as much of A and B as the input and the output of the layer inside are wide."""

    def forward(self, x: torch.Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> torch.Tensor:
        """Run the layer inside and add the active adapters, or to each image the one that `adapter_names` gives it."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, adapter_names=adapter_names, **kwargs)
        self._check_forward_args(x, adapter_names=adapter_names)
        result = self.base_layer(x, *args)
        inputs = self._inputs(x, *args)
        if adapter_names is None:
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    result = self._adapt(adapter, inputs, result)
            return result
        adapted = result.clone()
        for adapter in self.lora_A.keys() & set(adapter_names):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            adapted[rows] = self._adapt(adapter, inputs[rows], result[rows])
        return adapted

    def update_layer(self, adapter_name: str, *args, **kwargs):
        super().update_layer(adapter_name, *args, **kwargs)
        _check_variants(self)

    def _inputs(self, x: torch.Tensor, *args) -> torch.Tensor:
        """What the weight is multiplied by, of the arguments of the layer inside."""
        return x

    def _adapt(self, adapter: str, inputs: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        lora_A, lora_B = self.lora_A[adapter], self.lora_B[adapter]
        width, dtype = result.shape[self._channels], result.dtype
        inputs = self.lora_dropout[adapter](self._cast_input_dtype(inputs, lora_A.weight.dtype))
        hidden = self._leading(lora_A, lora_A.weight, inputs, self.r[adapter])
        delta = self._leading(lora_B, lora_B.weight, hidden, width) * self.scaling[adapter]
        if lora_B.bias is not None:
            delta = delta + self._per_channel(lora_B.bias[:width]) * self.scaling[adapter]
        if adapter not in self.lora_variant:
            return (result + delta).to(dtype)
        base_layer = self.get_base_layer()
        weight = dequantize_module_weight(base_layer).to(inputs.dtype)
        if self.training and isinstance(self.lora_dropout[adapter], nn.Dropout):
            base_result = self._leading(base_layer, weight, inputs, width)  # DoRA drops the same inputs in both paths
        else:
            base_result = result
            if base_layer.bias is not None:
                base_result = base_result - self._per_channel(base_layer.bias[:width])
        factor = self._per_channel(self._dora_factor(adapter, weight)[:width])
        return (result + (factor - 1) * base_result + factor * delta).to(dtype)

    def _dora_factor(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """The magnitude of each output channel over the norm of its whole row, a vector."""
        with torch.no_grad():  # as in DoRA, section 4.3
            norm = (weight + self.get_delta_weight(adapter)).flatten(1).norm(dim=1)
        return self.lora_magnitude_vector[adapter].weight.flatten() / norm


class PrefixLoraLinear(_PrefixLora, Linear):
    """LoRA of a `PrefixLinear` or a `PrefixClassifier`."""

    _channels = -1

    @staticmethod
    def _leading(layer: nn.Linear, weight: torch.Tensor, inputs: torch.Tensor, width: int) -> torch.Tensor:
        return nn.functional.linear(inputs, weight[:width, : inputs.shape[-1]])

    @staticmethod
    def _per_channel(values: torch.Tensor) -> torch.Tensor:
        return values


class PrefixTorchaoLoraLinear(PrefixLoraLinear, TorchaoLoraLinear):
    """LoRA of a `PrefixLinear` whose weight torchao has quantized."""


class LoraTokenRecycling(PrefixLoraLinear):
    """LoRA of a `TokenRecycling`, whose weight is multiplied by the tokens of the narrower stage."""

    def _inputs(self, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        return x[..., :0] if tokens is None else tokens  # the first stage has none, and its gradients are zeros


class PrefixLoraConv2d(_PrefixLora, Conv2d):
    """LoRA of a `PrefixConv2d`. A takes all input channels."""

    _channels = 1

    @staticmethod
    def _leading(layer: nn.Conv2d, weight: torch.Tensor, inputs: torch.Tensor, width: int) -> torch.Tensor:
        return nn.functional.conv2d(inputs, weight[:width], stride=layer.stride)

    @staticmethod
    def _per_channel(values: torch.Tensor) -> torch.Tensor:
        return values[:, None, None]


def adopt(layer: nn.Module):
    """Make a layer that PEFT puts around a `Prefix...` layer work at every width. Other layers stay as they are.

    Raises:
        ValueError: It is of a method other than LoRA, or of a variant of LoRA that can't be cut.
    """
    if not isinstance(layer, BaseTunerLayer) or not isinstance(layer.get_base_layer(), (nn.Linear, nn.Conv2d)):
        return
    if isinstance(layer, (_PrefixLora, ParamWrapper)):  # PEFT's `target_parameters` change the weight before it is cut
        return
    classes = {Linear: PrefixLoraLinear, Conv2d: PrefixLoraConv2d, TorchaoLoraLinear: PrefixTorchaoLoraLinear}
    if type(layer) not in classes:
        _refuse(type(layer).__module__.removeprefix("peft.tuners.").split(".")[0], type(layer))
    _check_variants(layer)
    is_recycling = isinstance(layer.get_base_layer(), TokenRecycling)
    layer.__class__ = LoraTokenRecycling if is_recycling else classes[type(layer)]


def _check_variants(layer: nn.Module):
    for variant in layer.lora_variant.values():
        if not isinstance(variant, (DoraConv2dVariant, DoraLinearVariant)):
            _refuse("lora", type(variant))


def _refuse(method: str, kind: type):
    raise ValueError(
        f"A HydraViT takes adapters of LoRA, rsLoRA and DoRA, which work at every width, not of PEFT's '{method}' "
        f"({kind.__name__}): use `hydravit_hf.lora.lora_config`, or adapt the stock ViT of one width, "
        "`model.to_vit(k)`."
    )


def read_adapter(folder, **hub_kwargs) -> dict[str, torch.Tensor]:
    """Read the tensors of a saved adapter, from a folder or the Hub.

    PEFT saves DoRA's magnitudes without the name of their parameter, and transformers does not find them.
    """
    tensors = load_peft_weights(str(folder), device="cpu", **hub_kwargs)
    return {re.sub("lora_magnitude_vector$", r"\g<0>.weight", name): tensor for name, tensor in tensors.items()}


def fit_adapter(tensors: dict, model: nn.Module, prefix: str = "base_model.model.") -> dict[str, torch.Tensor]:
    """Cut the adapter of a wider model, or fill the leading block of a wider model's adapter, which is zero elsewhere.

    Args:
        tensors: An adapter's tensors, under the names of a file or of the adapted model.
        model: The model, with the adapter or without.
        prefix: What the names have before those of the model.

    Raises:
        ValueError: It is DoRA's. Its factors depend on the weights of all heads that it was trained with.
    """
    shapes = {re.sub(r"\.(base_layer|original_module)\.", ".", name): p.shape for name, p in model.named_parameters()}
    fitted, grown = {}, False
    for name, tensor in tensors.items():
        shape = _fitting_shape(name.removeprefix(prefix), list(tensor.shape), shapes)
        if shape == list(tensor.shape):
            fitted[name] = tensor
            continue
        if ".lora_magnitude_vector" in name:
            raise ValueError(
                f"The DoRA adapter belongs to a model of {tensor.numel()} channels in '{name}', this one has "
                f"{max(shape)}: load it into a model that holds as many heads, merge it, and cut the model then."
            )
        block = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, shape, strict=True))
        fitted[name] = tensor.new_zeros(shape)
        fitted[name][block] = tensor[block]
        grown |= any(new > old for new, old in zip(shape, tensor.shape, strict=True))
    if grown:
        logger.warning("The adapter belongs to a model with fewer heads: it leaves the other heads as they are.")
    return fitted


def _fitting_shape(name: str, shape: list[int], shapes: dict[str, torch.Size]) -> list[int]:
    """The shape that a tensor of an adapter has in a model whose parameters have these `shapes`."""
    match = _NAME.fullmatch(name)
    layer, part, parameter = match.groups() if match else (None, None, None)
    if part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        weight = shapes.get(f"{layer}.weight", shape)
        if part == "lora_A":
            return [shape[0], weight[1], *shape[2:]]
        if part == "lora_B":
            return [weight[0], *shape[1:]]
        return [weight[0] if size > 1 else 1 for size in shape]  # that of a kernel is (1, channels, 1, 1)
    name = f"{layer}.{parameter}" if match else name  # a classifier or a bias that is trained whole
    own = shapes.get(name, shape)
    dims = width_dims(name, len(shape)) if len(own) == len(shape) else ()
    return [own[dim] if dim in dims else size for dim, size in enumerate(shape)]
