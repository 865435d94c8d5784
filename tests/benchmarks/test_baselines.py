"""The baselines of the studies are the networks that their papers describe, at the cost that the studies count."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

HEADS = list(range(3, 13))


@pytest.fixture
def baselines(load_module):
    return load_module("baselines")


@pytest.fixture
def config():
    sizes = {"head_dim": 8, "num_hidden_layers": 1, "image_size": 28, "patch_size": 4, "num_channels": 1}
    return HydraViTConfig(num_attention_heads=12, subnetwork_heads=HEADS, num_labels=10, **sizes)


@pytest.mark.parametrize("kind", ["MatFormer", "DynaBERT", None])
@pytest.mark.parametrize("num_heads", [3, 12])
def test_the_costs_are_those_that_torch_counts(baselines, config, kind, num_heads):
    model = (getattr(baselines, kind) if kind else HydraViTForImageClassification)(config).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one that it counts
        model(torch.randn(1, 1, 28, 28), num_heads_active=num_heads)
    assert baselines.count_macs(config, num_heads, kind) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["MatFormer", "DynaBERT"])
def test_all_heads_are_the_plain_model_and_fewer_use_leading_weights(baselines, config, kind):
    model, plain = getattr(baselines, kind)(config).eval(), HydraViTForImageClassification(config).eval()
    plain.load_state_dict(model.state_dict())
    pixels = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(model(pixels, 12).logits, plain(pixels, num_heads_active=12).logits)
    before = model(pixels, 3).logits
    model.hydravit.layers[0].mlp.fc1.weight[config.mlp_ratio * config.hidden_size // 4 :] += 1.0
    assert torch.equal(model(pixels, 3).logits, before)
    model.hydravit.layers[0].attention.q_proj.weight[config.hidden_size // 4 :] += 1.0
    assert torch.equal(model(pixels, 3).logits, before) == (kind == "DynaBERT")


@torch.no_grad()
def test_the_widths_of_scala_use_the_trailing_channels_but_the_narrowest(baselines, config):
    model, pixels = baselines.Scala(config).eval(), torch.randn(2, 1, 28, 28)
    before = {num_heads: model(pixels, num_heads).logits for num_heads in (3, 4, 9, 12)}
    for name, weight in model.vit.named_parameters():
        dims = baselines.width_dims(name, weight.ndim)
        leading = [slice(size // 4) if dim in dims else slice(None) for dim, size in enumerate(weight.shape)]
        if dims:
            weight[tuple(leading)] += 1.0  # of 3 heads
    changed = {k: not torch.equal(model(pixels, k).logits, logits) for k, logits in before.items()}
    assert changed == {3: True, 4: False, 9: False, 12: True}


def test_the_steps_of_scala_have_a_width_of_each_part(baselines, config):
    steps = [baselines.sample_scala(config, 0, step) for step in range(200)]
    assert {widths[0] for widths in steps} == {12} and {widths[3] for widths in steps} == {3}
    assert {widths[1] for widths in steps} == {7, 8, 9, 10, 11} and {widths[2] for widths in steps} == {4, 5, 6}
