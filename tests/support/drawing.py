"""Configurations, widths and models that hypothesis draws, always the same ones."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.model.configuration_hydravit import as_pair

from .models import spread

SAME_EACH_TIME = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}
cheap = settings(**SAME_EACH_TIME, max_examples=80)  # for configurations
costly = settings(**SAME_EACH_TIME, max_examples=25)  # for models


@st.composite
def configs(draw) -> HydraViTConfig:
    heads = draw(st.integers(1, 6))
    separate = draw(st.booleans())
    widths = draw(st.sets(st.integers(1, heads), min_size=1))
    widths = sorted(widths | {heads} if separate else widths)
    weights = st.lists(st.floats(0.1, 10), min_size=len(widths), max_size=len(widths))
    patch = draw(st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4))))
    grid = draw(st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    (rows, columns), (height, width) = as_pair(grid), as_pair(patch)
    return HydraViTConfig(
        num_attention_heads=heads,
        head_dim=draw(st.integers(2, 8)) * 2,
        num_hidden_layers=draw(st.integers(1, 3)),
        mlp_ratio=draw(st.integers(1, 4)),
        image_size=(rows * height, columns * width) if rows * height != columns * width else rows * height,
        patch_size=patch,
        num_channels=draw(st.integers(1, 4)),
        qkv_bias=draw(st.booleans()),
        hidden_act=draw(st.sampled_from(["gelu", "relu"])),
        layer_norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        drop_path_rate=draw(st.sampled_from([0.0, 0.1])),
        num_labels=draw(st.integers(1, 12)),
        num_heads_active=draw(st.none() | st.integers(1, heads)),
        subnetwork_heads=widths,
        subnetwork_weights=draw(st.none() | weights),
        separate_classifiers=separate,
    )


@st.composite
def configs_and_widths(draw) -> tuple[HydraViTConfig, int]:
    config = draw(configs())
    return config, draw(st.integers(1, config.num_attention_heads))


def make(config: HydraViTConfig) -> tuple[HydraViTForImageClassification, torch.Tensor]:
    """A model of random weights in evaluation mode, and images for it."""
    torch.manual_seed(0)
    model = spread(HydraViTForImageClassification(config)).eval()
    return model, torch.randn(2, config.num_channels, *as_pair(config.image_size))
