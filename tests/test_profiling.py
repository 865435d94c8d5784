"""Costs in closed form are those of the model: its parameters counted, its matrix products recorded."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.profiling import count_macs, count_parameters

HEADS = range(1, 7)
# As published with the paper: heads -> parameters in millions, GMACs
PUBLISHED = {
    3: (5.72, 1.25),
    4: (9.98, 2.14),
    5: (15.43, 3.25),
    6: (22.05, 4.60),
    7: (29.85, 6.18),
    8: (38.84, 7.99),
    9: (49.00, 10.04),
    10: (60.34, 12.31),
    11: (72.87, 14.82),
    12: (86.57, 17.56),
}
VARIANTS = {
    "plain": {},
    "no bias": {"qkv_bias": False},
    "separate classifiers": {"separate_classifiers": True, "subnetwork_heads": [2, 3, 6]},
    "rectangles": {"image_size": (8, 16), "patch_size": (2, 4)},
    "one channel": {"num_channels": 1},
    "narrow MLP": {"mlp_ratio": 1, "num_hidden_layers": 1},
    "no classifier": {"num_labels": 0},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> HydraViTForImageClassification:
    sizes = {"num_attention_heads": 6, "head_dim": 8, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    defaults = {**sizes, "num_labels": 5, "subnetwork_heads": list(HEADS), "attn_implementation": "eager"}
    return HydraViTForImageClassification(HydraViTConfig(**defaults | request.param)).eval()


def numel(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_parameters_of_every_width_are_those_of_the_extracted_subnetwork(variant):
    for num_heads in HEADS:
        extracted = variant.extract_subnetwork(num_heads)
        of_other_widths = 0
        if variant.config.separate_classifiers:
            classifiers = len(extracted.classifier.weight)
            of_other_widths = numel(extracted.classifier) * (classifiers - 1) // classifiers
        assert count_parameters(variant.config, num_heads) == numel(extracted) - of_other_widths, num_heads


def test_the_macs_of_every_width_are_half_the_flops_of_its_forward_pass(variant):
    size = variant.hydravit.embeddings.image_size
    image = torch.zeros(1, variant.config.num_channels, *size)
    for num_heads in HEADS:
        with FlopCounterMode(display=False) as counter:
            variant(image, num_heads_active=num_heads)
        assert 2 * count_macs(variant.config, num_heads) == counter.get_total_flops(), num_heads


@pytest.mark.parametrize("num_heads", PUBLISHED)
def test_the_costs_of_the_default_model_are_the_published_ones(num_heads):
    config = HydraViTConfig(num_labels=1000)
    parameters, gmacs = PUBLISHED[num_heads]
    assert round(count_parameters(config, num_heads) / 1e6, 2) == parameters
    assert round(count_macs(config, num_heads) / 1e9, 2) == gmacs


@pytest.mark.parametrize(("num_heads", "parameters"), [(3, 5_717_416), (6, 22_050_664), (12, 86_567_656)])
def test_the_default_model_has_as_many_parameters_as_the_deit_of_its_width(num_heads, parameters):
    assert count_parameters(HydraViTConfig(num_labels=1000), num_heads) == parameters
    with torch.device("meta"):
        model = HydraViTForImageClassification(HydraViTConfig(num_attention_heads=num_heads, num_labels=1000))
    assert numel(model) == parameters


def test_a_width_costs_the_same_whatever_the_model_holds_beyond_it():
    config = HydraViTConfig(num_attention_heads=6, head_dim=8, image_size=16, patch_size=4)
    for num_heads in HEADS:
        narrow = config.resized(num_heads)
        assert count_parameters(config, num_heads) == count_parameters(narrow, num_heads)
        assert count_macs(config, num_heads) == count_macs(narrow, num_heads)


@pytest.mark.parametrize("count", [count_parameters, count_macs])
@pytest.mark.parametrize("num_heads", [0, 7, -1, True, 3.0, "3", None])
def test_a_width_that_is_not_held_has_no_cost(count, num_heads):
    config = HydraViTConfig(num_attention_heads=6, head_dim=8, image_size=16, patch_size=4)
    with pytest.raises(ValueError, match="`num_heads_active` must be an integer from 1 to 6"):
        count(config, num_heads)
