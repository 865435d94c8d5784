"""What one ONNX export of several widths costs in ONNX Runtime, next to a file for each width.

    python examples/benchmarks/benchmark_export.py --batch_size 1 8

Each width is there three times: as a file of its own, in one file that takes the width as an input, and as a graph in a
folder whose graphs share their weights. Each round runs all three once, in a shuffled order. So a drift of the machine,
and what the run before left in its caches, affect all alike. A ratio is the median over the rounds of this way over the
file of its own, both of one round.
Wall-clock times on a machine with other work on it say little: `--clock cpu` takes the processor time that was used.
Each load runs in a process of its own, the ways in turn. Its memory is the growth up to the end of a first run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from timing import format_rows, machine, median_ratio, time_rounds, write_rows
from tqdm import tqdm

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.export import export_subnetwork, export_subnetworks

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OWN, INPUT, FOLDER = "own file", "width as input", "shared weights"
LOAD = """
import sys, time, numpy, onnxruntime, psutil
file, num_heads, threads, clock = sys.argv[1:]
options, process = onnxruntime.SessionOptions(), psutil.Process()
options.intra_op_num_threads, clock = int(threads), {"wall": time.perf_counter, "cpu": time.process_time}[clock]
memory, start = process.memory_info().rss, clock()
session = onnxruntime.InferenceSession(file, options)
elapsed = clock() - start
inputs = {"pixel_values": numpy.zeros((1, *session.get_inputs()[0].shape[1:]), numpy.float32)}
if len(session.get_inputs()) > 1:
    inputs["num_heads_active"] = numpy.array(int(num_heads))
session.run(None, inputs)
print(1e3 * elapsed, (process.memory_info().rss - memory) / 1e6)
"""


def files(folder: Path, num_heads: int) -> dict[str, Path]:
    """The file of each way to run a width."""
    return {
        OWN: folder / f"{num_heads}.onnx",
        INPUT: folder / "all.onnx",
        FOLDER: folder / "all" / f"{num_heads}_heads.onnx",
    }


def open_session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options)


def run(session: onnxruntime.InferenceSession, images: np.ndarray, num_heads: int) -> np.ndarray:
    inputs = {"pixel_values": images}
    if len(session.get_inputs()) > 1:
        inputs["num_heads_active"] = np.array(num_heads)
    return session.run(None, inputs)[0]


def make_model(config: HydraViTConfig) -> HydraViTForImageClassification:
    """A model of random weights: trained ones would give the same sizes and times."""
    model = HydraViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def measure_sizes(folder: Path, heads: list[int]) -> list[dict]:
    """The bytes of each way on disk."""
    sizes = {f"{num_heads} heads, {OWN}": (folder / f"{num_heads}.onnx").stat().st_size for num_heads in heads}
    widest = max(sizes.values())
    sizes[f"all, {INPUT}"] = (folder / "all.onnx").stat().st_size
    sizes[f"all, {FOLDER}"] = sum(file.stat().st_size for file in (folder / "all").iterdir())
    return [{"file": name, "bytes": size, "mb": size / 1e6, "share": size / widest} for name, size in sizes.items()]


def measure_loads(folder: Path, args) -> list[dict]:
    """Time and memory of each way to load a width."""
    loads = {(way, num_heads): [] for way in (OWN, INPUT, FOLDER) for num_heads in args.heads}
    for _ in tqdm(range(args.loads), desc="Loading", leave=False):
        for (way, num_heads), records in loads.items():
            arguments = [files(folder, num_heads)[way], num_heads, args.threads, args.clock]
            command = [sys.executable, "-c", LOAD, *map(str, arguments)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            records.append([float(number) for number in output.split()])
    rows = []
    for (way, num_heads), records in loads.items():
        load_ms, memory_mb = map(statistics.median, zip(*records, strict=True))
        rows.append({"way": way, "num_heads": num_heads, "load_ms": load_ms, "memory_mb": memory_mb})
    return rows


def measure_runs(model, folder: Path, args) -> list[dict]:
    """Time of each way to run a width, and how far its logits are from the model's."""
    rows, size = [], model.config.image_size
    for num_heads in args.heads:
        for batch_size in args.batch_size:
            sessions = {way: open_session(file, args.threads) for way, file in files(folder, num_heads).items()}
            images = torch.randn(batch_size, 3, size, size)
            with torch.no_grad():
                expected = model(images, num_heads_active=num_heads).logits.numpy()
            calls = {way: partial(run, session, images.numpy(), num_heads) for way, session in sessions.items()}
            desc = f"{num_heads} heads, batch {batch_size}"
            times = time_rounds(calls, args.rounds, warmup=2, clock=CLOCKS[args.clock], desc=desc)
            for way, measured in times.items():
                row = {"way": way, "batch_size": batch_size, "num_heads": num_heads}
                row |= {"ms": statistics.median(measured), "ratio": median_ratio(measured, times[OWN])}
                rows.append(row | {"difference": float(np.abs(calls[way]() - expected).max())})
    return rows


def measure(folder: Path, args):
    model = make_model(HydraViTConfig(num_labels=1000, **args.config))
    for num_heads in args.heads:
        export_subnetwork(model, num_heads, "onnx", folder / f"{num_heads}.onnx")
    export_subnetworks(model, args.heads, folder / "all.onnx")
    export_subnetworks(model, args.heads, folder / "all")
    threads = f"{args.threads} thread{'s'[: args.threads > 1]}"
    print(f"{machine()}, onnxruntime {onnxruntime.__version__} with {threads}, {args.clock} clock\n")
    sizes = measure_sizes(folder, args.heads)
    print(format_rows(sizes, {"file": ("on disk", ""), "mb": ("MB", ".2f"), "share": ("of widest", ".4f")}))
    loads = measure_loads(folder, args)
    columns = {"way": ("load", ""), "num_heads": ("heads", ""), "load_ms": ("ms", ".0f")}
    print(f"\n{format_rows(loads, columns | {'memory_mb': ('memory, MB', '.0f')})}")
    runs = measure_runs(model, folder, args)
    columns = {"way": ("run", ""), "batch_size": ("batch", ""), "num_heads": ("heads", ""), "ms": ("ms", ".2f")}
    columns |= {"ratio": ("ratio", ".3f"), "difference": ("difference from eager", ".1e")}
    print(f"\n{format_rows(runs, columns)}")
    if args.json:
        write_rows(args.json, [*sizes, *loads, *runs])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of HydraViTConfig, JSON")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, one a line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as temporary:  # not in /tmp, which may be memory
        measure(Path(temporary), args)
