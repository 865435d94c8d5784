"""Loads local folders of images, archives and tables: finds their splits, and the classes that folders name."""

import glob
import re
from pathlib import Path

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DownloadManager,
    Features,
    Image,
    IterableDatasetDict,
    load_dataset,
)

from .folders import files_in, images_among, images_in

# What splits are called, the likeliest first
TRAIN = ("train", "training")
VALIDATION = ("validation", "valid", "val", "dev", "eval", "evaluation")
TEST = ("test", "testing")
SPLITS = (*TRAIN, *VALIDATION, *TEST)
TABLES = (".parquet",)


def load_folder(folder: Path, **kwargs) -> DatasetDict:
    """Load a local folder of images, archives or tables. `load_images` describes the kinds.

    Raises:
        OSError: The folder does not exist.
        ValueError: The images have no classes.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    folder = folder.resolve()  # a relative one could be the name of a loader of `datasets`, such as "csv"
    files = files_in(folder)
    kinds = {kind: [file for file in files if file.suffix.lower() in kind] for kind in (TABLES, (".zip",), (".tar",))}
    images = images_among(files)
    if any(file.name.startswith("metadata.") for file in files):  # of `datasets`, which joins it with the images
        return load_dataset("imagefolder", data_dir=glob.escape(str(folder)), **kwargs)
    if images:
        return _image_folder(folder, images, **kwargs)
    for kind, loader in ((TABLES, "parquet"), ((".tar",), "webdataset")):
        if kinds[kind]:
            data_files = {}
            for file in kinds[kind]:
                data_files.setdefault(_split_of(file.relative_to(folder)), []).append(glob.escape(str(file)))
            # One by one, as a split without labels has other columns
            loaded = {
                split: load_dataset(loader, data_files=paths, split="train", **kwargs)
                for split, paths in data_files.items()
            }
            return (IterableDatasetDict if kwargs.get("streaming") else DatasetDict)(loaded)
    if kinds[(".zip",)]:
        extracted = [Path(DownloadManager().extract(str(file))) for file in kinds[(".zip",)]]
        if len(extracted) == 1:
            return load_folder(extracted[0], **kwargs)
        splits = {}
        for file, root in zip(kinds[(".zip",)], extracted, strict=True):
            rows = splits.setdefault(_split_of(file.relative_to(folder)), [])
            rows += [(path, path.parent.name) for path in images_in(root)]
        return _as_datasets(splits, **kwargs)
    return load_dataset(str(folder), **kwargs)


def load_image_files(folder: str | Path) -> Dataset:
    """Load all images below a folder, without labels.

    Raises:
        OSError: The folder does not exist or holds no images.
    """
    files = [str(file) for file in images_in(Path(folder))]
    if not files:
        raise FileNotFoundError(f"There are no images in '{folder}'.")
    return Dataset.from_dict({"image": files}, features=Features({"image": Image()}))


def _image_folder(folder: Path, images: list[Path], **kwargs) -> DatasetDict:
    """Images whose folders are their classes."""
    while len(tops := _tops(folder, images)) == 1 and not any(file.parent == folder for file in images):
        (top,) = tops
        if top.lower() in SPLITS or any(file.parent == folder / top for file in images):
            break  # a split, or the only class
        folder = folder / top
    names = {name: top for name in SPLITS for top in tops if top.lower() == name}
    nested = {parts[0] for file in images if len(parts := file.relative_to(folder).parts) > 2}
    train = next((names[name] for name in TRAIN if name in names), None)
    only_splits = set(names.values()) == tops and len(tops) > 0
    if only_splits and not nested and train is not None and len(tops) > 1:
        raise ValueError(f"The images of '{folder}' have no classes: put them into folders, such as train/cat/1.png.")
    if train not in nested and not (only_splits and nested):  # a folder "train" that holds images itself is a class
        return _as_datasets({"train": [(file, file.parent.name) for file in images if file.parent != folder]}, **kwargs)
    splits = {}
    for name, top in names.items():
        inside = [file for file in images if file.relative_to(folder).parts[0] == top]
        splits[name] = [(file, None if file.parent == folder / top else file.parent.name) for file in inside]
    return _as_datasets(splits, **kwargs)


def _as_datasets(splits: dict[str, list[tuple[Path, str | None]]], streaming: bool = False, **kwargs) -> DatasetDict:
    """Data sets of files and the names of their classes, which are numbered alike in all splits."""
    names = sorted({name for rows in splits.values() for _, name in rows if name is not None})
    numbers = {name: number for number, name in enumerate(names)} | {None: None}
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    found = {}
    for split, rows in splits.items():
        columns = {"image": [str(file) for file, _ in rows], "label": [numbers[name] for _, name in rows]}
        found[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict({split: data.to_iterable_dataset() if streaming else data for split, data in found.items()})


def _tops(folder: Path, files: list[Path]) -> set[str]:
    """The names of the folders at the top that hold some of the files."""
    return {parts[0] for file in files if len(parts := file.relative_to(folder).parts) > 1}


def _split_of(file: Path) -> str:
    """The split that a file's name begins with, or else that a folder around it is called; else "train"."""
    words = [re.split(r"[^a-z]", part.lower())[0] for part in (file.name, *reversed(file.parts[:-1]))]
    return next((word for word in words if word in SPLITS), "train")
