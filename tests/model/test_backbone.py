"""A backbone's feature maps are the model's hidden states, at any width, and dense heads sit on it."""

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    DPTConfig,
    DPTForDepthEstimation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hydravit_hf import HydraViTBackbone, HydraViTConfig

STAGES = ["stem", "stage1", "stage2"]
SIZES = {"num_attention_heads": 6, "head_dim": 8, "num_hidden_layers": 4, "image_size": 16, "patch_size": 4}
FOUR = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("num_heads", range(1, 7))
@pytest.mark.parametrize("held", [True, False], ids=["held", "active"])
def test_feature_maps_are_the_hidden_states_of_that_width(model, folder, images, num_heads, held):
    width = {"num_attention_heads" if held else "num_heads_active": num_heads}
    backbone = HydraViTBackbone.from_pretrained(folder, out_features=STAGES, apply_layernorm=False, **width)
    outputs = model.hydravit(images, num_heads_active=num_heads, output_hidden_states=True)
    assert backbone.channels == [8 * num_heads] * 3
    for train in (False, True):  # no drawn widths: a head is made for one number of channels
        feature_maps = backbone.train(train)(images).feature_maps
        for feature_map, tokens in zip(feature_maps, outputs.hidden_states, strict=True):
            assert feature_map.shape == (3, 8 * num_heads, 4, 4)
            torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens[:, 1:])
    normalized = HydraViTBackbone.from_pretrained(folder, reshape_hidden_states=False, **width)
    (feature_map,) = normalized(images).feature_maps
    torch.testing.assert_close(feature_map, outputs.last_hidden_state)


def test_a_call_may_run_fewer_heads_and_another_image_size(model, folder):
    images = torch.randn(2, 3, 24, 32)
    backbone = HydraViTBackbone.from_pretrained(folder)
    outputs = backbone(images, num_heads_active=3, output_hidden_states=True, output_attentions=True)
    expected = model.hydravit(images, num_heads_active=3, interpolate_pos_encoding=True)
    assert outputs.feature_maps[0].shape == (2, 24, 6, 8)
    tokens = outputs.feature_maps[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected.last_hidden_state[:, 1:])
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    assert backbone(images).hidden_states is None
    assert torch.equal(backbone(images, return_dict=False)[0][0], backbone(images).feature_maps[0])
    with pytest.raises(ValueError, match="from 1 to 6"):
        backbone(images, num_heads_active=7)
    with pytest.raises(ValueError, match="from 1 to 6"):
        backbone(images, num_heads_active=0)


def test_the_choice_of_layers_is_saved_and_the_default_follows_the_number_of_layers(folder, tmp_path):
    backbone = HydraViTBackbone.from_pretrained(folder, out_indices=[0, 1], num_heads_active=3)
    backbone.save_pretrained(tmp_path / "backbone")
    again = HydraViTBackbone.from_pretrained(tmp_path / "backbone")
    assert (again.out_features, again.channels) == (["stem", "stage1"], [24, 24])
    assert HydraViTBackbone.from_pretrained(folder, num_hidden_layers=1).out_features == ["stage1"]
    assert again.extract_subnetwork(2).out_features == ["stem", "stage1"]
    with pytest.raises(ValueError, match="stage9"):
        HydraViTBackbone.from_pretrained(folder, out_features=["stage9"])
    assert isinstance(AutoBackbone.from_config(AutoConfig.from_pretrained(folder)), HydraViTBackbone)


@pytest.mark.parametrize("num_heads", [3, 6])
def test_upernet_trains_on_it_and_comes_back_at_its_width(tmp_path, num_heads):
    config = UperNetConfig(
        backbone_config=HydraViTConfig(**SIZES, num_heads_active=num_heads, out_features=FOUR),
        num_labels=7,
        hidden_size=16,
        use_auxiliary_head=False,
        pool_scales=[1, 2],
    )
    model = UperNetForSemanticSegmentation(config)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(7, (2, 32, 32))
    model.train()(images, labels=labels).loss.backward()
    gradient = model.backbone.layers[0].mlp.fc1.weight.grad
    assert gradient[: 32 * num_heads, : 8 * num_heads].any()
    assert not gradient[32 * num_heads :].any() and not gradient[:, 8 * num_heads :].any()
    model.eval().save_pretrained(tmp_path / "upernet")
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "upernet")
    assert again.backbone.channels == [8 * num_heads] * 4
    torch.testing.assert_close(again(images).logits, model(images).logits)


def test_upernet_on_padded_feature_maps_trains_and_runs_every_width(tmp_path):
    backbone = HydraViTConfig(**SIZES, subnetwork_heads=[1, 3, 6], out_features=FOUR, pad_feature_maps=True)
    sizes = {"num_labels": 7, "hidden_size": 16, "use_auxiliary_head": False, "pool_scales": [1, 2]}
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes)).train()
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(7, (2, 32, 32))
    drawn = set()
    for _ in range(12):
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        gradient = model.backbone.layers[0].mlp.fc1.weight.grad
        drawn.add(int(gradient.any(0).sum()) // 8)
    assert drawn == {1, 3, 6}
    model.eval().save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    logits = []
    for num_heads in (1, 3, None):
        for each in (model, again):
            each.backbone.config.num_heads_active = num_heads
        logits.append(model(images).logits)
        torch.testing.assert_close(again(images).logits, logits[-1])
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])


def test_padded_feature_maps_are_those_of_the_width_and_zeros(model, folder, images):
    backbone = HydraViTBackbone.from_pretrained(folder, pad_feature_maps=True, num_heads_active=2)
    (plain,) = HydraViTBackbone.from_pretrained(folder, num_heads_active=2)(images).feature_maps
    (padded,) = backbone(images).feature_maps
    assert backbone.channels == [48] and padded.shape == (3, 48, 4, 4)
    assert torch.equal(padded[:, :16], plain) and not padded[:, 16:].any()


def test_dpt_sits_on_it():
    backbone = HydraViTConfig(
        **SIZES | {"num_attention_heads": 3}, out_features=FOUR, reshape_hidden_states=False, apply_layernorm=False
    )
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "patch_size": 4, "image_size": 16}
    model = DPTForDepthEstimation(DPTConfig(backbone_config=backbone, is_hybrid=False, **sizes))
    assert model(torch.randn(2, 3, 16, 16)).predicted_depth.shape[0] == 2
