"""A subnetwork is a stock ViT, and a ViT or DeiT is the start of a HydraViT."""

import pytest
import torch
from support.models import HEADS
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from hydravit_hf import HydraViTForImageClassification, HydraViTModel

VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
VIT |= {"image_size": 16, "patch_size": 4, "num_labels": 5}


@pytest.mark.parametrize("num_heads", HEADS)
def test_the_encoder_alone_agrees_with_a_stock_encoder(model, images, num_heads):
    encoder = model.hydravit
    outputs = encoder(images, num_heads_active=num_heads)
    stock = encoder.to_vit(num_heads)
    assert type(stock) is ViTModel
    torch.testing.assert_close(stock(images).last_hidden_state, outputs.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 0])
    extracted = encoder.extract_subnetwork(num_heads)
    assert type(extracted) is HydraViTModel
    torch.testing.assert_close(extracted(images).last_hidden_state, outputs.last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_attention_heads", [2, 6])
@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_a_model_from_a_vit_has_its_function_in_the_leading_heads(
    images, tmp_path, num_attention_heads, separate_classifiers
):
    vit = ViTForImageClassification(ViTConfig(**VIT)).eval()
    vit.save_pretrained(tmp_path)
    for source in (vit, tmp_path):
        model = HydraViTForImageClassification.from_vit(
            source, num_attention_heads, separate_classifiers=separate_classifiers
        )
        assert model.config.num_attention_heads == num_attention_heads
        logits = model.eval()(images, num_heads_active=2).logits
        torch.testing.assert_close(logits, vit(images).logits, atol=1e-5, rtol=0)
    encoder = HydraViTModel.from_vit(vit.vit, num_attention_heads)
    states = encoder.eval()(images, num_heads_active=2).last_hidden_state
    torch.testing.assert_close(states, vit.vit(images).last_hidden_state, atol=1e-5, rtol=0)


def test_a_subnetwork_survives_the_way_to_a_vit_and_back(model, images):
    back = HydraViTForImageClassification.from_vit(model.to_vit(), num_attention_heads=6)
    torch.testing.assert_close(back(images).logits, model(images).logits)
    narrow = HydraViTForImageClassification.from_vit(model.to_vit(), num_attention_heads=2)
    torch.testing.assert_close(narrow(images).logits, model(images, num_heads_active=2).logits, atol=1e-5, rtol=0)


def test_a_model_from_a_deit_leaves_only_the_distillation_token_behind(images):
    deit = DeiTForImageClassification(DeiTConfig(**VIT)).eval()
    model = HydraViTForImageClassification.from_vit(deit, num_attention_heads=2)
    parameters = model.state_dict()
    positions = deit.state_dict()["deit.embeddings.position_embeddings"]
    expected = positions[:, [0, *range(2, positions.shape[1])]]
    assert torch.equal(parameters.pop("hydravit.embeddings.position_embeddings"), expected)
    for name, tensor in parameters.items():
        assert torch.equal(tensor, deit.state_dict()[name.replace("hydravit.", "deit.")]), name
    assert model(images).logits.shape == (3, 5)


def test_a_model_from_a_vit_may_have_other_labels():
    vit = ViTForImageClassification(ViTConfig(**VIT))
    model = HydraViTForImageClassification.from_vit(vit, num_attention_heads=3, num_labels=7)
    assert model.classifier.weight.shape == (7, 24)
    assert len(model.config.id2label) == 7


@pytest.mark.parametrize("separate", [False, True])
def test_labels_in_another_order_keep_their_meaning(images, separate):
    vit = ViTForImageClassification(ViTConfig(**VIT)).eval()
    vit.config.id2label = dict(enumerate("abcde"))
    labels = dict(enumerate("edacb"))
    model = HydraViTForImageClassification.from_vit(
        vit, 2, id2label=labels, num_labels=5, separate_classifiers=separate, subnetwork_heads=[1, 2]
    ).eval()
    torch.testing.assert_close(model(images).logits, vit(images).logits[:, [4, 3, 0, 2, 1]], atol=1e-5, rtol=1e-5)
    others = HydraViTForImageClassification.from_vit(vit, 2, id2label=dict(enumerate("abcdx"))).eval()
    torch.testing.assert_close(others(images).logits, vit(images).logits, atol=1e-5, rtol=1e-5)


def test_what_is_no_vit_is_an_error(model):
    with pytest.raises(ValueError, match="it is a HydraViT already"):
        HydraViTForImageClassification.from_vit(model)
    with pytest.raises(ValueError, match="intermediate_size=40"):
        HydraViTForImageClassification.from_vit(ViTModel(ViTConfig(**VIT | {"intermediate_size": 40})))


def test_a_vit_starts_a_model_of_another_image_size(model):
    vit = model.to_vit()
    for size in (24, (8, 32)):
        images = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
        for num_heads in (4, 6, 8):
            started = HydraViTForImageClassification.from_vit(vit, num_attention_heads=num_heads, image_size=size)
            found = started(images, num_heads_active=4).logits
            expected = model(images, num_heads_active=4, interpolate_pos_encoding=True).logits
            torch.testing.assert_close(found, expected)
