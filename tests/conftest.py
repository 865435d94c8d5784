"""Shared by all tests: no network, and one tiny model with every weight off its initial value."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

HEADS = range(1, 7)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def make_model():
    """Makes tiny models of 6 heads of 8 channels; keyword arguments go to the configuration."""

    def make(**kwargs) -> HydraViTForImageClassification:
        sizes = {"num_attention_heads": 6, "head_dim": 8, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
        defaults = {**sizes, "num_labels": 5, "subnetwork_heads": list(HEADS)}
        model = HydraViTForImageClassification(HydraViTConfig(**defaults | kwargs)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16)
