"""The fine-tuning example, run as its users run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoImageProcessor

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, evaluate_subnetworks, make_image_processor
from hydravit_hf.data import load_digits, load_images, to_pixel_values

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune_trainer.py"


def finetune(*arguments, cwd=None) -> subprocess.CompletedProcess:
    options = ["--max_steps", 4, "--per_device_train_batch_size", 16, "--disable_tqdm", "True"]
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, [*options, *arguments])],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def digits_model(tmp_path):
    sizes = {"num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = HydraViTConfig(**sizes, num_labels=10)
    HydraViTForImageClassification(config).save_pretrained(tmp_path / "digits")
    processor = make_image_processor(config, image_mean=(0.25,) * 3, image_std=(0.5,) * 3)
    processor.save_pretrained(tmp_path / "digits")
    return tmp_path / "digits"


def test_other_labels_at_another_image_size(digits_model, tmp_path):
    folder = tmp_path / "odd"
    result = finetune("--model_name_or_path", digits_model, "--output_dir", folder, "--image_size", 16)
    assert result.returncode == 0, result.stderr[-3000:]
    narrow = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=3)
    assert narrow.config.id2label == {0: "even", 1: "odd"}
    assert narrow.config.image_size == 16
    processor = AutoImageProcessor.from_pretrained(folder)
    assert dict(processor.size) == {"height": 16, "width": 16}
    assert list(processor.image_mean) == [0.25] * 3
    test = load_digits()["test"].map(lambda label: {"label": label % 2}, input_columns="label")
    (row,) = evaluate_subnetworks(narrow, test.with_transform(to_pixel_values(processor)))
    assert f"|     3 |   {row['accuracy']:.2%} |" in result.stdout


def test_a_folder_of_images_names_the_labels(digits_model, tmp_path):
    for index in range(40):
        file = tmp_path / "images" / ("dark" if index % 2 else "light") / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (50 + index, 60, 70)).save(file)
    assert load_images(data_dir=tmp_path / "images")["train"].features["label"].names == ["dark", "light"]
    arguments = ["--data_dir", tmp_path / "images", "--learning_rate", 1e-3, "--eval_strategy", "no"]
    result = finetune("--model_name_or_path", digits_model, "--output_dir", tmp_path / "out", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    model = HydraViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "dark", 1: "light"}
    assert model.config.image_size == 8


def test_a_wrong_model_path_is_one_line_that_names_it(tmp_path):
    result = finetune("--model_name_or_path", tmp_path / "nowhere", "--output_dir", tmp_path / "out")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"No HydraViT to start from at '{tmp_path / 'nowhere'}'. ")
    assert not (tmp_path / "out").exists()
    result = finetune(cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("There is no 'runs/digits' yet: run examples/train_accelerate.py")
