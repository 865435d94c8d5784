"""How far two profiles of one run agree, and whether a width that was chosen by its latency meets the budget again.

    python examples/benchmark_profile.py --budgets_ms 30 75 150

A machine that others use at the same time shows in a 90th percentile far above the median.
"""

import argparse

import torch

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, choose_num_heads, profile_subnetworks
from hydravit_hf.reporting import format_table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=list(range(3, 13)))
    parser.add_argument("--budgets_ms", type=float, nargs="+", default=[30, 75, 150])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = HydraViTForImageClassification(HydraViTConfig(num_labels=1000))
    first, second = (profile_subnetworks(model, args.heads, rounds=args.rounds) for _ in range(2))
    print(f"{first[0]['device']}, torch {torch.__version__}\n\n{format_table(first)}\n\n{format_table(second)}\n")
    for one, two in zip(first, second, strict=True):
        print(f"{one['num_heads']} heads: second median {two['latency_ms'] / one['latency_ms']:.3f} x the first")
    for budget in args.budgets_ms:
        chosen = choose_num_heads(first, max_latency_ms=budget)
        (again,) = profile_subnetworks(model, [chosen], rounds=args.rounds)
        print(f"budget {budget:g} ms: {chosen} heads, measured again {again['latency_ms']:.1f} ms")


if __name__ == "__main__":
    main()
