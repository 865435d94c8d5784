"""How good are the narrow widths of a ViT that becomes elastic? A study on Fashion-MNIST, three seeds, on a CPU.

    pip install -c constraints.txt -e ".[train,study]"
    python examples/benchmarks/elastify_study.py --data /usr/share/datasets/fashion-mnist --folder runs/elastify_study
    python examples/benchmarks/elastify_study.py --report      # the table and the plot of the results, without training

The data are the four idx files of Fashion-MNIST, as Debian's package `dataset-fashion-mnist` has them. 5,000 of the
60,000 training images are for validation; the test images are looked at once for each run. The stock Trainer trains a
ViT of 12 heads x 8 channels, 4 layers and 49 patches. Each arm starts from it and trains one width of 3 to 12 heads in
each step, drawn with equal odds. Each run adds its row to the file of results. Runs in the file are not repeated.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from baselines import DynaBERT, count_macs
from fashion_mnist import FOLDER, Flipped, accuracies, load
from timing import RESULTS, append_rows, read_rows
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.elastification import find_rotation, fold_norms, measure, order, rotate
from hydravit_hf.training.optimizer import parameter_groups
from hydravit_hf.training.steps import sample_subnetworks
from hydravit_hf.training.teacher import Teacher

PLOT = Path(__file__).parents[2] / "docs" / "elastify_study.png"
HEADS, SHOWN = list(range(3, 13)), (3, 4, 6, 8, 10, 12)
HEAD_DIM = 8
SIZES = {"image_size": 28, "patch_size": 4, "num_channels": 1, "num_hidden_layers": 4, "layer_norm_eps": 1e-6}
EPOCHS, VIT_BATCH, BATCH, WEIGHT_DECAY = 15, 64, 128, 0.05
STEPS = (0, 150, 500, 2000)
TUNING_STEPS, LEARNING_RATES = 150, (3e-4, 1e-3)
ORDERING_IMAGES = 1024
TAUGHT = {"teacher_weight": 0.7}
ARMS = {
    "new weights": {"start": "new"},
    "leading slices": {"start": "slices"},
    "leading slices, taught": {"start": "slices"} | TAUGHT,
    "permuted, taught": {"start": "permuted"} | TAUGHT,
    "DynaBERT": {"start": "dynabert", "teacher_weight": 1.0, "hidden_state_weight": 1.0},
    "elastify": {"start": "rotated"},
    "elastify, taught": {"start": "rotated"} | TAUGHT,
}
STYLES = {  # lines of the plot
    "leading slices": {"color": "#d97706", "marker": "^"},
    "permuted, taught": {"color": "#be185d", "marker": "v"},
    "DynaBERT": {"color": "0.55", "marker": "D"},
    "elastify, taught": {"color": "#4338ca", "marker": "o"},
}


# --- The ViTs, by the stock Trainer ---


def train_vit(data: dict, folder: Path, num_heads: int, seed: int) -> ViTForImageClassification:
    if (folder / "config.json").exists():
        return ViTForImageClassification.from_pretrained(folder)
    set_seed(seed)
    width = HEAD_DIM * num_heads
    sizes = {"hidden_size": width, "num_attention_heads": num_heads, "intermediate_size": 4 * width}
    vit = ViTForImageClassification(ViTConfig(**SIZES, **sizes, num_labels=10))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=VIT_BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=800,
        weight_decay=WEIGHT_DECAY,
        label_smoothing_factor=0.1,
        seed=seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(vit, arguments, train_dataset=Flipped(*data["train"])).train()
    vit.save_pretrained(folder)
    return vit


# --- The arms ---


def start(vit: ViTForImageClassification, kind: str, images: torch.Tensor, seed: int) -> HydraViTForImageClassification:
    """Make the elastic model that an arm trains."""
    torch.manual_seed(seed)
    model = HydraViTForImageClassification.from_vit(vit, 12)
    if kind == "slices":
        return model
    if kind == "new":
        return HydraViTForImageClassification(model.config)
    loader = DataLoader([{"pixel_values": image} for image in images[:ORDERING_IMAGES]], batch_size=64)
    reorder(model, kind, loader, ORDERING_IMAGES)
    if kind == "dynabert":
        rewired, model = model, DynaBERT(model.config)
        model.load_state_dict(rewired.state_dict())
    return model


def reorder(model: HydraViTForImageClassification, kind: str, loader, count: int, has_classifier: bool = True):
    """Put the parts of a model in order as `elastify` does ("rotated"), with the channels of the stream permuted in
    place of the rotation ("permuted"), or with its stream as it is ("dynabert")."""
    fold_norms(model)
    statistics = measure(model, loader, count, has_classifier, disable_tqdm=True)
    if kind == "rotated":
        rotate(model, find_rotation(statistics.importance))
    elif kind == "permuted":  # a rotation as well: channels in the order of their importance
        channels = statistics.importance.diagonal().argsort(descending=True)
        rotate(model, torch.eye(len(channels)).double()[channels])
    order(model, statistics.heads.argsort(descending=True), statistics.neurons.argsort(descending=True))


def train(
    data: dict, vit, arm: str, steps: int, seed: int, learning_rate: float
) -> HydraViTForImageClassification | DynaBERT:
    """Start the model of an arm and train it for some steps."""
    options = dict(ARMS[arm])
    images, labels = data["train"]
    model = start(vit, options.pop("start"), images, seed)
    teacher = None
    if options:
        full, config = HydraViTForImageClassification.from_vit(vit, 12), model.config
        teacher = Teacher(full, config, options["teacher_weight"], options.get("hidden_state_weight", 0.0))

    def loss_of(step: int, batch: torch.Tensor) -> torch.Tensor:
        (num_heads,) = sample_subnetworks(model.config, seed, step, "uniform")
        with_states = "hidden_state_weight" in options
        outputs = model(images[batch], num_heads_active=num_heads, output_hidden_states=with_states)
        loss = nn.functional.cross_entropy(outputs.logits, labels[batch])
        return loss if teacher is None else teacher(images[batch]).add_to(loss, outputs.logits, outputs.hidden_states)

    return optimise(model, loss_of, len(images), steps, BATCH, seed, learning_rate)


def optimise(model, loss_of, num_images: int, steps: int, batch_size: int, seed: int, learning_rate: float):
    """Train a model in place by AdamW, with warm-up and a cosine. `loss_of` computes the loss of a step, by its number
    and the indices of its images."""
    optimizer = torch.optim.AdamW(parameter_groups(model.train(), WEIGHT_DECAY), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 1) + 1, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        loss_of(step, torch.randint(num_images, (batch_size,), generator=generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def measure_all(args: argparse.Namespace):
    """Do the runs that the file of results does not hold yet, and add a row for each."""
    torch.set_num_threads(1)
    data, done = load(args.data), {row["run"] for row in read_rows(args.results)}

    def add(run: str, make):
        if run not in done:
            append_rows(args.results, [{"run": run} | make()])
            print(run, flush=True)

    vit = train_vit(data, args.folder / "vit-12", 12, 0).eval()
    add("vit/12", lambda: {name: accuracies(vit, *data[name], [None]) for name in ("validation", "test")})
    for arm in args.arms:  # the learning rate of each arm, by the validation images
        for rate in LEARNING_RATES:
            run = lambda arm=arm, rate=rate: {  # noqa: E731
                "validation": accuracies(train(data, vit, arm, TUNING_STEPS, 100, rate), *data["validation"], SHOWN)
            }
            add(f"tuning/{arm}/{rate}", run)
    tuned = {row["run"]: np.mean(row["validation"]) for row in read_rows(args.results) if "tuning/" in row["run"]}
    rates = {arm: max(LEARNING_RATES, key=lambda rate, arm=arm: tuned[f"tuning/{arm}/{rate}"]) for arm in args.arms}
    for steps in args.steps:
        for seed in range(1 if steps == 0 else args.seeds):
            for arm in args.arms:
                if steps or ARMS[arm]["start"] != "new":
                    run = lambda arm=arm, steps=steps, seed=seed: {  # noqa: E731
                        "learning_rate": rates[arm],
                        "test": accuracies(train(data, vit, arm, steps, seed, rates[arm]), *data["test"], SHOWN),
                    }
                    add(f"{arm}/{steps}/{seed}", run)
    for num_heads in args.alone:
        small = train_vit(data, args.folder / f"vit-{num_heads}", num_heads, 0).eval()
        run = lambda small=small: {name: accuracies(small, *data[name], [None]) for name in ("validation", "test")}  # noqa: E731
        add(f"vit/{num_heads}", run)


# --- The report ---


def summarise(rows: list[dict]) -> list[dict]:
    """Gather the accuracies in percent, (seeds, widths), of each arm and number of steps."""
    found = {}
    for row in rows:
        arm, _, rest = row["run"].partition("/")
        if arm in ARMS:
            found.setdefault((arm, int(rest.partition("/")[0])), []).append(row["test"])
    gathered = [
        {"arm": arm, "steps": steps, "accuracy": 100 * np.array(values)} for (arm, steps), values in found.items()
    ]
    return sorted(gathered, key=lambda row: (row["steps"], list(ARMS).index(row["arm"])))


def format_rows(rows: list[dict]) -> str:
    """Format the summary as a Markdown table of means over the seeds, with the deviation at 3 and 12 heads."""
    lines = ["| steps | arm | seeds | " + " | ".join(f"{num_heads}" for num_heads in SHOWN) + " heads | mean |"]
    lines.append("| ---: | --- |" + " ---: |" * (len(SHOWN) + 2))
    for row in rows:
        means, seeds = row["accuracy"].mean(0), len(row["accuracy"])
        cells = [f"{mean:.1f}" for mean in means]
        if seeds > 1:
            spread = row["accuracy"].std(0, ddof=1)
            cells[0], cells[-1] = f"{cells[0]} ± {spread[0]:.1f}", f"{cells[-1]} ± {spread[-1]:.1f}"
        lines.append(f"| {row['steps']:,} | {row['arm']} | {seeds} | {' | '.join(cells)} | {means.mean():.1f} |")
    return "\n".join(lines)


def plot(rows: list[dict], alone: dict[int, float], path: Path):
    """Accuracy over MACs of an image, a panel for each number of steps, beside ViTs of one width by their heads."""
    from matplotlib.figure import Figure

    config = HydraViTConfig(num_attention_heads=12, head_dim=HEAD_DIM, **SIZES, num_labels=10)
    shown = sorted({row["steps"] for row in rows})
    figure, lines = Figure(figsize=(4.2 * len(shown), 4.2), dpi=150, layout="constrained"), {}
    for axes, steps in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for row in rows:
            if row["steps"] == steps and row["arm"] in STYLES:
                macs = [count_macs(config, num_heads, row["arm"]) / 1e6 for num_heads in SHOWN]
                (lines[row["arm"]],) = axes.plot(macs, row["accuracy"].mean(0), **STYLES[row["arm"]])
        macs = [config.count_macs(num_heads) / 1e6 for num_heads in sorted(alone)]
        style = {"color": "0.2", "marker": "s", "linestyle": "none"}
        (lines["a ViT of its own"],) = axes.plot(macs, [alone[num_heads] for num_heads in sorted(alone)], **style)
        axes.set(xlabel="million MACs per image", title=f"{steps:,} steps" if steps else "without training")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, help="idx files")
    parser.add_argument("--folder", type=Path, default=Path("runs/elastify_study"), help="folder of the ViTs")
    parser.add_argument("--results", type=Path, default=RESULTS / "elastify_study.jsonl", help="file of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--alone", type=int, nargs="*", default=[3, 6, 9], help="heads of the ViTs of their own")
    parser.add_argument("--plot", type=Path, default=PLOT, help="file of the plot")
    parser.add_argument("--report", action="store_true", help="train nothing, report the results")
    args = parser.parse_args()
    if not args.report:
        measure_all(args)
    rows = read_rows(args.results)
    own = {row["run"].removeprefix("vit/"): row for row in rows if row["run"].startswith("vit/")}
    alone = {int(num_heads): 100 * row["test"][0] for num_heads, row in own.items()}
    summary = summarise(rows)
    print(format_rows(summary))
    for num_heads, accuracy in alone.items():
        print(f"A ViT of {num_heads} heads alone: {accuracy:.2f} %")
    plot(summary, alone, args.plot)


if __name__ == "__main__":
    main()
