"""Every module that owns parameters is called: offloading, adapters and hooks rely on it."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from hydravit_hf import HydraViTBackbone, HydraViTForImageClassification

HEADS = range(1, 7)
KINDS = {
    "plain": {},
    "separate classifiers": {"separate_classifiers": True, "subnetwork_heads": [2, 4, 6]},
    "recycling": {"token_recycling": True, "subnetwork_heads": [2, 4, 6]},
}


@pytest.fixture(params=KINDS)
def any_kind(request, make_model):
    return make_model(**KINDS[request.param])


def owners(model) -> dict:
    """The modules that own parameters, by name."""
    return {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}


def test_a_forward_hook_on_each_module_with_parameters_fires_at_every_width(any_kind, images):
    fired = []
    for name, module in owners(any_kind).items():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    for num_heads in HEADS:
        fired.clear()
        any_kind(images, num_heads_active=num_heads)
        missing = owners(any_kind).keys() - set(fired)
        assert not missing or (missing == {"hydravit.recycling"} and any_kind.config.stages(num_heads) == [num_heads])
    fired.clear()
    any_kind.train()(images, torch.tensor([0, 1, 2]), num_heads_active=6)
    assert set(fired) == owners(any_kind).keys()


def test_weights_that_only_a_hook_brings_and_takes_away_are_enough(any_kind, images):
    expected = {num_heads: any_kind(images, num_heads_active=num_heads).logits for num_heads in HEADS}
    for module in owners(any_kind).values():
        weights = {name: weight.detach().clone() for name, weight in module.named_parameters(recurse=False)}

        def bring(module, _, weights=weights):
            for name, weight in module.named_parameters(recurse=False):
                weight.data = weights[name]

        def take(module, *_):
            for weight in module.parameters(recurse=False):
                weight.data = torch.full_like(weight, torch.nan)

        take(module)
        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take)
    for num_heads in HEADS:
        assert torch.equal(any_kind(images, num_heads_active=num_heads).logits, expected[num_heads])


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_gives_the_logits_of_the_model_at_every_width(any_kind, images, tmp_path, where):
    expected = {num_heads: any_kind(images, num_heads_active=num_heads).logits for num_heads in HEADS}
    cascade = any_kind.cascade(images, [2, 6], 0.0).logits
    if where == "cpu":
        offloaded = cpu_offload(any_kind, execution_device="cpu")
    else:
        offloaded = disk_offload(any_kind, tmp_path, execution_device="cpu")
    assert all(weight.is_meta for weight in offloaded.parameters())
    for num_heads in HEADS:
        torch.testing.assert_close(offloaded(images, num_heads_active=num_heads).logits, expected[num_heads])
    torch.testing.assert_close(offloaded.cascade(images, [2, 6], 0.0).logits, cascade)


def test_a_device_map_that_offloads_to_disk_gives_the_same_logits(any_kind, images, tmp_path):
    expected = {num_heads: any_kind(images, num_heads_active=num_heads).logits for num_heads in HEADS}
    any_kind.save_pretrained(tmp_path / "saved")
    parts = ["hydravit.embeddings", "hydravit.layers.0", "hydravit.layers.1", "hydravit.layernorm", "classifier"]
    parts += ["hydravit.recycling"] if any_kind.config.token_recycling else []
    for offloaded in parts:
        device_map = {part: "disk" if part == offloaded else "cpu" for part in parts}
        loaded = HydraViTForImageClassification.from_pretrained(
            tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offloaded"
        )
        for num_heads in HEADS:
            torch.testing.assert_close(loaded(images, num_heads_active=num_heads).logits, expected[num_heads])


def test_an_offloaded_backbone_gives_the_same_feature_maps(make_model, images, tmp_path):
    make_model().save_pretrained(tmp_path)
    backbone = HydraViTBackbone.from_pretrained(tmp_path, num_heads_active=3, out_indices=[1, 2]).eval()
    expected = backbone(images).feature_maps
    for found, wanted in zip(cpu_offload(backbone, "cpu")(images).feature_maps, expected, strict=True):
        torch.testing.assert_close(found, wanted)
