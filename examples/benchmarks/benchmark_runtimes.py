"""Every way to run a width, side by side: this model, extracted, compiled, quantised, exported, stock ViT.

    pip install -c constraints.txt -e ".[export,study]"
    python examples/benchmarks/benchmark_runtimes.py --heads 3 6 12 --json runtimes.jsonl --plot runtimes.png
    python examples/benchmarks/benchmark_runtimes.py --checkpoint runs/digits --heads 3 12 --rounds 0  # accuracy only

Each round calls every way once at every width, in a shuffled order, so that each call comes after one of another width.
A ratio is the median over the rounds of stock ViT in float32 over this way, both of one round: above 1 is faster than
what users of a plain ViT run today. `agreement` is the share of the images whose first label is that of stock ViT. With
`--checkpoint`, `accuracy` is measured on the held-out digits. Runtimes that are not installed are left out.
"""

import argparse
import copy
import statistics
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from timing import format_rows, machine, median_ratio, milliseconds, time_rounds, write_rows

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

BASELINE = "stock ViT"
COLUMNS = {
    "num_heads": ("heads", ""),
    "way": ("way", ""),
    "agreement": ("agreement", ".3f"),
    "accuracy": ("accuracy", ".3f"),
    "batch_size": ("batch", ""),
    "latency_ms": ("latency, ms", ".3f"),
    "throughput": ("images/s", ".1f"),
    "ratio": ("ratio", ".3f"),
}


def torch_ways(model, num_heads: int) -> dict:
    """Name -> a function of images (B, C, H, W) that gives logits, with the weights of `model`."""
    vit = model.to_vit(num_heads)
    half, half_vit = copy.deepcopy(model).bfloat16(), copy.deepcopy(vit).bfloat16()
    compiled, half_compiled = torch.compile(copy.deepcopy(vit)), torch.compile(copy.deepcopy(half_vit))
    small = model.extract_subnetwork(num_heads)
    return {
        BASELINE: lambda images: vit(images).logits,
        "elastic": lambda images: model(images, num_heads_active=num_heads).logits,
        "extracted": lambda images: small(images).logits,
        "stock ViT, bf16": lambda images: half_vit(images.bfloat16()).logits,
        "elastic, bf16": lambda images: half(images, num_heads_active=num_heads).logits,
        "compiled": lambda images: compiled(images).logits,
        "compiled, bf16": lambda images: half_compiled(images.bfloat16()).logits,
    }


def timm_ways(model, num_heads: int) -> dict:
    """timm's DeiT of that shape, with other weights. timm needs torchvision."""
    try:
        import timm
    except (ImportError, RuntimeError):
        return {}
    name = {3: "deit_tiny_patch16_224", 6: "deit_small_patch16_224", 12: "deit_base_patch16_224"}.get(num_heads)
    if name is None or model.config.image_size != 224:
        return {}
    return {"timm DeiT": timm.create_model(name).eval()}


def torchao_ways(model, num_heads: int) -> dict:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    vit = model.to_vit(num_heads)
    quantize_(vit, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(vit)
    return {"torchao int8, compiled": lambda images: compiled(images).logits}


def onnx_ways(model, num_heads: int, folder: Path, images: torch.Tensor) -> dict:
    from benchmark_export import open_session
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from hydravit_hf.export import export_subnetwork

    class Images(CalibrationDataReader):
        batches = iter([{"pixel_values": image[None].numpy()} for image in images[:16]])

        def get_next(self):
            return next(self.batches, None)

    files = {name: folder / f"{num_heads}_{name}.onnx" for name in ("plain", "prepared", "dynamic", "static")}
    export_subnetwork(model, num_heads, "onnx", files["plain"])
    quant_pre_process(files["plain"], files["prepared"], skip_symbolic_shape=True)
    quantize_dynamic(files["prepared"], files["dynamic"])
    quantize_static(files["prepared"], files["static"], Images(), per_channel=True)

    def way(file: Path):
        session = open_session(file, torch.get_num_threads())
        return lambda images: torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])

    names = {"ONNX Runtime": "plain", "ONNX Runtime, int8 dynamic": "dynamic", "ONNX Runtime, int8 static": "static"}
    return {name: way(files[key]) for name, key in names.items()}


def openvino_ways(model, num_heads: int, folder: Path) -> dict:
    import openvino

    from hydravit_hf.export import export_subnetwork

    file = export_subnetwork(model, num_heads, "openvino", folder / f"{num_heads}.xml")

    def way(precision: str):
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        request = openvino.Core().compile_model(file, "CPU", hints).create_infer_request()
        return lambda images: torch.from_numpy(request.infer([images.numpy()])[0].copy())

    return {"OpenVINO": way("f32"), "OpenVINO, bf16": way("bf16")}


def all_ways(model, num_heads: int, folder: Path, images: torch.Tensor) -> dict:
    ways = torch_ways(model, num_heads) | timm_ways(model, num_heads)
    if find_spec("torchao"):
        ways |= torchao_ways(model, num_heads)
    if find_spec("onnxruntime"):
        ways |= onnx_ways(model, num_heads, folder, images)
    if find_spec("openvino"):
        ways |= openvino_ways(model, num_heads, folder)
    return ways


def time_ways(ways: dict, images: dict[int, torch.Tensor], rounds: int) -> dict:
    """(width, way, batch size) -> milliseconds of each round. Two rounds warm up, and compile."""
    calls = {(*key, size): partial(way, batch) for key, way in ways.items() for size, batch in images.items()}
    return time_rounds(calls, rounds, warmup=2)


def time_switches(model, heads: list[int], images: torch.Tensor, rounds: int) -> float:
    """The median, over rounds and widths, of the first call after a switch of width over the call that follows it."""
    ratios = []
    for _ in range(rounds):
        for num_heads in heads:
            first, steady = (milliseconds(partial(model, images, num_heads_active=num_heads)) for _ in range(2))
            ratios.append(first / steady)
    return statistics.median(ratios)


def held_out_digits(checkpoint: Path):
    from transformers import AutoImageProcessor

    from hydravit_hf.data import load_digits, to_pixel_values

    items = load_digits()["test"].with_transform(to_pixel_values(AutoImageProcessor.from_pretrained(checkpoint)))[:]
    return torch.stack(items["pixel_values"]), torch.as_tensor(items["labels"])


def plot(rows: list[dict], path: Path, title: str):
    from matplotlib.figure import Figure

    batches = sorted({row["batch_size"] for row in rows})
    figure = Figure(figsize=(5.2 * len(batches), 4.6), dpi=150, layout="constrained")
    for axes, batch_size in zip(figure.subplots(1, len(batches), sharey=True, squeeze=False)[0], batches, strict=True):
        shown = [row for row in rows if row["batch_size"] == batch_size]
        names, heads = list(dict.fromkeys(row["way"] for row in shown)), sorted({row["num_heads"] for row in shown})
        for index, num_heads in enumerate(heads):
            ratios = [row["ratio"] for row in shown if row["num_heads"] == num_heads]
            places = np.arange(len(names)) + 0.8 * (index - (len(heads) - 1) / 2) / len(heads)
            color = (0.55 - 0.3 * index / len(heads), 0.5 - 0.3 * index / len(heads), 0.9)
            axes.barh(places, ratios, 0.75 / len(heads), color=color, label=f"{num_heads} heads")
        axes.axvline(1, color="0.3", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="times as fast as stock ViT, float32", title=f"batch {batch_size}")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # of both, as they share it
    axes.legend(frameon=False, loc="upper right")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def measure(model, images: torch.Tensor, labels: torch.Tensor | None, args) -> list[dict]:
    """A row for each width, way and batch size, and one for switches of the width."""
    batches = {batch_size: images[:batch_size].clone() for batch_size in args.batch_size}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        ways = {
            (num_heads, name): way
            for num_heads in args.heads
            for name, way in all_ways(model, num_heads, Path(folder), images).items()
            if not args.ways or name in [BASELINE, *args.ways]
        }
        predicted = {
            key: torch.cat([way(batch).float().argmax(-1) for batch in images.split(8)]) for key, way in ways.items()
        }
        times = time_ways(ways, batches, args.rounds) if args.rounds else {}
        switch = time_switches(model, args.heads, batches[min(batches)], args.rounds) if args.rounds else None
    rows = []
    for (num_heads, name), found in predicted.items():
        row = {"machine": machine(), "num_heads": num_heads, "way": name}
        row["agreement"] = (found == predicted[num_heads, BASELINE]).float().mean().item()
        if labels is not None:
            row["accuracy"] = (found == labels).float().mean().item()
        for batch_size in batches if times else [None]:
            timed = {}
            if times:
                mine, base = times[num_heads, name, batch_size], times[num_heads, BASELINE, batch_size]
                latency = statistics.median(mine)
                timed = {"batch_size": batch_size, "latency_ms": latency, "throughput": 1e3 * batch_size / latency}
                timed["ratio"] = median_ratio(base, mine)
            rows.append(row | timed)
    return rows if switch is None else [*rows, {"machine": machine(), "way": "elastic", "switch_ratio": switch}]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ways", nargs="+", help="only these, beside stock ViT")
    parser.add_argument("--checkpoint", type=Path, help="a model of the digits; default: random weights, 224 pixels")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, one a line")
    parser.add_argument("--plot", type=Path, help="also plot the ratios into this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # one piece of code is compiled for each width, way and batch size
    if args.checkpoint:
        model = HydraViTForImageClassification.from_pretrained(args.checkpoint).eval()
        images, labels = held_out_digits(args.checkpoint)
    else:
        model = HydraViTForImageClassification(HydraViTConfig(num_labels=1000)).eval()
        images, labels = torch.randn(32, 3, 224, 224), None
    rows = measure(model, images, labels, args)
    shown = [row for row in rows if "num_heads" in row]
    columns = {key: column for key, column in COLUMNS.items() if key in shown[0]}
    print(f"{machine()}\n\n{format_rows(shown, columns)}")
    if "switch_ratio" in rows[-1]:
        print(
            f"\nelastic: the first call after a switch of width takes {rows[-1]['switch_ratio']:.3f} x the steady call"
        )
    if args.json:
        write_rows(args.json, rows)
    if args.plot:
        plot(shown, args.plot, machine())


if __name__ == "__main__":
    main()
