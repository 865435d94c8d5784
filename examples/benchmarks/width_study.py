"""Is one HydraViT as good as a model for each width? A study on two small data sets, three seeds, on a CPU.

    pip install -c constraints.txt -e ".[train,study]"
    python examples/benchmarks/width_study.py              # about two hours on 2 cores
    python examples/benchmarks/width_study.py --report     # the table and the plot of the results, without training

Ten models, one for each width of 3 to 12 heads, are trained for the same number of epochs. Each strategy trains one
HydraViT twice: for as many epochs as one of those models, and with a quarter of the compute that all ten took
(multiply-accumulates; backward counts twice). The two baselines of the paper are trained in the same way: MatFormer,
whose MLP alone nests, and SortedNet, which draws one nested width from the full range. All share the recipe below. Each
run adds its row to the file of results, and runs that are in it are not repeated.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from baselines import MatFormer, count_macs
from timing import RESULTS, append_rows, read_rows
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.data import load_digits, load_mnist
from hydravit_hf.evaluation import score
from hydravit_hf.training.averaging import AveragedWeights
from hydravit_hf.training.optimizer import PrefixAdamW, parameter_groups
from hydravit_hf.training.steps import backward_widths, sample_subnetworks

PLOT = Path(__file__).parents[2] / "docs" / "width_study.png"
HEADS = list(range(3, 13))
SHARE = 0.25  # of the compute of ten models, at equal compute
DATA = {  # how to load it, image size, patch size, epochs, learning rate
    "digits": (load_digits, 8, 2, 30, 1e-3),
    "mnist": (load_mnist, 28, 7, 12, 2e-3),
}
WEIGHTS = [3.0] + [1.0] * 9  # 3 heads three times as often as each of the others
STRATEGIES = {
    "uniform": {"sampling": "uniform"},
    "uniform, unused weights frozen": {"sampling": "uniform", "freeze": True},
    "weighted, 3 heads three times": {"weights": WEIGHTS},
    "weighted, unused weights frozen": {"weights": WEIGHTS, "freeze": True},
    "sandwich": {"sampling": "sandwich"},
    "sandwich, distilled": {"sampling": "sandwich", "distillation": 0.5},
    "open sandwich, distilled": {"sampling": "open_sandwich", "draws": 2, "distillation": 0.5},
    "MatFormer": {"sampling": "uniform", "kind": "MatFormer"},
    "SortedNet": {"sampling": "uniform", "heads": list(range(1, 13))},
}
STYLES = {  # lines of the plot
    ("a model for each width", "epochs"): {"color": "0.35", "marker": "s", "linestyle": "--"},
    ("uniform, unused weights frozen", "compute"): {"color": "#4338ca", "marker": "o"},
    ("sandwich, distilled", "compute"): {"color": "#0891b2", "marker": "o"},
    ("SortedNet", "compute"): {"color": "#d97706", "marker": "^"},
    ("MatFormer", "compute"): {"color": "#be185d", "marker": "v"},
}
SIZES = {"head_dim": 8, "num_hidden_layers": 3, "num_channels": 1, "num_labels": 10}
BATCH, WARMUP, WEIGHT_DECAY = 64, 0.1, 0.05
LABEL_SMOOTHING, EMA_DECAY, MAX_GRAD_NORM = 0.1, 0.99, 1.0


def make_config(data: str, heads: list[int], weights: list[float] | None = None) -> HydraViTConfig:
    _, image_size, patch_size, *_ = DATA[data]
    return HydraViTConfig(
        **SIZES,
        num_attention_heads=heads[-1],
        image_size=image_size,
        patch_size=patch_size,
        subnetwork_heads=heads,
        subnetwork_weights=weights,
    )


def load(name: str) -> tuple[TensorDataset, TensorDataset]:
    splits = DATA[name][0]()
    tensors = []
    for split in ("train", "test"):
        images = np.stack([np.asarray(image.convert("L")) for image in splits[split]["image"]])
        pixels = torch.from_numpy(images)[:, None] / 127.5 - 1
        tensors.append(TensorDataset(pixels, torch.tensor(splits[split]["label"])))
    return tuple(tensors)


def train(
    data: str,
    seed: int,
    heads: list[int],
    share: float | None = None,
    sampling: str = "weighted",
    draws: int = 1,
    weights: list[float] | None = None,
    distillation: float = 0.0,
    freeze: bool = False,
    kind: str | None = None,
) -> dict:
    """Train one model for the epochs of its data set, or for a `share` of the compute of ten models.

    Returns:
        "accuracy" on the held-out images at each of `heads`, and the "steps" and "macs" of the whole training.
    """
    torch.set_num_threads(1)
    (images, labels), (test_images, test_labels) = (split.tensors for split in load(data))
    *_, epochs, learning_rate = DATA[data]
    per_epoch = len(images) // BATCH
    # 1. The model
    torch.manual_seed(seed)
    config = make_config(data, heads, weights)
    model = (MatFormer if kind == "MatFormer" else HydraViTForImageClassification)(config).train()
    # 2. The widths of all steps, and their costs: backward is twice forward
    steps = [sample_subnetworks(config, seed, number, sampling, draws) for number in range(10 * epochs * per_epoch)]
    macs = {num_heads: 3 * BATCH * count_macs(config, num_heads, kind) for num_heads in heads}
    costs = np.cumsum([sum(macs[num_heads] for num_heads in widths) for widths in steps])
    length = epochs * per_epoch
    if share is not None:
        ten = 3 * BATCH * sum(config.count_macs(num_heads) for num_heads in HEADS)
        length = int(np.searchsorted(costs, share * length * ten))
    # 3. The training
    optimise(model, images, labels, steps[:length], seed, learning_rate, freeze, distillation)
    # 4. The accuracy of each width
    model.eval()
    accuracies = []
    with torch.no_grad():
        for num_heads in HEADS if len(heads) > 1 else heads:
            scores = score(model(test_images, num_heads_active=num_heads).logits, test_labels)
            accuracies.append(scores[:, 0].mean().item())
    return {"accuracy": accuracies, "steps": length, "macs": int(costs[length - 1])}


def optimise(
    model: HydraViTForImageClassification,
    images: torch.Tensor,
    labels: torch.Tensor,
    steps: list[list[int]],
    seed: int,
    learning_rate: float,
    freeze: bool = False,
    distillation: float = 0.0,
):
    """Train a model at the widths of each step, the widest first, by the recipe of all studies.

    It leaves the averaged weights in the model. All models of a seed get the same batches.
    """
    if freeze:
        optimizer = PrefixAdamW(model, learning_rate, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=len(steps) + 1, pct_start=WARMUP, cycle_momentum=False, div_factor=1e3
    )
    average, per_epoch = AveragedWeights(model, EMA_DECAY), len(images) // BATCH
    for number, widths in enumerate(steps):
        epoch, position = divmod(number, per_epoch)
        if position == 0:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1_000 * seed + epoch))
        batch = order[position * BATCH : (position + 1) * BATCH]
        backward_widths(model, images[batch], labels[batch], widths, number, distillation, LABEL_SMOOTHING)
        if freeze:
            optimizer.num_heads = widths[0]
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update()
    average.swap()


def make_jobs(seeds: int) -> dict[str, dict]:
    """The arguments of `train` for each run, by its name."""
    jobs = {}
    for seed, data in product(range(seeds), DATA):
        run = {"data": data, "seed": seed}
        for num_heads in HEADS:
            jobs[f"{data}/alone, {num_heads}/epochs/{seed}"] = run | {"heads": [num_heads]}
        for name, strategy in STRATEGIES.items():
            jobs[f"{data}/{name}/epochs/{seed}"] = run | {"heads": HEADS} | strategy
            jobs[f"{data}/{name}/compute/{seed}"] = run | {"heads": HEADS, "share": SHARE} | strategy
    return jobs


def measure(seeds: int, num_processes: int, file: Path) -> dict[str, dict]:
    """Do the runs that `file` does not hold yet, and add a row for each."""
    results = load_results(file)
    jobs = {name: job for name, job in make_jobs(seeds).items() if name not in results}
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train, **job): name for name, job in jobs.items()}
        for future in tqdm(as_completed(futures), total=len(jobs), desc="Training models"):
            name = futures[future]
            results[name] = future.result()
            append_rows(file, [{"run": name} | results[name]])
    return results


def load_results(file: Path) -> dict[str, dict]:
    """What each run in `file` has reached, by the name of the run."""
    return {row.pop("run"): row for row in read_rows(file)}


def summarise(results: dict[str, dict], data: str) -> list[dict]:
    """Make a row for each method and budget: the accuracies in percent, (seeds, widths), and the cost."""
    seeds = sorted({int(name.rsplit("/", 1)[1]) for name in results if name.startswith(f"{data}/")})
    runs = [[results[f"{data}/alone, {k}/epochs/{seed}"] for k in HEADS] for seed in seeds]
    accuracy = 100 * np.array([[run["accuracy"][0] for run in of_seed] for of_seed in runs])
    alone = {"method": "a model for each width", "budget": "epochs", "accuracy": accuracy}
    alone |= {"steps": sum(run["steps"] for run in runs[0]), "macs": sum(run["macs"] for run in runs[0])}
    rows = [alone]
    for budget, method in product(("epochs", "compute"), STRATEGIES):
        runs = [results[f"{data}/{method}/{budget}/{seed}"] for seed in seeds]
        accuracy = 100 * np.array([run["accuracy"] for run in runs])
        rows.append(
            {"method": method, "budget": budget, "accuracy": accuracy} | {k: runs[0][k] for k in ("steps", "macs")}
        )
    for row in rows:
        row["macs_of_image"] = [count_macs(make_config(data, HEADS), k, row["method"]) / 1e6 for k in HEADS]
        row["share"] = row["macs"] / alone["macs"]
        row["worst"] = (row["accuracy"].mean(0) - alone["accuracy"].mean(0)).min()
    return rows


def format_rows(rows: list[dict]) -> str:
    """Format the rows as a Markdown table. It has means over the seeds, and the deviation of the mean of all widths."""
    lines = ["| method | compute | steps | 3 | 6 | 9 | 12 heads | mean of 3 to 12 | least gain over its own model |"]
    lines.append("| --- |" + " ---: |" * 8)
    for row in rows:
        accuracy, means = row["accuracy"].mean(0), row["accuracy"].mean(1)
        cells = [row["method"], f"{row['share']:.0%}", f"{row['steps']:,}"]
        cells += [f"{accuracy[HEADS.index(num_heads)]:.2f}" for num_heads in (3, 6, 9, 12)]
        cells += [f"{means.mean():.2f} ± {means.std(ddof=1):.2f}", "" if row is rows[0] else f"{row['worst']:+.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows_of_data: dict[str, list[dict]], path: Path):
    """Accuracy over MACs of training at a quarter of the compute, beside a model for each width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    for axes, (data, rows) in zip(figure.subplots(1, len(rows_of_data)), rows_of_data.items(), strict=True):
        for row in rows:
            style = STYLES.get((row["method"], row["budget"]))
            if style is None:
                continue
            mean, spread = row["accuracy"].mean(0), row["accuracy"].std(0, ddof=1)
            label = f"{row['method']}, {row['share']:.0%} of the compute"
            macs = row["macs_of_image"]
            axes.plot(macs, mean, label=label, **style)
            axes.fill_between(macs, mean - spread, mean + spread, color=style["color"], alpha=0.12, linewidth=0)
        axes.set(xlabel="million MACs per image", ylabel="accuracy, %", title=f"{data}: mean and deviation of seeds")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "width_study.jsonl", help="file of the results")
    parser.add_argument("--plot", type=Path, default=PLOT, help="file of the plot")
    parser.add_argument("--report", action="store_true", help="train nothing, report the results")
    args = parser.parse_args()
    results = load_results(args.results) if args.report else measure(args.seeds, args.num_processes, args.results)
    rows = {data: summarise(results, data) for data in DATA}
    for data in DATA:
        print(f"\n{data}\n\n{format_rows(rows[data])}")
    plot(rows, args.plot)


if __name__ == "__main__":
    main()
