"""What one ONNX export of several widths costs in ONNX Runtime, next to a file for each width.

    python examples/benchmark_export.py --batch_size 1 8

Each width is there three times: as a file of its own, in one file that takes the width as an input, and as a graph in a
folder whose graphs share their weights. Each round runs all three once, in shuffled order, so that a drift of the
machine and what the one before left in its caches hit all alike. A ratio is the median over the rounds of this way over
the file of its own, both of one round.
Wall-clock times on a machine with other work on it say little: `--clock cpu` takes the processor time that was used.
Loading runs in processes of its own, the ways in turn; memory is their growth up to the end of a first run.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
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


def measure(folder: Path, args):
    # 1. Random weights, as all that is measured is the same with trained ones
    model = HydraViTForImageClassification(HydraViTConfig(num_labels=1000, **json.loads(args.config))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    for num_heads in args.heads:
        export_subnetwork(model, num_heads, "onnx", folder / f"{num_heads}.onnx")
    export_subnetworks(model, args.heads, folder / "all.onnx")
    export_subnetworks(model, args.heads, folder / "all")

    # 2. Sizes
    widest = (folder / f"{max(args.heads)}.onnx").stat().st_size
    sizes = {f"{num_heads} heads, {OWN}": (folder / f"{num_heads}.onnx").stat().st_size for num_heads in args.heads}
    sizes[f"all, {INPUT}"] = (folder / "all.onnx").stat().st_size
    sizes[f"all, {FOLDER}"] = sum(file.stat().st_size for file in (folder / "all").iterdir())
    print(f"\n{'on disk':28} {'MB':>8} {'of widest':>9}")
    for name, size in sizes.items():
        print(f"{name:28} {size / 1e6:8.2f} {size / widest:9.4f}")

    # 3. Loading
    print(f"\n{'load':22} {'heads':>5} {'ms':>7} {'memory MB':>9}")
    loads = {(way, num_heads): [] for way in (OWN, INPUT, FOLDER) for num_heads in args.heads}
    for _ in tqdm(range(args.loads), desc="Loading", leave=False):
        for (way, num_heads), records in loads.items():
            arguments = [files(folder, num_heads)[way], num_heads, args.threads, args.clock]
            command = [sys.executable, "-c", LOAD, *map(str, arguments)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            records.append([float(number) for number in output.split()])
    for (way, num_heads), records in loads.items():
        milliseconds, megabytes = (statistics.median(column) for column in zip(*records, strict=True))
        print(f"{way:22} {num_heads:5} {milliseconds:7.0f} {megabytes:9.0f}")

    # 4. Speed
    clock, order, rows = CLOCKS[args.clock], random.Random(0), []
    print(f"\n{'run':16} {'batch':>5} {'heads':>5} {'ms':>8} {'ratio':>6} {'difference from eager':>22}")
    for num_heads in args.heads:
        for batch_size in args.batch_size:
            sessions = {way: open_session(file, args.threads) for way, file in files(folder, num_heads).items()}
            size = model.config.image_size
            images = torch.randn(batch_size, 3, size, size)
            with torch.no_grad():
                expected = model(images, num_heads_active=num_heads).logits.numpy()
            images = images.numpy()
            times, differences = {way: [] for way in sessions}, {}
            for turn in tqdm(range(-2, args.rounds), desc=f"{num_heads} heads, batch {batch_size}", leave=False):
                for way in order.sample(list(sessions), len(sessions)):
                    start = clock()
                    logits = run(sessions[way], images, num_heads)
                    elapsed = clock() - start
                    if turn >= 0:
                        times[way].append(elapsed)
                    else:
                        differences[way] = float(np.abs(logits - expected).max())
            for way, this in times.items():
                row = {"way": way, "num_heads": num_heads, "batch_size": batch_size}
                row |= {"ms": 1e3 * statistics.median(this), "difference": differences[way]}
                row["ratio"] = statistics.median(a / b for a, b in zip(this, times[OWN], strict=True))
                rows.append(row)
                print("{way:16} {batch_size:5} {num_heads:5} {ms:8.2f} {ratio:6.3f} {difference:22.1e}".format(**row))
    if args.json:
        args.json.write_text(json.dumps({"sizes": sizes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--config", default="{}", help="arguments of HydraViTConfig, JSON")
    parser.add_argument("--json", type=Path, help="also write sizes and rows to this file")
    args = parser.parse_args()
    print(f"CPU, {args.threads} threads, onnxruntime {onnxruntime.__version__}, {args.clock} clock")
    with tempfile.TemporaryDirectory(dir=".") as temporary:  # not in /tmp, which may be memory
        measure(Path(temporary), args)
