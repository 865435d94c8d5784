"""Thresholds at which a cascade does something."""

import torch

from hydravit_hf.model.cascade_hydravit import uncertainty


def splitting(model, images, heads, criterion="entropy", temperatures=None, share=0.5) -> list[float]:
    """Thresholds halfway between the uncertainties of two images, at each of which a share of all goes on."""
    thresholds = []
    for num_heads, temperature in zip(heads[:-1], (temperatures or [1.0] * len(heads))[:-1], strict=True):
        with torch.no_grad():
            logits = model(images, num_heads_active=num_heads).logits
        ranked = uncertainty(logits, criterion, temperature).sort().values
        stop = round((1 - share) * len(ranked))
        thresholds.append(ranked[stop - 1 : stop + 1].double().mean().item())
    return thresholds
