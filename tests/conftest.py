"""Shared by all tests: no network, and one tiny model with every weight off its initial value."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
import subprocess
import sys

import pytest
import torch

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, cli

HEADS = range(1, 7)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "hydravit_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPackage())
exec(compile(sys.argv.pop(1), "script", "exec"))
assert not [name for name in sys.modules if name.partition(".")[0] == "hydravit_hf"]
print("done")
"""


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
def many():
    return torch.randn(40, 3, 16, 16)


@pytest.fixture
def run_without_the_package(tmp_path, monkeypatch):
    """Runs a script in a process that can't import hydravit_hf, with arguments, to its end."""

    def run(script: str, *arguments):
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        command = [sys.executable, "-W", "error", "-c", WITHOUT_THE_PACKAGE, script, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout == "done\n"

    return run


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
