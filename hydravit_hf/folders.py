"""Checks and names folders."""

from pathlib import Path


def is_new_or_empty(folder: Path) -> bool:
    """Whether a folder does not exist or is empty, so that its new files mix with no others."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_new_or_empty(folder: Path):
    """Raise a `ValueError` if a folder exists and is not empty."""
    if not is_new_or_empty(folder):
        raise ValueError(f"'{folder}' exists and is not an empty folder.")


def short_name(source: str) -> str:
    """The Hub id of a model or data set, or the name of a local folder without those above it."""
    return Path(source).resolve().name if Path(source).exists() else source
