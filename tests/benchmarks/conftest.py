"""How tests run the scripts of examples/benchmarks/ in this process."""

import importlib
import runpy
import sys

import pytest
import torch
from support.benchmarks import BENCHMARKS


@pytest.fixture
def load_module(monkeypatch):
    """Imports a file of the benchmarks, as its neighbours do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture
def run_here(load_module, monkeypatch, capsys):
    """Runs a script of the benchmarks in this process, which saves the imports. Returns what it printed."""

    def run_here(script: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out

    return run_here
