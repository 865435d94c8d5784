"""Time of a training step at a width next to the stock ViT of the same shape, interleaved in one run.

    python examples/benchmarks/benchmark_step.py --heads 3 6 --batch_size 64

A step of the full model at k heads computes the gradients of k heads. Then the optimizer passes over all weights, used
or not. Both parts are timed. AdamW moves all weights, PrefixAdamW those of the k heads. Each round times every variant
once, in a shuffled order. The ratios are medians over the rounds, each of times of one round.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from timing import format_rows, machine, median_ratio, milliseconds, time_rounds, write_rows

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.training.optimizer import PrefixAdamW, parameter_groups

BASELINE = "stock ViT, AdamW"
COLUMNS = {
    "num_heads": ("heads", ""),
    "model": ("model", ""),
    "passes_ms": ("forward and backward, ms", ".0f"),
    "optimizer_ms": ("optimizer, ms", ".0f"),
    "step_ms": ("step, ms", ".0f"),
    "ratio": ("ratio", ".2f"),
    "optimizer_share": ("optimizer's part", ".1%"),
}


class Step:
    """A training step. It records the milliseconds of its passes and of its optimizer."""

    def __init__(self, model, optimizer: torch.optim.Optimizer, images, labels, **width):
        self.model, self.optimizer, self.images, self.labels, self.width = model, optimizer, images, labels, width
        self.parts: list[tuple[float, float]] = []

    def __call__(self):
        self.parts.append((milliseconds(self._passes), milliseconds(self._update)))

    def _passes(self):
        self.model(self.images, labels=self.labels, **self.width).loss.backward()

    def _update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, fused=True)


def measure(args) -> list[dict]:
    config = HydraViTConfig(num_labels=1_000, **args.config)
    images = torch.randn(args.batch_size, 3, config.image_size, config.image_size, device=args.device)
    labels = torch.randint(1_000, (args.batch_size,), device=args.device)
    rows = []
    for num_heads in args.heads:
        # 1. The full model under both optimizers, and the stock ViT that it is at this width
        elastic = HydraViTForImageClassification(config).to(args.device).train()
        stock = elastic.to_vit(num_heads).train()
        prefix = PrefixAdamW(elastic, lr=1e-4, weight_decay=0.05)
        prefix.num_heads = num_heads
        steps = {
            BASELINE: Step(stock, adamw(stock), images, labels),
            "HydraViT, AdamW": Step(elastic, adamw(elastic), images, labels, num_heads_active=num_heads),
            "HydraViT, PrefixAdamW": Step(elastic, prefix, images, labels, num_heads_active=num_heads),
        }
        # 2. The rounds
        times = time_rounds(steps, args.rounds, desc=f"{num_heads} heads")
        # 3. Medians, and ratios within the rounds
        for name, step in steps.items():
            passes, updates = zip(*step.parts[-args.rounds :], strict=True)
            row = {"num_heads": num_heads, "model": name, "passes_ms": statistics.median(passes)}
            row |= {"optimizer_ms": statistics.median(updates), "step_ms": statistics.median(times[name])}
            row |= {"ratio": median_ratio(times[name], times[BASELINE])}
            rows.append(row | {"optimizer_share": median_ratio(updates, times[name])})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of HydraViTConfig, JSON")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, one a line")
    args = parser.parse_args()
    rows = measure(args)
    print(f"{machine(args.device)}, batch {args.batch_size}, float32, {args.rounds} rounds\n")
    print(format_rows(rows, COLUMNS))
    if args.json:
        write_rows(args.json, rows)
