"""What several tests of training share: a few digits, and trainers on them."""

import pytest
from support.training import QUIET, make_config, make_model

from hydravit_hf import HydraViTTrainer, HydraViTTrainingArguments, make_image_processor
from hydravit_hf.data import load_digits, to_pixel_values


@pytest.fixture(scope="session")
def images():
    """The digits as images, 84 of them to train on and 60 to test on."""
    digits = load_digits()
    return {"train": digits["train"].select(range(84)), "test": digits["test"].select(range(60))}


@pytest.fixture(scope="session")
def digits(images):
    """The same as items {"pixel_values", "labels"}."""
    transform = to_pixel_values(make_image_processor(make_config(), (0.5,) * 3, (0.5,) * 3))
    return {name: [*split.with_transform(transform)] for name, split in images.items()}


@pytest.fixture
def make_trainer(tmp_path, digits):
    """Makes trainers on the digits: keyword arguments go to the training arguments, `trainer` to the trainer."""

    def make(model=None, folder="run", trainer=None, **kwargs) -> HydraViTTrainer:
        defaults = {"max_steps": 8, "learning_rate": 3e-3, "save_strategy": "no", "logging_steps": 1}
        arguments = HydraViTTrainingArguments(
            str(tmp_path / folder), **QUIET | defaults | {"write_model_card": False} | kwargs
        )
        data = {"train_dataset": digits["train"], "eval_dataset": digits["test"]}
        return HydraViTTrainer(make_model() if model is None else model, arguments, **data | (trainer or {}))

    return make
