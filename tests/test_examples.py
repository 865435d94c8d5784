"""The training scripts run as their users run them: as processes, on real data, to the end or to a kill."""

import json
import re
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from support.cards import check_card
from support.scripts import EXAMPLES, finish, run, stop_when_there_is
from transformers import AutoImageProcessor, pipeline

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, make_image_processor
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.training.arguments import (
    AugmentationArguments,
    DataArguments,
    LoopArguments,
    ModelArguments,
    RunArguments,
    parse_arguments,
)
from hydravit_hf.training.steps import SubnetworkTrainingArguments

SIZES = ["--num_attention_heads", 4, "--num_hidden_layers", 1]
TINY = [*SIZES, "--max_train_steps", 24, "--drop_path_rate", 0.1]
TINY_TRAINER = [*SIZES, "--max_steps", 24, "--drop_path_rate", 0.1, "--disable_tqdm", "True"]
FINETUNE = ["--max_steps", 4, "--per_device_train_batch_size", 16, "--disable_tqdm", "True"]


def train(output_dir: Path, *arguments) -> str:
    return finish("train_accelerate.py", "--output_dir", output_dir, *TINY, *arguments)


def held_out_digits(folder: Path):
    processor = AutoImageProcessor.from_pretrained(folder)
    return load_digits()["test"].with_transform(to_pixel_values(processor))


def odd_digits(folder: Path):
    """The held-out digits under the labels that fine-tuning learns."""
    test = load_digits()["test"].map(lambda label: {"label": label % 2}, input_columns="label")
    return test.with_transform(to_pixel_values(AutoImageProcessor.from_pretrained(folder)))


def assert_equal_weights(one: Path, other: Path):
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def assert_equal_results(one: Path, other: Path):
    expected, found = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    for key in ("num_heads", "accuracy", "top5_accuracy", "loss"):
        assert [row[key] for row in expected] == [row[key] for row in found]


def save_images(folder: Path, count: int):
    """Save digits as a folder of images."""
    for index, item in enumerate(load_digits()["train"].select(range(count))):
        file = folder / str(item["label"]) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        item["image"].save(file)


def save_shards(folder: Path):
    """Save the digits as parquet files."""
    digits = load_digits()
    folder.mkdir()
    for index in range(2):
        digits["train"].shard(2, index).to_parquet(folder / f"train-{index:05d}-of-00002.parquet")
    digits["test"].to_parquet(folder / "test-00000-of-00001.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# train_accelerate.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of a short run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    tracking = ["--with_tracking", "--report_to", "tensorboard"]
    return folder, train(folder, *tracking, "--evaluation_epochs", 1, "--checkpointing_steps", 12)


def test_training_leaves_one_checkpoint_whose_card_is_true_at_every_width(trained):
    folder, printed = trained
    whole = HydraViTForImageClassification.from_pretrained(folder)
    check_card(folder, whole, held_out_digits(folder), [3, 4])
    rows = json.loads((folder / "results.json").read_text())
    assert rows[-1]["accuracy"] > 0.3  # chance is 0.1
    assert all(f"{row['accuracy']:.2%}" in printed for row in rows)
    assert printed.count("| heads |") == 2  # after the first epoch and at the end
    with Image.open(folder / "accuracy_over_macs.png") as plot:
        assert plot.format == "PNG"
    assert list(folder.rglob("events.out.tfevents.*"))


def test_training_leaves_its_recipe_on_the_card_which_trains_again(trained, tmp_path, monkeypatch):
    card = ModelCard.load(trained[0] / "README.md")
    recipe = re.search("```yaml\n(.*?)```", card.text, flags=re.DOTALL)[1]
    assert "max_train_steps: 24" in recipe and "flip" not in recipe
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.setattr(sys, "argv", ["train_accelerate.py", "--config", str(tmp_path / "recipe.yaml")])
    classes = (DataArguments, ModelArguments, AugmentationArguments, SubnetworkTrainingArguments, LoopArguments)
    parsed = parse_arguments("Train.", (*classes, RunArguments))[:-1]
    settings = {name: value for args in parsed for name, value in asdict(args).items() if value is not None}
    assert {name: str(value) for name, value in settings.items()} == json.loads((trained[0] / "run.json").read_text())


def test_a_trained_folder_serves_in_the_stock_pipeline(trained):
    digits = load_digits()["test"].select(range(100))
    classify = pipeline("image-classification", model=str(trained[0]), model_kwargs={"num_attention_heads": 3})
    predictions = classify(list(digits["image"]), top_k=1)
    assert sum(int(rows[0]["label"]) == label for rows, label in zip(predictions, digits["label"], strict=True)) > 20


def test_a_run_that_resumes_from_its_middle_ends_with_the_same_weights(trained, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(trained[0], folder, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-24"))
    shutil.copytree(trained[0] / "checkpoint-12", folder / "checkpoint-12", dirs_exist_ok=True)
    assert "Resumed from" in train(folder, "--resume_from_checkpoint", "latest")
    assert_equal_weights(trained[0], folder)
    assert_equal_results(trained[0], folder)


@pytest.mark.slow  # its fast sibling is the test above
def test_a_run_that_is_killed_or_told_to_end_and_resumed_has_the_weights_of_one_that_was_not(tmp_path):
    options = [*TINY, "--checkpointing_steps", "4", "--gradient_accumulation_steps", "2", "--augment"]
    options += ["--mixup_alpha", "0.2", "--subnetwork_sampling", "sandwich", "--distillation_weight", "0.5"]
    finish("train_accelerate.py", "--output_dir", tmp_path / "whole", *options)
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0), (signal.SIGINT, 130)):
        folder = tmp_path / sent.name
        stopped = ["train_accelerate.py", "--output_dir", folder, *options]
        # in the middle of the second epoch of 11 steps
        assert stop_when_there_is(folder / "checkpoint-12", *stopped, sent=sent) == code
        assert not (folder / "model.safetensors").exists()
        assert "Resumed from" in finish(*stopped, "--resume_from_checkpoint", "latest")
        assert_equal_weights(tmp_path / "whole", folder)
        assert_equal_results(tmp_path / "whole", folder)


def test_a_folder_that_holds_another_run_is_left_alone(trained):
    folder, _ = trained
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    result = run("train_accelerate.py", "--output_dir", folder, *TINY)
    assert result.returncode != 0
    assert "is not empty" in result.stderr.splitlines()[-1]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_run_is_not_resumed_on_other_data_than_it_began_with(trained, tmp_path):
    shutil.copy(trained[0] / "run.json", tmp_path)
    began_with = json.loads((trained[0] / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(began_with | {"images": 7}))
    result = run("train_accelerate.py", "--output_dir", tmp_path, *TINY, "--resume_from_checkpoint", "latest")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].endswith("another run than the one to resume: images was 7 and is 1437.")


@pytest.mark.slow  # its fast sibling is the test of a run that resumes from its middle
def test_a_run_that_is_resumed_from_its_last_checkpoint_takes_no_more_step(trained, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(trained[0], folder, ignore=shutil.ignore_patterns("model.safetensors"))
    shutil.copytree(trained[0] / "checkpoint-24", folder / "checkpoint-24", dirs_exist_ok=True)
    assert "checkpoint-24" in train(folder, "--resume_from_checkpoint", "latest")
    assert_equal_weights(trained[0], folder)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-24"]


@pytest.mark.slow  # its fast siblings are the tests of the files by width
def test_training_saves_files_by_width(tmp_path):
    train(tmp_path / "loop", "--shard_by_heads", "--max_train_steps", 4)
    finish("train_trainer.py", "--output_dir", tmp_path / "trainer", *TINY_TRAINER, "--shard_by_heads")
    for name in ("loop", "trainer"):
        files = [file.name for file in sorted((tmp_path / name).glob("*.safetensors"))]
        assert files == ["model-03-heads.safetensors", "model-04-heads.safetensors"]
        whole = HydraViTForImageClassification.from_pretrained(tmp_path / name)
        check_card(tmp_path / name, whole, held_out_digits(tmp_path / name), [3, 4])


@pytest.mark.slow  # its fast siblings are the tests of `make_model` and of the steps of such a model
def test_stages_that_recycle_tokens_are_trained_from_an_ordinary_checkpoint(trained, tmp_path):
    train(tmp_path, "--model_name_or_path", trained[0], "--token_recycling", "--subnetwork_heads", 2, 4)
    model = HydraViTForImageClassification.from_pretrained(tmp_path)
    assert model.config.token_recycling and model.config.subnetwork_heads == [2, 4]
    assert model.hydravit.recycling.weight.any()
    rows = json.loads((tmp_path / "results.json").read_text())
    counted = [model.config.count_macs(num_heads) for num_heads in (2, 4)]
    assert [row["macs"] for row in rows] == pytest.approx(counted, rel=1e-3)
    assert "recycles tokens" in (tmp_path / "README.md").read_text()


@pytest.mark.slow  # its fast siblings are the tests of `make_model`
def test_training_starts_from_a_folder_of_images_and_a_stock_vit(trained, tmp_path):
    save_images(tmp_path / "images", 120)
    HydraViTForImageClassification.from_pretrained(trained[0]).to_vit(3).save_pretrained(tmp_path / "vit")
    options = ["--data_dir", tmp_path / "images", "--max_train_steps", 2, "--per_device_train_batch_size", 16]
    train(tmp_path / "out", "--from_vit", tmp_path / "vit", *options)
    model = HydraViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_attention_heads == 4
    assert model.config.id2label == {index: str(index) for index in range(10)}


@pytest.mark.slow  # its fast siblings are the tests of `make_model` and of the teacher
@pytest.mark.parametrize("script", ["train_accelerate.py", "train_trainer.py"])
def test_a_vit_is_made_elastic_and_teaches(trained, tmp_path, script):
    vit = HydraViTForImageClassification.from_pretrained(trained[0]).to_vit(4)
    vit.save_pretrained(tmp_path / "vit")
    length = ["--max_train_steps" if "accelerate" in script else "--max_steps", 2]
    options = ["--from_vit", tmp_path / "vit", "--elastify", *length, "--output_dir", tmp_path / "out"]
    finish(script, *options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The teacher, vit, has" in card and "elastify" in card
    assert HydraViTForImageClassification.from_pretrained(tmp_path / "out").config.num_attention_heads == 4


@pytest.mark.slow  # its fast sibling is the test of streams of `make_datasets`
def test_the_recipe_of_the_paper_streams_parquet_files_of_any_data_set(tmp_path):
    save_shards(tmp_path / "shards")
    options = ["--config", EXAMPLES / "imagenet1k.yaml", "--data_dir", tmp_path / "shards", "--streaming"]
    options += [*SIZES, "--image_size", 16, "--patch_size", 8, "--num_workers", 2]
    length = ["--steps_per_epoch", 3, "--max_train_steps", 5, "--per_device_train_batch_size", 16]
    finish("train_accelerate.py", *options, *length, "--output_dir", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["ema_decay"] == "0.99996" and settings["steps_per_epoch"] == "3"
    assert HydraViTForImageClassification.from_pretrained(tmp_path / "run").config.drop_path_rate == 0.1
    too_long = ["--steps_per_epoch", 30, "--max_train_steps", 30, "--per_device_train_batch_size", 64]
    result = run("train_accelerate.py", *options, *too_long, "--output_dir", tmp_path / "too_long")
    assert result.returncode != 0
    assert "ValueError: The stream ended after 22 of 30 steps" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# train_trainer.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_by_trainer(tmp_path_factory):
    """The output folder of a short run of `HydraViTTrainer`, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "trainer"
    saves = ["--save_strategy", "steps", "--save_steps", 12, "--ema_decay", 0.9]
    return folder, finish("train_trainer.py", "--output_dir", folder, *TINY_TRAINER, *saves)


def test_the_trainer_leaves_one_checkpoint_whose_card_is_true_at_every_width(trained_by_trainer):
    folder, printed = trained_by_trainer
    whole = HydraViTForImageClassification.from_pretrained(folder)
    check_card(folder, whole, held_out_digits(folder), [3, 4])
    rows = json.loads((folder / "results.json").read_text())
    assert rows[-1]["accuracy"] > 0.3  # chance is 0.1
    assert all(f"{row['latency_ms']:.2f} ms" in printed and f"{row['accuracy']:.2%}" in printed for row in rows)
    text = (folder / "README.md").read_text()
    assert "360 held-out images of the handwritten digits" in text
    assert "python examples/train_trainer.py --output_dir" in text


def test_a_trainer_that_resumes_from_its_middle_ends_with_the_same_weights(trained_by_trainer, tmp_path):
    whole, folder = trained_by_trainer[0], tmp_path / "resumed"
    folder.mkdir()
    shutil.copytree(whole / "checkpoint-12", folder / "checkpoint-12")
    shutil.copytree(whole / "checkpoint-24", folder / "checkpoint-24")
    (folder / "checkpoint-24" / "trainer_state.json").unlink()  # as if it had been killed while saving
    options = ["--save_strategy", "steps", "--save_steps", 12, "--ema_decay", 0.9, "--resume_from_checkpoint", "latest"]
    finish("train_trainer.py", "--output_dir", folder, *TINY_TRAINER, *options)
    assert_equal_weights(whole, folder)
    assert_equal_results(whole, folder)


# ---------------------------------------------------------------------------------------------------------------------
# finetune_trainer.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    """A folder with a new model of the digits."""
    folder = tmp_path_factory.mktemp("digits")
    sizes = {"num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = HydraViTConfig(**sizes, num_labels=10)
    HydraViTForImageClassification(config).save_pretrained(folder)
    make_image_processor(config, image_mean=(0.25,) * 3, image_std=(0.5,) * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finetuned(digits_model, tmp_path_factory):
    """The options of a run on other labels at another image size, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "odd"
    options = [*FINETUNE, "--model_name_or_path", digits_model, "--image_size", 16]
    options += ["--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 3]
    return options, folder, finish("finetune_trainer.py", *options, "--output_dir", folder)


def test_finetuning_leaves_other_labels_at_another_image_size_and_a_card(finetuned):
    _, folder, printed = finetuned
    model = HydraViTForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "even", 1: "odd"}
    assert model.config.image_size == 16
    processor = AutoImageProcessor.from_pretrained(folder)
    assert dict(processor.size) == {"height": 16, "width": 16}
    assert list(processor.image_mean) == [0.25] * 3
    check_card(folder, model, odd_digits(folder), [3, 4])
    for row in json.loads((folder / "results.json").read_text()):
        costs = f"{row['parameters'] / 1e6:.2f} M | {row['macs'] / 1e6:.1f} M |"
        assert re.search(rf"\| +{row['num_heads']} \| +{re.escape(costs)} .* \| +{row['accuracy']:.2%} \|", printed)


def test_finetuning_resumes_from_its_last_whole_checkpoint(finetuned, tmp_path):
    options, whole, _ = finetuned
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-3").mkdir()  # that of a run that was killed while saving
    arguments = [*options, "--output_dir", tmp_path, "--resume_from_checkpoint", "latest"]
    result = run("finetune_trainer.py", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "checkpoint-3' was not saved whole" in result.stderr
    assert_equal_weights(whole, tmp_path)


def test_finetuning_with_lora_leaves_an_adapter_and_a_model_that_has_it_in_its_weights(digits_model, tmp_path):
    pytest.importorskip("peft")
    options = [*FINETUNE, "--model_name_or_path", digits_model, "--lora", 2, "--learning_rate", 1e-2]
    finish("finetune_trainer.py", *options, "--output_dir", tmp_path)
    merged = HydraViTForImageClassification.from_pretrained(tmp_path)
    labels = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}, "ignore_mismatched_sizes": True}
    images = torch.stack([item["pixel_values"] for item in [*held_out_digits(tmp_path)][:8]])
    for num_heads in (3, 4):
        kwargs = {"num_attention_heads": num_heads, **labels}
        adapted = HydraViTForImageClassification.from_pretrained(tmp_path / "adapter", **kwargs)
        expected = merged(images, num_heads_active=num_heads).logits
        torch.testing.assert_close(adapted(images).logits, expected, atol=1e-5, rtol=0)
    check_card(tmp_path, merged, odd_digits(tmp_path), [3, 4])
    adapter, whole = (tmp_path / name for name in ("adapter/adapter_model.safetensors", "model.safetensors"))
    assert adapter.stat().st_size < whole.stat().st_size


def test_finetuning_starts_from_a_stock_vit_and_takes_the_labels_from_a_folder_of_images(digits_model, tmp_path):
    for index in range(40):
        file = tmp_path / "images" / ("dark" if index % 2 else "light") / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (50 + index, 60, 70)).save(file)
    HydraViTForImageClassification.from_pretrained(digits_model).to_vit(3).save_pretrained(tmp_path / "vit")
    options = ["--from_vit", tmp_path / "vit", "--num_attention_heads", 5, "--data_dir", tmp_path / "images"]
    options += ["--eval_strategy", "no", "--save_strategy", "no", "--output_dir", tmp_path / "out"]
    finish("finetune_trainer.py", *FINETUNE, *options)
    model = HydraViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "dark", 1: "light"}
    assert (model.config.num_attention_heads, model.config.image_size) == (5, 8)
    assert [row["num_heads"] for row in json.loads((tmp_path / "out" / "results.json").read_text())] == [3, 4, 5]


@pytest.mark.parametrize(
    "script",
    [
        "train_accelerate.py",
        pytest.param("train_trainer.py", marks=pytest.mark.slow),
        pytest.param("finetune_trainer.py", marks=pytest.mark.slow),
    ],
)
def test_a_broken_image_is_named_or_left_out(digits_model, tmp_path, script):
    save_images(tmp_path / "images", 60)
    broken = next((tmp_path / "images").glob("3/*.png"))
    broken.write_bytes(broken.read_bytes()[:-60])
    options = ["--data_dir", tmp_path / "images", "--model_name_or_path", digits_model]
    options += ["--output_dir", tmp_path / "out"]
    options += ["--per_device_train_batch_size", 8]
    options += ["--max_train_steps", 8, "--num_workers", 1] if script == "train_accelerate.py" else ["--max_steps", 8]
    result = run(script, *options)
    assert result.returncode != 0
    assert f"\nValueError: '{broken}' can't be read: " in result.stderr  # the bar of the steps may follow
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    printed = finish(script, *options, "--skip_broken_images")
    assert "held-out images of images (1 broken images left out)\n" in printed
    assert "(1 broken images left out)" in (tmp_path / "out" / "README.md").read_text()


def test_a_wrong_model_path_is_one_line_that_names_it(tmp_path):
    options = [*FINETUNE, "--output_dir", tmp_path / "out"]
    result = run("finetune_trainer.py", *options, "--model_name_or_path", tmp_path / "nowhere")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"There is no model to start from at '{tmp_path / 'nowhere'}'. ")
    assert not (tmp_path / "out").exists()
    result = run("finetune_trainer.py", *options, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("There is no 'runs/digits' yet: run examples/train_accelerate.py")
