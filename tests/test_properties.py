"""What holds of every configuration and every width, tried on configurations that hypothesis draws."""

import json
import tempfile
from functools import partial

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.model.configuration_hydravit import as_pair
from hydravit_hf.profiling import _count_macs_of

PROFILE = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}
cheap = settings(**PROFILE, max_examples=200)
costly = settings(**PROFILE, max_examples=60)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


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
    """A model of random weights, and images for it."""
    torch.manual_seed(0)
    model = HydraViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, torch.randn(2, config.num_channels, *as_pair(config.image_size))


def inside(model, num_heads: int) -> dict[str, tuple[slice, ...]]:
    """Where the parameters of a width lie in those of the model."""
    extracted = model.extract_subnetwork(num_heads).state_dict()
    return {name: tuple(slice(size) for size in tensor.shape) for name, tensor in extracted.items()}


# Configurations


@cheap
@given(configs())
def test_a_configuration_survives_dictionaries_and_json(config):
    values = config.to_dict()
    assert HydraViTConfig.from_dict(values).to_dict() == values
    assert HydraViTConfig(**values).to_dict() == values
    again = HydraViTConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_json_string() == config.to_json_string()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = HydraViTConfig.from_pretrained(folder)
    assert loaded.to_json_string() == config.to_json_string()
    assert (loaded.hidden_size, loaded.patch_grid) == (config.hidden_size, config.patch_grid)


@cheap
@given(configs_and_widths(), st.integers(1, 8))
def test_resizing_in_two_steps_is_resizing_in_one_where_the_first_holds_the_second(pair, wider):
    config, num_heads = pair
    for first in {num_heads, max(num_heads, min(wider, config.num_attention_heads))}:
        twice, once = config.resized(first).resized(num_heads), config.resized(num_heads)
        assert twice.to_dict() == once.to_dict()
    grown = config.resized(config.num_attention_heads + wider)
    assert grown.subnetwork_heads[: len(config.subnetwork_heads)] == config.subnetwork_heads
    assert grown.resized(grown.num_attention_heads).to_dict() == grown.to_dict()


# Widths of one model


@costly
@given(configs_and_widths())
def test_a_width_is_the_extracted_model_and_the_stock_vit(pair):
    config, num_heads = pair
    model, images = make(config)
    outputs = model(images, num_heads_active=num_heads, output_hidden_states=True)
    for other in (model.extract_subnetwork(num_heads), model.to_vit(num_heads)):
        found = other(images, output_hidden_states=True)
        close(found.logits, outputs.logits)
        close(found.hidden_states, outputs.hidden_states)


@costly
@given(configs_and_widths())
def test_what_lies_outside_the_prefix_never_matters(pair):
    config, num_heads = pair
    model, images = make(config)
    before = model(images, num_heads_active=num_heads).logits
    with torch.no_grad():
        for name, block in inside(model, num_heads).items():
            parameter = model.get_parameter(name)
            kept = parameter[block].clone()
            parameter.fill_(torch.nan)
            parameter[block] = kept
    # a width without a classifier of its own uses that of the next wider one, which extraction keeps as the last
    close(model(images, num_heads_active=num_heads).logits, before, atol=0, rtol=0)


@costly
@given(configs_and_widths())
def test_gradients_outside_the_prefix_are_zero_and_never_none(pair):
    config, num_heads = pair
    model, images = make(config)
    model(images, num_heads_active=num_heads).logits.pow(2).sum().backward()
    for name, block in inside(model, num_heads).items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.count_nonzero() == gradient[block].count_nonzero(), name


@costly
@given(configs_and_widths())
def test_the_costs_in_closed_form_are_those_of_the_extracted_model(pair):
    config, num_heads = pair
    model, images = make(config)
    extracted = model.extract_subnetwork(num_heads)
    others = sum(parameter[:-1].numel() for parameter in extracted.classifier.parameters())
    expected = extracted.num_parameters() - (others if config.separate_classifiers else 0)
    assert config.count_parameters(num_heads) == expected
    assert config.count_macs(num_heads) == extracted.config.count_macs(num_heads)
    assert config.count_macs(num_heads) == _count_macs_of(model, images[:1], num_heads)


# Checkpoints


@costly
@given(configs_and_widths(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["1GB", "4KB"]))
def test_a_width_from_disk_is_the_extracted_model_bit_by_bit(pair, dtype, max_shard_size):
    config, num_heads = pair
    model = make(config)[0].to(dtype)
    expected = model.extract_subnetwork(num_heads)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        narrow = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=num_heads)
        active = HydraViTForImageClassification.from_pretrained(folder, num_heads_active=num_heads)
    assert narrow.config.subnetwork_heads == expected.config.subnetwork_heads
    for loaded, origin in ((narrow, expected), (active, model)):
        assert loaded.dtype == dtype
        tensors = origin.state_dict()
        assert loaded.state_dict().keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    assert active.config.num_heads_active == num_heads


@costly
@given(configs(), st.integers(1, 3))
def test_what_was_grown_and_cut_again_is_the_original(config, more):
    model, images = make(config)
    held = config.num_attention_heads
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        grown = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=held + more)
    assert all(parameter.isfinite().all() for parameter in grown.parameters())
    cut = grown.extract_subnetwork(held)
    tensors = model.state_dict()
    for name, tensor in cut.state_dict().items():
        block = tuple(slice(size) for size in tensors[name].shape)
        assert torch.equal(tensor[block], tensors[name]), name
    close(cut(images).logits, model(images, num_heads_active=held).logits)
