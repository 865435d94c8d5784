"""Costs of each width, counted and measured, and the choice of the widest that fits a budget."""

import copy
import math
import os
import platform
import random
import re
import statistics
import threading
import timeit
from collections.abc import Callable
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from .evaluation import evaluating
from .model.configuration_hydravit import HydraViTConfig, as_pair
from .model.modeling_hydravit import HydraViTForImageClassification

# Budget of `choose_num_heads` -> key of a row, the size of the unit in messages, and its name
BUDGETS = {
    "max_latency_ms": ("latency_ms", 1, "ms"),
    "max_memory_mb": ("peak_memory_mb", 1, "MB"),
    "max_macs": ("macs", 1e9, "GMACs"),
    "max_parameters": ("parameters", 1e6, "M parameters"),
}
SHORTEST_SAMPLE = 2e-3  # seconds; a timing repeats faster passes until it takes this long

_PROFILER = threading.Lock()  # torch's profiler is one for all threads, and ends the process if two start it


def add_costs(config: HydraViTConfig, rows: list[dict]) -> list[dict]:
    """Add the counted `parameters` and `macs` to rows that have `num_heads`. Values that a row has already stay.

    Examples:
        >>> from hydravit_hf import HydraViTConfig
        >>> from hydravit_hf.profiling import add_costs
        >>> add_costs(HydraViTConfig(), [{"num_heads": 3, "accuracy": 0.7}])
        [{'parameters': 5524802, 'macs': 1253491584, 'num_heads': 3, 'accuracy': 0.7}]
    """
    return [
        {
            "parameters": config.count_parameters(row["num_heads"]),
            "macs": config.count_macs(row["num_heads"]),
        }
        | row
        for row in rows
    ]


def profile_subnetworks(
    model: HydraViTForImageClassification,
    heads: list[int] | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    rounds: int = 30,
    warmup: int = 3,
    disable_tqdm: bool = False,
) -> list[dict]:
    """Measure the latency and the memory of forward passes at each width, on random images.

    All widths take turns in one run: each round times every width once, in a shuffled order that is the same in each
    run. So a drift of the machine affects all widths alike.

    Args:
        model: The model, on a CPU or a CUDA device. It stays in its mode; it runs in `eval()` mode.
        heads: Head counts to measure. None means `model.config.subnetwork_heads`.
        batch_size: Images in a forward pass.
        dtype, device: Type and device of a copy of the model to measure. None measures the model as it is.
        rounds: Number of timings of each width. A timing repeats a pass of less than 2 ms until it takes that long.
        warmup: Number of untimed passes of each width before the first round.
        disable_tqdm: Whether to hide the progress bar.

    Returns:
        A row for each width:

        - `num_heads`, `parameters`.
        - `macs`: Multiply-accumulate operations of one image, counted while it runs.
        - `batch_size`.
        - `latency_ms`, `latency_p90_ms`: Milliseconds of a forward pass, median and 90th percentile.
        - `throughput`: Images per second at the median.
        - `peak_memory_mb`: Megabytes (1e6 bytes) that the width needs if nothing else is held: its weights, the images
          and the most that a forward pass allocates beside them. It comes from torch's allocator. It leaves out torch
          itself, a CUDA context and the memory that libraries allocate on their own.
        - `device`: Name of the processor, and of a CPU the number of threads.
        - `dtype`: Type of the weights, such as "float32".

    Raises:
        ValueError: The model does not hold a width, a count is not positive, the model has no classifier, or the device
            is of another kind.

    Examples:
        >>> from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, profile_subnetworks
        >>> model = HydraViTForImageClassification(HydraViTConfig(num_hidden_layers=1, image_size=16))
        >>> rows = profile_subnetworks(model, heads=[3, 12], rounds=3)
        >>> [row["num_heads"] for row in rows], rows[0]["latency_ms"] > 0
        ([3, 12], True)
    """
    config = _classifier_config(model)
    heads = [config.check_num_heads(num_heads) for num_heads in heads or config.subnetwork_heads]
    for name, count in (("batch_size", batch_size), ("rounds", rounds), ("warmup", warmup)):
        if type(count) is not int or count < 1:
            raise ValueError(f"`{name}` must be a positive integer, not {count!r}.")
    if dtype is not None or device is not None:
        model = copy.deepcopy(model).to(device=device, dtype=dtype)
    if model.device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be a CPU or a CUDA device, not {str(model.device)!r}.")
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (batch_size, config.num_channels, *as_pair(config.image_size))
    images = torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device)
    passes = {num_heads: partial(_forward, model, images, num_heads) for num_heads in heads}
    with evaluating(model), torch.inference_mode():
        macs = {num_heads: _count_macs_of(model, images[:1], num_heads) for num_heads in passes}
        milliseconds = time_interleaved(passes, rounds, warmup, disable_tqdm)
        allocated = _peak_allocations(passes, model.device)

    def row(num_heads: int) -> dict:
        parameters, latency = config.count_parameters(num_heads), statistics.median(milliseconds[num_heads])
        return {
            "num_heads": num_heads,
            "parameters": parameters,
            "macs": macs[num_heads],
            "batch_size": batch_size,
            "latency_ms": latency,
            "latency_p90_ms": float(np.percentile(milliseconds[num_heads], 90)),
            "throughput": 1e3 * batch_size / latency,
            "peak_memory_mb": (parameters * model.dtype.itemsize + images.nbytes + allocated[num_heads]) / 1e6,
            "device": device_name(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    return [row(num_heads) for num_heads in heads]


def choose_num_heads(
    rows: list[dict] | HydraViTForImageClassification,
    max_latency_ms: float | None = None,
    max_memory_mb: float | None = None,
    max_macs: float | None = None,
    max_parameters: float | None = None,
) -> int:
    """Choose the widest head count that meets all budgets.

    Args:
        rows: Rows from `profile_subnetworks`, or a model. A model is profiled on the spot, at its trained widths and
            with one image per batch. If the budgets are MACs or parameters only, these are counted and nothing runs.
        max_latency_ms: Budget of the median latency, in milliseconds.
        max_memory_mb: Budget of the peak memory, in megabytes (1e6 bytes).
        max_macs: Budget of multiply-accumulate operations of one image.
        max_parameters: Budget of parameters.

    Raises:
        ValueError: No width fits (the message says what the narrowest needs), there is no budget, a budget is not a
            positive number, or the rows lack a column that a budget needs.

    Examples:
        >>> from hydravit_hf import choose_num_heads
        >>> rows = [{"num_heads": 3, "latency_ms": 23.0}, {"num_heads": 12, "latency_ms": 267.0}]
        >>> choose_num_heads(rows, max_latency_ms=100)
        3
    """
    given = dict(zip(BUDGETS, (max_latency_ms, max_memory_mb, max_macs, max_parameters), strict=True))
    budgets = {name: limit for name, limit in given.items() if limit is not None}
    if not budgets:
        raise ValueError(f"Give at least one budget: {', '.join(f'`{name}`' for name in BUDGETS)}.")
    for name, limit in budgets.items():
        if not isinstance(limit, Real) or isinstance(limit, bool) or not limit > 0:
            raise ValueError(f"`{name}` must be a positive number, not {limit!r}.")
    if isinstance(rows, torch.nn.Module):
        measured = {"max_latency_ms", "max_memory_mb"} & budgets.keys()
        rows = profile_subnetworks(rows) if measured else _closed_form_rows(rows)
    keys = ["num_heads", *(BUDGETS[name][0] for name in budgets)]
    if not rows or not all(key in row for row in rows for key in keys):
        raise ValueError(f"`rows` must be rows with the keys {keys}, not {rows!r}.")
    fitting = [row for row in rows if all(row[BUDGETS[name][0]] <= limit for name, limit in budgets.items())]
    if not fitting:
        narrowest = min(rows, key=lambda row: row["num_heads"])
        needed = _in_units({name: narrowest[BUDGETS[name][0]] for name in budgets})
        raise ValueError(
            f"No width fits. The narrowest, {narrowest['num_heads']} heads, needs {needed}; "
            f"allowed: {_in_units(budgets)}."
        )
    return max(row["num_heads"] for row in fitting)


def _classifier_config(model: HydraViTForImageClassification) -> HydraViTConfig:
    if model.base_model is model:
        raise ValueError("`model` must be a HydraViTForImageClassification: these are the costs of a classifier.")
    return model.config


def _closed_form_rows(model: HydraViTForImageClassification) -> list[dict]:
    config = _classifier_config(model)
    return add_costs(config, [{"num_heads": num_heads} for num_heads in config.subnetwork_heads])


def _in_units(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount / BUDGETS[name][1]:.4g} {BUDGETS[name][2]}" for name, amount in amounts.items())


def _forward(model: HydraViTForImageClassification, images: torch.Tensor, num_heads: int):
    model(images, num_heads_active=num_heads)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def _count_macs_of(model: HydraViTForImageClassification, images: torch.Tensor, num_heads: int) -> int:
    """Count the multiply-accumulate operations of a forward pass while it runs."""
    # The counter does not know every fused kernel; here attention runs as matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images, num_heads_active=num_heads)
    return counter.get_total_flops() // 2


def time_interleaved(passes: dict[Any, Callable], rounds: int, warmup: int, disable_tqdm: bool) -> dict[Any, list]:
    """Time several functions in turns, so that a drift of the machine affects all alike.

    Each round times every function once, in a shuffled order that is the same in each run.

    Args:
        passes: Functions without arguments, by a name of any kind. They must wait until a GPU is done.
        rounds: Number of rounds.
        warmup: Number of untimed calls of each function before the first round. The fastest of them decides how many
            calls make a timing of 2 ms or more.
        disable_tqdm: Whether to hide the progress bar.

    Returns:
        Milliseconds of one call in each round, by the names of `passes`.

    Examples:
        >>> from hydravit_hf.profiling import time_interleaved
        >>> passes = {"short": lambda: sum(range(100)), "long": lambda: sum(range(100_000))}
        >>> milliseconds = time_interleaved(passes, rounds=3, warmup=1, disable_tqdm=True)
        >>> len(milliseconds["short"]), min(milliseconds["short"]) < min(milliseconds["long"])
        (3, True)
    """
    timers = {name: timeit.Timer(run) for name, run in passes.items()}
    fastest = {name: min(timer.repeat(warmup, number=1)) for name, timer in timers.items()}
    repeats = {name: math.ceil(SHORTEST_SAMPLE / seconds) for name, seconds in fastest.items()}
    milliseconds = {name: [] for name in passes}
    order = random.Random(0)
    for _ in tqdm(range(rounds), desc="Profiling", disable=disable_tqdm, leave=False):
        for name in order.sample(list(timers), len(timers)):
            seconds = timers[name].timeit(repeats[name]) / repeats[name]
            milliseconds[name].append(1e3 * seconds)
    return milliseconds


def _peak_allocations(passes: dict[int, Callable], device: torch.device) -> dict[int, int]:
    """The most bytes that each pass holds at a time, beyond those that were allocated before it."""
    peaks = dict.fromkeys(passes, 0)
    if device.type == "cuda":
        for num_heads, run in passes.items():
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            peaks[num_heads] = torch.cuda.max_memory_allocated(device) - before
        return peaks
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler logs to stderr
    with _PROFILER, torch.autograd.profiler.profile(profile_memory=True) as profiler:
        for num_heads, run in passes.items():
            with torch.profiler.record_function(f"pass {num_heads}"):
                run()
    starts = {f"pass {num_heads}": num_heads for num_heads in passes}
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() in starts:
            num_heads, allocated = starts[event.name()], 0
        elif event.name() == "[memory]":
            allocated += event.nbytes()
            peaks[num_heads] = max(peaks[num_heads], allocated)
    return peaks


def device_name(device: torch.device) -> str:
    """Name a processor. The name of a CPU includes the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    name = models[0] if models else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s'[: threads > 1]}"
