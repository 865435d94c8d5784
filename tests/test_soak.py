"""Thousands of calls at mixed widths leave no memory behind, and the example that shows it can fail."""

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "examples" / "soak.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", str(SOAK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_calls_at_mixed_widths_are_right_and_leave_no_memory_behind():
    result = run("--calls", "2000")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "\n    2,000 calls" in result.stdout
    assert "\n0 wrong answers" in result.stdout


def test_memory_that_grows_is_a_failure():
    result = run("--calls", "40", "--max_growth_mb", "-1000")
    assert result.returncode == 1
    assert "the memory may grow by -1000.0 MB" in result.stderr
