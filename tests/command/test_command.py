"""The command starts fast, and fails with one line that names what was typed."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from support.serving import free_port

from hydravit_command import EXTRAS, app
from hydravit_hf import __version__
from hydravit_hf.data import load_digits

ROOT = Path(__file__).parents[2]


def test_the_version_is_that_of_the_package(hydravit):
    assert hydravit("--version") == (0, f"hydravit_hf {__version__}\n", "")


def test_wrong_usage_exits_with_2(hydravit):
    for arguments, named in (
        ("profile", "MODEL"),
        ("predict model", "IMAGES"),
        ("nonsense", "nonsense"),
        ("profile model --batch-size 0", "--batch-size"),
        ("export model model.onnx --format tflite", "--format"),
        ("serve model --late never", "--late"),
        ("cascade model digits --criterion mood", "--criterion"),
    ):
        code, out, err = hydravit(*arguments.split())
        assert code == 2 and out == "" and named in err.splitlines()[-1]


def test_the_help_has_each_command_and_cuts_no_line(hydravit):
    code, out, _ = hydravit("--help")
    listed = out.partition("Commands:\n")[2]
    assert code == 0 and "..." not in listed
    assert [line.split()[0] for line in listed.splitlines()] == list(typer.main.get_command(app).commands)


def run_light(script: str, **environment) -> str:
    """The output of a script that imports the command, in a process that may import nothing heavy."""
    script = f"import sys\nfrom contextlib import suppress\nfrom hydravit_command import main\n{script}"
    script += "\nprint({'hydravit_hf', 'numpy', 'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert result.returncode == 0 and result.stderr == "set()\n", result.stderr
    return result.stdout


def test_the_help_and_the_version_import_neither_torch_nor_transformers():
    names = [[], *([name] for name in typer.main.get_command(app).commands)]
    out = run_light(f"""
for arguments in {[["--version"], *([*name, "--help"] for name in names)]}:
    sys.argv = ["hydravit", *arguments]
    with suppress(SystemExit):
        main()
""")
    assert out.startswith(f"hydravit_hf {__version__}\n") and out.count("Usage: hydravit ") == len(names)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("hydravit ex", {"extract", "export"}),
        ("hydravit profile --max-m", {"--max-macs", "--max-memory-mb"}),
        ("hydravit export model file --format o", {"onnx", "openvino"}),
    ],
)
def test_a_shell_completes_commands_and_options_without_importing_torch(typed, completed):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    out = run_light("with suppress(SystemExit):\n    main()", _HYDRAVIT_COMPLETE="complete_bash", **words)
    assert set(out.split()) == completed


def test_the_command_is_installed_with_all_of_its_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"hydravit": "hydravit_command:main"}
    packages = {file.parent.relative_to(ROOT).as_posix() for file in ROOT.glob("hydravit_hf/**/__init__.py")}
    names = {"hydravit_hf/command": "hydravit_command"}
    found = {names.get(package, package.replace("/", ".")) for package in packages}
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_the_extras_that_hints_name_are_those_that_bring_a_module():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    others = {"sklearn": "scikit_learn", "onnx_ir": "onnxscript", "multipart": "python_multipart"}
    for extra, modules in EXTRAS.items():
        packages = {package.replace("-", "_") for package in extras[extra]}
        assert {others.get(module, module) for module in modules} == packages, extra


@pytest.mark.parametrize(
    ("module", "arguments", "hint"),
    [
        ("torchao", ["quantize", "{folder}", "{new}"], 'pip install "hydravit_hf[quantize]"'),
        ("datasets", ["evaluate", "{folder}", "digits"], 'pip install "hydravit_hf[train]"'),
        ("starlette", ["serve", "{folder}"], 'pip install "hydravit_hf[serve]"'),
    ],
)
def test_a_missing_package_is_an_error_that_names_its_extra(
    hydravit, folder, tmp_path, monkeypatch, module, arguments, hint
):
    for name in [name for name in sys.modules if name.startswith((module, "hydravit_hf.server"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    arguments = [argument.format(folder=folder, new=tmp_path / "new") for argument in arguments]
    code, out, err = hydravit(*arguments)
    assert code == 1 and out == "" and err.startswith("error: ") and err.endswith(f": {hint}\n")
    assert err.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("profile {folder} --heads 7", "`--heads` must be an integer from 1 to 6"),
        ("profile {folder} --rounds 1 --max-macs 0", "`--max-macs` must be a positive number"),
        ("evaluate {folder} digits --heads 7", "`--heads` must be an integer from 1 to 6"),
        ("evaluate {folder} digits --split third", "`--split` must be one of"),
        ("predict {folder} image.png --num-heads 7", "`--num-heads` must be an integer from 1 to 6"),
        ("predict {folder} image.png --heads 3,1 --thresholds 1", "`--heads` of a cascade must be a list of integers"),
        ("predict {folder} image.png --heads 1,3 --thresholds 1,2", "`--thresholds` of a cascade of 2 widths"),
        ("predict {folder} image.png --cascade", "`hydravit cascade --save` fits one"),
        ("cascade {folder} digits", "`--max-macs`, `--max-latency-ms`, `--max-accuracy-loss`"),
        ("cascade {folder} digits --max-macs 1 --heads 3", "`--heads` must be two head counts or more"),
        ("extract {folder} 7 {new}", "error: NUM_HEADS must be an integer from 1 to 6"),
        ("export {folder} {new}.txt", "error: PATH must end with '.onnx'"),
        ("export {folder} {new}.onnx --heads 3,3", "`--heads` must have each width once"),
        ("reshard {folder} {new} --heads 7", "`--heads` must list some of"),
        ("serve {folder} --heads 7", "`--heads` must be an integer from 1 to 6"),
    ],
)
def test_an_error_names_what_was_typed(hydravit, folder, tmp_path, arguments, message):
    arguments = arguments.format(folder=folder, new=tmp_path / "new")
    code, _, err = hydravit(*arguments.split(), *(["--port", free_port()] if "serve" in arguments else []))
    assert code == 1 and message in err.splitlines()[-1], err
    assert not list(tmp_path.glob("new*"))


def test_an_error_of_any_kind_is_one_line(hydravit, folder, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("cat")

    monkeypatch.setattr("hydravit_hf.profiling.profile_subnetworks", fail)
    code, out, err = hydravit("profile", folder)
    assert (code, out, err) == (1, "", "error: KeyError: 'cat'\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["profile", "no/such-model"],
        ["evaluate", "no/such-model", "digits"],
        ["predict", "no/such-model", "image.png"],
        ["extract", "no/such-model", "3", "new"],
        ["convert", "no-such-file.pth.tar", "new"],
        ["card", "no-such-folder"],
        ["push", "no-such-folder", "user/name"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_does_not_exist_is_named_in_one_line(hydravit, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = hydravit(*arguments)
    assert code == 1 and out == "" and not list(tmp_path.iterdir())
    assert err.startswith("error: ") and err.count("\n") == 1 and arguments[1] in err


@pytest.mark.parametrize("typed", ["./missing", "/missing", "a/b/c", "{folder}s"])
def test_a_mistyped_path_is_not_sought_on_the_hub(hydravit, folder, typed):
    typed = typed.replace("{folder}", str(folder))
    for arguments in (("profile", typed), ("evaluate", typed, "digits"), ("evaluate", folder, typed)):
        code, out, err = hydravit(*arguments)
        assert code == 1 and not out and f"There is no folder '{typed}'." in err
    assert (f"Do you mean '{folder}'" in err) == typed.endswith("tinys")


def test_the_installed_command_keeps_json_apart_from_messages(folder, tmp_path):
    load_digits()["test"][0]["image"].save(tmp_path / "digit.png")
    command = [sys.executable, "-W", "error", "-m", "hydravit_hf.cli"]
    command += ["predict", folder, tmp_path / "digit.png", "--json"]
    # where torchao is installed, transformers imports it, and it logs what torch says of it
    env = os.environ | {"TORCH_LOGS": "-torch", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0 and len(json.loads(result.stdout)) == 1
    assert "error" not in result.stderr.lower() and "warning" not in result.stderr.lower()
