"""How good every width is: one pass over the data, a row for each width."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator

from .model.configuration_hydravit import HydraViTConfig
from .model.modeling_hydravit import HydraViTForImageClassification

SCORES = ("accuracy", "top5_accuracy", "loss")
SINGLE_LABEL = "single_label_classification"


def problem_type_of(config: HydraViTConfig) -> str:
    """The `problem_type` of a configuration. None means a regression for one label, as in transformers, and a
    single-label classification for several."""
    return config.problem_type or ("regression" if config.num_labels == 1 else SINGLE_LABEL)


def score(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the `SCORES` of each image, (B, 3).

    They are whether its label ranks first, whether it ranks among the first five, and its cross-entropy.

    Args:
        logits: Logits, (B, labels).
        labels: Labels, (B,).

    Examples:
        >>> import torch
        >>> from hydravit_hf.evaluation import score
        >>> score(torch.tensor([[0.0, 100.0], [100.0, 0.0]]), torch.tensor([0, 0]))[0]
        tensor([  0.,   1., 100.])
    """
    logits = logits.float()
    ranked = logits.topk(min(5, logits.shape[-1])).indices
    hits = ranked == labels[:, None]
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.stack((hits[:, 0], hits.any(-1), losses), dim=-1)


@torch.no_grad()
def evaluate_subnetworks(
    model: HydraViTForImageClassification,
    dataset,
    heads: list[int] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator=None,
    disable_tqdm: bool = False,
) -> list[dict]:
    """Evaluate a single-label classifier at several widths.

    Args:
        model: The model. It stays on its device and in its mode; it is evaluated in `eval()` mode.
        dataset: Items `{"pixel_values": (C, H, W), "labels": int}`, or a `DataLoader` of batches of them.
        heads: Head counts to evaluate. None means `model.config.subnetwork_heads`.
        batch_size, num_workers: Arguments of the loader, if `dataset` is not one.
        accelerator: An `accelerate.Accelerator` that shares the data among its processes.
        disable_tqdm: Whether to hide the progress bar.

    Returns:
        A row for each width, `{"num_heads", "accuracy", "top5_accuracy", "loss"}`. The accuracies are fractions of the
        images whose label ranks first, or among the first five. The loss is the mean cross-entropy.

    Raises:
        ValueError: There is no data, the model does not hold a width, or it is no single-label classifier.

    Examples:
        >>> import torch
        >>> from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, evaluate_subnetworks
        >>> config = HydraViTConfig(num_hidden_layers=1, image_size=16, num_labels=2)
        >>> data = [{"pixel_values": torch.zeros(3, 16, 16), "labels": 0}] * 4
        >>> rows = evaluate_subnetworks(HydraViTForImageClassification(config), data, heads=[3, 12])
        >>> [row["num_heads"] for row in rows], list(rows[0])
        ([3, 12], ['num_heads', 'accuracy', 'top5_accuracy', 'loss'])
    """
    from .metrics import SubnetworkMetric  # needs the package `evaluate`

    if model.config.problem_type not in (None, SINGLE_LABEL):
        raise ValueError(
            f"This function evaluates single-label classifiers, not problem_type='{model.config.problem_type}': "
            "`HydraViTTrainer.evaluate` does."
        )
    heads = [model.config.check_num_heads(num_heads) for num_heads in heads or model.config.subnetwork_heads]
    loader, gather = make_loader(dataset, batch_size, num_workers), lambda tensors: tensors
    if accelerator is not None:
        loader, gather = accelerator.prepare_data_loader(loader), accelerator.gather_for_metrics
    metric, found_images = SubnetworkMetric(SCORES), False
    progress = tqdm(loader, desc="Evaluating", disable=disable_tqdm, leave=False)
    with evaluating(model), progress:  # so that an error closes the bar, too
        for batch in progress:
            pixel_values, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
            for num_heads in dict.fromkeys(heads):
                logits = model(pixel_values, num_heads_active=num_heads).logits
                metric.add_scores(gather(score(logits, labels)).cpu(), num_heads)
            found_images = True
    if not found_images:
        raise ValueError("There is nothing to evaluate on: the dataset is empty.")
    means = metric.compute()
    return [
        {"num_heads": num_heads} | {name: means[f"{num_heads}_heads_{name}"] for name in SCORES} for num_heads in heads
    ]


@torch.no_grad()
def evaluate_classifier(model: nn.Module, dataset, batch_size: int = 64) -> dict[str, float]:
    """Evaluate any single-label classifier of transformers, such as the ViT that an elastic model was made from.

    Args:
        model: The classifier. It stays on its device and in its mode; it is evaluated in `eval()` mode.
        dataset: As in `evaluate_subnetworks`.
        batch_size: Number of images in a pass.

    Returns:
        `{"accuracy", "top5_accuracy", "loss"}`, as in `evaluate_subnetworks`.
    """
    scores = []
    with evaluating(model):
        for batch in make_loader(dataset, batch_size):
            logits = model(batch["pixel_values"].to(model.device)).logits
            scores.append(score(logits, batch["labels"].to(model.device)).cpu())
    if not scores:
        raise ValueError("There is nothing to evaluate on: the dataset is empty.")
    return dict(zip(SCORES, torch.cat(scores).double().mean(0).tolist(), strict=True))


def make_loader(dataset, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Turn a dataset into a loader of its items in their order. A `DataLoader` stays as it is."""
    if isinstance(dataset, DataLoader):
        return dataset
    return DataLoader(dataset, batch_size, collate_fn=default_data_collator, num_workers=num_workers)


@contextmanager
def evaluating(model: nn.Module):
    """Put a model into `eval()` mode within this context, and each module back into its former mode after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
