"""Is one elastic ViT as good as a model for each width, and which elastic ViT is the best? A study on Fashion-MNIST.

    pip install -c constraints.txt -e ".[train,study]"
    python examples/benchmarks/fashion_study.py               # two hours of a core for each seed
    python examples/benchmarks/fashion_study.py --report      # the table and the plot of the results, without training

The data are the four idx files of Fashion-MNIST, as Debian's package `dataset-fashion-mnist` has them. The models have
6 layers, 16 patches and 12 heads of 8 channels. The reference is ten models, one for each width of 3 to 12 heads. Five
of them are trained. Each elastic method then trains one model with a third of the compute of the ten, counted in
multiply-accumulates (backward counts twice, the pass of a teacher once). All share one recipe, and the batches of a
seed. `--attempts` compares variants of this package's own training on 5,000 validation images, which are part of the
60,000 training images. The 10,000 test images are looked at once for each run of the table. Each run adds its row to
the file of results. Runs in the file are not repeated.
"""

import argparse
import copy
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from baselines import DynaBERT, MatFormer, Scala, backward_scala, count_macs, sample_scala
from elastify_study import reorder
from fashion_mnist import FOLDER, accuracies, load
from timing import RESULTS, append_rows, read_rows
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.training.averaging import AveragedWeights
from hydravit_hf.training.optimizer import PrefixAdamW, parameter_groups
from hydravit_hf.training.steps import backward_widths, sample_subnetworks, schedule_odds
from hydravit_hf.training.teacher import Lesson, Teacher

PLOT = Path(__file__).parents[2] / "docs" / "fashion_study.png"
HEADS, ALONE = list(range(3, 13)), (3, 4, 6, 9, 12)
SIZES = {"head_dim": 8, "image_size": 28, "patch_size": 7, "num_channels": 1, "num_hidden_layers": 6, "num_labels": 10}
SIZES |= {"initializer_range": 0.1}  # narrow layers learn little at first from the 0.02 of wide ones
EPOCHS = 4  # of the models of one width
SHARE = 1 / 3  # of the compute of ten models
BATCH, LEARNING_RATE, WARMUP, WEIGHT_DECAY, MAX_GRAD_NORM = 64, 2e-3, 0.1, 0.05, 1.0
LABEL_SMOOTHING, EMA_DECAY = 0.1, 0.99
ORDERING_IMAGES = 1024
WEIGHTS = [3.0] + [1.0] * 9  # 3 heads three times as often as each of the others

# How each method trains. `kind` names what is not a plain HydraViT, the other keys are arguments of `train`.
BEST = "this package's best"
METHODS = {
    "HydraViT, uniform": {"sampling": "uniform"},
    "HydraViT, weighted": {"weights": WEIGHTS},
    BEST: {"weights": WEIGHTS, "freeze": True},
    "MatFormer": {"kind": "MatFormer", "sampling": "uniform"},
    "SortedNet": {"sampling": "uniform", "heads": list(range(1, 13))},
    "DynaBERT": {"kind": "DynaBERT", "sampling": "uniform", "teacher_weight": 1.0, "hidden_state_weight": 1.0},
    "Scala": {"kind": "Scala", "warm_up": 0.1},
}
ATTEMPTS = {
    "uniform": {"sampling": "uniform"},
    "weighted": {"weights": WEIGHTS},
    "weighted, unused weights frozen": {"weights": WEIGHTS, "freeze": True},
    "narrow widths later": {"weights": WEIGHTS, "curriculum": 0.3},
    "odds that move to the narrow widths": {"final_weights": [6.0] + [1.0] * 9},
    "sandwich, distilled": {"sampling": "sandwich", "distillation": 0.5},
    "open sandwich, distilled": {"sampling": "open_sandwich", "draws": 2, "distillation": 0.5},
    "taught by the average of the widest": {"weights": WEIGHTS, "averaged_teacher_weight": 0.5},
    "classifiers for each width": {"weights": WEIGHTS, "separate_classifiers": True},
}
STYLES = {  # lines of the plot
    "HydraViT, uniform": {"color": "#0891b2", "marker": "o"},
    BEST: {"color": "#4338ca", "marker": "o"},
    "MatFormer": {"color": "#be185d", "marker": "v"},
    "SortedNet": {"color": "#d97706", "marker": "^"},
    "DynaBERT": {"color": "0.55", "marker": "D"},
    "Scala": {"color": "#15803d", "marker": "s"},
}


def rewire(model: HydraViTForImageClassification, images: torch.Tensor, *weights: float) -> tuple[DynaBERT, Teacher]:
    """Order the heads and neurons of a trained ViT for DynaBERT, and let the ViT teach by some weights."""
    model = model.eval()
    teacher = Teacher(copy.deepcopy(model), model.config, *weights)
    items = [{"pixel_values": image} for image in images[:ORDERING_IMAGES]]
    reorder(model, "dynabert", DataLoader(items, batch_size=64), ORDERING_IMAGES)
    student = DynaBERT(model.config).to(images.device)
    student.load_state_dict(model.state_dict())
    return student.train(), teacher


@dataclass
class AveragedTeacher:
    """Teaches with the averaged weights of the model itself, at all heads."""

    model: HydraViTForImageClassification
    average: AveragedWeights
    weight: float
    hidden_state_weight = 0.0

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Lesson:
        with self.average.in_place():
            logits = self.model(images, num_heads_active=self.model.config.num_attention_heads).logits
        return Lesson(logits, weight=self.weight)


# --- Training ---


def make_config(heads: list[int], weights: list[float] | None = None, **options) -> HydraViTConfig:
    return HydraViTConfig(
        **SIZES, num_attention_heads=heads[-1], subnetwork_heads=heads, subnetwork_weights=weights, **options
    )


def plan(budget: float, costs: dict[int, float], sample, overhead: float = 0.0) -> list[list[int]]:
    """Draw the widths of each step until the budget is spent. `sample` gets the step and the share that is spent."""
    spent, steps = 0.0, []
    while spent < budget:
        steps.append(sample(len(steps), spent / budget))
        spent += overhead + sum(costs[num_heads] for num_heads in steps[-1])
    return steps


def mirror(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the images, (B, 1, H, W)."""
    is_mirrored = (torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5).to(images.device)
    return torch.where(is_mirrored, images.flip(-1), images)


def optimise(model: nn.Module, data: tuple, steps: list[list[int]], seed: int, backward, freeze: bool = False):
    """Train a model at the widths of each step by the recipe of all methods. The model ends with the averaged weights.

    `backward` adds the gradients of images and labels at the widths of a step.
    """
    images, labels = data
    if freeze:
        optimizer = PrefixAdamW(model, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=len(steps) + 1, pct_start=WARMUP, cycle_momentum=False, div_factor=1e3
    )
    generator, average = torch.Generator().manual_seed(seed), AveragedWeights(model, EMA_DECAY)
    per_epoch = len(images) // BATCH
    for number, widths in enumerate(steps):
        if number % per_epoch == 0:
            order = torch.randperm(len(images), generator=generator).to(images.device)
        batch = order[number % per_epoch * BATCH :][:BATCH]
        backward(mirror(images[batch], generator), labels[batch], widths, number, average)
        if freeze:
            optimizer.num_heads = widths[0]
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update()
    average.swap()


def train(
    seed: int,
    split: str,
    folder: Path,
    epochs: int,
    device: str = "cpu",
    heads: list[int] = HEADS,
    share: float | None = SHARE,
    kind: str | None = None,
    sampling: str = "weighted",
    draws: int = 1,
    weights: list[float] | None = None,
    final_weights: list[float] | None = None,
    curriculum: float = 0.0,
    distillation: float = 0.0,
    teacher_weight: float = 0.0,
    hidden_state_weight: float = 0.0,
    averaged_teacher_weight: float = 0.0,
    warm_up: float = 0.0,
    freeze: bool = False,
    separate_classifiers: bool = False,
) -> dict:
    """Train one model for some epochs, or for a `share` of the compute that ten models take for these epochs.

    Returns:
        "accuracy" on the images of `split` at each width, and the "steps" and "macs" of the whole training.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = {name: tuple(part.to(device) for part in load(folder)[name]) for name in ("train", split)}
    config = make_config(heads, weights, separate_classifiers=separate_classifiers)
    classes = {"MatFormer": MatFormer, "Scala": Scala}
    model = classes.get(kind, HydraViTForImageClassification)(config).to(device).train()

    # 1. The widths of each step, until the budget is spent. Backward costs twice as much as forward
    full = config.count_macs(config.num_attention_heads) * BATCH
    costs = {num_heads: 3 * BATCH * count_macs(config, num_heads, kind) for num_heads in heads}
    epoch = len(data["train"][0]) // BATCH
    of_models = [make_config(HEADS).count_macs(num_heads) for num_heads in (heads if share is None else HEADS)]
    budget = (share or 1) * epochs * epoch * 3 * BATCH * sum(of_models)

    def sample(step: int, progress: float) -> list[int]:
        if progress < warm_up:
            return [heads[-1]]
        if kind == "Scala":
            return sample_scala(config, seed, step)
        odds = schedule_odds(config, round(1000 * progress), 1001, round(1000 * curriculum), final_weights)
        return sample_subnetworks(config, seed, step, sampling, draws, odds)

    # 2. The training
    teacher = None

    def backward(images, labels, widths, number, average):
        if kind == "Scala":
            return backward_scala(model, images, labels, widths, LABEL_SMOOTHING)
        given = AveragedTeacher(model, average, averaged_teacher_weight) if averaged_teacher_weight else teacher
        backward_widths(model, images, labels, widths, number, distillation, LABEL_SMOOTHING, teacher=given)

    if kind == "DynaBERT":  # half of the budget for the ViT that becomes elastic and teaches
        steps = plan(budget / 2, costs, lambda *_: [heads[-1]])
        optimise(model, data["train"], steps, seed, backward)
        model, teacher = rewire(model, data["train"][0], teacher_weight, hidden_state_weight)
        steps_of_widths = plan(budget / 2, costs, sample, overhead=full)
        optimise(model, data["train"], steps_of_widths, seed + 1000, backward)
        steps += steps_of_widths
    else:
        steps = plan(budget, costs, sample, overhead=full if averaged_teacher_weight else 0.0)
        optimise(model, data["train"], steps, seed, backward, freeze)

    # 3. The accuracy of each width
    shown = heads if share is None else HEADS
    return {"accuracy": accuracies(model.eval(), *data[split], shown), "steps": len(steps), "macs": int(budget)}


def make_jobs(args: argparse.Namespace) -> dict[str, dict]:
    """The arguments of `train` for each run, by its name."""
    jobs = {}
    for seed in range(args.seeds):
        common = {"seed": seed, "split": "test", "folder": args.data, "epochs": args.epochs, "device": args.device}
        for num_heads in ALONE:
            jobs[f"alone, {num_heads}/{args.epochs}/{seed}"] = common | {"heads": [num_heads], "share": None}
        for method, options in METHODS.items():
            jobs[f"{method}/{args.epochs}/{seed}"] = common | options
        if args.attempts:
            common |= {"split": "validation", "seed": 100 + seed}
            for name, options in ATTEMPTS.items():
                jobs[f"attempt, {name}/{args.epochs}/{seed}"] = common | options
    return {name: job for name, job in jobs.items() if any(name.startswith(only) for only in args.only)}


def measure(args: argparse.Namespace):
    """Do the runs that the file of results does not hold yet, and add a row for each."""
    done = {row["run"] for row in read_rows(args.results)}
    jobs = {name: job for name, job in make_jobs(args).items() if name not in done}
    with ProcessPoolExecutor(args.num_processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train, **job): name for name, job in jobs.items()}
        for future in tqdm(as_completed(futures), total=len(jobs), desc="Training models"):
            append_rows(args.results, [{"run": futures[future], "device": args.device} | future.result()])


# --- The report ---


def area(macs: list[float], accuracy: np.ndarray) -> np.ndarray:
    """The mean accuracy over all budgets of MACs, from those of 3 heads to those of 12.

    Accuracies, (seeds, widths), are joined by lines. A budget below a method's smallest width gets the share of right
    answers that guessing has, 10 %.
    """
    config = make_config(HEADS)
    budgets = np.linspace(config.count_macs(HEADS[0]), config.count_macs(HEADS[-1]), 1000)
    return np.array([np.interp(budgets, macs, row, left=10.0).mean() for row in accuracy])


def summarise(rows: list[dict], epochs: int) -> list[dict]:
    """Make a row for each method: the accuracies in percent, (seeds, widths), the MACs of each width, and the area."""
    found = {}
    for row in rows:
        name, of_epochs, seed = row["run"].split("/")
        if int(of_epochs) == epochs:
            found.setdefault(name, {})[int(seed)] = row
    gathered = []
    for name, of_seeds in found.items():
        if name.startswith("alone, "):
            continue
        method = name.removeprefix("attempt, ")
        kind = (METHODS | ATTEMPTS)[method].get("kind")
        macs = [count_macs(make_config(HEADS), num_heads, kind) for num_heads in HEADS]
        accuracy = 100 * np.array([row["accuracy"] for row in of_seeds.values()])
        steps = next(iter(of_seeds.values()))["steps"]
        row = {"name": name, "seeds": list(of_seeds), "accuracy": accuracy, "macs": macs, "steps": steps}
        gathered.append(row | {"area": area(macs, accuracy)})
    order = [*METHODS, *(f"attempt, {name}" for name in ATTEMPTS)]
    return sorted(gathered, key=lambda row: order.index(row["name"]))


def alone_accuracies(rows: list[dict], epochs: int) -> dict[int, dict[int, float]]:
    """The accuracy in percent of each model that has one width, by its heads and its seed."""
    found = {}
    for row in rows:
        name, of_epochs, seed = row["run"].split("/")
        if name.startswith("alone, ") and int(of_epochs) == epochs:
            found.setdefault(int(name.removeprefix("alone, ")), {})[int(seed)] = 100 * row["accuracy"][0]
    return dict(sorted(found.items()))


def gains(row: dict, alone: dict[int, dict[int, float]]) -> np.ndarray:
    """What each seed has more than its models that have one width, in points, (seeds, widths)."""
    own = [[of_seed[seed] for of_seed in alone.values()] for seed in row["seeds"]]
    return row["accuracy"][:, [HEADS.index(num_heads) for num_heads in alone]] - np.array(own)


def format_mean(values: np.ndarray) -> str:
    """The mean over the seeds, and its standard error where there is more than one."""
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{error}"


def format_rows(summary: list[dict], alone: dict[int, dict[int, float]]) -> str:
    """Format a Markdown table of means over the seeds, with their standard errors.

    The gain is that over the models of one width, paired by the seed: its mean over their widths, and the least of its
    means over the seeds.
    """
    heading = "| method | seeds | steps | " + " | ".join(map(str, alone))
    lines = [
        f"{heading} heads | mean of 3 to 12 | area | gain | least gain |",
        "| --- |" + " ---: |" * (len(alone) + 6),
    ]
    own = np.array([list(of_seed.values()) for of_seed in alone.values()]).T
    macs = [count_macs(make_config(HEADS), num_heads) for num_heads in alone]
    cells = [format_mean(column) for column in own.T]
    lines.append(
        f"| a model for each width | {len(own)} | | {' | '.join(cells)} | | {format_mean(area(macs, own))} | | |"
    )
    for row in summary:
        cells = [format_mean(row["accuracy"][:, HEADS.index(num_heads)]) for num_heads in alone]
        cells += [format_mean(row["accuracy"].mean(1)), format_mean(row["area"])]
        gained = gains(row, alone)
        cells += [format_mean(gained.mean(1)), f"{gained.mean(0).min():.2f}"]
        lines.append(f"| {row['name']} | {len(row['seeds'])} | {row['steps']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(summary: list[dict], alone: dict[int, dict[int, float]], path: Path):
    """Accuracy over MACs of an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    axes, config = figure.subplots(), make_config(HEADS)
    macs = [config.count_macs(num_heads) / 1e6 for num_heads in alone]
    means = [np.mean(list(of_seed.values())) for of_seed in alone.values()]
    axes.plot(macs, means, color="0.2", marker="s", linestyle="--", label="a model for each width")
    for row in summary:
        if row["name"] in STYLES:
            macs = [value / 1e6 for value in row["macs"]]
            axes.plot(macs, row["accuracy"].mean(0), label=row["name"], **STYLES[row["name"]])
    axes.set(xlabel="million MACs per image", ylabel="accuracy, %")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, help="idx files")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of the models of one width")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--attempts", action="store_true", help="compare variants on the validation images as well")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="runs whose names begin so")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "fashion_study.jsonl", help="file of the results")
    parser.add_argument("--plot", type=Path, default=PLOT, help="file of the plot")
    parser.add_argument("--report", action="store_true", help="train nothing, report the results")
    args = parser.parse_args()
    if not args.report:
        measure(args)
    rows = read_rows(args.results)
    summary, alone = summarise(rows, args.epochs), alone_accuracies(rows, args.epochs)
    print(format_rows(summary, alone))
    plot(summary, alone, args.plot)


if __name__ == "__main__":
    main()
