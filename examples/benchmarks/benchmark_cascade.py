"""Does a cascade skip the work? Its time over the time of the passes that it consists of, interleaved in one run.

    python examples/benchmarks/benchmark_cascade.py --batch_size 32 --shares 0.5 0.8
    python examples/benchmarks/benchmark_cascade.py --token_recycling
    python examples/benchmarks/benchmark_cascade.py --onnx                    # the exported files, in ONNX Runtime

The weights and the images are random. For each share, the threshold lets that share of the images stop early. Each
round times, in alternating order, the cascade, its two passes (the narrow one of all images and the wide one of the
rest), and the wide pass of all images. The ratio is the median over the rounds of the cascade over its passes, both of
one round.
"""

import argparse
import json
import statistics
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from timing import format_rows, machine, median_ratio, time_rounds

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.export import export_cascade, export_subnetwork
from hydravit_hf.model.cascade_hydravit import uncertainty


def in_torch(model, images: torch.Tensor, heads: list[int], threshold: float, rest: torch.Tensor, tokens) -> dict:
    """The cascade, its two passes, and the wide pass of all images, as functions."""
    narrow, wide = heads
    second = {"num_heads_active": wide} | ({} if tokens is None else {"recycled_tokens": tokens})
    return {
        "cascade": lambda: model.cascade(images, heads, threshold),
        "passes": lambda: (model.hydravit(images, num_heads_active=narrow), model.hydravit(rest, **second)),
        "wide": lambda: model.hydravit(images, num_heads_active=wide),
    }


@cache
def width_in_onnx_runtime(model, num_heads: int):
    """A session with the file of one width, exported once for all shares."""
    from benchmark_export import open_session

    with tempfile.TemporaryDirectory() as folder:
        file = export_subnetwork(model, num_heads, "onnx", Path(folder) / "width.onnx")
        return open_session(file, torch.get_num_threads())


def in_onnx_runtime(model, images: torch.Tensor, heads: list[int], threshold: float, rest: torch.Tensor) -> dict:
    """The same functions with exported files."""
    from benchmark_export import open_session

    narrow, wide = (width_in_onnx_runtime(model, num_heads) for num_heads in heads)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_heads": heads, "thresholds": threshold}
        file = export_cascade(model, Path(folder) / "cascade.onnx", cascade=settings)
        cascade = open_session(file, torch.get_num_threads())
    everything, rest = ({"pixel_values": batch.numpy()} for batch in (images, rest))
    return {
        "cascade": partial(cascade.run, None, everything),
        "passes": lambda: (narrow.run(None, everything), wide.run(None, rest)),
        "wide": partial(wide.run, None, everything),
    }


@torch.inference_mode()
def measure(args) -> list[dict]:
    torch.manual_seed(0)
    narrow, _ = args.heads
    # 1. A model, images, and how uncertain it is about them at the narrow width
    stages = {"subnetwork_heads": args.heads, "token_recycling": True} if args.token_recycling else {}
    config = HydraViTConfig(num_labels=1000, **stages, **args.config)
    model = HydraViTForImageClassification(config).to(args.device).eval()
    images = torch.randn(args.batch_size, 3, config.image_size, config.image_size, device=args.device)
    encoded = model.hydravit(images, num_heads_active=narrow)
    ranked = uncertainty(model.classifier(encoded.pooler_output)).sort().values.double()
    rows = []
    for share in args.shares:
        # 2. The threshold between the images that stop and those that go on
        stop = round(share * args.batch_size)
        threshold = ranked[stop - 1 : stop + 1].mean().item()
        rest = images[stop:].clone()
        found = (model.cascade(images, args.heads, threshold).num_heads == narrow).sum().item()
        if found != stop:
            raise RuntimeError(f"{found} images stop early, not {stop}.")
        # 3. The rounds
        if args.onnx:
            calls = in_onnx_runtime(model, images, args.heads, threshold, rest)
        else:
            tokens = encoded.last_hidden_state[stop:].clone() if args.token_recycling else None
            calls = in_torch(model, images, args.heads, threshold, rest, tokens)
        times = time_rounds(calls, args.rounds, shuffle=False, desc=f"{share:.0%} stop early")
        medians = {name: statistics.median(measured) for name, measured in times.items()}
        rows.append({"share": share, "ratio": median_ratio(times["cascade"], times["passes"])} | medians)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=2, default=[3, 12])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8], help="shares that stop early")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--token_recycling", action="store_true", help="the wide pass recycles tokens")
    parser.add_argument("--onnx", action="store_true", help="export all and run it in ONNX Runtime")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of HydraViTConfig, JSON")
    args = parser.parse_args()
    if args.onnx and (args.token_recycling or args.device != "cpu"):
        parser.error("--onnx is for models without token recycling, on a CPU")
    columns = {
        "share": ("stop early", ".0%"),
        "cascade": ("cascade, ms", ".1f"),
        "passes": ("both passes, ms", ".1f"),
        "ratio": ("ratio", ".3f"),
        "wide": (f"{args.heads[1]} heads for all, ms", ".1f"),
    }
    rows = measure(args)
    print(f"{machine(args.device)}, {args.batch_size} images, {args.heads[0]} then {args.heads[1]} heads\n")
    print(format_rows(rows, columns))
