"""How good every width is: one pass over the data, a row for each."""

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator

from .modeling_hydravit import HydraViTForImageClassification


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
    from .subnetwork_accuracy import SubnetworkAccuracy

    heads = [model.config.check_num_heads(num_heads) for num_heads in heads or model.config.subnetwork_heads]
    if len(dataset) == 0:
        raise ValueError("There is nothing to evaluate on: the dataset is empty.")
    loader = dataset
    if not isinstance(dataset, DataLoader):
        loader = DataLoader(dataset, batch_size, collate_fn=default_data_collator, num_workers=num_workers)
    gather = lambda tensors: tensors  # noqa: E731
    if accelerator is not None:
        loader, gather = accelerator.prepare_data_loader(loader), accelerator.gather_for_metrics
    metric = SubnetworkAccuracy(keep_in_memory=True)
    images, top5, loss = 0, dict.fromkeys(heads, 0), dict.fromkeys(heads, 0.0)
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(loader, desc="Evaluating", disable=disable_tqdm, leave=False):
            pixel_values, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
            for num_heads in loss:
                logits = model(pixel_values, num_heads_active=num_heads).logits.float()
                losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                ranked = logits.topk(min(5, logits.shape[-1])).indices
                ranked, references, losses = gather((ranked, labels, losses))
                top5[num_heads] += (ranked == references[:, None]).any(-1).sum().item()
                loss[num_heads] += losses.double().sum().item()
                metric.add_batch(
                    predictions=ranked[:, 0].tolist(),
                    references=references.tolist(),
                    num_heads=[num_heads] * len(references),
                )
            images += len(references)
    finally:
        model.train(was_training)
    results = metric.compute()
    return [
        {
            "num_heads": num_heads,
            "accuracy": results[f"{num_heads}_heads_accuracy"],
            "top5_accuracy": top5[num_heads] / images,
            "loss": loss[num_heads] / images,
        }
        for num_heads in heads
    ]
