"""Reads every image of a data set once: which are broken, which are huge, and which are in both splits."""

import hashlib
import os
from collections import Counter, defaultdict
from io import BytesIO
from itertools import chain

from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image as PILImage
from transformers.utils import logging

from .data import read_image, undecoded
from .model.images_hydravit import HUGE_PIXELS, with_channels

logger = logging.get_logger(__name__)

FOUND = Features({"error": Value("string"), "pixels": Value("int64"), "digest": Value("binary")})
NAMED = 10  # broken images that a warning names; `hydravit check-data` names all


def check_images(splits: DatasetDict, num_proc: int | None = None) -> dict:
    """Report what a data set holds.

    Args:
        splits: Splits with the columns `image` and `label`, as `load_images` gives them.
        num_proc: Number of processes that read the images. None means one for each core, 8 at most.

    Returns:
        `images`, the number of images in each split; `classes`, that of each class in each split; `broken`, the images
        that can't be read, each with its error; `huge`, those of more than `HUGE_PIXELS` pixels, each with their
        number; and `duplicates`, groups of images with the same pixels that are in several splits. Each image has a
        `split`, a `row` and, if there is one, a `path`.

    Examples:
        >>> from hydravit_hf.data import load_digits
        >>> from hydravit_hf.data_checks import check_images
        >>> report = check_images(load_digits(), num_proc=1)
        >>> report["classes"]["3"], report["broken"], report["duplicates"]
        ({'train': 146, 'test': 37}, [], [])
    """
    images = {split: len(dataset) for split, dataset in splits.items()}
    report = {"images": images, "classes": _count_classes(splits), "broken": [], "huge": [], "duplicates": []}
    places = defaultdict(list)
    for split, dataset in splits.items():
        found = read_images(dataset, num_proc)
        for row, (error, pixels, digest) in enumerate(zip(*(found[name] for name in FOUND), strict=True)):
            if error is not None:
                report["broken"].append(_place(dataset, split, row) | {"error": error})
                continue
            if pixels > HUGE_PIXELS:
                report["huge"].append(_place(dataset, split, row) | {"pixels": pixels})
            places[digest].append((split, row))
    for same in places.values():
        if len({split for split, _ in same}) > 1:
            report["duplicates"].append([_place(splits[split], split, row) for split, row in same])
    return report


def leave_out_broken(splits: dict[str, Dataset], num_proc: int | None = None) -> tuple[DatasetDict, dict[str, int]]:
    """Leave out the images that can't be read, and warn of them by name.

    It reads every image once. In several processes of Accelerate, call it in all of them: each reads its part, and all
    get the same images.

    Args:
        splits: Splits with a column `image`.
        num_proc: As in `check_images`, for each process of Accelerate.

    Returns:
        The splits, and the number of images of each that were left out.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state, kept, numbers = PartialState(), {}, {}
    num_proc = num_proc or max(1, _cores() // state.num_processes)
    for split, dataset in splits.items():
        rows = range(state.process_index, len(dataset), state.num_processes)
        errors = read_images(dataset.select(rows), num_proc)["error"]
        broken = gather_object([(row, error) for row, error in zip(rows, errors, strict=True) if error is not None])
        numbers[split], kept[split] = len(broken), dataset
        if broken:
            left_out = dict(sorted(broken))
            kept[split] = dataset.select([row for row in range(len(dataset)) if row not in left_out])
            if state.is_main_process:
                named = [f"row {row}: {error}" for row, error in left_out.items()]
                named = "; ".join(named[:NAMED]) + ("; ..." if len(named) > NAMED else "")
                logger.warning(f"{len(broken)} of {len(dataset)} images of the split '{split}' are left out: {named}.")
    return DatasetDict(kept), numbers


def read_images(dataset: Dataset, num_proc: int | None = None) -> Dataset:
    """Read each image once, and keep no more of it than a row with its `error` (None if there is none), its number of
    `pixels`, and a `digest` of their values as RGB. A progress bar shows how far it is."""
    num_proc = min(num_proc or _cores(), max(1, len(dataset) // 50))  # starting a process takes as long as 50 images
    images = undecoded(dataset.with_format(None).select_columns("image"))
    return images.map(
        _read,
        input_columns="image",
        remove_columns="image",
        features=FOUND,
        num_proc=num_proc if num_proc > 1 else None,
        keep_in_memory=True,
        load_from_cache_file=False,  # the files may have changed
        desc="Reading the images",
    )


def _read(image: dict) -> dict:
    try:
        decoded = with_channels(read_image(image), 3)
        with PILImage.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as opened:
            pixels = opened.width * opened.height  # of the file, which may be decoded smaller
    except Exception as error:
        return {"error": str(error), "pixels": None, "digest": None}
    content = hashlib.blake2b(repr(decoded.size).encode(), digest_size=16)
    content.update(decoded.tobytes())
    return {"error": None, "pixels": pixels, "digest": content.digest()}


def _count_classes(splits: dict[str, Dataset]) -> dict[str, dict[str, int]]:
    feature = next(iter(splits.values())).features["label"]
    is_list = hasattr(feature, "feature")
    names = getattr(feature.feature if is_list else feature, "names", [])  # numbers have none
    labels = {split: dataset.with_format(None)["label"] for split, dataset in splits.items()}
    numbers = {split: Counter(chain.from_iterable(column) if is_list else column) for split, column in labels.items()}
    return {name: {split: numbers[split][label] for split in splits} for label, name in enumerate(names)}


def _place(dataset: Dataset, split: str, row: int) -> dict:
    image = undecoded(dataset.with_format(None).select([row]))[0]["image"]
    return {"split": split, "row": row} | ({"path": image["path"]} if image and image["path"] else {})


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
