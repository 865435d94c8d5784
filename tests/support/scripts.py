"""Runs the scripts of examples/ as their users run them: as processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(script: str, *arguments) -> list[str]:
    return [sys.executable, str(EXAMPLES / script), *map(str, arguments)]


def run(script: str, *arguments, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a script to its end, whatever that is."""
    options = {"capture_output": True, "text": True, "timeout": 300, "cwd": cwd, "env": ENVIRONMENT}
    return subprocess.run(command(script, *arguments), **options)


def finish(script: str, *arguments, cwd: Path | None = None) -> str:
    """Run a script that must succeed. Returns what it printed."""
    result = run(script, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def stop_when_there_is(path: Path, script: str, *arguments, sent: int = signal.SIGKILL) -> int:
    """Start a script, and send it a signal as soon as a path exists. Returns its exit code."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(script, *arguments), env=ENVIRONMENT, **quiet)
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(sent)
    return process.wait(120)
