"""How far two profiles of one run agree, and whether a width that was chosen by its latency meets the budget again.

    python examples/benchmarks/benchmark_profile.py --budgets_ms 30 75 150

A 90th percentile far above the median shows a machine that others use at the same time.
"""

import argparse
import json

import torch
from timing import machine

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, choose_num_heads, profile_subnetworks
from hydravit_hf.reporting import format_table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=list(range(3, 13)))
    parser.add_argument("--budgets_ms", type=float, nargs="+", default=[30, 75, 150])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of HydraViTConfig, JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = HydraViTForImageClassification(HydraViTConfig(num_labels=1000, **args.config))
    first, second = (profile_subnetworks(model, args.heads, rounds=args.rounds) for _ in range(2))
    print(f"{machine()}\n\n{format_table(first)}\n\n{format_table(second)}\n")
    for one, two in zip(first, second, strict=True):
        print(f"{one['num_heads']} heads: second median {two['latency_ms'] / one['latency_ms']:.3f} x the first")
    for budget in args.budgets_ms:
        chosen = choose_num_heads(first, max_latency_ms=budget)
        (again,) = profile_subnetworks(model, [chosen], rounds=args.rounds)
        print(f"budget {budget:g} ms: {chosen} heads, measured again {again['latency_ms']:.1f} ms")
