"""What a training loop needs beyond the model: the widths of a step, losses, mixed images, averaged weights, and runs
that survive a crash."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .configuration_hydravit import HydraViTConfig

RUN_FILE = "run.json"
SAMPLING = ("weighted", "uniform", "sandwich", "open_sandwich")


@dataclass
class SubnetworkArguments:
    """How to train the subnetworks: shared by the `Trainer` and the Accelerate example."""

    subnetwork_sampling: str = field(
        default="weighted",
        metadata={
            "help": "Widths of a step: one, drawn by the odds in the model's configuration (weighted) or not (uniform);"
            " the widest, the narrowest and others between them (sandwich); the narrowest and others (open_sandwich).",
            "choices": SAMPLING,
        },
    )
    sandwich_draws: int = field(default=1, metadata={"help": "Widths that a sandwich draws beside its ends."})
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Part of the narrower widths' loss that the widest one's predictions have, from 0 to 1."},
    )
    one_width_per_process: bool = field(
        default=False,
        metadata={
            "help": "Let each process draw its own width, as the original does. Each step then averages several, and "
            "takes as long as the widest."
        },
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Of mixup's Beta distribution; 0: no mixup."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "Of CutMix's Beta distribution; 0: no CutMix."})
    ema_decay: float = field(
        default=0.0, metadata={"help": "Of the averaged weights, which are evaluated and saved; 0: no averaging."}
    )
    freeze_unused_weights: bool = field(
        default=False,
        metadata={"help": "Let decay and momentum leave alone the weights outside of the widths of the step (AdamW)."},
    )

    def __post_init__(self):
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"`distillation_weight` must be from 0 to 1, not {self.distillation_weight!r}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be from 0 to below 1, not {self.ema_decay!r}.")
        if self.subnetwork_sampling not in SAMPLING:
            raise ValueError(
                f"`subnetwork_sampling` must be one of {', '.join(SAMPLING)}, not {self.subnetwork_sampling!r}."
            )
        if self.distillation_weight and not self.subnetwork_sampling.endswith("sandwich"):
            raise ValueError(
                "`distillation_weight` needs subnetwork_sampling='sandwich' or 'open_sandwich': the widest subnetwork "
                "of a step teaches the others."
            )
        for name in ("mixup_alpha", "cutmix_alpha", "sandwich_draws"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, not {getattr(self, name)!r}.")

    def sample(self, config: HydraViTConfig, seed: int, step: int, process_index: int) -> list[int]:
        """The head counts that a process trains at `step`, the widest first; see `sample_subnetworks`."""
        process_index = process_index if self.one_width_per_process else None
        return sample_subnetworks(config, seed, step, self.subnetwork_sampling, self.sandwich_draws, process_index)

    def widest(self, config: HydraViTConfig, seed: int, step: int, num_processes: int) -> int:
        """The most heads that any process trains at `step`."""
        return max(self.sample(config, seed, step, process_index)[0] for process_index in range(num_processes))


def sample_subnetworks(
    config: HydraViTConfig,
    seed: int,
    step: int,
    sampling: str = "weighted",
    sandwich_draws: int = 1,
    process_index: int | None = None,
) -> list[int]:
    """The head counts to train at `step`, the widest first.

    A pure function of its arguments: every process draws the same widths, and a resumed run replays the draws. A width
    that is pinned by `config.num_heads_active` is trained alone. With token recycling it is the widest, whose pass has
    all stages in it.

    Args:
        config: Its `subnetwork_heads` are drawn from, and its `subnetwork_weights` are the odds.
        seed: Of the run.
        step: Optimizer steps taken.
        sampling: "weighted": one width, by the odds of the configuration (paper, "weighted sampling"); "uniform": one
            width, whatever the odds; "sandwich": the widest, the narrowest, and others by the odds
            (https://arxiv.org/abs/1903.05134); "open_sandwich": the narrowest, and others by the odds.
        sandwich_draws: Widths that a sandwich draws beside its ends, if there are as many.
        process_index: Of this process, to draw a width of its own, as the original does without saying so. A step is
            then as slow as its widest draw: for two processes and uniform draws from 3..12, 1.37 times the MACs of
            one draw for both.

    Raises:
        ValueError: An unknown `sampling`, or token recycling with another one than "weighted".
    """
    if sampling not in SAMPLING:
        raise ValueError(f"`sampling` must be one of {', '.join(SAMPLING)}, not {sampling!r}.")
    if config.token_recycling and sampling != "weighted":
        raise ValueError(f"Token recycling trains all its stages at each step: leave out the sampling '{sampling}'.")
    if config.num_heads_active is not None:
        return [config.num_heads_active]
    if config.token_recycling:
        return [config.num_attention_heads]
    heads, odds = config.subnetwork_heads, config.subnetwork_odds
    generator = np.random.default_rng([seed, step] if process_index is None else [seed, step, process_index])
    if sampling == "uniform":
        return [int(generator.choice(heads))]
    if sampling == "weighted":
        return [int(generator.choice(heads, p=odds))]
    ends = {heads[0]} if sampling == "open_sandwich" else {heads[0], heads[-1]}
    others = {num_heads: share for num_heads, share in zip(heads, odds, strict=True) if num_heads not in ends}
    # a race of exponential clocks: a draw without replacement that takes odds of zero last
    times = generator.exponential(size=len(others)) / np.maximum([*others.values()], 1e-12)
    drawn = [[*others][index] for index in np.argsort(times)[:sandwich_draws]]
    return sorted({*ends, *drawn}, reverse=True)


def classification_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
    distillation_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy with the labels and, in part, with the predictions of a wider subnetwork.

    Args:
        logits: (B, labels), or (S, B, labels) of the S stages of token recycling, which count alike.
        targets: Labels (B,), or probabilities (B, labels).
        teacher_logits: (B, labels) of the widest subnetwork of the step (in-place distillation,
            https://arxiv.org/abs/1903.05134); None: the labels alone.
        distillation_weight: The teacher's part of the loss, from 0 to 1.
        label_smoothing: Of the labels.
    """
    if logits.ndim == 3:
        logits, targets = logits.flatten(0, 1), torch.cat([targets] * len(logits))
    loss = nn.functional.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    if teacher_logits is None:
        return loss
    teacher = teacher_logits.detach().float().softmax(-1)
    return torch.lerp(loss, nn.functional.cross_entropy(logits.float(), teacher), distillation_weight)


def check_loss(loss: torch.Tensor, num_heads: int, step: int):
    """Raise a `FloatingPointError` where a loss is not a number, before it gets into the weights."""
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"The loss at step {step}, with {num_heads} heads, is {loss.item()}: lower the learning rate, warm up for "
            "longer or clip the gradients, and check that the images hold numbers."
        )


def mix_images(
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    seed: list[int],
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with another of the batch, by mixup (https://arxiv.org/abs/1710.09412) or CutMix
    (https://arxiv.org/abs/1905.04899); each image draws its own partner, method and share.

    Args:
        pixel_values: (B, C, H, W).
        labels: (B,).
        num_labels: Classes that there are.
        seed: Of the draws.
        mixup_alpha, cutmix_alpha: Of the Beta distribution of the shares; 0: not this method. With both, one half of
            the images each.

    Returns:
        Images (B, C, H, W) and the probabilities of their labels (B, labels).

    Raises:
        ValueError: Both alphas are 0.
    """
    if not (mixup_alpha or cutmix_alpha):
        raise ValueError("`mixup_alpha` or `cutmix_alpha` must be above 0.")
    generator = np.random.default_rng(seed)
    (batch, _, height, width), device = pixel_values.shape, pixel_values.device
    is_cut = generator.random(batch) < (cutmix_alpha > 0) / ((cutmix_alpha > 0) + (mixup_alpha > 0))
    alpha = np.where(is_cut, cutmix_alpha, mixup_alpha)
    share = generator.beta(alpha, alpha)
    partner = torch.from_numpy(generator.permutation(batch)).to(device)
    # the part of each pixel that is the image's own: `share` everywhere, or all of it outside a box of the partner's
    inside = np.ones((batch, 1, 1), dtype=bool)
    for side, shape in ((height, (1, -1, 1)), (width, (1, 1, -1))):
        centre, half = generator.random((batch, 1, 1)) * side, np.sqrt(1 - share)[:, None, None] * side / 2
        pixels = np.arange(side).reshape(shape) + 0.5
        inside = inside & (abs(pixels - centre) < half)
    own = np.where(is_cut[:, None, None], ~inside, share[:, None, None])
    own = torch.from_numpy(own.astype(np.float32)).to(device)[:, None]
    pixel_values = torch.lerp(pixel_values[partner], pixel_values, own.to(pixel_values.dtype))
    targets = nn.functional.one_hot(labels, num_labels).float()
    return pixel_values, torch.lerp(targets[partner], targets, own.mean((1, 2, 3))[:, None])


class AveragedWeights:
    """An exponential moving average of a model's weights, which can take their place in the model.

    Args:
        model: The model; it is averaged from its present weights on.
        decay: What remains of the average at each update, from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.weights = dict(model.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._average_fn = get_ema_multi_avg_fn(decay)

    def update(self):
        """Take in the present weights, after an optimizer step."""
        self._average_fn(list(self.average.values()), [weight.detach() for weight in self.weights.values()], None)

    @contextmanager
    def in_place(self):
        """Within this context the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """Exchange the model's weights and their average, in place, as sharded weights must keep their memory."""
        for name, weight in self.weights.items():
            weights = weight.clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(weights)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, average: dict[str, torch.Tensor]):
        for name, tensor in self.average.items():
            tensor.copy_(average[name])


def open_run(output_dir: Path, settings: dict, resume: bool, overwrite: bool):
    """Make `output_dir` the folder of this run, before any work is done.

    Args:
        output_dir: The folder.
        settings: What makes this run the one that it is, as JSON; a resumed run must have the same.
        resume: Whether to go on with the run that the folder holds.
        overwrite: Whether to start anew in a folder that is not empty; the checkpoints in it are deleted.

    Raises:
        ValueError: The folder holds something else, or another run than that to resume.
    """
    file = output_dir / RUN_FILE
    settings = json.loads(json.dumps(settings))
    if resume:
        if not file.exists():
            raise ValueError(f"There is no run to resume in '{output_dir}'.")
        previous = json.loads(file.read_text())
        changed = [key for key in settings | previous if settings.get(key) != previous.get(key)]
        if changed:
            changes = ", ".join(f"{key} was {previous.get(key)!r} and is {settings.get(key)!r}" for key in changed)
            raise ValueError(f"'{output_dir}' holds another run than the one to resume: {changes}.")
        return
    if output_dir.is_file():
        raise ValueError(f"'{output_dir}' is a file, not a folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise ValueError(
            f"'{output_dir}' is not empty: choose another --output_dir, or go on with --resume_from_checkpoint, or "
            "start anew with --overwrite_output_dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    for checkpoint in list_checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def save_checkpoint(accelerator, output_dir: Path, step: int, keep: int | None = None):
    """Save the state of a run as `checkpoint-{step}`; the folder gets its name once it is complete.

    Args:
        accelerator: The `accelerate.Accelerator` that prepared what is to be saved.
        output_dir: The folder of the run.
        step: Optimizer steps taken.
        keep: Checkpoints to keep; the oldest ones go. None: all.
    """
    unfinished = output_dir / "_checkpoint"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finished = output_dir / f"checkpoint-{step}"
        shutil.rmtree(finished, ignore_errors=True)  # of a run that resumed from an earlier one
        os.replace(unfinished, finished)
        for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
            shutil.rmtree(old)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    folders = (folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name))
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer steps taken at a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
