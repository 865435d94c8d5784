"""The examples in docstrings run and print what they say, and editors are shown the public names."""

import ast
import doctest
import inspect
import pkgutil
import pydoc
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import hydravit_hf

MODULES = [module.name for module in pkgutil.walk_packages(hydravit_hf.__path__, "hydravit_hf.")]
NEEDED = {  # the examples of a module need this package
    "hydravit_hf.export": "onnxscript",
    "hydravit_hf.lora": "peft",
    "hydravit_hf.model.lora_hydravit": "peft",
}
EXCEPTIONS = {  # public names without an example that runs, and why
    "HydraViTBackbone": "docs and README show it on a saved checkpoint",
    "HydraViTImageClassificationPipeline": "its docstring shows calls on files and addresses",
    "HydraViTTrainer": "docs/training.md trains with it, and a test runs that",
    "HydraViTTrainingArguments": "docs/training.md trains with it, and a test runs that",
    "ModelCardCallback": "examples/finetune_trainer.py uses it, and a test runs that",
    "convert_original_checkpoint": "it needs the authors' file",
    "export_cascade": "an export takes seconds, and export_subnetwork has an example",
    "export_subnetworks": "an export takes seconds, and export_subnetwork has an example",
    "push_checkpoint": "it needs a Hub",
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporters and PEFT
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_each_module_run(name, tmp_path, monkeypatch):
    if name in NEEDED and find_spec(NEEDED[name]) is None:
        pytest.skip(f"the examples need {NEEDED[name]}")
    monkeypatch.chdir(tmp_path)
    report = doctest.testmod(import_module(name))
    assert not report.failed


def test_each_public_name_has_an_example():
    finder = doctest.DocTestFinder(recurse=False)
    without = {
        name
        for name in hydravit_hf.__all__
        if not any(test.examples for test in finder.find(getattr(hydravit_hf, name), name))
    }
    assert without == EXCEPTIONS.keys()


def test_editors_are_shown_each_public_name_in_its_file():
    stub = ast.parse(Path(hydravit_hf.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    shown = {}
    for statement in stub.body:
        if isinstance(statement, ast.ImportFrom):
            shown |= {alias.name: f"hydravit_hf.{statement.module}" for alias in statement.names}
        elif isinstance(statement, ast.Assign):
            listed = ast.literal_eval(statement.value)
    assert shown == {name: getattr(hydravit_hf, name).__module__ for name in hydravit_hf.__all__}
    assert sorted(listed) == sorted(hydravit_hf.__all__)
    assert set(listed) <= set(dir(hydravit_hf))


def test_help_shows_each_public_name():
    text = pydoc.plain(pydoc.render_doc(hydravit_hf))
    assert [name for name in hydravit_hf.__all__ if not re.search(rf"^ +(class )?{name}\(", text, re.MULTILINE)] == []


def test_the_passes_of_the_models_document_each_of_their_arguments():
    for model in (hydravit_hf.HydraViTModel, hydravit_hf.HydraViTForImageClassification, hydravit_hf.HydraViTBackbone):
        _, *names = inspect.signature(model.forward).parameters
        for name in names:
            assert f"\n    {name}: " in inspect.getdoc(model.forward), (model.__name__, name)
