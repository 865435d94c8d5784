"""What a training step on two processes sends and takes: narrow steps of a HydraViT, with and without its hook.

    python examples/benchmarks/benchmark_gradients.py

Two processes train over gloo on loopback, as DDP does. Each row is a step at some heads: of a stock ViT of these heads,
of the HydraViT as DDP trains it by itself ("all gradients"), with `share_leading_gradients`, or with `PrefixAdamW` as
well, which updates the leading heads alone (`freeze_unused_weights`). A round takes one step of each, in random order.
The bytes are those that the loopback interface carries for both processes (Linux).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from timing import format_rows, machine, median_ratio, time_rounds, write_rows
from torch.nn.parallel import DistributedDataParallel

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.training.gradients import share_leading_gradients
from hydravit_hf.training.optimizer import PrefixAdamW

WAYS = ("stock ViT", "all gradients", "leading gradients", "leading gradients and updates")
COLUMNS = {
    "heads": ("heads", ""),
    "way": ("way", ""),
    "sent_mb": ("sent, MB", ".1f"),
    "sent_ratio": ("ratio", ".2f"),
    "ms": ("step, ms", ".0f"),
    "ms_ratio": ("ratio", ".2f"),
}


class Step:
    """One training step of a model under DDP. Counts what the loopback interface sends meanwhile."""

    def __init__(self, model: DistributedDataParallel, images: torch.Tensor, num_heads: int, way: str):
        self.model, self.images, self.num_heads, self.way = model, images, num_heads, way
        if way.endswith("updates"):
            self.optimizer = PrefixAdamW(model.module, lr=1e-4)
            self.optimizer.num_heads = num_heads
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.sent_mb = []

    def __call__(self):
        dist.barrier()
        before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
        options = {} if self.way == "stock ViT" else {"num_heads_active": self.num_heads}
        if self.way.startswith("leading"):
            share_leading_gradients(self.model, self.num_heads)
        self.model(self.images, **options).logits.logsumexp(-1).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.barrier()
        self.sent_mb.append((psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before) / 1e6)


def measure(args: argparse.Namespace) -> list[dict]:
    """Measure in this process, one of the two."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    config = HydraViTConfig(**args.config)
    images = torch.randn(args.batch_size, config.num_channels, config.image_size, config.image_size)
    model = HydraViTForImageClassification(config)
    elastic = {way: DistributedDataParallel(model) for way in WAYS[1:]}
    steps = {}
    for num_heads in args.heads:
        vit = DistributedDataParallel(model.to_vit(num_heads))
        for way, of_way in {WAYS[0]: vit, **elastic}.items():
            steps[num_heads, way] = Step(of_way, images, num_heads, way)
    times = time_rounds(steps, args.rounds, desc=None)
    rows = []
    for (num_heads, way), measured in times.items():
        base = num_heads, WAYS[0]
        row = {"heads": num_heads, "way": way, "ms": statistics.median(measured)}
        row |= {"ms_ratio": median_ratio(measured, times[base])}
        sent, of_base = (steps[key].sent_mb for key in ((num_heads, way), base))
        rows.append(row | {"sent_mb": statistics.median(sent), "sent_ratio": median_ratio(sent, of_base)})
    rank = dist.get_rank()
    dist.barrier()
    del elastic, vit, steps, of_way
    dist.destroy_process_group()
    return rows if rank == 0 else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=8, help="images of each process")
    parser.add_argument(
        "--config", type=json.loads, default={"image_size": 32}, help="arguments of HydraViTConfig, JSON"
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    if "RANK" not in os.environ:  # become two processes
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        sys.exit(subprocess.run([*launch, *sys.argv], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode)
    if rows := measure(args):
        print(f"{machine()}, two processes, {args.rounds} rounds, medians\n")
        print(format_rows(rows, COLUMNS))
        if args.json is not None:
            write_rows(args.json, [row | {"machine": machine(), "rounds": args.rounds} for row in rows])
