"""Every image is read once: what can't be read is named, what is in both splits is found, and all else stays."""

import shutil
from io import BytesIO

import numpy as np
import pytest
from accelerate import PartialState, debug_launcher
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from hydravit_hf.data import load_images
from hydravit_hf.data_checks import check_images, leave_out_broken, read_images


def encoded(number: int, kind: str = "PNG") -> bytes:
    file = BytesIO()
    PILImage.fromarray(np.random.default_rng(number).integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


BROKEN = {
    "truncated.png": (encoded(1)[:-500], "truncated"),
    "empty.jpg": (b"", "cannot identify image file"),
    "text.webp": (b"an error page", "cannot identify image file"),
    "other.bmp": (encoded(1, "EPS"), "cannot identify image file"),
}


@pytest.fixture
def folder(tmp_path):
    """Images of two classes in two splits, four of which are broken and one of which is in both splits."""
    for split, count in (("train", 60), ("val", 10)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                seed = 1000 * label + number + 100 * (split == "val")
                (tmp_path / split / name / f"{number}.png").write_bytes(encoded(seed))
    for name, (data, _) in BROKEN.items():
        (tmp_path / "train" / "cat" / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("num_proc", [1, 2])
def test_broken_images_are_named_with_what_is_wrong_by_any_number_of_processes(folder, num_proc):
    report = check_images(load_images(data_dir=folder), num_proc)
    assert report["classes"] == {"cat": {"train": 64, "test": 10}, "dog": {"train": 60, "test": 10}}
    found = {place["path"]: (place["split"], place["error"]) for place in report["broken"]}
    assert found.keys() == {str(folder / "train" / "cat" / name) for name in BROKEN}
    for name, (_, message) in BROKEN.items():
        path = str(folder / "train" / "cat" / name)
        assert found[path][0] == "train" and message in found[path][1] and path in found[path][1]
    assert report["huge"] == report["duplicates"] == []


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_the_same_pixels_in_both_splits_are_found_in_any_file_format(folder, kind):
    with PILImage.open(folder / "train" / "dog" / "7.png") as image:
        image.save(folder / "val" / "cat" / f"copy.{kind.lower()}")
    shutil.copy(folder / "train" / "dog" / "8.png", folder / "train" / "dog" / "twice.png")  # in one split only
    (same,) = check_images(load_images(data_dir=folder), 1)["duplicates"]
    names = [folder / "train" / "dog" / "7.png", folder / "val" / "cat" / f"copy.{kind.lower()}"]
    assert [(place["split"], place["path"]) for place in same] == [("train", str(names[0])), ("test", str(names[1]))]


def test_huge_images_are_named_and_those_beyond_the_limit_of_pillow_are_broken(folder, monkeypatch):
    PILImage.new("1", (5000, 4000)).save(folder / "val" / "cat" / "huge.png")
    PILImage.new("1", (5100, 4100)).save(folder / "val" / "cat" / "huger.png")
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 20_000_000)
    with pytest.warns(PILImage.DecompressionBombWarning):
        report = check_images(load_images(data_dir=folder), 1)
    assert [(place["path"], place["pixels"]) for place in report["huge"]] == [
        (str(folder / "val" / "cat" / "huge.png"), 20_000_000)
    ]
    (place,) = [place for place in report["broken"] if place["split"] == "test"]
    assert "huger.png" in place["error"] and "5100 x 4100 pixels" in place["error"]


def table(images: list) -> Dataset:
    """A data set that holds the files themselves, as a parquet file does."""
    columns = {"image": [None if data is None else {"bytes": data, "path": None} for data in images]}
    features = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    return Dataset.from_dict(columns | {"label": [0] * len(images)}, features=Features(features))


def test_images_without_files_are_named_by_their_rows():
    splits = DatasetDict({"train": table([encoded(1), b"junk", None]), "test": table([encoded(1)])})
    report = check_images(splits, 1)
    assert [(place["split"], place["row"]) for place in report["broken"]] == [("train", 1), ("train", 2)]
    assert "an image of 4 bytes can't be read" in report["broken"][0]["error"]
    assert report["duplicates"] == [[{"split": "train", "row": 0}, {"split": "test", "row": 0}]]


def test_broken_images_are_left_out_and_all_others_stay_in_their_order(folder, caplog):
    splits = load_images(data_dir=folder)
    kept, numbers = leave_out_broken(splits)
    assert numbers == {"train": 4, "test": 0}
    assert "4 of 124 images of the split 'train' are left out" in caplog.text and "truncated.png" in caplog.text
    paths = [image["path"] for image in splits["train"].cast_column("image", Image(decode=False))["image"]]
    expected = [path for path in paths if path.rpartition("/")[2] not in BROKEN]
    assert [image["path"] for image in kept["train"].cast_column("image", Image(decode=False))["image"]] == expected
    assert kept["test"].num_rows == 20
    assert set(read_images(kept["train"], 1)["error"]) == {None}


def test_many_broken_images_are_counted_and_the_first_ones_named(caplog):
    kept, numbers = leave_out_broken({"train": table([b"junk"] * 25 + [encoded(1)])})
    assert numbers == {"train": 25} and len(kept["train"]) == 1
    assert "row 9: " in caplog.text and "row 10: " not in caplog.text and "; ...." in caplog.text


def _check_share():
    PartialState._reset_state()  # that of the tests before
    PartialState(cpu=True)
    images = [encoded(number) if number % 3 else b"junk" for number in range(11)]
    kept, numbers = leave_out_broken({"train": table(images)}, num_proc=1)
    rows = kept["train"].cast_column("image", Image(decode=False))["image"]
    assert numbers == {"train": 4} and [row["bytes"] for row in rows] == [data for data in images if data != b"junk"]
    assert len(gather_object([1])) == 2


@pytest.mark.slow  # its fast siblings run in one process
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_read_a_part_each_and_leave_out_the_same_images():
    debug_launcher(_check_share, num_processes=2)
