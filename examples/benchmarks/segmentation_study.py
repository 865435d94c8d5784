"""Does a dense head learn every width of a backbone? UPerNet on canvases of Fashion-MNIST, on a CPU.

    python examples/benchmarks/segmentation_study.py --data /usr/share/datasets/fashion-mnist
    python examples/benchmarks/segmentation_study.py --report

A canvas of 56 pixels shows three items at random places. Each pixel is of the background or of one of ten classes. The
training canvases are made of training images, the 500 test canvases of test images. The backbone has 12 heads x 8
channels, 4 layers and 64 patches. One UPerNet trains on padded feature maps at a width of 3 to 12 heads drawn in each
step ("elastic"), others at 3, 6 or 12 heads alone. The batch norms of UPerNet get the statistics of a width before it
is scored. Each run adds its row to the file of results. Runs in the file are not repeated.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from fashion_mnist import FOLDER, load
from timing import RESULTS, append_rows, read_rows
from torch.optim.swa_utils import update_bn
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from hydravit_hf import HydraViTConfig
from hydravit_hf.training.optimizer import parameter_groups

SIZE, ITEM, ITEMS, CLASSES = 56, 28, 3, 11
SHOWN = (3, 6, 12)
ARMS = ("elastic", *(f"{num_heads} heads alone" for num_heads in SHOWN))
STEPS, BATCH, LEARNING_RATE, TEST_CANVASES = 800, 32, 3e-3, 500
BATCHES_OF_STATISTICS = 10


def make_canvases(images: torch.Tensor, labels: torch.Tensor, count: int, generator: torch.Generator):
    """Put items on canvases. Returns images, (count, 1, H, W), and the class of each pixel, (count, H, W)."""
    canvases, classes = torch.full((count, 1, SIZE, SIZE), -1.0), torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    chosen = torch.randint(len(images), (count, ITEMS), generator=generator)
    places = torch.randint(SIZE - ITEM + 1, (count, ITEMS, 2), generator=generator)
    for canvas in range(count):
        for index, (top, left) in zip(chosen[canvas].tolist(), places[canvas].tolist(), strict=True):
            area = (slice(top, top + ITEM), slice(left, left + ITEM))
            is_item = images[index, 0] > -0.8
            canvases[canvas, 0][area] = torch.where(is_item, images[index, 0], canvases[canvas, 0][area])
            classes[canvas][area] = torch.where(is_item, labels[index] + 1, classes[canvas][area])
    return canvases, classes


def make_model(num_heads: int | None) -> UperNetForSemanticSegmentation:
    """A UPerNet on a new backbone that runs `num_heads`, or draws a width for each step in training."""
    backbone = HydraViTConfig(
        num_attention_heads=12,
        head_dim=8,
        num_hidden_layers=4,
        image_size=SIZE,
        patch_size=7,
        initializer_range=0.1,
        num_channels=1,
        num_heads_active=num_heads,
        pad_feature_maps=num_heads is None,
        out_indices=[1, 2, 3, 4],
    )
    sizes = {"hidden_size": 48, "num_labels": CLASSES, "use_auxiliary_head": False, "pool_scales": [1, 2, 7]}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes))


def train(data: dict, num_heads: int | None, seed: int, steps: int) -> UperNetForSemanticSegmentation:
    torch.manual_seed(seed)
    model, generator = make_model(num_heads).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(steps):
        canvases, classes = make_canvases(*data["train"], BATCH, generator)
        model(canvases, labels=classes).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def set_width(model: UperNetForSemanticSegmentation, data: dict, num_heads: int):
    """Set the width of the backbone, and measure the statistics of the batch norms at this width."""
    model.backbone.config.num_heads_active = num_heads
    generator = torch.Generator().manual_seed(0)
    update_bn((make_canvases(*data["train"], BATCH, generator)[0] for _ in range(BATCHES_OF_STATISTICS)), model)


@torch.no_grad()
def score(model: UperNetForSemanticSegmentation, canvases: torch.Tensor, classes: torch.Tensor) -> dict:
    """The share of right pixels, and the mean over the classes of intersection over union."""
    confusion = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    for images, truth in zip(canvases.split(50), classes.split(50), strict=True):
        found = model(images).logits.argmax(1)
        confusion += np.bincount((CLASSES * truth + found).flatten(), minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    there = union > 0
    return {
        "pixel_accuracy": float(right.sum() / confusion.sum()),
        "mean_iou": float((right[there] / union[there]).mean()),
    }


def measure_all(args: argparse.Namespace):
    torch.set_num_threads(1)
    data, done = load(args.data), {row["run"] for row in read_rows(args.results)}
    test = make_canvases(*data["test"], TEST_CANVASES, torch.Generator().manual_seed(0))
    for seed in range(args.seeds):
        for arm in ARMS:
            if (run := f"{arm}/{seed}") not in done:
                alone = None if arm == "elastic" else int(arm.split()[0])
                model = train(data, alone, seed, args.steps)
                scores = {}
                for num_heads in [alone] if alone else SHOWN:
                    set_width(model, data, num_heads)
                    scores[str(num_heads)] = score(model, *test)
                append_rows(args.results, [{"run": run, "steps": args.steps, "scores": scores}])
                print(run, flush=True)


def report(rows: list[dict]) -> str:
    """Format the scores in percent, means over the seeds, as a Markdown table."""
    lines = ["| UPerNet | seeds | mean IoU at 3 | 6 | 12 heads | pixels at 3 | 6 | 12 heads |"]
    lines.append("| --- |" + " ---: |" * 7)
    for arm in ARMS:
        runs = [row["scores"] for row in rows if row["run"].startswith(f"{arm}/")]
        cells = [
            f"{100 * np.mean([run[str(k)][name] for run in runs]):.1f}" if runs and str(k) in runs[0] else ""
            for name in ("mean_iou", "pixel_accuracy")
            for k in SHOWN
        ]
        if runs:
            lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, help="idx files")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "segmentation_study.jsonl", help="file of the results"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--report", action="store_true", help="train nothing, report the results")
    args = parser.parse_args()
    if not args.report:
        measure_all(args)
    print(report(read_rows(args.results)))


if __name__ == "__main__":
    main()
