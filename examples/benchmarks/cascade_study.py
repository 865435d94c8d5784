"""How accurate is a cascade over widths at equal mean MACs and at equal time? A study on two small data sets, on a CPU.

    pip install -c constraints.txt -e ".[train,study]"
    python examples/benchmarks/cascade_study.py            # an hour on 2 cores
    python examples/benchmarks/cascade_study.py --report   # the tables and the plot of the results, without training

For each of three seeds, one HydraViT of 3 to 12 heads is trained on three quarters of the training images, as in
`width_study.py`. Others are trained for one cascade, all of its widths at each step, with and without token recycling.
The thresholds of the cascades are fitted to a range of goals on the last quarter. All accuracies and costs are measured
on the held-out images, which neither training nor fitting has seen. The trained models stay in `runs/cascade_study`.
Each seed adds its rows to the file of results, and seeds that are in it are not repeated.
"""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import process_time

import numpy as np
import torch
from timing import RESULTS, append_rows, read_rows, time_rounds
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from width_study import DATA, HEADS, load, make_config, optimise

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, evaluate_subnetworks
from hydravit_hf.cascade import cascade_latencies, evaluate_cascade, fit_cascade
from hydravit_hf.training.steps import sample_subnetworks

PLOT = Path(__file__).parents[2] / "docs" / "cascade_study.png"
STEPS = {"digits": 1_700, "mnist": 1_900}  # those of the width study at a quarter of the compute of ten models
VALIDATION = 0.25
STAGES = [3, 6, 12]  # the default of `fit_cascade`
RECYCLING = {"subnetwork_heads": STAGES, "token_recycling": True}
TRAININGS = {  # arguments of the configuration, and the widths of a step
    "any width": ({}, "uniform"),
    "all stages": ({"subnetwork_heads": STAGES}, "sandwich"),
    "recycling": (RECYCLING, "weighted"),
    "recycling, equal compute": (RECYCLING, "weighted"),  # to that of "any width"; the others have equal steps
}
CASCADES = {  # how the model was trained, the widths, and the training of the fixed widths that it is compared with
    "3, 6, 12 heads": ("any width", STAGES, "any width"),
    "3, 6 heads": ("any width", [3, 6], "any width"),
    "3, 12 heads": ("any width", [3, 12], "any width"),
    "3, 6, 12 heads, all stages": ("all stages", STAGES, "all stages"),
    "3, 6, 12 heads, recycling": ("recycling", STAGES, "all stages"),
    "3, 6, 12 heads, recycling, equal compute": ("recycling, equal compute", STAGES, "any width"),
}
BUDGETS = 10  # from 1.1 times the MACs of the narrowest to 0.97 times those of the widest
TIMED_BATCH, ROUNDS = 250, 5
OPTIONS = {"batch_size": 250, "disable_tqdm": True}
STYLES = {  # lines of the plot
    "one width, any width": {"color": "0.35", "marker": "s", "linestyle": "--"},
    "3, 6, 12 heads": {"color": "#4338ca", "marker": "o"},
    "3, 12 heads": {"color": "#d97706", "marker": "v"},
    "one width, all stages": {"color": "#0891b2", "marker": "s", "linestyle": "--"},
    "3, 6, 12 heads, all stages": {"color": "#0891b2", "marker": "^"},
    "3, 6, 12 heads, recycling": {"color": "#be185d", "marker": "D"},
}


class Tensors(Dataset):
    """Images and labels as a data set of items."""

    def __init__(self, pixel_values: torch.Tensor, labels: torch.Tensor):
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def split(data: str, seed: int) -> tuple[Tensors, Tensors, Tensors]:
    """Images to train on, to fit on and to measure on."""
    (images, labels), test = (part.tensors for part in load(data))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = order.split([len(images) - (held := round(VALIDATION * len(images))), held])
    return *(Tensors(images[part], labels[part]) for part in parts), Tensors(*test)


def train(data: str, seed: int, training: str, models: Path) -> Path:
    """Train one HydraViT with frozen unused weights, unless its folder is there."""
    folder = models / f"{data}-{seed}-{training.replace(', ', '-').replace(' ', '-')}"
    if folder.exists():
        return folder
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    part, *_ = split(data, seed)
    arguments, sampling = TRAININGS[training]
    any_width, steps = make_config(data, HEADS), STEPS[data]
    config = HydraViTConfig(**any_width.to_dict() | arguments)
    if training.endswith("equal compute"):
        mean = sum(any_width.count_macs(num_heads) for num_heads in HEADS) / len(HEADS)
        steps = round(steps * mean / config.count_macs(HEADS[-1]))
    model = HydraViTForImageClassification(config).train()
    widths = [sample_subnetworks(config, seed, step, sampling) for step in range(steps)]
    optimise(model, part.pixel_values, part.labels, widths, seed, DATA[data][-1], freeze=True)
    model.save_pretrained(folder)
    return folder


def measure(data: str, seed: int, folders: dict[str, Path]) -> list[dict]:
    """Measure each width, and each cascade and goal, on the held-out images, a row for each."""
    models = {name: HydraViTForImageClassification.from_pretrained(path).eval() for name, path in folders.items()}
    _, validation, test = split(data, seed)
    of_seed = {"data": data, "seed": seed}
    # 1. Every width
    rows, cascades, calls = [], [], {}
    for training, model in models.items():
        method = f"one width, {training}"
        for row in evaluate_subnetworks(model, test, **OPTIONS):
            num_heads = row["num_heads"]
            reached = {"accuracy": row["accuracy"], "macs": model.config.count_macs(num_heads)}
            rows.append(of_seed | {"method": method, "num_heads": num_heads} | reached)
            calls[method, num_heads] = partial(forward, model, num_heads)
    ms = timed(calls, test)
    rows = [row | {"ms": ms[row["method"], row["num_heads"]]} for row in rows]
    # 2. Cascades, fitted on the validation images
    narrowest, widest = (models["any width"].config.count_macs(num_heads) for num_heads in (HEADS[0], HEADS[-1]))
    goals = [{"max_macs": budget} for budget in np.geomspace(1.1 * narrowest, 0.97 * widest, BUDGETS)]
    goals += [{"max_accuracy_loss": loss} for loss in (0.0, 0.005, 0.01)]
    calls = {}
    for (method, (training, heads, _)), goal in product(CASCADES.items(), goals):
        model = models[training]
        settings = fit_cascade(model, validation, heads, **goal, **OPTIONS)["cascade"]
        found = evaluate_cascade(model, test, *settings.values(), **OPTIONS)
        reached = {name: found[name] for name in ("thresholds", "accuracy", "macs", "shares")}
        cascades.append(of_seed | {"method": method, "goal": goal} | reached)
        calls[method, *settings["thresholds"]] = partial(model.cascade, **settings)
    ms = timed(calls, test)
    rows += [row | {"ms": ms[row["method"], *row["thresholds"]]} for row in cascades]
    # 3. Cascades for images that come one by one, fitted to a latency
    for method, (training, heads, _) in CASCADES.items():
        model = models[training]
        latencies = cascade_latencies(model, heads, disable_tqdm=True)
        goal = {"max_latency_ms": (2 * latencies[0] + latencies[-1]) / 3}
        settings = fit_cascade(model, validation, heads, **goal, latencies=latencies, **OPTIONS)["cascade"]
        rows.append(
            of_seed | {"method": method, "goal": goal, "ms": one_by_one(partial(model.cascade, **settings), test)}
        )
    return rows


@torch.inference_mode()
def one_by_one(call, images: Tensors) -> float:
    """Milliseconds of an image on average. Each image counts with the median of some calls."""
    batches = images.pixel_values.split(1)
    times = (time_rounds({"": partial(call, image)}, ROUNDS, desc=None)[""] for image in batches)
    return statistics.fmean(map(statistics.median, times))


@torch.inference_mode()
def timed(calls: dict, images: Tensors) -> dict:
    """Milliseconds of CPU time that each call takes for an image: medians of interleaved rounds."""
    batches = images.pixel_values.split(TIMED_BATCH)
    passes = {name: partial(lambda call: list(map(call, batches)), call) for name, call in calls.items()}
    times = time_rounds(passes, ROUNDS, clock=process_time)
    return {name: statistics.median(measured) / len(images) for name, measured in times.items()}


def forward(model: HydraViTForImageClassification, num_heads: int, pixel_values: torch.Tensor):
    model(pixel_values, num_heads_active=num_heads)


def curve(rows: list[dict], data: str, method: str) -> list[dict]:
    """Average over the seeds. There is a row for each width or budget."""
    rows = [row for row in rows if row["data"] == data and row["method"] == method]
    by_seed = [
        [row for row in rows if row["seed"] == seed and ("num_heads" in row or "max_macs" in row["goal"])]
        for seed in sorted({row["seed"] for row in rows})
    ]
    means = []
    for same in zip(*by_seed, strict=True):
        mean = {key: float(np.mean([row[key] for row in same])) for key in ("macs", "ms", "accuracy")}
        name = method.replace("one width", f"{same[0].get('num_heads')} heads")
        means.append(mean | {"name": name if "num_heads" in same[0] else f"cascade {method}"})
    return means


def gains(points: list[dict], widths: list[dict], over: str) -> list[float]:
    """How far each point is above the line through the widths at equal `over`, in points of accuracy."""
    line = [[row[key] for row in widths] for key in (over, "accuracy")]
    return [100 * (point["accuracy"] - float(np.interp(point[over], *line))) for point in points]


def report(rows: list[dict], path: Path):
    """Print the tables, and plot accuracy over MACs and over time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(10, 8), dpi=150, layout="constrained")
    for data, pair in zip(DATA, figure.subplots(2, 2), strict=True):
        print(f"\n{data}\n\n| | MACs | ms | accuracy | at equal MACs | at equal time |\n| --- |" + " ---: |" * 5)
        for method in dict.fromkeys(row["method"] for row in rows):
            points, above = curve(rows, data, method), []
            if method in CASCADES:
                widths = curve(rows, data, f"one width, {CASCADES[method][2]}")
                above = [gains(points, widths, over) for over in ("macs", "ms")]
            for index, row in enumerate(points):
                if index and row == points[index - 1]:
                    continue  # a larger budget changed nothing
                cells = [row["name"], f"{row['macs'] / 1e6:.2f} M", f"{row['ms']:.4f}", f"{row['accuracy']:.2%}"]
                cells += [f"{column[index]:+.2f}" for column in above] or ["", ""]
                print("| " + " | ".join(cells) + " |")
            if method not in STYLES:
                continue
            for axes, over, unit in zip(pair, ("macs", "ms"), (1e6, 1), strict=True):
                label = f"cascade of {method}" if method in CASCADES else method.removesuffix(", any width")
                x = [row[over] / unit for row in points]
                axes.plot(x, [100 * row["accuracy"] for row in points], label=label, **STYLES[method])
        for axes, label in zip(pair, ("million MACs per image, mean", "ms of one core per image, mean"), strict=True):
            axes.set(xlabel=label, ylabel="accuracy, %", title=f"{data}: mean of the seeds")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        pair[0].legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path)
    print("\nRecycling less the plain cascade of as many steps at equal MACs, in points\n")
    for data in DATA:
        plain, recycling = (curve(rows, data, f"3, 6, 12 heads, {name}") for name in ("all stages", "recycling"))
        print(f"{data}: " + ", ".join(f"{gain:+.2f}" for gain in gains(recycling, plain, "macs")))
    print("\nGoals of the validation images on the held-out ones\n\n| | goal | mean | worst of the seeds |")
    print("| --- | --- | ---: | ---: |")
    for data, method, name in product(DATA, CASCADES, ("max_macs", "max_latency_ms", "max_accuracy_loss")):
        chosen = [row for row in rows if (row["data"], row["method"]) == (data, method) and name in row.get("goal", {})]
        if not chosen:
            continue
        if name == "max_accuracy_loss":
            training, heads, _ = CASCADES[method]
            alone = (data, f"one width, {training}", heads[-1])
            widest = {
                row["seed"]: row["accuracy"]
                for row in rows
                if (row["data"], row["method"], row.get("num_heads")) == alone
            }
            missed = [100 * (widest[row["seed"]] - row["accuracy"] - row["goal"][name]) for row in chosen]
            form = "{:+.2f} points of accuracy"
        else:
            reached = {"max_macs": "macs", "max_latency_ms": "ms"}[name]
            missed = [100 * (row[reached] / row["goal"][name] - 1) for row in chosen]
            form = "{:+.1f} % of the budget"
        print(f"| {data}, {method} | `{name}` | {form.format(np.mean(missed))} | {form.format(max(missed))} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--models", type=Path, default=Path("runs/cascade_study"), help="folder of the models")
    parser.add_argument("--results", type=Path, default=RESULTS / "cascade_study.jsonl", help="file of the results")
    parser.add_argument("--plot", type=Path, default=PLOT, help="file of the plot")
    parser.add_argument("--report", action="store_true", help="measure nothing, report the results")
    args = parser.parse_args()
    measured = {(row["data"], row["seed"]) for row in read_rows(args.results)}
    missing = [pair for pair in product(DATA, range(args.seeds)) if pair not in measured]
    if missing and not args.report:
        jobs = [(data, seed, training) for (data, seed), training in product(missing, TRAININGS)]
        with ProcessPoolExecutor(args.num_processes, mp_context=get_context("spawn")) as pool:
            trained = pool.map(partial(train, models=args.models), *zip(*jobs, strict=True))
            folders = dict(zip(jobs, tqdm(trained, desc="Training", total=len(jobs)), strict=True))
        torch.set_num_threads(1)
        for data, seed in missing:
            rows = measure(data, seed, {name: folders[data, seed, name] for name in TRAININGS})
            append_rows(args.results, rows)
    report(read_rows(args.results), args.plot)


if __name__ == "__main__":
    main()
