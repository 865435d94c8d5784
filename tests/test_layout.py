"""Who imports whom, and what travels with a checkpoint."""

import ast
import sys
from itertools import chain
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import hydravit_hf

PACKAGE = Path(__file__).parents[1] / "hydravit_hf"
# Each file imports from those above it only; files of one line don't import each other.
LAYERS = [
    ["checkpoint_hydravit", "configuration_hydravit", "pipeline_hydravit"],
    ["cascade_hydravit", "parameters_hydravit"],
    ["modeling_hydravit", "image_processing", "subnetwork_accuracy", "reporting", "onnx_graphs"],
    [
        "augmentation",
        "convert_checkpoint",
        "data",
        "evaluation",
        "export",
        "hub",
        "optimization",
        "profiling",
        "training",
    ],
    ["cascade", "model_card", "trainer"],
    ["cli"],
    ["__init__"],
]


def imports(module: str, relative: bool) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and bool(node.level) == relative:
            found.add(node.module)
        elif isinstance(node, ast.Import) and not relative:
            found |= {alias.name for alias in node.names}
    return {name.partition(".")[0] for name in found}


def test_files_import_downwards_only():
    assert sorted(chain(*LAYERS)) == sorted(file.stem for file in PACKAGE.glob("*.py"))
    for number, layer in enumerate(LAYERS):
        below = set(chain(*LAYERS[:number]))
        for module in layer:
            assert imports(module, relative=True) <= below, module


def test_what_travels_imports_what_transformers_needs_and_each_other_only():
    travelling = {name for name in chain(*LAYERS) if name.endswith("_hydravit")}
    for module in travelling:
        assert imports(module, relative=False) <= set(sys.stdlib_module_names) | {
            "torch",
            "transformers",
            "numpy",
            "PIL",
        }
        assert imports(module, relative=True) <= travelling
        # transformers refuses code whose imports are missing; Pillow is imported where it is there
        assert set(get_imports(PACKAGE / f"{module}.py")).isdisjoint({"PIL"})


def test_importing_the_package_needs_no_extra():
    extras = {
        "sklearn",
        "onnxruntime",
        "torchao",
        "accelerate",
        "datasets",
        "evaluate",
        "gradio",
        "matplotlib",
        "onnx",
        "onnx_ir",
        "openvino",
    }
    todo, seen = {"__init__"}, set()
    while todo:
        module = todo.pop()
        seen.add(module)
        assert imports(module, relative=False).isdisjoint(extras), module
        todo |= imports(module, relative=True) - seen


def test_every_public_name_can_be_imported():
    for name in hydravit_hf.__all__:
        assert getattr(hydravit_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        hydravit_hf.nonsense  # noqa: B018
