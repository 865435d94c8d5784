"""The example scripts run as their users run them: as processes, on real data, to the end or to a kill."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, pipeline

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.evaluation import evaluate_subnetworks

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--num_attention_heads", "4", "--num_hidden_layers", "1", "--max_train_steps", "24", "--drop_path_rate", "0.1"]


def command(script: str, *arguments) -> list[str]:
    return [sys.executable, str(EXAMPLES / script), *map(str, arguments)]


def run(script: str, *arguments, **kwargs) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(script, *arguments), env=environment, capture_output=True, text=True, timeout=300, **kwargs
    )


def train(output_dir: Path, *arguments) -> subprocess.CompletedProcess:
    result = run("train_accelerate.py", "--output_dir", output_dir, *TINY, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of a short run, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    result = train(folder, "--with_tracking", "--report_to", "tensorboard", "--evaluation_epochs", "1")
    return folder, result.stdout


def test_training_leaves_one_checkpoint_whose_table_is_true_at_every_width(trained):
    folder, printed = trained
    rows = json.loads((folder / "results.json").read_text())
    assert [row["num_heads"] for row in rows] == [3, 4]
    processor = AutoImageProcessor.from_pretrained(folder)
    test = load_digits()["test"].with_transform(to_pixel_values(processor))
    whole = HydraViTForImageClassification.from_pretrained(folder)
    for row in rows:
        (found,) = evaluate_subnetworks(whole, test, [row["num_heads"]], batch_size=50)
        assert found["accuracy"] == pytest.approx(row["accuracy"])
        assert f"{row['accuracy']:.2%}" in printed
        extracted = whole.extract_subnetwork(row["num_heads"])
        assert row["parameters"] == extracted.num_parameters()
    assert rows[-1]["accuracy"] > 0.3  # chance is 0.1
    with Image.open(folder / "accuracy_over_macs.png") as plot:
        assert plot.format == "PNG"
    card = ModelCard.load(folder / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == [round(row["accuracy"], 5) for row in rows]
    recipe = yaml.safe_load(re.search("```yaml\n(.*?)```", card.text, flags=re.DOTALL)[1])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train(folder, "--config", str(folder / "recipe.yaml"), "--help").returncode == 0
    assert list(folder.rglob("events.out.tfevents.*"))
    assert printed.count("| heads |") == 2  # after the first epoch and at the end


def test_what_was_trained_serves_in_the_stock_pipeline(trained):
    folder, _ = trained
    digits = load_digits()["test"]
    classify = pipeline("image-classification", model=str(folder), model_kwargs={"num_attention_heads": 3})
    predictions = classify([digits[index]["image"] for index in range(100)], top_k=1)
    correct = sum(predictions[index][0]["label"] == str(digits[index]["label"]) for index in range(100))
    assert correct > 20


def test_stages_that_recycle_tokens_are_trained_from_an_ordinary_checkpoint(trained, tmp_path):
    start = ["--model_name_or_path", trained[0], "--token_recycling", "--subnetwork_heads", "2", "4"]
    train(tmp_path, *start)
    model = HydraViTForImageClassification.from_pretrained(tmp_path)
    assert model.config.token_recycling and model.config.subnetwork_heads == [2, 4]
    assert model.hydravit.recycling.weight.any()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["macs"] for row in rows] == [model.config.count_macs(num_heads) for num_heads in (2, 4)]
    assert "recycles tokens" in (tmp_path / "README.md").read_text()


def test_a_run_that_is_killed_and_resumed_ends_with_the_weights_of_one_that_was_not(tmp_path):
    checkpoints = ["--checkpointing_steps", "4", "--gradient_accumulation_steps", "2", "--augment"]
    checkpoints += ["--mixup_alpha", "0.2", "--subnetwork_sampling", "sandwich", "--distillation_weight", "0.5"]
    train(tmp_path / "whole", *checkpoints)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command("train_accelerate.py", "--output_dir", killed, *TINY, *checkpoints),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-12").exists():  # in the middle of the second epoch of 11 steps
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists()
    result = train(killed, *checkpoints, "--resume_from_checkpoint", "latest")
    assert "Resumed from" in result.stdout
    expected, found = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    expected, found = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "whole", killed))
    for key in ("num_heads", "accuracy", "top5_accuracy", "loss"):
        assert [row[key] for row in expected] == [row[key] for row in found]


def test_a_folder_that_holds_another_run_is_left_alone(trained):
    folder, _ = trained
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    result = run("train_accelerate.py", "--output_dir", folder, *TINY)
    assert result.returncode != 0
    assert "is not empty" in result.stderr.splitlines()[-1]
    result = run(
        "train_accelerate.py", "--output_dir", folder, *TINY, "--seed", 1, "--resume_from_checkpoint", "latest"
    )
    assert result.returncode != 0
    assert "seed was '0' and is '1'" in result.stderr.splitlines()[-1]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_training_starts_from_a_folder_of_images_and_a_stock_vit(trained, tmp_path):
    folder, _ = trained
    digits = load_digits()["train"]
    for index in range(120):
        file = tmp_path / "images" / str(digits[index]["label"]) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        digits[index]["image"].save(file)
    HydraViTForImageClassification.from_pretrained(folder).to_vit(3).save_pretrained(tmp_path / "vit")
    arguments = ["--data_dir", tmp_path / "images", "--from_vit", tmp_path / "vit", "--max_train_steps", 2]
    train(tmp_path / "out", *arguments, "--per_device_train_batch_size", 16)
    model = HydraViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_attention_heads == 4
    assert model.config.id2label == {index: str(index) for index in range(10)}
    arguments[2:4] = ["--model_name_or_path", tmp_path / "out"]
    train(
        tmp_path / "again",
        *arguments,
        "--per_device_train_batch_size",
        16,
        "--separate_classifiers",
        "--ignore_mismatched_sizes",
    )
    assert HydraViTForImageClassification.from_pretrained(tmp_path / "again").classifier.weight.shape[0] == 2


def test_the_benchmark_of_forward_prints_a_row_for_each_width(tmp_path):
    arguments = ["--batch_size", 1, "--heads", 1, 2, "--rounds", 1, "--device", "cpu", "--json", tmp_path / "rows.json"]
    result = run("benchmark_forward.py", *arguments)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["num_heads"] for row in rows] == [1, 2]
    assert all(row["elastic_ms"] > 0 and row["stock_ms"] > 0 for row in rows)


@pytest.mark.slow  # its fast sibling is test_a_narrow_load_reads_the_leading_rows_only
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the benchmark is for Linux")
def test_the_benchmark_of_loading_prints_a_row_for_each_way():
    result = run("benchmark_loading.py", "--rounds", 1)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("num_attention_heads=3") == 2


def test_the_recipe_of_the_paper_streams_parquet_files_of_any_data_set(tmp_path):
    digits = load_digits()
    shards = tmp_path / "shards"
    shards.mkdir()
    for index in range(2):
        digits["train"].shard(2, index).to_parquet(shards / f"train-{index:05d}-of-00002.parquet")
    digits["test"].to_parquet(shards / "test-00000-of-00001.parquet")
    sizes = ["--num_attention_heads", 4, "--num_hidden_layers", 1, "--image_size", 16, "--patch_size", 8]
    run_options = ["--per_device_train_batch_size", 16, "--num_workers", 2, "--max_train_steps", 5]
    options = ["--config", EXAMPLES / "imagenet1k.yaml", "--data_dir", shards, "--streaming", "--steps_per_epoch", 3]
    result = run("train_accelerate.py", *options, *sizes, *run_options, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr[-3000:]
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["ema_decay"] == "0.99996" and settings["steps_per_epoch"] == "3"
    assert HydraViTForImageClassification.from_pretrained(tmp_path / "run").config.drop_path_rate == 0.1
    too_long = ["--steps_per_epoch", 30, "--max_train_steps", 30, "--per_device_train_batch_size", 64]
    result = run(
        "train_accelerate.py", *options, *sizes, *run_options, *too_long, "--output_dir", tmp_path / "too_long"
    )
    assert result.returncode != 0
    assert "ValueError: The stream ended after 22 of 30 steps" in result.stderr


def test_an_argument_that_no_one_knows_is_refused_in_a_configuration_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rat: 0.1\n")
    result = run("train_accelerate.py", "--config", tmp_path / "recipe.yaml")
    assert result.returncode == 2
    assert "learning_rat" in result.stderr.splitlines()[-1]


def test_the_benchmark_of_profiles_compares_two_and_measures_a_choice_again():
    result = run("benchmark_profile.py", "--heads", 1, 2, "--rounds", 1, "--budgets_ms", 1e9)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "1 heads: second median" in result.stdout and "budget 1e+09 ms: 2 heads, measured again" in result.stdout


def test_the_benchmark_of_a_step_prints_a_row_for_each_optimizer():
    result = run("benchmark_step.py", "--heads", 1, "--batch_size", 1, "--rounds", 1)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line.split("|") for line in result.stdout.splitlines() if line.startswith("| 1 |")]
    assert [row[2].strip() for row in rows] == ["stock ViT, AdamW", "HydraViT, AdamW", "HydraViT, PrefixAdamW"]


def test_the_tables_of_the_width_study_are_those_of_its_measurements(tmp_path):
    docs = EXAMPLES.parent / "docs"
    shutil.copy(docs / "width_study.json", tmp_path)
    result = run("width_study.py", "--report", "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    text = (docs / "training.md").read_text()
    assert len(lines) > 30
    assert all(line in text for line in lines)
    with Image.open(tmp_path / "width_study.png") as plot:
        assert plot.format == "PNG"


def test_the_width_study_trains_what_it_says(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    study = importlib.import_module("width_study")
    monkeypatch.setitem(study.DATA, "digits", (*study.DATA["digits"][:3], 1, 1e-3))
    threads = torch.get_num_threads()
    alone = [study.train("digits", seed=0, heads=[num_heads]) for num_heads in study.HEADS]
    total = sum(run["macs"] for run in alone)
    for name in ("MatFormer", "open sandwich, distilled"):
        options = {"seed": 0, "heads": study.HEADS, **study.STRATEGIES[name]}
        quarter = study.train("digits", share=0.25, **options)
        assert quarter["macs"] == pytest.approx(total / 4, rel=0.05)
        assert len(quarter["accuracy"]) == len(study.HEADS)
        assert study.train("digits", **options)["steps"] == alone[0]["steps"] == 22
    torch.set_num_threads(threads)
