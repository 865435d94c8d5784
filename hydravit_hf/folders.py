"""Checks folders before a command writes to them."""

from pathlib import Path


def is_new_or_empty(folder: Path) -> bool:
    """Whether a folder does not exist or is empty, so that its new files mix with no others."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_new_or_empty(folder: Path):
    """Raise a `ValueError` if a folder exists and is not empty."""
    if not is_new_or_empty(folder):
        raise ValueError(f"'{folder}' exists and is not an empty folder.")
