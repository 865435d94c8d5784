"""Every snippet of the README runs, in order.

What all pages link to exists, and so do the commands that they name.
"""

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
import typer
from huggingface_hub import ModelCard
from support.pages import PAGES, ROOT, snippets
from transformers import AutoModelForImageClassification

import hydravit_command
import hydravit_hf
from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, HydraViTModel
from hydravit_hf.data import load_digits

README = PAGES["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def trained(save_digits):
    save_digits()


def test_the_python_snippets_run_in_one_interpreter_and_do_what_they_say(trained, capsys):
    names = {}
    for number, snippet in enumerate(snippets("python", README)):
        exec(compile(snippet, f"README snippet {number + 1}", "exec"), names)
        if number == 0:  # the output below it, with the labels and scores of another model
            shown = re.search(r"```\n\n```\n(.*?)```", README, flags=re.DOTALL)[1]
            found, expected = (
                re.sub(r"'(LABEL_)?\d'|\d[.]\d+", "x", text) for text in (capsys.readouterr().out, shown)
            )
            assert found == expected
    model, narrow = names["model"], names["logits"]
    for small in ("small", "vit", "remote"):
        torch.testing.assert_close(names[small](names["pixel_values"]).logits, narrow, atol=1e-5, rtol=0)
    assert model.config.num_attention_heads == 12 and names["loss"].requires_grad
    full = model(names["pixel_values"]).logits
    torch.testing.assert_close(names["elastic"](names["pixel_values"]).logits, full, atol=1e-4, rtol=0)
    assert names["outputs"].logits.shape == (1, 10) and names["fitted"]["cascade"]["num_heads"] == [3, 6, 12]


def test_the_commands_install_extras_that_exist():
    *commands, shell = snippets("bash", README)
    assert len(commands) == 2 and len(shell.splitlines()) > 3
    for command in commands:
        assert command.count("\n") == 1  # one line installs and runs
        assert set(re.search(r"\[(.*)\]", command)[1].split(",")) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_to_files_and_headings_that_exist(page):
    for path, anchor in re.findall(r"\]\(((?!http)[^)#]*)#?([^)]*)\)", PAGES[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            headings = re.findall("^#+ (.*)", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("page", PAGES)
def test_the_scripts_that_a_page_names_exist_and_have_the_options_that_it_gives(page):
    text = PAGES[page].replace("\\\n", " ")
    for script, arguments in re.findall(r"(examples/[\w/]+[.](?:py|yaml))([^`\n]*)", text):
        assert (ROOT / script).exists(), script
        sources = [ROOT / script, *(ROOT / "hydravit_hf" / "training").glob("*.py")]
        known = {word for file in sources for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
        assert script.endswith("yaml") or set(re.findall(r"--(\w+)", arguments)) <= known, script


@pytest.mark.parametrize("page", PAGES)
def test_the_hydravit_command_knows_the_options_that_a_page_gives(page):
    commands = typer.main.get_command(hydravit_command.app).commands
    lines = re.findall("`(hydravit [a-z][^`]*)`", PAGES[page])
    lines += [line for line in "".join(snippets("bash", PAGES[page])).splitlines() if line.startswith("hydravit ")]
    for line in lines:
        _, name, *arguments = shlex.split(line)
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= known, line


def test_the_tree_of_the_package_names_each_of_its_files():
    (tree,) = re.search("```\nhydravit_hf/\n(.*?)```", PAGES["CONTRIBUTING.md"], flags=re.DOTALL).groups()
    named, folder = [], ""
    for indent, name in re.findall(r"^( +)([\w./]+)", tree, flags=re.MULTILINE):
        folder = "" if len(indent) == 2 else folder
        named.append(folder + name)
        folder = name if name.endswith("/") else folder
    package = ROOT / "hydravit_hf"
    files = [file for file in package.rglob("*") if "__pycache__" not in file.parts and file.name != "__init__.py"]
    names = ["__init__.py", *(file.relative_to(package).as_posix() + "/" * file.is_dir() for file in files)]
    assert sorted(named) == sorted(names)


def test_the_lines_for_a_shell_run(trained, monkeypatch):
    load_digits()["test"][0]["image"].save("digit.png")
    for line in snippets("bash", README)[-1].splitlines():
        name, *arguments = shlex.split(line)
        assert name == "hydravit"
        if arguments[0] == "card":  # what training leaves
            rows = [{"num_heads": heads, "accuracy": 0.9} for heads in range(3, 13)]
            Path("runs/digits/results.json").write_text(json.dumps(rows))
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as stop:
            hydravit_command.main()
        if arguments[0] == "push":  # there is no token here: the checks of the folder passed
            assert "hf auth login" in str(stop.value.code)
        else:
            assert not stop.value.code
    assert ModelCard.load("runs/digits/README.md").data.eval_results
    assert type(AutoModelForImageClassification.from_pretrained("digits-tiny")).__name__ == "ViTForImageClassification"


def test_the_table_of_costs_is_that_of_the_default_model():
    config = HydraViTConfig(num_labels=1000)
    pages = README, PAGES["docs/costs.md"]
    short, rows = (re.findall(r"^\| +(\d+) \| +([\d.]+) M \| +([\d.]+) G \|(.*)", page, re.MULTILINE) for page in pages)
    assert [int(heads) for heads, *_ in rows] == config.subnetwork_heads
    for *costs, rest in short:
        assert costs in [row[:3] for row in map(list, rows)]
        *_, download = re.findall(r"(\d+) MB", rest)
        assert int(download) == round(4e-6 * config.count_parameters(int(costs[0])))
    for heads, parameters, macs, _ in rows:
        assert f"{config.count_parameters(int(heads)) / 1e6:.2f}" == parameters
        assert f"{config.count_macs(int(heads)) / 1e9:.2f}" == macs


def test_what_the_readme_names_exists():
    homes = (hydravit_hf, HydraViTForImageClassification, HydraViTModel, HydraViTConfig, transformers)
    for name in re.findall(r"`(\w+)`", README):
        known = name in {"hydravit_hf", *PROJECT["scripts"]} or any(hasattr(home, name) for home in homes)
        assert known, name
