"""Forward time of every width next to the stock ViT of the same shape, interleaved in one run.

    python examples/benchmarks/benchmark_forward.py --batch_size 1 8 --dtype float32 bfloat16

Each round times both models once at every width, one right after the other, in alternating order. The ratio is the
median over the rounds of elastic over stock, both of one round.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from timing import format_rows, machine, median_ratio, time_rounds, write_rows

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

COLUMNS = {
    "dtype": ("dtype", ""),
    "batch_size": ("batch", ""),
    "num_heads": ("heads", ""),
    "stock_ms": ("stock ViT, ms", ".2f"),
    "elastic_ms": ("HydraViT, ms", ".2f"),
    "ratio": ("ratio", ".3f"),
}


@torch.inference_mode()
def measure(args) -> list[dict]:
    config, rows = HydraViTConfig(**args.config), []
    for dtype in args.dtype:
        # 1. One elastic model, and the plain ViT that each of its subnetworks is
        elastic = HydraViTForImageClassification(config).to(args.device, getattr(torch, dtype)).eval()
        stock = {num_heads: elastic.to_vit(num_heads) for num_heads in args.heads}
        for batch_size in args.batch_size:
            # 2. Both at every width
            size = (batch_size, 3, config.image_size, config.image_size)
            images = torch.randn(size, device=args.device, dtype=elastic.dtype)
            calls = {}
            for num_heads in args.heads:
                calls["stock", num_heads] = partial(stock[num_heads], images)
                calls["elastic", num_heads] = partial(elastic, images, num_heads_active=num_heads)
            desc = f"{dtype}, batch {batch_size}"
            times = time_rounds(calls, args.rounds, warmup=2, shuffle=False, desc=desc)
            # 3. Medians and ratios
            for num_heads in args.heads:
                both = {way: times[way, num_heads] for way in ("stock", "elastic")}
                row = {"machine": machine(args.device), "dtype": dtype, "batch_size": batch_size}
                row |= {"num_heads": num_heads} | {f"{way}_ms": statistics.median(both[way]) for way in both}
                rows.append(row | {"ratio": median_ratio(both["elastic"], both["stock"])})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, nargs="+", default=list(range(3, 13)))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of HydraViTConfig, JSON")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, one a line")
    args = parser.parse_args()
    rows = measure(args)
    print(f"{machine(args.device)}, {args.rounds} rounds\n\n{format_rows(rows, COLUMNS)}")
    if args.json:
        write_rows(args.json, rows)
