"""The wheel holds every file of the packages, and their types are right in a user's file."""

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes

import pytest
from support.pages import ROOT

# Following other packages takes mypy minutes: their types are `Any` here. The files of hydravit_hf give their types and
# no errors of their own, as those of an installed package do.
MYPY = """
[mypy]
[mypy-torch.*,transformers.*,huggingface_hub.*,numpy.*,PIL.*,accelerate.*,datasets.*,evaluate.*,tqdm.*,safetensors.*]
follow_imports = skip
[mypy-matplotlib.*,peft.*,onnx.*,onnxruntime.*,onnxscript.*,openvino.*]
follow_imports = skip
[mypy-hydravit_hf.*]
follow_imports = silent
"""
WRONG = "from hydravit_hf import choose_num_heads\nnum_heads: str = choose_num_heads([], max_latency_ms=50)\n"


def test_the_wheel_holds_every_file_of_its_packages(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "hydravit_hf", source / "hydravit_hf", ignore=shutil.ignore_patterns("__pycache__"))
    files = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
    files = {name.replace("hydravit_hf/command/", "hydravit_command/") for name in files}
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "--wheel-dir", tmp_path, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    (wheel,) = tmp_path.glob("hydravit_hf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert files <= set(archive.namelist())
        (metadata,) = (archive.read(name) for name in archive.namelist() if name.endswith("/METADATA"))
        (commands,) = (archive.read(name) for name in archive.namelist() if name.endswith("/entry_points.txt"))
    described = message_from_bytes(metadata)
    assert described["Requires-Python"] == ">=3.11" and described["Description-Content-Type"] == "text/markdown"
    assert b"[console_scripts]\nhydravit = " in commands
    assert {"hydravit_hf/py.typed", "hydravit_hf/__init__.pyi", "hydravit_hf/model_card_template.md"} <= files
    assert {"hydravit_hf/server/page.html", "hydravit_hf/browser_page/index.html"} <= files


def test_mypy_accepts_a_file_that_uses_every_public_name_and_finds_a_wrong_type(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(MYPY)
    shutil.copy(ROOT / "tests" / "support" / "typed_user.py", tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "typed_user.py", "wrong.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    wrong, summary = result.stdout.splitlines()
    assert wrong.startswith('wrong.py:2: error: Incompatible types in assignment (expression has type "int"'), result
    assert summary.startswith("Found 1 error in 1 file"), summary


def test_the_typed_file_uses_every_public_name():
    import hydravit_hf

    text = (ROOT / "tests" / "support" / "typed_user.py").read_text(encoding="utf-8")
    used = text.partition("version: str")[2]
    assert [name for name in hydravit_hf.__all__ if name not in used] == []
