"""What all benchmarks share: interleaved timing, the name of the machine, tables, and files of one row a line.

A machine drifts: other work, heat and caches change its speed within a run. So whatever is compared takes turns, and a
ratio is the median over the rounds of both times of one round.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from tqdm import tqdm

from hydravit_hf.profiling import device_name

RESULTS = Path(__file__).parent / "results"


def milliseconds(call: Callable, clock: Callable = time.perf_counter) -> float:
    """Time one call. It waits until a GPU is done."""
    start = clock()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def time_rounds(
    calls: dict[Hashable, Callable],
    rounds: int,
    warmup: int = 1,
    clock: Callable = time.perf_counter,
    shuffle: bool = True,
    desc: str | None = "Timing",
) -> dict[Hashable, list[float]]:
    """Time each call once in every round. Unlike `hydravit_hf.profiling.time_interleaved`, it never repeats a call.

    Args:
        calls: Functions without arguments, by a name of any kind.
        rounds: Number of rounds.
        warmup: Number of rounds before them that do not count.
        clock: `time.perf_counter`, or `time.process_time` for the time that the processor was used.
        shuffle: Whether each round draws its order, the same in each run. Else each second round goes backward, and
            neighbours stay neighbours.
        desc: Title of the progress bar. None shows none.

    Returns:
        Milliseconds of each round, by the names of `calls`.
    """
    times, draw = {name: [] for name in calls}, random.Random(0)
    for turn in tqdm(range(-warmup, rounds), desc=desc, disable=desc is None, leave=False):
        order = draw.sample(list(calls), len(calls)) if shuffle else list(calls)[:: 1 if turn % 2 else -1]
        for name in order:
            elapsed = milliseconds(calls[name], clock)
            if turn >= 0:
                times[name].append(elapsed)
    return times


def median_ratio(times: list[float], baseline: list[float]) -> float:
    """The median over the rounds of one time over another."""
    return statistics.median(mine / base for mine, base in zip(times, baseline, strict=True))


def machine(device: torch.device | str = "cpu") -> str:
    """Name the processor and the version of torch."""
    return f"{device_name(torch.device(device))}, torch {torch.__version__}"


def format_rows(rows: list[dict], columns: dict[str, tuple[str, str]]) -> str:
    """Format rows as a Markdown table that is also aligned for a terminal.

    Args:
        rows: The rows. A cell without a value stays empty.
        columns: Heading and format of each key to show, such as {"ratio": ("ratio", ".3f")}.
    """
    cells = [[heading for heading, _ in columns.values()]]
    cells += [[format(row[key], form) if key in row else "" for key, (_, form) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |", *lines[1:]])


def read_rows(file: Path) -> list[dict]:
    """Read a file of one row a line. A file that does not exist has none."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def append_rows(file: Path, rows: list[dict]):
    """Add rows to a file, one a line, in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write("".join(json.dumps(row) + "\n" for row in rows))


def write_rows(file: Path, rows: list[dict]):
    """Write rows into a new file, one a line."""
    file.unlink(missing_ok=True)
    append_rows(file, rows)
