"""Every snippet of the README and of docs/training.md runs, in order, on checkpoints like the first command's."""

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, HydraViTModel, cli
from hydravit_hf.data import load_digits
from hydravit_hf.image_processing import make_image_processor

ROOT = Path(__file__).parents[1]
README, TRAINING = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md"))


def snippets(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def trained(make_model, tmp_path, monkeypatch):
    model = make_model(num_attention_heads=12, subnetwork_heads=None, num_labels=10, image_size=8)
    model.save_pretrained(tmp_path / "runs" / "digits")
    make_image_processor(model.config).save_pretrained(tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)


def test_the_python_snippets_run_and_do_what_they_say(trained):
    names = {}
    assert len(snippets("python")) >= 3
    for number, snippet in enumerate(snippets("python")):
        exec(compile(snippet, f"README snippet {number + 1}", "exec"), names)
        if number == 0:
            assert names["small"].config.num_attention_heads == 3
            assert names["model"].config.num_heads_active == 6
            torch.testing.assert_close(names["vit"](names["pixel_values"]).logits, names["logits"], atol=1e-5, rtol=0)
            torch.testing.assert_close(names["small"](names["pixel_values"]).logits, names["logits"], atol=1e-5, rtol=0)
    assert names["model"].config.num_attention_heads == 12


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


def test_the_commands_install_extras_that_exist_and_run_files_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    *commands, shell = snippets("bash")
    assert len(commands) == 2 and len(shell.splitlines()) > 3
    for command in commands:
        assert command.count("\n") == 1  # one line installs and runs
        assert set(re.search(r"\[(.*)\]", command)[1].split(",")) <= set(extras)
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for path in re.findall(r"\]\(((?!http|#)[^)#]+)[^)]*\)", file.read_text(encoding="utf-8")):
            assert (file.parent / path).exists(), path


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
        if arguments[0] == "push":  # there is no Hub here: the checks of the folder passed
            assert "offline" in str(stop.value.code).lower()
        else:
            assert not stop.value.code
    assert ModelCard.load("runs/digits/README.md").data.eval_results
    assert type(AutoModelForImageClassification.from_pretrained("digits-tiny")).__name__ == "ViTForImageClassification"


def test_the_table_of_costs_is_that_of_the_default_model():
    config = HydraViTConfig(num_labels=1000)
    rows = re.findall(r"^\| +(\d+) \| +([\d.]+) M \| +([\d.]+) G \|", README, flags=re.MULTILINE)
    assert [int(heads) for heads, *_ in rows] == config.subnetwork_heads
    for heads, parameters, macs in rows:
        assert f"{config.count_parameters(int(heads)) / 1e6:.2f}" == parameters
        assert f"{config.count_macs(int(heads)) / 1e9:.2f}" == macs


def test_what_the_readme_names_exists():
    for name in re.findall(r"`(\w+)`", README):
        known = hasattr(HydraViTForImageClassification, name) or hasattr(HydraViTModel, name)
        assert known or name in {
            "hydravit_hf",
            "HydraViTBackbone",
            "HydraViTTrainer",
            "create_model_card",
            "PreTrainedModel",
            "Trainer",
            "num_heads_active",
            "num_attention_heads",
        }, name
