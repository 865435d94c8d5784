"""Fits a cascade over widths to a goal, and evaluates it. `cascade_hydravit` runs it.

A cascade is fitted on arrays: every width runs once on every image, and the search for thresholds then compares only
uncertainties, hits and costs.

Letters in shapes: S widths, N images. The stage of an image is the index of the width that answers.
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

TOLERANCE = 1.05  # the mean cost of as many new images stays within 1.05 x budget ...
CONFIDENCE = 1.645  # ... with 95 % confidence: standard errors, one-sided
COARSE = 4_000  # number of threshold combinations to try before each threshold is refined
SWEEPS = 20  # largest number of passes over the thresholds that refine them
TEMPERATURES = (0.05, 20.0)  # smallest and largest temperature


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
    """Find the temperatures and thresholds of a cascade that meet one goal best.

    Fit it on images that the model was not trained on. Each width gets the temperature that minimises the
    cross-entropy of its predictions. For two widths, the search tries every threshold that separates two images. For
    more widths, it tries a grid of quantiles of the uncertainties and then improves one threshold at a time until none
    improves. That is good, but not always the best of all.

    Args:
        model: The model. It stays on its device and in its mode; it runs in `eval()` mode.
        dataset: Items `{"pixel_values": (C, H, W), "labels": int}`, or a `DataLoader` of batches of them.
        heads: Two head counts or more, in increasing order. None means the narrowest and the widest of
            `model.config.subnetwork_heads`, and the one nearest to their geometric mean.
        max_macs: Goal: the highest accuracy within this mean number of multiply-accumulates per image. The thresholds
            leave room for chance: the mean cost of as many new images stays within 1.05 x budget with 95 % confidence.
        max_latency_ms: Goal: the same for the mean latency per image in milliseconds.
        max_accuracy_loss: Goal: the fewest multiply-accumulates with an accuracy on these images that is at most this
            fraction below that of the widest.
        criterion: Measure of uncertainty: "entropy", "margin" or "probability".
        calibrate: Whether to fit the temperatures. Otherwise they are 1.
        latencies: For `max_latency_ms`, the latency in milliseconds of an image that exits at each of `heads`. None
            measures them with `cascade_latencies`, for images that come one by one. For images that come in batches,
            measure your own: a sum of latencies from `profile_subnetworks` is too low if a pass of few images takes as
            long as one of many.
        batch_size, num_workers: Arguments of the loader, if `dataset` is not one.
        disable_tqdm: Whether to hide the progress bars.

    Returns:
        A dictionary of the settings and of what they reach on these images:

        - `cascade`: Settings for `model.config.cascade`.
        - `accuracy`, `macs`: Accuracy, and mean multiply-accumulates of an image.
        - `latency_ms`: Mean latency of an image, if that is the goal.
        - `shares`: Fraction of the images that each width answers.
        - `widest_accuracy`: Accuracy of the widest alone.
        - `images`: Number of images.

    Raises:
        ValueError: No cascade meets the goal (the message says what the cheapest or the most accurate one reaches),
            there is not exactly one goal, there are fewer than two widths, an argument is out of its range, or there is
            no data.

    Examples:
        >>> import torch
        >>> from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, fit_cascade
        >>> config = HydraViTConfig(num_hidden_layers=1, image_size=16, num_labels=2)
        >>> model = HydraViTForImageClassification(config)
        >>> held_out = [{"pixel_values": torch.randn(3, 16, 16), "labels": n % 2} for n in range(40)]
        >>> fitted = fit_cascade(model, held_out, [3, 12], max_macs=config.count_macs(12))
        >>> model.config.cascade = fitted["cascade"]  # the default of `model.cascade` and saved with the model
        >>> fitted["cascade"]["num_heads"], fitted["images"], fitted["macs"] <= config.count_macs(12)
        ([3, 12], 40, True)
    """
    goal, limit = _check_goal(max_macs=max_macs, max_latency_ms=max_latency_ms, max_accuracy_loss=max_accuracy_loss)
    config = model.config
    heads = _default_heads(config) if heads is None else heads
    heads = config.resolve_cascade(heads, 0.0, criterion)["num_heads"]
    if len(heads) < 2:
        raise ValueError(f"`heads` must be two head counts or more, not {heads}.")
    # 1. The cost of an image that exits at each width
    macs = np.array(config.count_cascade_macs(heads), dtype=float)
    costs = macs
    if goal == "max_latency_ms":
        if latencies is None:
            latencies = cascade_latencies(model, heads, criterion, disable_tqdm=disable_tqdm)
        costs = _check_latencies(latencies, heads)
    # 2. The uncertainties of the narrower widths, and whether each width is right
    logits, labels = _predict(model, dataset, heads, batch_size, num_workers, disable_tqdm)
    temperatures = [fit_temperature(of_width, labels) if calibrate else 1.0 for of_width in logits]
    narrower = zip(logits[:-1], temperatures[:-1], strict=True)
    uncertain = np.stack([uncertainty(of_width, criterion, t).double().numpy() for of_width, t in narrower])
    hits = (logits.argmax(-1) == labels).double().numpy()
    # 3. The thresholds
    thresholds = _search(uncertain, hits, costs, _within(goal, limit, hits, costs))
    if thresholds is None:
        raise ValueError(_cannot_meet(goal, limit, heads, uncertain, hits, costs))
    never = math.log(config.num_labels) + 1  # above every uncertainty, and a number in every JSON, unlike infinity
    thresholds = [min(threshold, never) for threshold in thresholds]
    # 4. What they reach
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
    """Evaluate a cascade on labelled images.

    Args:
        model, dataset, batch_size, num_workers, disable_tqdm: As in `fit_cascade`.
        heads, thresholds, criterion, temperatures: Settings of the cascade, as in `cascade_hydravit.run_cascade`. None
            takes them from `model.config.cascade`.

    Returns:
        A row of results:

        - `num_heads`, `thresholds`: Settings of the cascade.
        - `accuracy`, `top5_accuracy`, `loss`: As in the rows of `evaluate_subnetworks`.
        - `macs`: Mean multiply-accumulates of an image.
        - `shares`: Fraction of the images that each width answers.

    Raises:
        ValueError: There is no data, or an argument is out of its range.

    Examples:
        >>> import torch
        >>> from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, evaluate_cascade
        >>> config = HydraViTConfig(num_hidden_layers=1, image_size=16, num_labels=2)
        >>> model = HydraViTForImageClassification(config)
        >>> data = [{"pixel_values": torch.randn(3, 16, 16), "labels": n % 2} for n in range(8)]
        >>> row = evaluate_cascade(model, data, heads=[3, 12], thresholds=0.0)  # 0 sends every image on
        >>> row["shares"], row["macs"] == config.count_macs(3) + config.count_macs(12)
        ([0.0, 1.0], True)
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
    """Write the settings of a cascade into the configuration of a saved checkpoint. Nothing else in it changes.

    Args:
        folder: Folder of the checkpoint.
        cascade: Settings, as in `HydraViTConfig`.

    Raises:
        ValueError: A setting is out of its range.
        OSError: The folder does not exist.
    """
    file = Path(folder) / CONFIG_NAME
    values = json.loads(file.read_text(encoding="utf-8"))
    config = HydraViTConfig.from_pretrained(folder, cascade=cascade)
    values["cascade"] = json.loads(config.to_json_string())["cascade"]  # infinity as transformers writes it
    staging = file.with_name(f"_{CONFIG_NAME}")
    staging.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(staging, file)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Find the temperature from 0.05 to 20 that minimises the mean cross-entropy (https://arxiv.org/abs/1706.04599).

    The cross-entropy has one minimum, so ternary search finds it.

    Args:
        logits: Logits, (N, labels).
        labels: Labels, (N,).
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
    """Measure the latency in ms of an image that exits a cascade at each width.

    It gives medians of interleaved rounds on the model's device, for images that come one by one.

    Args:
        model: The model. It stays on its device and in its mode; it runs in `eval()` mode.
        heads: Head counts in increasing order.
        criterion: Measure of uncertainty.
        rounds: Number of timings of each exit.
        disable_tqdm: Whether to hide the progress bar.
    """
    config = model.config
    shape = (1, config.num_channels, *as_pair(config.image_size))
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)

    def run(stage: int):
        thresholds = [0.0] * stage + [math.inf] * (len(heads) - 1 - stage)
        model.cascade(image, heads, thresholds, criterion).logits.cpu()  # the copy waits for a GPU

    passes = {stage: partial(run, stage) for stage in range(len(heads))}
    with evaluating(model):
        milliseconds = time_interleaved(passes, rounds, 3, disable_tqdm)
    return [statistics.median(milliseconds[stage]) for stage in passes]


def _check_goal(**goals: float | None) -> tuple[str, float]:
    """The name and the limit of the one goal that is given."""
    given = [(name, limit) for name, limit in goals.items() if limit is not None]
    if len(given) != 1:
        raise ValueError(f"Give exactly one goal of {', '.join(f'`{name}`' for name in goals)}.")
    ((goal, limit),) = given
    least = -1 if goal == "max_accuracy_loss" else 0
    if not isinstance(limit, Real) or isinstance(limit, bool) or not least < limit < math.inf:
        raise ValueError(f"`{goal}` must be a number above {least}, not {limit!r}.")
    return goal, limit


def _check_latencies(latencies: list[float], heads: list[int]) -> np.ndarray:
    costs = np.array(latencies, dtype=float)
    if costs.shape != (len(heads),) or not (costs > 0).all():
        raise ValueError(f"`latencies` must be a positive number for each of the heads {heads}, not {latencies!r}.")
    return costs


def _default_heads(config: HydraViTConfig) -> list[int]:
    narrow, wide = config.subnetwork_heads[0], config.subnetwork_heads[-1]
    middle = min(config.subnetwork_heads, key=lambda num_heads: abs(math.log(num_heads**2 / (narrow * wide))))
    return sorted({narrow, middle, wide})


def _batches(model, dataset, batch_size: int, num_workers: int, disable_tqdm: bool) -> Iterator:
    """Yield images and labels on the model's device. The model is in `eval()` mode until the last batch."""
    loader = make_loader(dataset, batch_size, num_workers)
    with evaluating(model):
        for batch in tqdm(loader, desc="Evaluating", disable=disable_tqdm, leave=False):
            yield batch["pixel_values"].to(model.device), batch["labels"].to(model.device)


@torch.no_grad()
def _predict(model, dataset, heads: list[int], *options) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of all widths, (S, N, labels), and collect the labels, (N,)."""
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
    """Make the function that picks the best cascade within the goal.

    It takes the accuracies of some cascades, their mean costs and the standard deviations of their costs. It returns
    the index of the best one, or None if none meets the goal. `_search` describes the arrays.
    """
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
    """Search the thresholds that `best` picks. The result is None if it picks none.

    Args:
        uncertain: Uncertainty of every image at all widths but the widest, (S - 1, N).
        hits: Whether each width is right, as 0 or 1, (S, N).
        costs: Cost of an image that exits at each width, including the narrower ones, (S,).
        best: Function from `_within`.
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
            if index is not None:  # a rounding error can make all of them miss the goal
                thresholds[step] = float(cuts[index])
        if thresholds == before:
            break
    return thresholds


def _sweep(uncertain, hits, costs, thresholds: list[float], step: int) -> tuple[np.ndarray, ...]:
    """List the thresholds of one step that separate two images, each halfway between their uncertainties.

    It returns them with the accuracy, the mean cost and the standard deviation of the cost that each one gives. The
    thresholds of the other steps stay.
    """
    order, images = np.argsort(uncertain[step], kind="stable"), uncertain.shape[1]
    ends = [_exits(uncertain, [*thresholds[:step], end, *thresholds[step + 1 :]]) for end in (math.inf, 0.0)]

    def means(values: Callable) -> np.ndarray:
        """Means over all images if 0 to N of them stop at this step, the most certain ones first, (N + 1,)."""
        stop, go = (values(exits)[order] for exits in ends)
        return (go.sum() + np.concatenate(([0], np.cumsum(stop - go)))) / images

    accuracy, cost = means(lambda exits: _taken(hits, exits)), means(lambda exits: costs[exits])
    variance = means(lambda exits: (costs[exits] / costs[-1]) ** 2) - (cost / costs[-1]) ** 2
    ranked = uncertain[step][order]
    cuts = np.concatenate(([0.0], (ranked[1:] + ranked[:-1]) / 2, [math.inf]))
    apart = np.concatenate(([True], ranked[1:] > ranked[:-1], [True]))
    return tuple(values[apart] for values in (cuts, accuracy, cost, costs[-1] * np.sqrt(variance.clip(0))))


def _exits(uncertain: np.ndarray, thresholds) -> np.ndarray:
    """The stage at which each image exits, (N,)."""
    stops = uncertain < np.asarray(thresholds)[:, None]
    return np.where(stops.any(0), stops.argmax(0), len(stops))


def _taken(values: np.ndarray, exits: np.ndarray) -> np.ndarray:
    """The value of each image at the stage where it exits, (N,), from those of all stages, (S, N)."""
    return np.take_along_axis(values, exits[None], axis=0)[0]


def _cannot_meet(goal: str, limit: float, heads: list[int], uncertain, hits, costs) -> str:
    """The message of a goal that no cascade meets. It says what the most accurate or the cheapest cascade reaches."""
    if goal == "max_accuracy_loss":
        thresholds = _search(uncertain, hits, costs, lambda accuracy, cost, _: np.lexsort((-cost, accuracy))[-1])
        exits = _exits(uncertain, thresholds)
        return (
            f"The search found no cascade of {heads} heads with an accuracy of {hits[-1].mean() - limit:.2%}: the "
            f"widest has {hits[-1].mean():.2%}, and the most accurate cascade has {_taken(hits, exits).mean():.2%}, at "
            f"{costs[exits].mean():.4g} MACs an image."
        )
    unit = "MACs" if goal == "max_macs" else "ms"
    return (
        f"No cascade of {heads} heads fits {limit:.4g} {unit} an image: the cheapest, {heads[0]} heads for all images, "
        f"takes {costs[0]:.4g} {unit} and has an accuracy of {hits[0].mean():.2%}."
    )
