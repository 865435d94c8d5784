"""How good every width is: one pass over the data, a row for each."""

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator

from .modeling_hydravit import HydraViTForImageClassification

SCORES = ("accuracy", "top5_accuracy", "loss")


def score(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The `SCORES` of each image, (B, 3): whether its label is the first, or among the first five, and its loss.

    Args:
        logits: (B, labels).
        labels: (B,).
    """
    logits = logits.float()
    ranked = logits.topk(min(5, logits.shape[-1])).indices
    hits = ranked == labels[:, None]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
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
    """Evaluate widths of a single-label classifier.

    Args:
        model: The model; it is evaluated where it is, in `eval()` mode, and left in the mode that it had.
        dataset: Of items `{"pixel_values": (C, H, W), "labels": int}`, or a `DataLoader` of batches of them.
        heads: The head counts; None: `model.config.subnetwork_heads`.
        batch_size, num_workers: Of the loader that is made of a dataset.
        accelerator: An `accelerate.Accelerator`, to share the data among its processes.
        disable_tqdm: Whether to show no progress bar.

    Returns:
        For each width a row `{"num_heads", "accuracy", "top5_accuracy", "loss"}`: fractions of the images whose label
        is the first, or among the first five, and the mean cross-entropy.

    Raises:
        ValueError: No data, or a width that the model doesn't hold.
    """
    heads = [model.config.check_num_heads(num_heads) for num_heads in heads or model.config.subnetwork_heads]
    loader = dataset
    if not isinstance(dataset, DataLoader):
        loader = DataLoader(dataset, batch_size, collate_fn=default_data_collator, num_workers=num_workers)
    gather = lambda tensors: tensors  # noqa: E731
    if accelerator is not None:
        loader, gather = accelerator.prepare_data_loader(loader), accelerator.gather_for_metrics
    images, totals = 0, {num_heads: torch.zeros(len(SCORES), dtype=torch.float64) for num_heads in heads}
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(loader, desc="Evaluating", disable=disable_tqdm, leave=False):
            pixel_values, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
            for num_heads in totals:
                logits = model(pixel_values, num_heads_active=num_heads).logits
                scores = gather(score(logits, labels))
                totals[num_heads] += scores.double().sum(0).cpu()
            images += len(scores)
    finally:
        model.train(was_training)
    if images == 0:
        raise ValueError("There is nothing to evaluate on: the dataset is empty.")
    means = {num_heads: (total / images).tolist() for num_heads, total in totals.items()}
    return [{"num_heads": num_heads, **dict(zip(SCORES, means[num_heads], strict=True))} for num_heads in heads]
