"""Folders that a command may write to."""

from pathlib import Path


def is_new_or_empty(folder: Path) -> bool:
    """Whether a folder can be filled without mixing its files with others: it does not exist, or it is empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
