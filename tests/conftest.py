"""Shared by all tests: no network, and one tiny model with every weight off its initial value."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
import sys

import pytest
import torch

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, cli

HEADS = range(1, 7)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


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


@pytest.fixture
def hydravit(monkeypatch, capsys):
    """Runs the command in this process: (exit code, what it printed, what it printed to stderr)."""

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["hydravit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed, code = capsys.readouterr(), stop.value.code
        if isinstance(code, str):  # as Python does it
            return 1, printed.out, printed.err + code + "\n"
        return code or 0, printed.out, printed.err

    return run


@pytest.fixture
def browser() -> str:
    """The path of an installed Chromium."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium to show it")
    return path
