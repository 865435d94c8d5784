"""Trains a small HydraViT on scikit-learn's handwritten digits when the page first starts."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from transformers import pipeline, set_seed

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.evaluation import evaluate_subnetworks
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model.pipeline_hydravit import TASK
from hydravit_hf.profiling import add_costs
from hydravit_hf.training.trainer import HydraViTTrainer, HydraViTTrainingArguments

EASY, HARD = 10, 5  # example images: the first of each digit, and the ones that are hardest for the narrowest width
ENLARGED = 28  # times, so that people can see 8 x 8 pixels


def find_or_train() -> Path:
    """Find the folder of the trained model, with its image processor, results.json and example images, or make it."""
    cache = Path(os.environ.get("HYDRAVIT_SPACE_CACHE") or Path.home() / ".cache" / "hydravit_space")
    folder = cache / "digits"
    if not folder.exists():
        print("Training a small model on handwritten digits: half a minute on two CPU cores, the first time only.")
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as unfinished:
            train(Path(unfinished) / "digits")
            (Path(unfinished) / "digits").rename(folder)
    return folder


def train(folder: Path, epochs: int = 25, seed: int = 0):
    set_seed(seed)
    digits = load_digits()
    labels = digits["train"].features["label"].names
    config = HydraViTConfig(
        head_dim=32,
        num_hidden_layers=3,
        image_size=8,
        patch_size=4,
        subnetwork_weights=[3] + 9 * [1],
        id2label=dict(enumerate(labels)),
    )
    model = HydraViTForImageClassification(config)
    processor = make_image_processor(config)
    processor.resample = Image.Resampling.BOX  # gives back the pixels of an enlarged digit exactly
    splits = digits.with_transform(to_pixel_values(processor))
    args = HydraViTTrainingArguments(
        str(folder),
        seed=seed,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=7e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a share of all steps
        weight_decay=0.05,
        label_smoothing_factor=0.1,
        ema_decay=0.98,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    HydraViTTrainer(model, args, train_dataset=splits["train"]).train()
    rows = add_costs(config, evaluate_subnetworks(model, splits["test"], batch_size=128, disable_tqdm=True))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    save_examples(model, processor, digits["test"], folder / "examples")


def save_examples(model, processor, test, folder: Path):
    images, labels = list(test["image"]), list(test["label"])
    classify = pipeline(TASK, model=model, image_processor=processor, top_k=len(set(labels)), batch_size=128)
    answers = classify(images, num_heads_active=model.config.subnetwork_heads[0])
    names = [model.config.id2label[label] for label in labels]
    scores = [{row["label"]: row["score"] for row in answer}[name] for answer, name in zip(answers, names, strict=True)]
    hardest = sorted(range(len(test)), key=scores.__getitem__)[:HARD]
    folder.mkdir()
    for number, index in enumerate([*map(labels.index, range(EASY)), *hardest]):
        image = images[index].resize((8 * ENLARGED, 8 * ENLARGED), Image.Resampling.NEAREST)
        image.save(folder / f"{number:02d}.png")
