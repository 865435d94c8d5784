"""Imports point one way, and what travels with a checkpoint needs nothing of the package around it."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import hydravit_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hydravit_hf"
COMMAND_FILES = sorted((PACKAGE / "command").glob("*.py"))
# The files of model/ without "_hydravit", and what each of them imports of the others. Each is below what it imports.
MODEL = {
    "configuration": set(),
    "files": set(),
    "fetching": set(),
    "quantization": set(),
    "recycling": {"quantization"},
    "nesting": {"configuration"},
    "cascade": {"configuration"},
    "images": {"fetching"},
    "pipeline": {"images"},
    "sources": {"configuration"},
    "vit": {"configuration", "nesting", "quantization", "sources"},
    "shards": {"configuration", "files", "nesting", "quantization"},
    "lora": {"nesting", "recycling"},
    "checkpoint": {"configuration", "files", "lora", "nesting", "quantization", "shards", "pipeline"},
    "modeling": {"configuration", "nesting", "vit", "checkpoint", "lora", "quantization", "recycling", "cascade"},
}
TRAVELLING = [f"model.{name}_hydravit" for name in MODEL]
# The other files import what is in lines above theirs, and nothing of their own line.
LAYERS = [
    ["model.__init__", *TRAVELLING],
    [
        "endpoint_handler",
        "folders",
        "image_processing",
        "lora",
        "metrics",
        "onnx_graphs",
        "previous_card",
        "reporting",
        "resharding",
        "serving",
    ],
    ["convert_checkpoint", "data_folders", "evaluation", "export", "hub"],
    ["browser", "data"],
    [
        "data_checks",
        "training.__init__",
        *(f"training.{name}" for name in ("augmentation", "averaging", "gradients", "optimizer", "runs", "teacher")),
    ],
    ["profiling", "training.steps"],
    ["cascade", "elastification", "engine", "model_card"],
    ["server.requests", "training.arguments"],
    ["server.service"],
    ["server.process"],
    ["server.__init__"],
    ["training.trainer"],
    ["cli"],
    ["__init__"],
]
# The files of command/, in the same way. They import the package above by its name, and inside functions only.
COMMAND = [["loading", "options", "printing"], ["measuring", "running", "saving", "sharing"], ["__init__"]]
# What the network imports when an adapter is added, and when quantized weights are loaded
WHEN_NEEDED = {"model.lora_hydravit": {"peft"}, "model.quantization_hydravit": {"torchao"}}
NEEDED_BY_TRANSFORMERS = {"huggingface_hub", "numpy", "safetensors", "torch"}
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in PACKAGE.rglob("*.py")
    if file not in COMMAND_FILES
}


def imports(node: ast.AST, module: str) -> tuple[set[str], set[str]]:
    """The modules of the package, and the top-level names of other packages, that a part of a module imports."""
    own, others = set(), set()
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            others.add(statement.module.partition(".")[0])
        elif isinstance(statement, ast.ImportFrom):
            folder = module.split(".")[: -statement.level]
            names = [statement.module] if statement.module else [alias.name for alias in statement.names]
            own |= {".".join([*folder, name]) for name in names}
    return own, others


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


OWN, OTHERS = ({module: imports(tree(module), module)[part] for module in MODULES} for part in (0, 1))


def test_every_file_has_its_place():
    assert sorted(module for layer in LAYERS for module in layer) == sorted(MODULES)


def test_files_import_upwards_in_the_table_only():
    above = set()
    for layer in LAYERS:
        if "model.modeling_hydravit" not in layer:
            for module in layer:
                assert OWN[module] <= above, module
        above |= set(layer)


def test_files_of_model_import_each_other_as_the_arrows_say():
    above = set()
    for name, imported in MODEL.items():
        assert imported <= above, name  # so no circle closes
        assert OWN[f"model.{name}_hydravit"] == {f"model.{other}_hydravit" for other in imported}, name
        above.add(name)


def test_only_saving_imports_the_pipeline():
    """The network runs without a pipeline. The import inside `save_pretrained` makes transformers copy its file."""
    module, pipeline = "model.checkpoint_hydravit", "model.pipeline_hydravit"
    assert [name for name in TRAVELLING if pipeline in OWN[name]] == [module]
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef)]
    importing = [node.name for node in functions if pipeline in imports(node, module)[0]]
    assert importing == ["save_pretrained"]
    statements = [node for node in tree(module).body if isinstance(node, ast.ImportFrom)]
    assert all(pipeline not in imports(node, module)[0] for node in statements)


@pytest.mark.parametrize("module", TRAVELLING)
def test_what_travels_imports_what_transformers_needs_and_each_other_only(module):
    assert OWN[module] <= set(TRAVELLING)
    allowed = {*sys.stdlib_module_names, *NEEDED_BY_TRANSFORMERS, "transformers"}
    assert OTHERS[module] <= allowed | {"PIL", "peft", "torchao"}
    assert set(get_imports(MODULES[module])) <= allowed  # transformers needs these; an image library is imported if any
    for statement in ast.walk(tree(module)):
        assert not isinstance(statement, ast.ImportFrom) or statement.module  # `from . import x` copies no file


def test_importing_the_package_needs_no_extra():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name
        for group in ("train", "study", "space", "serve", "export", "lora", "quantize")
        for name in dependencies["optional-dependencies"][group]
    }
    extras = {name.replace("scikit-learn", "sklearn") for name in extras} | {"onnx_ir"}
    todo, seen = {"__init__"}, set()
    while todo:
        module = todo.pop()
        seen.add(module)
        others = OTHERS[module] - WHEN_NEEDED.get(module, set())
        assert others.isdisjoint(extras), module
        todo |= OWN[module] - seen
    assert seen == {"__init__", *TRAVELLING}


def test_no_file_imports_the_package_by_its_own_name_and_only_one_the_command():
    for module in MODULES:
        assert "hydravit_hf" not in OTHERS[module], module
        assert ("hydravit_command" in OTHERS[module]) == (module == "cli"), module


def test_the_command_imports_the_package_and_all_that_is_slow_inside_functions():
    files = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in COMMAND_FILES}
    assert sorted(name for layer in COMMAND for name in layer) == sorted(files)
    above = set()
    for layer in COMMAND:
        for name in layer:
            own, others = imports(files[name], name)
            assert own <= above, name
            at_start = set().union(
                *(imports(node, name)[1] for node in files[name].body if isinstance(node, ast.Import | ast.ImportFrom))
            )
            assert at_start <= {*sys.stdlib_module_names, "typer"}, name
            assert "hydravit_command" not in others, name
        above |= set(layer)


def test_every_public_name_can_be_imported():
    for name in hydravit_hf.__all__:
        assert getattr(hydravit_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        hydravit_hf.nonsense  # noqa: B018


def test_each_file_that_travels_has_a_test_file():
    for name in MODEL:
        assert (ROOT / "tests" / "model" / f"test_{name}.py").is_file(), name
