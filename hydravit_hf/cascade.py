"""Fitting a cascade over widths to a goal, and what it is worth: see `cascade_hydravit` for how it runs.

Letters in shapes: S widths, N images.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import CONFIG_NAME

from .evaluation import SCORES, evaluating, make_loader, score
from .model.cascade_hydravit import uncertainty
from .model.configuration_hydravit import HydraViTConfig, as_pair
from .model.modeling_hydravit import HydraViTForImageClassification
from .profiling import time_interleaved

TOLERANCE = 1.05  # of a budget, which the mean over as many new images keeps with 95 % confidence
CONFIDENCE = 1.645  # standard errors, one-sided
COARSE = 4_000  # combinations of thresholds that are tried before each one is refined
SWEEPS = 20  # over the thresholds, at most
TEMPERATURES = (0.05, 20.0)


def fit_cascade(
    model: HydraViTForImageClassification,
    dataset,
    heads: list[int] | None = None,
    max_macs: float | None = None,
    max_latency_ms: float | None = None,
    max_accuracy_loss: float | None = None,
    criterion: str = "entropy",
    calibrate: bool = True,
    latencies: list[float] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    disable_tqdm: bool = False,
) -> dict:
    """Find the temperatures and thresholds of a cascade that meet one goal on labelled images, best those that the
    model was not trained on.

    Each width's temperature minimises the cross-entropy of its predictions. Then, of two widths, every threshold that
    tells the images apart is tried. Of more, a grid over quantiles of the uncertainties is, and from its best point
    one threshold after the other, in the same way, until none improves: good, but not always the best of all.

    Args:
        model: The model; it is run where it is, in `eval()` mode, and left in the mode that it had.
        dataset: Of items `{"pixel_values": (C, H, W), "labels": int}`, or a `DataLoader` of batches of them.
        heads: Two head counts or more, in increasing order; None: the narrowest and the widest that the model was
            trained to run, and the one nearest to their geometric mean.
        max_macs: The most multiply-accumulates of an image on average: the thresholds of the highest accuracy within
            this budget. They leave room for chance: the mean over as many new images of the same kind stays within
            5 % of the budget, with 95 % confidence.
        max_latency_ms: The same for milliseconds of an image on average.
        max_accuracy_loss: Instead, the accuracy on these images that may be lost against the widest, a fraction: the
            thresholds with the fewest MACs.
        criterion: "entropy", "margin" or "probability".
        calibrate: Whether to fit the temperatures; otherwise they are 1.
        latencies: For `max_latency_ms`, the milliseconds that an image takes which stops at each of `heads`; None: they
            are measured on the spot by `cascade_latencies`, for images that come one by one. For those that come in
            batches, sums over the rows of `profile_subnetworks` say less than the truth where a pass of few images
            takes as long as one of many.
        batch_size, num_workers: Of the loader that is made of a dataset.
        disable_tqdm: Whether to show no progress bar.

    Returns:
        - `cascade`: the settings, for `model.config.cascade`.
        - `accuracy`, `macs` (mean of an image) and, for that goal, `latency_ms`: what they reach on these images.
        - `shares`: of the images, whose answer is from each of the widths.
        - `widest_accuracy`: of the widest alone; `images`: their number.

    Raises:
        ValueError: A goal that can't be met, and what the cheapest or the most accurate cascade reaches; not exactly
            one goal; fewer than two widths, or an argument out of its range; no data.
    """
    goals = {"max_macs": max_macs, "max_latency_ms": max_latency_ms, "max_accuracy_loss": max_accuracy_loss}
    given = [(name, limit) for name, limit in goals.items() if limit is not None]
    if len(given) != 1:
        raise ValueError(f"Give exactly one goal of {', '.join(f'`{name}`' for name in goals)}.")
    ((goal, limit),) = given
    least = -1 if goal == "max_accuracy_loss" else 0
    if not isinstance(limit, Real) or isinstance(limit, bool) or not least < limit < math.inf:
        raise ValueError(f"`{goal}` must be a number above {least}, not {limit!r}.")
    config = model.config
    heads = _default_heads(config) if heads is None else heads
    heads = config.resolve_cascade(heads, 0.0, criterion)["num_heads"]
    if len(heads) < 2:
        raise ValueError(f"`heads` must be two head counts or more, not {heads}.")
    macs = np.array(config.count_cascade_macs(heads), dtype=float)
    costs = macs
    if goal == "max_latency_ms":
        if latencies is None:
            latencies = cascade_latencies(model, heads, criterion, disable_tqdm=disable_tqdm)
        costs = np.array(latencies, dtype=float)
        if costs.shape != macs.shape or not (costs > 0).all():
            raise ValueError(f"`latencies` must be a positive number for each of the heads {heads}, not {latencies!r}.")
    logits, labels = _predict(model, dataset, heads, batch_size, num_workers, disable_tqdm)
    temperatures = [fit_temperature(of_width, labels) if calibrate else 1.0 for of_width in logits]
    narrower = zip(logits[:-1], temperatures[:-1], strict=True)
    uncertain = np.stack([uncertainty(of_width, criterion, t).double().numpy() for of_width, t in narrower])
    hits = (logits.argmax(-1) == labels).double().numpy()
    thresholds = _search(uncertain, hits, costs, _within(goal, limit, hits, costs))
    if thresholds is None:
        raise ValueError(_cannot_meet(goal, limit, heads, uncertain, hits, costs))
    never = math.log(config.num_labels) + 1  # above every uncertainty, and a number in every JSON
    thresholds = [min(threshold, never) for threshold in thresholds]
    exits = _exits(uncertain, thresholds)
    fitted = {
        "cascade": config.resolve_cascade(heads, thresholds, criterion, temperatures),
        "accuracy": float(_taken(hits, exits).mean()),
        "macs": float(macs[exits].mean()),
    }
    if goal == "max_latency_ms":
        fitted["latency_ms"] = float(costs[exits].mean())
    shares = (np.bincount(exits, minlength=len(heads)) / len(exits)).tolist()
    return fitted | {"shares": shares, "widest_accuracy": float(hits[-1].mean()), "images": len(exits)}


@torch.no_grad()
def evaluate_cascade(
    model: HydraViTForImageClassification,
    dataset,
    heads: list[int] | None = None,
    thresholds: float | list[float] | None = None,
    criterion: str | None = None,
    temperatures: list[float] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    disable_tqdm: bool = False,
) -> dict:
    """Run a cascade over labelled images.

    Args:
        model, dataset, batch_size, num_workers, disable_tqdm: As in `fit_cascade`.
        heads, thresholds, criterion, temperatures: As in `HydraViTForImageClassification.cascade`: what is None is
            that of `model.config.cascade`.

    Returns:
        A row with `num_heads` and `thresholds`; `accuracy`, `top5_accuracy` and `loss`, as `evaluate_subnetworks` gives
        them; `macs`: multiply-accumulates of an image on average; `shares`: of the images, whose answer is from each
        of the widths.

    Raises:
        ValueError: No data, or an argument out of its range.
    """
    settings = model.config.resolve_cascade(heads, thresholds, criterion, temperatures)
    scores, num_heads, macs = [], [], []
    for pixel_values, labels in _batches(model, dataset, batch_size, num_workers, disable_tqdm):
        outputs = model.cascade(pixel_values, **settings)
        scores.append(score(outputs.logits, labels).double().cpu())
        num_heads.append(outputs.num_heads.cpu())
        macs.append(outputs.macs.double().cpu())
    _check_not_empty(scores)
    means = dict(zip(SCORES, torch.cat(scores).mean(0).tolist(), strict=True))
    taken = torch.cat(num_heads)
    shares = [(taken == count).double().mean().item() for count in settings["num_heads"]]
    named = {name: settings[name] for name in ("num_heads", "thresholds")}
    return named | means | {"macs": torch.cat(macs).mean().item(), "shares": shares}


def save_cascade(folder: str | Path, cascade: dict):
    """Write the settings of a cascade into the configuration of a checkpoint in a local folder; nothing else changes.

    Raises:
        ValueError: Settings that the model doesn't hold.
        OSError: No such folder.
    """
    file = Path(folder) / CONFIG_NAME
    values = json.loads(file.read_text(encoding="utf-8"))
    config = HydraViTConfig.from_pretrained(folder, cascade=cascade)
    values["cascade"] = json.loads(config.to_json_string())["cascade"]  # infinity as transformers writes it
    staging = file.with_name(f"_{CONFIG_NAME}")
    staging.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(staging, file)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature from 0.05 to 20 at which the mean cross-entropy is least (https://arxiv.org/abs/1706.04599), by
    ternary search: it has one minimum.

    Args:
        logits: (N, labels).
        labels: (N,).
    """
    logits = logits.double()
    low, high = map(math.log, TEMPERATURES)
    while high - low > 1e-3:
        thirds = (2 * low + high) / 3, (low + 2 * high) / 3
        left, right = (torch.nn.functional.cross_entropy(logits / math.exp(third), labels) for third in thirds)
        low, high = (low, thirds[1]) if left <= right else (thirds[0], high)
    return math.exp((low + high) / 2)


def cascade_latencies(
    model: HydraViTForImageClassification,
    heads: list[int],
    criterion: str = "entropy",
    rounds: int = 30,
    disable_tqdm: bool = False,
) -> list[float]:
    """Milliseconds that a cascade takes for one image that stops at each of `heads`: medians of interleaved rounds, on
    the model's device."""
    config = model.config
    shape = (1, config.num_channels, *as_pair(config.image_size))
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)

    def run(stage: int):
        thresholds = [0.0] * stage + [math.inf] * (len(heads) - 1 - stage)
        model.cascade(image, heads, thresholds, criterion).logits.cpu()  # which waits for a GPU

    passes = {stage: partial(run, stage) for stage in range(len(heads))}
    with evaluating(model):
        milliseconds = time_interleaved(passes, rounds, 3, disable_tqdm)
    return [statistics.median(milliseconds[stage]) for stage in passes]


def _default_heads(config: HydraViTConfig) -> list[int]:
    narrow, wide = config.subnetwork_heads[0], config.subnetwork_heads[-1]
    middle = min(config.subnetwork_heads, key=lambda num_heads: abs(math.log(num_heads**2 / (narrow * wide))))
    return sorted({narrow, middle, wide})


def _batches(model, dataset, batch_size: int, num_workers: int, disable_tqdm: bool) -> Iterator:
    """Images and labels on the model's device. The model is in `eval()` mode until the last batch."""
    loader = make_loader(dataset, batch_size, num_workers)
    with evaluating(model):
        for batch in tqdm(loader, desc="Evaluating", disable=disable_tqdm, leave=False):
            yield batch["pixel_values"].to(model.device), batch["labels"].to(model.device)


@torch.no_grad()
def _predict(model, dataset, heads: list[int], *options) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (S, N, labels) of all widths, and labels (N,)."""
    logits, labels = [], []
    for pixel_values, of_batch in _batches(model, dataset, *options):
        widths = [model(pixel_values, num_heads_active=num_heads).logits.float().cpu() for num_heads in heads]
        logits.append(torch.stack(widths))
        labels.append(of_batch.cpu())
    _check_not_empty(logits)
    return torch.cat(logits, dim=1), torch.cat(labels)


def _check_not_empty(batches: list):
    if not batches:
        raise ValueError("There is nothing to evaluate on: the dataset is empty.")


def _within(goal: str, limit: float, hits: np.ndarray, costs: np.ndarray) -> Callable:
    """Which of some cascades is the best that meets the goal, by their accuracies, mean costs and the standard
    deviations of the costs; None where none does."""
    images, floor = hits.shape[1], hits[-1].mean() - limit

    def best(accuracy: np.ndarray, cost: np.ndarray, deviation: np.ndarray) -> int | None:
        if goal == "max_accuracy_loss":
            meets, ranks = accuracy >= floor - 1e-9, (accuracy, -cost)
        else:
            likely_most = cost + CONFIDENCE * deviation * math.sqrt(2 / images)
            meets, ranks = (cost <= limit * (1 + 1e-9)) & (likely_most <= TOLERANCE * limit), (-cost, accuracy)
        index = np.lexsort((*ranks, meets))[-1]
        return index if meets[index] else None

    return best


def _search(uncertain: np.ndarray, hits: np.ndarray, costs: np.ndarray, best: Callable) -> list[float] | None:
    """The thresholds that are `best`.

    Args:
        uncertain: (S - 1, N), of all widths but the widest.
        hits: (S, N), whether each width is right.
        costs: (S,), of an image that stops at a width, the narrower ones included.
        best: Of `_within`.
    """
    steps = len(uncertain)
    levels = np.linspace(0, 1, min(64, max(2, int(COARSE ** (1 / steps)))))
    quantiles = np.quantile(uncertain, levels, axis=1)
    quantiles[0], quantiles[-1] = 0, math.inf
    grid = list(product(*quantiles.T))
    exits = [_exits(uncertain, thresholds) for thresholds in grid]
    found = [(_taken(hits, of).mean(), costs[of].mean(), costs[of].std()) for of in exits]
    index = best(*map(np.array, zip(*found, strict=True)))
    if index is None:
        return None
    thresholds = [float(threshold) for threshold in grid[index]]
    for _ in range(SWEEPS):
        before = list(thresholds)
        for step in range(steps):
            cuts, *reached = _sweep(uncertain, hits, costs, thresholds, step)
            index = best(*reached)
            if index is not None:  # as it may be by a rounding error
                thresholds[step] = float(cuts[index])
        if thresholds == before:
            break
    return thresholds


def _sweep(uncertain, hits, costs, thresholds: list[float], step: int) -> tuple[np.ndarray, ...]:
    """Every threshold of one step that tells the images apart, halfway between two of them, and the accuracy, mean cost
    and standard deviation of the cost that each one gives."""
    order, images = np.argsort(uncertain[step], kind="stable"), uncertain.shape[1]
    ends = [_exits(uncertain, [*thresholds[:step], end, *thresholds[step + 1 :]]) for end in (math.inf, 0.0)]

    def means(values: Callable) -> np.ndarray:
        """For 0 to N images that stop, the most certain first."""
        stop, go = (values(exits)[order] for exits in ends)
        return (go.sum() + np.concatenate(([0], np.cumsum(stop - go)))) / images

    accuracy, cost = means(lambda exits: _taken(hits, exits)), means(lambda exits: costs[exits])
    variance = means(lambda exits: (costs[exits] / costs[-1]) ** 2) - (cost / costs[-1]) ** 2
    ranked = uncertain[step][order]
    cuts = np.concatenate(([0.0], (ranked[1:] + ranked[:-1]) / 2, [math.inf]))
    apart = np.concatenate(([True], ranked[1:] > ranked[:-1], [True]))
    return tuple(values[apart] for values in (cuts, accuracy, cost, costs[-1] * np.sqrt(variance.clip(0))))


def _exits(uncertain: np.ndarray, thresholds) -> np.ndarray:
    """The stage at which each image stops, (N,)."""
    stops = uncertain < np.asarray(thresholds)[:, None]
    return np.where(stops.any(0), stops.argmax(0), len(stops))


def _taken(values: np.ndarray, exits: np.ndarray) -> np.ndarray:
    """Of values (S, N) those of the stage at which each image stops, (N,)."""
    return np.take_along_axis(values, exits[None], axis=0)[0]


def _cannot_meet(goal: str, limit: float, heads: list[int], uncertain, hits, costs) -> str:
    if goal == "max_accuracy_loss":
        thresholds = _search(uncertain, hits, costs, lambda accuracy, cost, _: np.lexsort((-cost, accuracy))[-1])
        exits = _exits(uncertain, thresholds)
        return (
            f"No cascade of {heads} heads that was found reaches an accuracy of {hits[-1].mean() - limit:.2%}: the "
            f"widest has {hits[-1].mean():.2%}, and the most accurate cascade {_taken(hits, exits).mean():.2%}, at "
            f"{costs[exits].mean():.4g} MACs an image."
        )
    unit = "MACs" if goal == "max_macs" else "ms"
    return (
        f"No cascade of {heads} heads fits {limit:.4g} {unit} an image: the cheapest, {heads[0]} heads for all images, "
        f"takes {costs[0]:.4g} {unit} and has an accuracy of {hits[0].mean():.2%}."
    )
