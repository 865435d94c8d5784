"""Every snippet of the README and of the pages on training, loading and elastify runs, in order.

What the pages link to exists, and so do the commands that they name.
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
from transformers import AutoModelForImageClassification

import hydravit_hf
from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, HydraViTModel, cli
from hydravit_hf.data import load_digits
from hydravit_hf.image_processing import make_image_processor

ROOT = Path(__file__).parents[1]
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/*.md", "examples/space/*.md")
    for file in ROOT.glob(pattern)
}
README, TRAINING = PAGES["README.md"], PAGES["docs/training.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def snippets(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def trained(make_model, tmp_path, monkeypatch):
    model = make_model(num_attention_heads=12, subnetwork_heads=None, num_labels=10, image_size=8)
    model.save_pretrained(tmp_path / "runs" / "digits")
    make_image_processor(model.config).save_pretrained(tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)


def test_the_python_snippets_run_in_one_interpreter_and_do_what_they_say(trained, capsys):
    names = {}
    for number, snippet in enumerate(snippets("python")):
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


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_snippets_on_training_train_a_checkpoint_that_loads_at_any_width(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, snippet in enumerate(snippets("python", TRAINING)):
        exec(compile(snippet, f"docs/training.md snippet {number + 1}", "exec"), names)
    assert names["model"].config.stages(6) == [3, 6]
    loaded = HydraViTForImageClassification.from_pretrained("runs/trainer", num_attention_heads=3)
    assert loaded.config.subnetwork_heads == [3]
    assert "eval_3_heads_accuracy" in names["trainer"].state.log_history[-1]
    for folder in ("runs/trainer", "runs/stock"):
        assert len(ModelCard.load(f"{folder}/README.md").data.eval_results) == 4
        assert {"results.json", "accuracy_over_macs.png"} <= {file.name for file in Path(folder).iterdir()}


def test_the_snippets_on_elastify_make_a_vit_elastic_and_teach_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, snippet in enumerate(snippets("python", PAGES["docs/elastify.md"])):
        exec(compile(snippet, f"docs/elastify.md snippet {number + 1}", "exec"), names)
        if number == 0:
            digits, model, vit = names["images"][:4]["image"], names["model"], names["vit"]
            processor = make_image_processor(model.config)
            pixel_values = processor(digits, return_tensors="pt").pixel_values
            torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, atol=1e-4, rtol=0)
    assert names["trainer"].state.global_step == 2


def test_the_snippets_on_loading_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, snippet in enumerate(snippets("python", PAGES["docs/loading.md"])):
        exec(compile(snippet, f"docs/loading.md snippet {number + 1}", "exec"), names)
    assert (names["small"].config.hidden_size, names["middle"].config.hidden_size) == (192, 320)


def test_the_snippet_on_serving_replays_a_load(capsys):
    (snippet,) = snippets("python", PAGES["docs/serving.md"])
    exec(compile(snippet, "docs/serving.md", "exec"), {})
    assert re.match(r"100 of 100 on time, at \{\d", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_snippets_on_data_train_on_several_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, snippet in enumerate(snippets("python", PAGES["docs/data.md"])):
        exec(compile(snippet, f"docs/data.md snippet {number + 1}", "exec"), names)
    assert names["left_out"] == {"train": 0, "test": 0} and names["train_dataset"][0]["pixel_values"].shape == (3, 8, 8)
    assert names["trainer"].evaluate().keys() >= {"eval_3_heads_average_precision", "eval_mean_average_precision"}


def test_the_commands_install_extras_that_exist():
    *commands, shell = snippets("bash")
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
    commands = typer.main.get_command(cli.app).commands
    lines = re.findall("`(hydravit [a-z][^`]*)`", PAGES[page])
    lines += [line for line in "".join(snippets("bash", PAGES[page])).splitlines() if line.startswith("hydravit ")]
    for line in lines:
        _, name, *arguments = shlex.split(line)
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= known, line


def test_the_tree_of_the_package_names_each_of_its_files():
    tree = re.search("```\nhydravit_hf/\n(.*?)```", PAGES["CONTRIBUTING.md"], flags=re.DOTALL)[1]
    named, folder = [], ""
    for indent, name in re.findall(r"^( +)([\w./]+)", tree, flags=re.MULTILINE):
        folder = "" if len(indent) == 2 else folder
        named.append(folder + name)
        folder = name if name.endswith("/") else folder
    package = ROOT / "hydravit_hf"
    files = [*package.glob("*.*"), *package.glob("*/[a-z]*.py"), *package.glob("browser_page/*")]
    files += [package / "browser_page", package / "model", package / "training"]
    names = [file.relative_to(package).as_posix() + "/" * file.is_dir() for file in files]
    assert sorted(named) == sorted(names)


def test_the_lines_for_a_shell_run(trained, monkeypatch):
    load_digits()["test"][0]["image"].save("digit.png")
    for line in snippets("bash")[-1].splitlines():
        name, *arguments = shlex.split(line)
        assert name == "hydravit"
        if arguments[0] == "card":  # what training leaves
            rows = [{"num_heads": heads, "accuracy": 0.9} for heads in range(3, 13)]
            Path("runs/digits/results.json").write_text(json.dumps(rows))
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
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
