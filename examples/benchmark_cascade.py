"""Does a cascade skip the work? Its time over that of the passes that it should consist of, interleaved in one run.

    python examples/benchmark_cascade.py --batch_size 32 --shares 0.5 0.8
    python examples/benchmark_cascade.py --token_recycling
    python examples/benchmark_cascade.py --onnx                    # the exported files, in ONNX Runtime

For each share of images that stop early, the threshold is set so that they do, on random images and weights. Each round
times, in alternating order, the cascade, and the narrow pass of all images with the wide pass of the rest; and the wide
pass of all. The ratio is the median over the rounds of the first two, both of one round.
"""

import argparse
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.export import export_cascade, export_subnetwork
from hydravit_hf.model.cascade_hydravit import uncertainty


def milliseconds(call, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def in_torch(model, images: torch.Tensor, heads: list[int], threshold: float, rest: torch.Tensor, tokens) -> dict:
    """What is timed: the cascade, its two passes, and the wide pass of all images."""
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
    """The same of exported files."""
    from benchmark_export import open_session

    narrow, wide = (width_in_onnx_runtime(model, num_heads) for num_heads in heads)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_heads": heads, "thresholds": threshold}
        file = export_cascade(model, Path(folder) / "cascade.onnx", cascade=settings)
        cascade = open_session(file, torch.get_num_threads())
    everything, rest = ({"pixel_values": batch.numpy()} for batch in (images, rest))
    return {
        "cascade": lambda: cascade.run(None, everything),
        "passes": lambda: (narrow.run(None, everything), wide.run(None, rest)),
        "wide": lambda: wide.run(None, everything),
    }


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=2, default=[3, 12])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8], help="of the images that stop early")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--token_recycling", action="store_true", help="of a model whose wide pass recycles tokens")
    parser.add_argument("--onnx", action="store_true", help="export all and run it in ONNX Runtime")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.onnx and (args.token_recycling or args.device != "cpu"):
        parser.error("--onnx is for models without token recycling, on a CPU")
    device, (narrow, wide) = torch.device(args.device), args.heads
    torch.manual_seed(0)
    # 1. A model, images, and how uncertain it is about them at the narrow width
    stages = {"subnetwork_heads": args.heads, "token_recycling": True} if args.token_recycling else {}
    model = HydraViTForImageClassification(HydraViTConfig(num_labels=1000, **stages)).to(device).eval()
    images = torch.randn(args.batch_size, 3, 224, 224, device=device)
    encoded = model.hydravit(images, num_heads_active=narrow)
    ranked = uncertainty(model.classifier(encoded.pooler_output)).sort().values.double()
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, {args.batch_size} images, {narrow} then {wide} heads\n")
    print("| stop early | cascade, ms | both passes, ms | ratio | 12 heads for all, ms |".replace("12", str(wide)))
    print("| ---: | ---: | ---: | ---: | ---: |")
    for share in args.shares:
        # 2. The threshold between the images that stop and those that go on
        stop = round(share * args.batch_size)
        threshold = ranked[stop - 1 : stop + 1].mean().item()
        rest = images[stop:].clone()
        if (found := (model.cascade(images, [narrow, wide], threshold).num_heads == narrow).sum().item()) != stop:
            raise RuntimeError(f"{found} images stop early, not {stop}.")
        # 3. The rounds, after one that warms up
        if args.onnx:
            calls = in_onnx_runtime(model, images, args.heads, threshold, rest)
        else:
            tokens = encoded.last_hidden_state[stop:].clone() if args.token_recycling else None
            calls = in_torch(model, images, args.heads, threshold, rest, tokens)
        times = {name: [] for name in calls}
        for turn in tqdm(range(-1, args.rounds), desc=f"{share:.0%} stop early", leave=False):
            for name in list(calls) if turn % 2 else reversed(calls):
                times[name] += [milliseconds(calls[name], device)] * (turn >= 0)
        ratio = statistics.median(a / b for a, b in zip(times["cascade"], times["passes"], strict=True))
        cells = [statistics.median(times[name]) for name in calls]
        print(f"| {share:.0%} | {cells[0]:.1f} | {cells[1]:.1f} | {ratio:.3f} | {cells[2]:.1f} |")


if __name__ == "__main__":
    main()
