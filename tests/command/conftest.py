"""A tiny model and a folder of digits, on which the tests of the command run."""

import pytest

from hydravit_hf.data import load_digits
from hydravit_hf.image_processing import make_image_processor

LABELS = [str(digit) for digit in range(10)]


@pytest.fixture
def folder(make_model, tmp_path):
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    model = make_model(image_size=8, num_labels=10, num_hidden_layers=1, **labels)
    model.save_pretrained(tmp_path / "tiny")
    make_image_processor(model.config).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def digit_files(tmp_path):
    """A folder of digits in two splits."""
    for split, items in load_digits().items():
        for number, item in enumerate(items.select(range(20))):
            (tmp_path / "images" / split / str(item["label"])).mkdir(parents=True, exist_ok=True)
            item["image"].save(tmp_path / "images" / split / str(item["label"]) / f"{number}.png")
    return tmp_path / "images"
