# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""A cascade over widths: a wider subnetwork runs only for the images that the narrower one is not certain about.

The work is skipped, not masked: each pass is given a batch of only the images that have come so far. Nothing is kept
between calls, so threads may share a model. This file travels with each saved checkpoint as remote code.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .configuration_hydravit import CRITERIA


@dataclass
class CascadeOutput(ModelOutput):
    """What a cascade gives for B images.

    Args:
        logits: (B, labels), of the last width that each image went through, as that width gives them.
        num_heads: (B,), the heads of that width.
        macs: (B,), multiply-accumulates of all the widths that the image went through.
    """

    logits: torch.Tensor | None = None
    num_heads: torch.Tensor | None = None
    macs: torch.Tensor | None = None


def uncertainty(logits: torch.Tensor, criterion: str = "entropy", temperature: float = 1.0) -> torch.Tensor:
    """How uncertain each prediction is, (B,), in float32 or wider: 0 is certain, and logits that are not numbers are
    the least certain.

    Args:
        logits: (B, labels), of two labels at least.
        criterion: Of their softmax: "entropy" (in nats); "margin", 1 less the distance of the largest probability to
            the next; or "probability", 1 less the largest.
        temperature: What the logits are divided by.

    Raises:
        ValueError: Another criterion.
    """
    probabilities = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(-1)
    if criterion == "entropy":
        uncertain = torch.special.entr(probabilities).sum(-1)
    elif criterion == "margin":
        first, second = probabilities.topk(2).values.unbind(-1)
        uncertain = 1 - (first - second)
    elif criterion == "probability":
        uncertain = 1 - probabilities.amax(-1)
    else:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, not {criterion!r}.")
    return uncertain.clamp_min(0).nan_to_num(nan=torch.finfo(uncertain.dtype).max)


def check_chooses_one_label(config):
    """Raise a `ValueError` where a model has no cascade, as it doesn't choose one of several labels."""
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            "A cascade needs a model that chooses one of several labels: this one has "
            f"num_labels={config.num_labels}, problem_type={config.problem_type!r}."
        )


@torch.no_grad()
def run_cascade(
    model,
    pixel_values: torch.Tensor,
    heads: list[int] | None = None,
    thresholds: float | list[float] | None = None,
    criterion: str | None = None,
    temperatures: list[float] | None = None,
    interpolate_pos_encoding: bool = False,
) -> CascadeOutput:
    """Classify images at the first of `heads`, and those that it is not certain about at the next, and so on. Without
    gradients, whatever the caller's mode.

    Args:
        model: A HydraViTForImageClassification of one label an image.
        pixel_values: Images, (B, C, H, W).
        heads: Head counts in increasing order; None: those of `config.cascade`, and so the rest where it is None.
        thresholds: An image goes on where its `uncertainty` is at least that of the step; one number for all steps,
            or a list. So 0 sends all images on, which gives exactly the widest, and infinity none, the narrowest.
        criterion: Of `uncertainty`; None: "entropy".
        temperatures: Of `uncertainty` at each of `heads`; None: 1. They decide who goes on; the logits stay as they
            are.
        interpolate_pos_encoding: As in the model's `forward`.

    Raises:
        ValueError: An argument out of its range, or a model of several labels an image or of none.
    """
    config = model.config
    settings = config.resolve_cascade(heads, thresholds, criterion, temperatures)
    check_chooses_one_label(config)
    heads, criterion = settings["num_heads"], settings["criterion"]
    logits = pixel_values.new_empty((len(pixel_values), config.num_labels), dtype=model.dtype)
    images = torch.arange(len(pixel_values), device=pixel_values.device)  # that are still to be classified
    num_heads, macs = torch.zeros_like(images), torch.zeros_like(images)
    costs = config.count_cascade_macs(heads, tuple(pixel_values.shape[2:]))
    steps = zip(heads, costs, [*settings["thresholds"], None], settings["temperatures"], strict=True)
    given, tokens, reached = pixel_values, None, 0  # the images that go on, and the tokens that they recycle
    for count, cost, threshold, temperature in steps:
        if len(images) == 0:
            break
        for stage in config.stages(count):
            if stage > reached:
                run = {"num_heads_active": stage, "interpolate_pos_encoding": interpolate_pos_encoding}
                outputs = model.hydravit(given, **run, recycled_tokens=tokens, return_dict=True)
                tokens = outputs.last_hidden_state if config.token_recycling else None
        found, reached = model.classifier(outputs.pooler_output), count
        logits = found if len(images) == len(logits) else logits.index_copy_(0, images, found)
        num_heads[images], macs[images] = count, cost
        if threshold is None:
            break
        going = (uncertainty(found, criterion, temperature) >= threshold).nonzero().flatten()
        images, given = images[going], given[going]
        tokens = None if tokens is None else tokens[going]
    return CascadeOutput(logits=logits, num_heads=num_heads, macs=macs)
