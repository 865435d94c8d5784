"""The elastic ViTs that the studies compare HydraViT with, and what they cost. SortedNet is a HydraViT of 1 head on."""

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.model.modeling_hydravit import HydraViTAttention, HydraViTMLP
from hydravit_hf.model.nesting_hydravit import width_dims


class PartialMLP(HydraViTMLP):
    """Runs the leading part of the neurons, on all channels of the stream."""

    part = 1.0

    def forward(self, hidden_states):
        neurons = round(self.part * self.fc1.out_features)
        inner = F.linear(hidden_states, self.fc1.weight[:neurons], self.fc1.bias[:neurons])
        return F.linear(self.activation_fn(inner), self.fc2.weight[:, :neurons], self.fc2.bias)


class PartialAttention(HydraViTAttention):
    """Runs the leading part of the heads, on all channels of the stream."""

    part = 1.0

    def forward(self, hidden_states, **kwargs):
        width = round(self.part * hidden_states.shape[-1])
        rows = [
            F.linear(hidden_states, linear.weight[:width], linear.bias[:width])
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        ]
        query, key, value = (row.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for row in rows)
        output = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return F.linear(output, self.o_proj.weight[:, :width], self.o_proj.bias), None


class MatFormer(HydraViTForImageClassification):
    """A ViT whose MLP alone nests (https://arxiv.org/abs/2310.07707): "k heads" run all heads, and k twelfths of the
    neurons."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.hydravit.layers:
            layer.mlp = PartialMLP(config)
        self.init_weights()

    def forward(self, pixel_values, num_heads_active):
        full = self.config.num_attention_heads
        for layer in self.hydravit.layers:
            layer.mlp.part = num_heads_active / full
        return super().forward(pixel_values, num_heads_active=full)


class DynaBERT(HydraViTForImageClassification):
    """A ViT whose heads and neurons nest, on a stream of full width (https://arxiv.org/abs/2004.04037)."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.hydravit.layers:
            layer.attention, layer.mlp = PartialAttention(config), PartialMLP(config)

    def forward(self, pixel_values, num_heads_active, **kwargs):
        full = self.config.num_attention_heads
        for layer in self.hydravit.layers:
            layer.attention.part = layer.mlp.part = num_heads_active / full
        return super().forward(pixel_values, num_heads_active=full, **kwargs)


class Scala(nn.Module):
    """A ViT whose widths use the trailing channels, but the narrowest the leading ones (https://arxiv.org/abs/2412.04786).

    Reversing all channels makes the trailing ones lead. The order of channels is the same in all layers, so it cancels.
    """

    def __init__(self, config: HydraViTConfig):
        super().__init__()
        self.vit, self.config = HydraViTForImageClassification(config), config

    def forward(self, pixel_values, num_heads_active):
        heads = {"num_heads_active": num_heads_active}
        if num_heads_active in (self.config.subnetwork_heads[0], self.config.num_attention_heads):
            return self.vit(pixel_values, **heads)
        reversed_weights = {
            name: weight.flip(width_dims(name, weight.ndim)) for name, weight in self.vit.named_parameters()
        }
        return functional_call(self.vit, reversed_weights, (pixel_values,), heads)


def sample_scala(config: HydraViTConfig, seed: int, step: int) -> list[int]:
    """All heads, a width of the upper half, one of the lower half, and the narrowest ("stable sampling")."""
    narrowest, widest = config.subnetwork_heads[0], config.num_attention_heads
    generator, middle = np.random.default_rng([seed, step]), (narrowest + widest) // 2
    return [widest, int(generator.integers(middle, widest)), int(generator.integers(narrowest + 1, middle)), narrowest]


def backward_scala(model: Scala, images: torch.Tensor, labels: torch.Tensor, widths: list[int], label_smoothing: float):
    """Each width learns from the labels, and each but the widest also from the next wider one of the step."""
    teacher = None
    for num_heads in widths:
        logits = model(images, num_heads_active=num_heads).logits
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if teacher is not None:
            loss = loss + F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")
        loss.backward()
        teacher = logits.detach().softmax(-1)


def count_macs(config: HydraViTConfig, num_heads: int, kind: str | None = None) -> int:
    """Count the multiply-accumulates of an image. `kind` is "MatFormer" or "DynaBERT", any other name a HydraViT."""
    full, width = config.num_attention_heads, config.hidden_size
    tokens = 1 + config.patch_grid[0] * config.patch_grid[1]
    of_mlp = 2 * config.mlp_ratio * width**2
    partial = {"MatFormer": of_mlp, "DynaBERT": of_mlp + 4 * width**2 + 2 * tokens * width}
    if kind not in partial:
        return config.count_macs(num_heads)
    unused = (1 - num_heads / full) * partial[kind]
    return config.count_macs(full) - round(config.num_hidden_layers * tokens * unused)
