"""Checks, lists and names folders, and writes files and folders whole or not at all."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


def is_new_or_empty(folder: Path) -> bool:
    """Whether a folder does not exist or is empty, so that its new files mix with no others."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_new_or_empty(folder: Path):
    """Raise a `ValueError` if a folder exists and is not empty."""
    if not is_new_or_empty(folder):
        raise ValueError(f"'{folder}' exists and is not an empty folder.")


@contextmanager
def written_whole(path: Path):
    """Make a folder to write files in. At the end of the context, they move to the folder of `path`, `path` last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".exporting-", dir=path.parent))
    try:
        yield staging
        if path.is_dir():
            path.rmdir()  # it is empty, else this raises an error
        for written in sorted(staging.iterdir(), key=lambda entry: entry.name == path.name):
            os.replace(written, path.with_name(written.name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def short_name(source: str) -> str:
    """The Hub id of a model or data set, or the name of a local folder without those above it."""
    return Path(source).resolve().name if Path(source).exists() else source


def check_path(source: str):
    """Raise a `FileNotFoundError` if a name is a mistyped path rather than a Hub id, so that the Hub is not asked.

    That is what begins with `.`, `/` or `~`, has more than one `/`, or has a like name beside it.
    """
    path = Path(source)
    if path.exists():
        return
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = get_close_matches(path.name, beside, n=1)
    if source.startswith((".", "/", "~")) or len(path.parts) > 2 or path.is_absolute() or similar:
        hint = f" Do you mean '{path.parent / similar[0]}'?" if similar else ""
        raise FileNotFoundError(f"There is no folder '{source}'.{hint}")


def files_in(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, through links to other folders too, in sorted order."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()  # a link that leads back
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        files += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return files


def images_in(folder: Path) -> list[Path]:
    """The images among the files of a folder."""
    return images_among(files_in(folder))


def images_among(files: list[Path]) -> list[Path]:
    """The files whose names end like those of the images that the package reads."""
    from PIL import Image

    from .model.images_hydravit import FORMATS

    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    return [file for file in files if file.suffix.lower() in suffixes]
