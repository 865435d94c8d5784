"""A disk that is full, and files that may not grow, for tests of what a failed write leaves behind."""

import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

FULL = "No space left on device|os error 28|File too large|os error 27"


def fill(disk: Path, left: int = 0) -> Path:
    """Write a file that takes all but `left` bytes of the disk."""
    (disk / "blocks").write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return disk / "blocks"


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder, by their paths."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def files_of_at_most(size: int):
    """Let each write beyond `size` bytes of a file fail, where no small disk can be mounted. Python ignores the signal
    that would end the process, so the write is an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
