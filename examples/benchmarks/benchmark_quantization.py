"""torchao's schemes on one HydraViT: accuracy at each width, size of the file, and speed beside float32.

    pip install -c constraints.txt -e ".[quantize]"
    python examples/benchmarks/benchmark_quantization.py --heads 3 12 --threads 1 --json quantization.jsonl
    python examples/benchmarks/lora_study.py --base_only --onnx ...    # leaves its model in runs/lora_study/base
    python examples/benchmarks/benchmark_quantization.py --checkpoint runs/lora_study/base --heads 2 3 4 5 6 --rounds 0

The size is that of the default model, or of the checkpoint. Each way runs the subnetwork that `extract_subnetwork` cuts
out of the quantized model. Each round calls every way once, in a shuffled order. A ratio is the median over the rounds
of float32 over this way, both of one round: above 1 is faster.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import format_rows, machine, median_ratio, time_rounds, write_rows
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from transformers import TorchAoConfig
from transformers.utils import logging

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

FLOAT = "float32"
COLUMNS = {
    "scheme": ("scheme", ""),
    "size": ("file of float32's", ".3f"),
    "num_heads": ("heads", ""),
    "accuracy": ("accuracy, %", ".2f"),
    "batch_size": ("batch", ""),
    "latency_ms": ("ms", ".1f"),
    "ratio": ("ratio", ".2f"),
    "compiled_ms": ("compiled, ms", ".1f"),
    "compiled_ratio": ("ratio", ".2f"),
}


def schemes(head_dim: int) -> dict:
    """The schemes that can be cut, by name."""
    group = PerGroup(head_dim)
    return {
        "8 bits by row, dynamic": Int8DynamicActivationInt8WeightConfig(),
        "8 bits by row": Int8WeightOnlyConfig(),
        "8 bits in groups": Int8WeightOnlyConfig(granularity=group),
        "8 bits in groups, bf16 scales": IntxWeightOnlyConfig(torch.int8, group, scale_dtype=torch.bfloat16),
        "4 bits in groups": IntxWeightOnlyConfig(torch.int4, group),
        "4 bits in groups, dynamic": Int8DynamicActivationIntxWeightConfig(torch.int4, group),
    }


def quantize(folder: Path, names: list[str] | None) -> tuple[dict, dict]:
    """The models of a checkpoint, and the bytes of their weights, by the name of their scheme."""
    load = HydraViTForImageClassification.from_pretrained
    models, sizes = {FLOAT: load(folder)}, {FLOAT: (folder / "model.safetensors").stat().st_size}
    for name, config in schemes(models[FLOAT].config.head_dim).items():
        if names and name not in names:
            continue
        models[name] = load(folder, quantization_config=TorchAoConfig(config))
        models[name].save_pretrained(folder / "quantized")
        sizes[name] = (folder / "quantized" / "model.safetensors").stat().st_size
    return models, sizes


def ways(models: dict, num_heads: int) -> dict[tuple[str, bool], Callable]:
    """Functions of images, by the scheme and whether they are compiled."""
    found = {}
    for name, model in models.items():
        small = model.extract_subnetwork(num_heads)
        found[name, False] = small
        found[name, True] = torch.compile(small)
    return found


def time_all(models: dict, num_heads: int, batch_size: int, rounds: int) -> dict:
    """The latency of each scheme, eager and compiled, and how many times as fast it is as eager float32."""
    size = models[FLOAT].config.image_size
    images = torch.randn(batch_size, models[FLOAT].config.num_channels, size, size)
    calls = {key: partial(way, images) for key, way in ways(models, num_heads).items()}
    times = time_rounds(calls, rounds, warmup=2, desc=f"{num_heads} heads, batch {batch_size}")
    found = {}
    for (name, is_compiled), mine in times.items():
        prefix = "compiled_" if is_compiled else ""
        row = found.setdefault(name, {})
        row[f"{prefix}ms" if is_compiled else "latency_ms"] = statistics.median(mine)
        row[f"{prefix}ratio"] = median_ratio(times[FLOAT, False], mine)
    return found


def score(models: dict, heads: list[int], data: Path, classes: int) -> dict:
    """The accuracy of each scheme and width on the test images of Fashion-MNIST, in %. The study trains on the last
    classes."""
    from elastify_backbone_study import Enlarged
    from fashion_mnist import accuracies
    from lora_study import part

    images, labels = part(data, "test", range(10 - classes, 10))
    return {
        name: dict(zip(heads, accuracies(Enlarged(model), images, labels, heads), strict=True))
        for name, model in models.items()
    }


def measure(args) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        if args.checkpoint:
            model = HydraViTForImageClassification.from_pretrained(args.checkpoint)
        else:
            model = HydraViTForImageClassification(HydraViTConfig(num_labels=1000, **args.config))
        model.save_pretrained(folder)
        models, sizes = quantize(Path(folder), args.schemes)
    found = score(models, args.heads, args.data, model.config.num_labels) if args.checkpoint else None
    rows = []
    for num_heads in args.heads:
        for batch_size in args.batch_size if args.rounds else [None]:
            with torch.inference_mode():
                times = time_all(models, num_heads, batch_size, args.rounds) if args.rounds else {}
            for name, size in sizes.items():
                row = {"machine": machine(), "threads": torch.get_num_threads(), "scheme": name}
                row |= {"size": size / sizes[FLOAT], "num_heads": num_heads}
                row |= {"accuracy": 100 * found[name][num_heads]} if found else {}
                rows.append(row | ({"batch_size": batch_size} | times[name] if times else {}))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=11, help="0 measures no speed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--schemes", nargs="+", help="only these")
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of HydraViTConfig, JSON")
    parser.add_argument("--checkpoint", type=Path, help="measure the accuracy of this model of Fashion-MNIST")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="idx files")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, one a line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    logging.disable_progress_bar()
    rows = measure(args)
    columns = {key: column for key, column in COLUMNS.items() if key in rows[0]}
    print(f"{machine()}, {args.threads} threads\n\n{format_rows(rows, columns)}")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
