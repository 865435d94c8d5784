"""Forward time of every width next to the stock ViT of the same shape, interleaved in one run.

    python examples/benchmark_forward.py --batch_size 1 8 --dtype float32 bfloat16

Each round times both models once at every width, in alternating order, so that a drift of the machine hits all alike.
The ratio is the median over the rounds of elastic over stock, both of one round.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification


def seconds(call, device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
parser.add_argument("--heads", type=int, nargs="+", default=list(range(3, 13)))
parser.add_argument("--rounds", type=int, default=20)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--json", type=Path, help="also write the rows to this file")
args = parser.parse_args()
device = torch.device(args.device)
machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
print(f"{machine}, torch {torch.__version__}, {args.rounds} rounds")
print(f"{'dtype':>9} {'batch':>6} {'heads':>6} {'stock ViT ms':>13} {'HydraViT ms':>12} {'ratio':>6}")

rows = []
for dtype in args.dtype:
    # 1. One elastic model, and the plain ViT that each of its subnetworks is
    elastic = HydraViTForImageClassification(HydraViTConfig()).to(device, getattr(torch, dtype)).eval()
    stock = {num_heads: elastic.to_vit(num_heads) for num_heads in args.heads}
    for batch_size in args.batch_size:
        images = torch.randn(batch_size, 3, 224, 224, device=device, dtype=getattr(torch, dtype))
        times = {num_heads: ([], []) for num_heads in args.heads}
        with torch.inference_mode():
            for turn in tqdm(range(-2, args.rounds), desc=f"{dtype}, batch {batch_size}", leave=False):
                for num_heads, (stock_times, elastic_times) in times.items():
                    # 2. Both at this width, the other one first in every other round; two rounds warm up
                    calls = [
                        (stock_times, partial(stock[num_heads], images)),
                        (elastic_times, partial(elastic, images, num_heads_active=num_heads)),
                    ]
                    for record, call in calls if turn % 2 else reversed(calls):
                        elapsed = seconds(call, device)
                        if turn >= 0:
                            record.append(elapsed)
        # 3. Medians and ratios
        for num_heads, (stock_times, elastic_times) in times.items():
            rows.append(
                {
                    "machine": machine,
                    "dtype": dtype,
                    "batch_size": batch_size,
                    "num_heads": num_heads,
                    "stock_ms": 1e3 * statistics.median(stock_times),
                    "elastic_ms": 1e3 * statistics.median(elastic_times),
                    "ratio": statistics.median(e / s for s, e in zip(stock_times, elastic_times, strict=True)),
                }
            )
            print(
                "{dtype:>9} {batch_size:6} {num_heads:6} {stock_ms:13.2f} {elastic_ms:12.2f} {ratio:6.3f}".format(
                    **rows[-1]
                )
            )
if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + "\n")
