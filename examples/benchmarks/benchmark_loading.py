"""What it costs to load 3 heads out of a 12-head ViT-B-sized file, next to an ordinary 3-head checkpoint (Linux).

    python examples/benchmarks/benchmark_loading.py

Each load runs in a process of its own, the ways in turn, from a warm or a cold page cache. It measures the time of
`from_pretrained`, the growth of the process's memory up to the end of a first forward pass, and the bytes that came
from the disk. The script prints the medians, with the ratios to the ordinary checkpoint.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from timing import format_rows, machine, milliseconds
from transformers import ViTForImageClassification

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

ORDINARY = "ordinary 3-head ViT"
WAYS = {  # the folder, the class and the keywords of each way
    ORDINARY: ("vit3", ViTForImageClassification, {}),
    "12-head file, num_attention_heads=3": ("hydravit12", HydraViTForImageClassification, {"num_attention_heads": 3}),
    "12-head file, num_heads_active=3": ("hydravit12", HydraViTForImageClassification, {"num_heads_active": 3}),
}
COLUMNS = {
    "cache": ("cache", ""),
    "way": ("way", ""),
    "ms": ("load, ms", ".0f"),
    "ms_ratio": ("ratio", ".2f"),
    "memory_mb": ("memory, MB", ".1f"),
    "memory_mb_ratio": ("ratio", ".2f"),
    "read_mb": ("disk, MB", ".1f"),
    "read_share": ("of file", ".1%"),
}


def load(folder: Path, way: str, config: HydraViTConfig) -> dict:
    """Load and run once, in this process."""
    name, model_class, keywords = WAYS[way]
    images, models, process = torch.randn(1, 3, config.image_size, config.image_size), [], psutil.Process()
    memory, read = process.memory_info().rss, process.io_counters().read_bytes
    elapsed = milliseconds(lambda: models.append(model_class.from_pretrained(folder / name, **keywords)))
    read = process.io_counters().read_bytes - read
    with torch.inference_mode():
        models[0](images)
    return {"ms": elapsed, "memory_mb": (process.memory_info().rss - memory) / 1e6, "read_mb": read / 1e6}


def run(folder: Path, way: str, cache: str, config: dict) -> dict:
    """Load in a process of its own."""
    for file in folder.rglob("*.safetensors") if cache == "cold" else ():
        with open(file, "rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--folder", str(folder), "--way", way, "--config", json.dumps(config)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)


def measure(folder: Path, config: dict, caches: list[str], rounds: int):
    """Make both checkpoints, load them in turn, and print the medians."""
    model = HydraViTForImageClassification(HydraViTConfig(**config))
    model.save_pretrained(folder / "hydravit12")
    model.to_vit(3).save_pretrained(folder / "vit3")
    os.sync()
    file_mb = (folder / "hydravit12" / "model.safetensors").stat().st_size / 1e6
    rows = []
    for cache in caches:
        records = {way: [] for way in WAYS}
        for turn in range(-1, rounds):  # the first one warms up
            for way in WAYS:
                records[way] += [run(folder, way, cache, config)] * (turn >= 0)
        medians = {
            way: {key: statistics.median(record[key] for record in runs) for key in runs[0]}
            for way, runs in records.items()
        }
        for way, row in medians.items():
            ratios = {f"{key}_ratio": row[key] / medians[ORDINARY][key] for key in ("ms", "memory_mb")}
            rows.append({"cache": cache, "way": way, "read_share": row["read_mb"] / file_mb} | row | ratios)
    print(f"{machine()}, {rounds} rounds, medians; the file of all 12 heads has {file_mb:.0f} MB\n")
    print(format_rows(rows, COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cache", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of HydraViTConfig, JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(load(args.folder, args.way, HydraViTConfig(**args.config))))
    else:
        with tempfile.TemporaryDirectory(dir=".") as temporary:  # not in /tmp, which may be memory
            measure(Path(temporary), args.config, args.cache, args.rounds)
