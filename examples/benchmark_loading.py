"""What it costs to load 3 heads out of a 12-head ViT-B-sized file, next to an ordinary 3-head checkpoint (Linux).

    python examples/benchmark_loading.py

Each load runs in a process of its own, the ways in turn, from a warm or a cold page cache. Measured are the time of
`from_pretrained`, the growth of the process's memory up to the end of a first forward, and the bytes that came from the
disk. The medians are printed, with the ratio to the ordinary checkpoint.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from transformers import ViTForImageClassification

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

WAYS = {  # the folder, the class and the keywords of each way
    "ordinary 3-head ViT": ("vit3", ViTForImageClassification, {}),
    "12-head file, num_attention_heads=3": ("hydravit12", HydraViTForImageClassification, {"num_attention_heads": 3}),
    "12-head file, num_heads_active=3": ("hydravit12", HydraViTForImageClassification, {"num_heads_active": 3}),
}


def load(folder: Path, way: str) -> dict:
    """Load and run once, in this process."""
    name, model_class, keywords = WAYS[way]
    images = torch.randn(1, 3, 224, 224)
    process = psutil.Process()
    memory, read, start = process.memory_info().rss, process.io_counters().read_bytes, time.perf_counter()
    model = model_class.from_pretrained(folder / name, **keywords)
    elapsed = time.perf_counter() - start
    read = process.io_counters().read_bytes - read
    with torch.inference_mode():
        model(images)
    return {"ms": 1e3 * elapsed, "memory_mb": (process.memory_info().rss - memory) / 1e6, "read_mb": read / 1e6}


def measure(folder: Path, rounds: int):
    """Make both checkpoints, load them in turn in processes of their own, and print the medians."""
    model = HydraViTForImageClassification(HydraViTConfig())
    model.save_pretrained(folder / "hydravit12")
    model.to_vit(3).save_pretrained(folder / "vit3")
    os.sync()
    file_mb = (folder / "hydravit12" / "model.safetensors").stat().st_size / 1e6
    print(f"file of all 12 heads: {file_mb:.0f} MB, {torch.get_num_threads()} threads, {rounds} rounds, medians")
    print(
        f"{'cache':5}  {'way':36} {'load ms':>8} {'ratio':>6} {'memory MB':>10} {'ratio':>6} "
        f"{'disk MB':>8} {'of file':>8}"
    )
    for cache in ("warm", "cold"):
        runs = {way: [] for way in WAYS}
        for turn in range(rounds + 1):
            for way, records in runs.items():
                for file in folder.rglob("*.safetensors") if cache == "cold" else ():
                    with open(file, "rb") as weights:
                        os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
                record = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                if turn > 0:
                    records.append(record)
        medians = {
            way: {key: statistics.median(record[key] for record in records) for key in records[0]}
            for way, records in runs.items()
        }
        ordinary = medians["ordinary 3-head ViT"]
        for way, row in medians.items():
            print(
                f"{cache:5}  {way:36} {row['ms']:8.0f} {row['ms'] / ordinary['ms']:6.2f} {row['memory_mb']:10.1f} "
                f"{row['memory_mb'] / ordinary['memory_mb']:6.2f} {row['read_mb']:8.1f} {row['read_mb'] / file_mb:8.1%}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(load(args.folder, args.way)))
    else:
        with tempfile.TemporaryDirectory(dir=".") as temporary:  # not in /tmp, which may be memory
            measure(Path(temporary), args.rounds)
