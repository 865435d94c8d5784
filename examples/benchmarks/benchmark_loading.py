"""What it costs to load 3 heads out of a 12-head ViT-B-sized checkpoint, next to an ordinary 3-head one (Linux).

    python examples/benchmarks/benchmark_loading.py

The checkpoint of 12 heads is one file, or files by width (`shard_by_heads=True`). `get_slice` reads the one file with
safetensors' own slices, in place of this package's reader of rows. Each load runs in a process of its own, the ways in
turn, from a warm or a cold page cache. It measures the time of `from_pretrained`, the growth of the process's memory up
to the end of a first forward pass, and the bytes that came from the disk. The script prints the medians, and the ratios
to the ordinary checkpoint as medians over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from timing import format_rows, machine, median_ratio, milliseconds, write_rows
from transformers import ViTForImageClassification

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.model import checkpoint_hydravit
from hydravit_hf.model.files_hydravit import DTYPES

ORDINARY = "ordinary 3-head ViT"
NARROW, NARROW_PASS = {"num_attention_heads": 3}, {"num_heads_active": 3}
WAYS = {  # the folder, the class and the keywords of each way
    ORDINARY: ("vit3", ViTForImageClassification, {}),
    "files by width, 3 heads": ("by_width", HydraViTForImageClassification, NARROW),
    "one file, 3 heads": ("one_file", HydraViTForImageClassification, NARROW),
    "one file, 3 heads, get_slice": ("one_file", HydraViTForImageClassification, NARROW),
    "files by width, 12 heads": ("by_width", HydraViTForImageClassification, {}),
    "one file, 12 heads": ("one_file", HydraViTForImageClassification, {}),
}
COLUMNS = {
    "cache": ("cache", ""),
    "way": ("way", ""),
    "ms": ("load, ms", ".0f"),
    "ms_ratio": ("ratio", ".2f"),
    "memory_mb": ("memory, MB", ".1f"),
    "memory_mb_ratio": ("ratio", ".2f"),
    "read_mb": ("disk, MB", ".1f"),
    "read_mb_ratio": ("ratio", ".2f"),
}


class Slice:
    """A tensor that safetensors' own slices read, with the interface of `StoredTensor`."""

    def __init__(self, file, name: str):
        self.slice = file.get_slice(name)
        self.shape, self.dtype = self.slice.get_shape(), DTYPES[self.slice.get_dtype()]

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        return self.slice[slices].clone()


@contextmanager
def open_slices(shards):
    with safe_open(shards[0].path, "pt") as file:
        yield {name: Slice(file, name) for name in file.keys()}, {}  # noqa: SIM118


def load(folder: Path, way: str, config: HydraViTConfig) -> dict:
    """Load and run once, in this process."""
    name, model_class, keywords = WAYS[way]
    if way.endswith("get_slice"):
        checkpoint_hydravit.open_weights = open_slices
    images, models, process = torch.randn(1, 3, config.image_size, config.image_size), [], psutil.Process()
    memory, read = process.memory_info().rss, process.io_counters().read_bytes
    elapsed = milliseconds(lambda: models.append(model_class.from_pretrained(folder / name, **keywords)))
    read = process.io_counters().read_bytes - read
    with torch.inference_mode():
        models[0](images, **{} if model_class is ViTForImageClassification else NARROW_PASS)
    return {"ms": elapsed, "memory_mb": (process.memory_info().rss - memory) / 1e6, "read_mb": read / 1e6}


def run(folder: Path, way: str, cache: str, config: dict) -> dict:
    """Load in a process of its own."""
    for file in folder.rglob("*.safetensors") if cache == "cold" else ():
        with open(file, "rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--folder", str(folder), "--way", way, "--config", json.dumps(config)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)


def measure(folder: Path, config: dict, ways: list[str], caches: list[str], rounds: int) -> list[dict]:
    """Make the checkpoints and load them in turn. Returns the medians."""
    model = HydraViTForImageClassification(HydraViTConfig(**config))
    model.save_pretrained(folder / "one_file")
    model.save_pretrained(folder / "by_width", shard_by_heads=True)
    model.to_vit(3).save_pretrained(folder / "vit3")
    os.sync()
    rows = []
    for cache in caches:
        records = {way: [] for way in ways}
        for turn in range(-1, rounds):  # the first one warms up
            for way in ways:
                records[way] += [run(folder, way, cache, config)] * (turn >= 0)
        for way, runs in records.items():
            columns = {key: [record[key] for record in runs] for key in runs[0]}
            row = {"cache": cache, "way": way} | {key: statistics.median(values) for key, values in columns.items()}
            for key in columns if cache == "cold" else ("ms", "memory_mb"):
                row[f"{key}_ratio"] = median_ratio(columns[key], [record[key] for record in records[ORDINARY]])
            rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS)[1:], default=list(WAYS)[1:], metavar="WAY")
    parser.add_argument("--cache", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of HydraViTConfig, JSON")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(load(args.folder, args.way, HydraViTConfig(**args.config))))
    else:
        with tempfile.TemporaryDirectory(dir=".") as temporary:  # not in /tmp, which may be memory
            rows = measure(Path(temporary), args.config, [ORDINARY, *args.ways], args.cache, args.rounds)
        print(f"{machine()}, {args.rounds} rounds, medians\n")
        print(format_rows(rows, COLUMNS))
        if args.json is not None:
            write_rows(args.json, [row | {"machine": machine(), "rounds": args.rounds} for row in rows])
