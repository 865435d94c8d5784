"""What a width costs: in closed form, and measured on a device; and the widest that fits a budget."""

import copy
import math
import os
import platform
import random
import re
import statistics
import timeit
from collections.abc import Callable
from functools import partial
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from .evaluation import evaluating
from .model.configuration_hydravit import HydraViTConfig, as_pair
from .model.modeling_hydravit import HydraViTForImageClassification

# Budget of `choose_num_heads` -> key of a row, and the unit that it reads in with its size
BUDGETS = {
    "max_latency_ms": ("latency_ms", 1, "ms"),
    "max_memory_mb": ("peak_memory_mb", 1, "MB"),
    "max_macs": ("macs", 1e9, "GMACs"),
    "max_parameters": ("parameters", 1e6, "M parameters"),
}
SHORTEST_SAMPLE = 2e-3  # seconds; faster passes are timed several at a time


def add_costs(config: HydraViTConfig, rows: list[dict]) -> list[dict]:
    """Add `parameters` and `macs`, in closed form, to rows that have a `num_heads` and lack them."""
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
    """Measure what forward passes of random images cost at each width, all widths interleaved in one run.

    Each round times every width once, in a shuffled order that is the same in each run, so that a drift of the machine
    hits all alike.

    Args:
        model: The model, on a CPU or a CUDA device; it is run in `eval()` mode, and left in the mode that it had.
        heads: The head counts; None: `model.config.subnetwork_heads`.
        batch_size: Images of one forward pass.
        dtype, device: To measure a copy of the model there; None: as the model is.
        rounds: Timings of each width. A pass below 2 ms is repeated in each of them until it takes that long.
        warmup: Untimed passes of each width before the first round.
        disable_tqdm: Whether to show no progress bar.

    Returns:
        For each width a row:

        - `num_heads`; `parameters`; `macs`: multiply-accumulate operations of one image, counted as it runs.
        - `batch_size`; `latency_ms`, `latency_p90_ms`: milliseconds of a forward pass, median and 90th percentile;
          `throughput`: images per second at the median.
        - `peak_memory_mb`: megabytes (1e6 bytes) that the width needs when it is all that is held: its weights, the
          images and the most that a forward pass allocates beside them at a time, by the record of torch's allocator.
          Torch itself, a CUDA context and what libraries allocate on their own come on top.
        - `device`: the name of the processor, for a CPU with the number of threads; `dtype`: such as "float32".

    Raises:
        ValueError: A width that the model doesn't hold, a count that is not positive, a model without a classifier,
            or another kind of device.
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
    """The widest head count that meets all the budgets that are given.

    Args:
        rows: From `profile_subnetworks`; or a model, which is profiled on the spot, at its trained widths and one image
            a batch. For MACs and parameters alone nothing is run.
        max_latency_ms: Of the median, in milliseconds.
        max_memory_mb: Of the peak, in megabytes (1e6 bytes).
        max_macs: Of one image.
        max_parameters: Of the width.

    Raises:
        ValueError: Nothing fits, and what the narrowest needs; no budget, or one that is not a positive number; rows
            without what the budgets ask for.
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
        raise ValueError("`model` must be a HydraViTForImageClassification: the costs are those of a classifier.")
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
    with FlopCounterMode(display=False) as counter:
        # This runs the attention as matrix products: not every fused kernel is counted
        model(images, num_heads_active=num_heads, output_attentions=True)
    return counter.get_total_flops() // 2


def time_interleaved(passes: dict[int, Callable], rounds: int, warmup: int, disable_tqdm: bool) -> dict[int, list]:
    """Milliseconds of each pass in every round."""
    timers = {num_heads: timeit.Timer(run) for num_heads, run in passes.items()}
    fastest = {num_heads: min(timer.repeat(warmup, number=1)) for num_heads, timer in timers.items()}
    repeats = {num_heads: math.ceil(SHORTEST_SAMPLE / seconds) for num_heads, seconds in fastest.items()}
    milliseconds = {num_heads: [] for num_heads in passes}
    order = random.Random(0)
    for _ in tqdm(range(rounds), desc="Profiling", disable=disable_tqdm, leave=False):
        for num_heads in order.sample(list(timers), len(timers)):
            seconds = timers[num_heads].timeit(repeats[num_heads]) / repeats[num_heads]
            milliseconds[num_heads].append(1e3 * seconds)
    return milliseconds


def _peak_allocations(passes: dict[int, Callable], device: torch.device) -> dict[int, int]:
    """The most bytes that each pass has allocated at a time."""
    peaks = dict.fromkeys(passes, 0)
    if device.type == "cuda":
        for num_heads, run in passes.items():
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            peaks[num_heads] = torch.cuda.max_memory_allocated(device) - before
        return peaks
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would say on stderr that it starts and stops
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
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
    """The name of a processor, for a CPU with the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    name = models[0] if models else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s'[: threads > 1]}"
