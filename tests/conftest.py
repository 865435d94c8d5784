"""What all tests share: no network, fixed seeds, a tiny model, the command and processes without the package."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import logging
import shutil
import subprocess
import sys

import pytest
import support.models
import torch

import hydravit_command
from hydravit_hf import make_image_processor

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
    """Makes tiny models; keyword arguments go to the configuration."""
    return support.models.make_model


@pytest.fixture
def save_digits(make_model, tmp_path, monkeypatch):
    """Saves an untrained model for the digits in `runs/digits` of an empty folder, and goes there."""

    def save(**kwargs):
        model = make_model(num_attention_heads=12, subnetwork_heads=None, num_labels=10, image_size=8, **kwargs)
        model.save_pretrained(tmp_path / "runs" / "digits")
        make_image_processor(model.config).save_pretrained(tmp_path / "runs" / "digits")
        monkeypatch.chdir(tmp_path)

    return save


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
    """Runs a script with arguments in a process that can't import hydravit_hf."""

    def run(script: str, *arguments):
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        command = [sys.executable, "-W", "error", "-c", WITHOUT_THE_PACKAGE, script, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout == "done\n"

    return run


@pytest.fixture
def logged():
    """A list of what the package logs. Messages that are logged once only are logged again in each test."""
    messages, handler, logger = [], logging.Handler(), logging.getLogger("hydravit_hf")
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.warning_once.__func__.cache_clear()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def large_model(make_model):
    """A model whose weights are 1.8 MB, and so fit once and not twice on the small disk."""
    return make_model(head_dim=16, num_hidden_layers=4)


@pytest.fixture
def hydravit(monkeypatch, capsys):
    """Runs the command in this process. Returns its exit code, its standard output and its errors."""

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["hydravit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            hydravit_command.main()
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
