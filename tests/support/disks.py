"""A full disk, real where this process may mount one, and a limit of the size of a file everywhere else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FULL = "No space left on device|os error 28|File too large|os error 27"
LIMITED = """
import resource, signal
from hydravit_hf import HydraViTForImageClassification
{setup}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error instead
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    {work}
except Exception as error:
    print(*[kind.__name__ for kind in type(error).__mro__], error)
"""


def fill(disk: Path, left: int = 0) -> Path:
    """A file that takes all but `left` bytes of the disk."""
    (disk / "blocks").write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return disk / "blocks"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def limited(setup: str, work: str, **environment: str) -> str:
    """What the error says when `work` writes more than 100 kB into one file."""
    command = [sys.executable, "-c", LIMITED.format(setup=setup, work=work)]
    environment = os.environ | environment
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout
