"""Runs the scripts of examples/ as their users run them: each in a process of its own.

The processes are forked from one that has imported what all scripts import. This saves five seconds each time.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["accelerate", "datasets", "evaluate", "torch._dynamo", "transformers.trainer"])


def run(script: str, *arguments, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a script to its end, whatever that is."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start(script, *arguments, cwd=cwd, outputs=outputs)
        process.join(300)
        assert process.exitcode is not None, outputs[1].read_text()[-3000:]
        return subprocess.CompletedProcess(script, process.exitcode, *(file.read_text() for file in outputs))


def finish(script: str, *arguments, cwd: Path | None = None) -> str:
    """Run a script that must succeed. Returns what it printed."""
    result = run(script, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def stop_when_there_is(path: Path, script: str, *arguments, sent: int = signal.SIGKILL) -> int:
    """Start a script, and send it a signal as soon as a path exists. Returns its exit code."""
    process = start(script, *arguments)
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, sent)
    process.join(120)
    return process.exitcode


def start(script: str, *arguments, cwd=None, outputs=(os.devnull, os.devnull)) -> multiprocessing.Process:
    command = [str(EXAMPLES / script), *map(str, arguments)]
    process = PROCESSES.Process(target=_become, args=(command, cwd or Path.cwd(), dict(os.environ), outputs))
    process.start()
    return process


def _become(command: list[str], cwd: Path, environment: dict[str, str], outputs):
    for stream, file in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
