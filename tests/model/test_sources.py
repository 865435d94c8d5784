"""Plain ViTs of every kind become a HydraViT with the same function; others are refused with the reason."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.models import spread
from support.vits import CLASSIFIERS, ENCODERS, SHAPES, SIZES, VIT, make, make_images, to_timm
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hydravit_hf import HydraViTForImageClassification, HydraViTModel
from hydravit_hf.model.sources_hydravit import read_source


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_of_transformers_has_the_same_logits(kind, shape):
    vit = make(*CLASSIFIERS[kind], num_labels=5, **SHAPES[shape])
    images = make_images(vit.config)
    model = HydraViTForImageClassification.from_vit(vit, num_attention_heads=2).eval()
    torch.testing.assert_close(model(images).logits, vit(images).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_of_transformers_has_the_same_features(kind, shape):
    if kind in ("dinov2", "vit_mae") and shape == "rectangles":
        pytest.skip("their own embeddings are square")
    vit = make(*ENCODERS[kind], **SHAPES[shape])
    images = make_images(vit.config)
    model = HydraViTModel.from_vit(vit, num_attention_heads=2).eval()
    expected = vit(images).last_hidden_state[:, 0]
    torch.testing.assert_close(model(images).pooler_output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_saved_encoder_is_read_by_its_path(tmp_path, kind):
    vit = make(*ENCODERS[kind])
    vit.save_pretrained(tmp_path)
    images = make_images(vit.config)
    model = HydraViTModel.from_vit(tmp_path, num_attention_heads=2).eval()
    torch.testing.assert_close(model(images).pooler_output, vit(images).last_hidden_state[:, 0], atol=1e-5, rtol=0)


def test_the_decoder_of_an_autoencoder_is_left_behind(tmp_path):
    autoencoder = make(ViTMAEForPreTraining, ViTMAEConfig, VIT | {"decoder_hidden_size": 16, "mask_ratio": 0.0})
    autoencoder.save_pretrained(tmp_path)
    images = make_images(autoencoder.config)
    expected = autoencoder.vit(images).last_hidden_state[:, 0]
    for source in (autoencoder.vit, tmp_path):
        model = HydraViTModel.from_vit(source, num_attention_heads=2).eval()
        torch.testing.assert_close(model(images).pooler_output, expected, atol=1e-5, rtol=0)


def test_a_classifier_that_reads_the_patches_too_is_replaced_with_a_warning(logged):
    dinov2 = make(Dinov2ForImageClassification, Dinov2Config, SIZES, num_labels=5)
    model = HydraViTForImageClassification.from_vit(dinov2, num_attention_heads=2).eval()
    assert any("no classifier.weight, classifier.bias that fits" in message for message in logged)
    images = make_images(dinov2.config)
    expected = dinov2.dinov2(images).last_hidden_state[:, 0]
    torch.testing.assert_close(model.hydravit(images).pooler_output, expected, atol=1e-5, rtol=0)


def test_a_deit_keeps_the_classifier_of_its_class_token(logged):
    deit = make(DeiTForImageClassificationWithTeacher, DeiTConfig, VIT, num_labels=5)
    model = HydraViTForImageClassification.from_vit(deit, num_attention_heads=2)
    assert torch.equal(model.classifier.weight, deit.cls_classifier.weight)
    assert any("distillation token" in message for message in logged)


@pytest.mark.parametrize("prefix", ["", "module.", "timm_model."])
@pytest.mark.parametrize("shape", ["plain", "no biases of the projections"])
def test_a_state_dict_of_timm_has_the_same_logits(shape, prefix):
    vit = make(*CLASSIFIERS["vit"], num_labels=5, layer_norm_eps=1e-6, **SHAPES[shape])
    state_dict = {f"{prefix}{name}": tensor for name, tensor in to_timm(vit).items()}
    model = HydraViTForImageClassification.from_vit(state_dict, num_attention_heads=2, head_dim=8).eval()
    images = make_images(vit.config)
    torch.testing.assert_close(model(images).logits, vit(images).logits, atol=1e-5, rtol=0)


def test_variants_of_timm_have_the_function_of_their_parts():
    vit = make(*CLASSIFIERS["vit"], num_labels=5, layer_norm_eps=1e-6)
    images, parameters = make_images(vit.config), to_timm(vit)
    # LayerScale multiplies what a branch adds
    scaled = parameters | {f"blocks.{index}.ls{part}.gamma": torch.rand(16) for index in (0, 1) for part in (1, 2)}
    for layer in range(2):
        for part, linear in ((1, vit.vit.layers[layer].attention.o_proj), (2, vit.vit.layers[layer].mlp.fc2)):
            linear.weight.data *= scaled[f"blocks.{layer}.ls{part}.gamma"][:, None]
            linear.bias.data *= scaled[f"blocks.{layer}.ls{part}.gamma"]
    # The class token has no position
    scaled["pos_embed"] = scaled["pos_embed"][:, 1:]
    vit.vit.embeddings.position_embeddings.data[:, 0] = 0
    model = HydraViTForImageClassification.from_vit(scaled, num_attention_heads=2, head_dim=8).eval()
    torch.testing.assert_close(model(images).logits, vit(images).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_folder_of_timm_is_read_without_timm(tmp_path, wrapped):
    vit = make(*CLASSIFIERS["vit"], num_labels=3, layer_norm_eps=1e-6, hidden_size=128, intermediate_size=512)
    names = ["cat", "dog", "eel"]
    config = {"architecture": "vit_tiny_patch4_16", "num_classes": 3, "global_pool": "token", "label_names": names}
    config |= {"pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config | ({"model_type": "timm_wrapper"} if wrapped else {})))
    prefix = "timm_model." if wrapped else ""
    save_file({f"{prefix}{name}": tensor for name, tensor in to_timm(vit).items()}, tmp_path / "model.safetensors")
    model = HydraViTForImageClassification.from_vit(tmp_path, num_attention_heads=2).eval()
    assert model.config.id2label == dict(enumerate(names))
    images = make_images(vit.config)
    torch.testing.assert_close(model(images).logits, vit(images).logits, atol=1e-5, rtol=0)
    for name, value, message in (("architecture", "resnet18", "resnet18"), ("global_pool", "avg", "mean of the pat")):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=message):
            HydraViTForImageClassification.from_vit(tmp_path)


def test_a_model_of_timm_has_the_same_logits():
    timm = pytest.importorskip("timm", exc_type=ImportError, reason="timm needs a build of torchvision")
    for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224"):
        vit = spread(timm.create_model(name, num_classes=5)).eval()
        heads = vit.blocks[0].attn.num_heads
        model = HydraViTForImageClassification.from_vit(vit, num_attention_heads=heads).eval()
        images = torch.randn(2, 3, 224, 224)
        torch.testing.assert_close(model(images).logits, vit(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        ("CLIPVisionModel", "CLIPVisionConfig", "before the first layer"),
        ("SiglipVisionModel", "SiglipVisionConfig", "no class token"),
        ("DINOv3ViTModel", "DINOv3ViTConfig", "rotary"),
        ("SwinModel", "SwinConfig", "windows"),
        ("BeitModel", "BeitConfig", "relative positions"),
        ("Data2VecVisionModel", "Data2VecVisionConfig", "relative positions"),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "register tokens"),
        ("ResNetModel", "ResNetConfig", "'resnet' are not supported"),
    ],
)
def test_other_models_are_refused_with_the_reason(tmp_path, model, config, reason):
    with torch.device("meta"):
        other = getattr(transformers, model)(getattr(transformers, config)())
    other.config.architectures = [model]
    other.config.save_pretrained(tmp_path)
    for source in (other, tmp_path):  # of a path, the weights are not even read
        with pytest.raises(ValueError, match=reason):
            HydraViTForImageClassification.from_vit(source)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("norm_pre.weight", "before the first layer"),
        ("blocks.0.attn.q_norm.weight", "normalises queries and keys"),
        ("reg_token", "register tokens"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("fc_norm.weight", "mean of the patches"),
        ("blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("nonsense", "it holds 'nonsense'"),
    ],
)
def test_parameters_without_a_place_are_refused_with_the_reason(name, reason):
    parameters = to_timm(make(*CLASSIFIERS["vit"], num_labels=5)) | {name: torch.ones(16)}
    with pytest.raises(ValueError, match=reason):
        HydraViTForImageClassification.from_vit(parameters, head_dim=8)


def test_incomplete_parameters_are_refused_by_name():
    parameters = to_timm(make(*CLASSIFIERS["vit"], num_labels=5))
    for missing, message in (("cls_token", "class token"), ("blocks.1.mlp.fc2.bias", "layers.1.mlp.fc2.bias")):
        rest = {name: tensor for name, tensor in parameters.items() if name != missing}
        with pytest.raises(ValueError, match=message):
            HydraViTForImageClassification.from_vit(rest, num_attention_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="16 channels wide, no multiple of head_dim=64"):
        HydraViTForImageClassification.from_vit(parameters)


def test_what_is_no_model_is_a_type_error():
    for wrong in (None, 3, torch.nn.Linear(2, 2), [1]):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            read_source(wrong)
