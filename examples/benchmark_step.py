"""Time of a training step at a width next to the stock ViT of the same shape, interleaved in one run.

    python examples/benchmark_step.py --heads 3 6 --batch_size 64

A step of the full model at k heads computes the gradients of k heads and then passes over all the weights, used or not:
both parts are timed. AdamW moves all weights, PrefixAdamW those of the k heads. Each round times every variant once, in
an order that turns with the rounds; the ratios are medians over the rounds, each of one round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.training.optimizer import PrefixAdamW, parameter_groups

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--heads", type=int, nargs="+", default=[3, 6])
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--json", type=Path, help="also write the rows to this file")
args = parser.parse_args()
device = torch.device(args.device)


def now() -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, fused=True)


def time_step(model, optimizer, images, labels, **width) -> tuple[float, float]:
    """Seconds of the forward and backward pass, and of the optimizer's."""
    start = now()
    model(images, labels=labels, **width).loss.backward()
    middle = now()
    optimizer.step()
    optimizer.zero_grad()
    return middle - start, now() - middle


machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
print(f"{machine}, torch {torch.__version__}, batch {args.batch_size}, float32, {args.rounds} rounds")
print("| heads | model | forward and backward, ms | optimizer, ms | step, ms | ratio | optimizer's part |")
print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
images = torch.randn(args.batch_size, 3, 224, 224, device=device)
labels = torch.randint(1_000, (args.batch_size,), device=device)
rows = []
for num_heads in args.heads:
    # 1. The full model under both optimizers, and the stock ViT that it is at this width
    elastic = HydraViTForImageClassification(HydraViTConfig(num_labels=1_000)).to(device).train()
    stock = elastic.to_vit(num_heads).train()
    prefix = PrefixAdamW(elastic, lr=1e-4, weight_decay=0.05)
    prefix.num_heads = num_heads
    width = {"num_heads_active": num_heads}
    variants = {
        "stock ViT, AdamW": (stock, adamw(stock), {}),
        "HydraViT, AdamW": (elastic, adamw(elastic), width),
        "HydraViT, PrefixAdamW": (elastic, prefix, width),
    }
    times = {name: [] for name in variants}
    # 2. Rounds, of which the first warms up
    for turn in tqdm(range(-1, args.rounds), desc=f"{num_heads} heads", leave=False):
        names = list(variants)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        for name in names:
            model, optimizer, options = variants[name]
            elapsed = time_step(model, optimizer, images, labels, **options)
            if turn >= 0:
                times[name].append(elapsed)
    # 3. Medians, and ratios within the rounds
    baseline = [sum(elapsed) for elapsed in times["stock ViT, AdamW"]]
    for name, measured in times.items():
        passes, updates = (1e3 * statistics.median(part) for part in zip(*measured, strict=True))
        steps = [sum(elapsed) for elapsed in measured]
        ratio = statistics.median(step / base for step, base in zip(steps, baseline, strict=True))
        share = statistics.median(update / step for (_, update), step in zip(measured, steps, strict=True))
        step = 1e3 * statistics.median(steps)
        rows.append({"num_heads": num_heads, "model": name, "passes_ms": passes, "optimizer_ms": updates})
        rows[-1] |= {"step_ms": step, "ratio": ratio, "optimizer_share": share}
        print(f"| {num_heads} | {name} | {passes:.0f} | {updates:.0f} | {step:.0f} | {ratio:.2f} | {share:.1%} |")
if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + "\n")
