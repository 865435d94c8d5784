# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""A cascade over widths: wider subnetworks run only for the images that narrower ones are uncertain about.

A cascade skips the work and does not mask it: each pass gets a batch of only the images that still go on. Nothing is
kept between calls, so threads may share a model. This file travels with each saved checkpoint as remote code.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .configuration_hydravit import CRITERIA


@dataclass
class CascadeOutput(ModelOutput):
    """Output of a cascade for B images.

    Args:
        logits: Logits of the last width that each image went through, (B, labels).
        num_heads: Number of heads of that width, (B,).
        macs: Multiply-accumulates of all widths that the image went through, (B,).
    """

    logits: torch.Tensor | None = None
    num_heads: torch.Tensor | None = None
    macs: torch.Tensor | None = None


def uncertainty(logits: torch.Tensor, criterion: str = "entropy", temperature: float = 1.0) -> torch.Tensor:
    """Compute how uncertain each prediction is, (B,), in float32 or wider.

    0 means certain. Logits that are not numbers are the least certain.

    Args:
        logits: Logits of two labels or more, (B, labels).
        criterion: Measure on their softmax: "entropy" (in nats), "margin" (1 minus the distance between the two largest
            probabilities) or "probability" (1 minus the largest).
        temperature: Divisor of the logits.

    Raises:
        ValueError: The criterion is unknown.

    Examples:
        >>> import torch
        >>> from hydravit_hf.model.cascade_hydravit import uncertainty
        >>> uncertainty(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), "probability")
        tensor([0.5000, 0.0000])
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
    """Raise a `ValueError` if a model does not choose one of several labels, as a cascade needs."""
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
    """Classify images at the first of `heads`, then the uncertain ones at the next, and so on.

    It computes no gradients.

    Args:
        model: A `HydraViTForImageClassification` that chooses one of several labels.
        pixel_values: Images, (B, C, H, W).
        heads: Head counts in increasing order. None takes the settings that are None from `config.cascade`.
        thresholds: An image goes on if its `uncertainty` is at least the threshold of the step: one number for all
            steps, or a list. With 0, all images go on to the widest. With infinity, all stop at the narrowest.
        criterion: Criterion of `uncertainty`. None means "entropy".
        temperatures: Temperature of `uncertainty` at each of `heads`. None means 1. They decide which images go on and
            leave the logits as they are.
        interpolate_pos_encoding: As in the model's `forward`.

    Raises:
        ValueError: An argument is out of its range, or the model does not choose one of several labels.
    """
    config = model.config
    settings = config.resolve_cascade(heads, thresholds, criterion, temperatures)
    check_chooses_one_label(config)
    heads, criterion = settings["num_heads"], settings["criterion"]
    logits = pixel_values.new_empty((len(pixel_values), config.num_labels), dtype=model.dtype)
    images = torch.arange(len(pixel_values), device=pixel_values.device)  # those that still go on
    num_heads, macs = torch.zeros_like(images), torch.zeros_like(images)
    costs = config.count_cascade_macs(heads, tuple(pixel_values.shape[2:]))
    steps = zip(heads, costs, [*settings["thresholds"], None], settings["temperatures"], strict=True)
    given, tokens, reached = pixel_values, None, 0
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
