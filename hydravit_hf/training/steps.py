"""One training step: the widths that it trains, their losses, and the arguments that say how.

All loops share what stands here: `HydraViTTrainer`, the Accelerate example and the studies.

Letters in shapes: B images, S stages of token recycling, C channels, H height, W width.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..evaluation import SINGLE_LABEL, problem_type_of
from ..model.configuration_hydravit import HydraViTConfig
from .gradients import share_leading_gradients
from .teacher import Lesson, Teacher

# The loss of logits and targets, and the targets that the logits of a teacher are
LOSSES = {
    SINGLE_LABEL: (nn.functional.cross_entropy, lambda logits: logits.softmax(-1)),
    "multi_label_classification": (nn.functional.binary_cross_entropy_with_logits, torch.sigmoid),
    "regression": (nn.functional.mse_loss, lambda logits: logits),
}
SAMPLING = ("weighted", "uniform", "sandwich", "open_sandwich")


@dataclass
class SubnetworkTrainingArguments:
    """How to train the subnetworks. `HydraViTTrainingArguments` and the Accelerate example add them to their own."""

    subnetwork_sampling: str = field(
        default="weighted",
        metadata={
            "help": "Widths that a step trains. weighted: one, drawn by the odds in the model's configuration. "
            "uniform: one, drawn with equal odds. sandwich: the widest, the narrowest and others in between. "
            "open_sandwich: the narrowest and others.",
            "choices": SAMPLING,
        },
    )
    sandwich_draws: int = field(default=1, metadata={"help": "Number of widths that a sandwich draws beside its ends."})
    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of distillation (0 to 1): how much narrower widths learn from the widest rather than from "
            "labels."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Frozen classifier with the same labels that teaches every width: its folder or Hub id."},
    )
    teacher_weight: float = field(
        default=0.7,
        metadata={"help": "Weight of the teacher's predictions (0 to 1). The other loss has the rest."},
    )
    hidden_state_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the distance to the leading channels of the teacher's hidden states."},
    )
    curriculum_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps over which the widths enter, the widest first; 0: all from the start."},
    )
    final_subnetwork_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Odds of the widths at the end of the training. The odds move there linearly from those in the "
            "model's configuration. Default: they stay."
        },
    )
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Parameter of mixup's Beta distribution; 0 turns mixup off."}
    )
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Parameter of CutMix's Beta distribution; 0 turns CutMix off."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of the averaged weights, which are evaluated and saved; 0 turns averaging off."},
    )
    freeze_unused_weights: bool = field(
        default=False,
        metadata={
            "help": "Keep weight decay and momentum from moving weights outside of the widths of a step (AdamW)."
        },
    )

    def __post_init__(self):
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"`distillation_weight` must be from 0 to 1, not {self.distillation_weight!r}.")
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"`teacher_weight` must be from 0 to 1, not {self.teacher_weight!r}.")
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
        if self.final_subnetwork_weights is not None and self.subnetwork_sampling == "uniform":
            raise ValueError("`final_subnetwork_weights` needs another subnetwork_sampling than 'uniform'.")
        for name in ("mixup_alpha", "cutmix_alpha", "sandwich_draws", "hidden_state_weight", "curriculum_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, not {getattr(self, name)!r}.")

    def sample(self, config: HydraViTConfig, seed: int, step: int, max_steps: int) -> list[int]:
        """The head counts that a step of `max_steps` trains, the widest first; see `sample_subnetworks`."""
        odds = schedule_odds(config, step, max_steps, self.curriculum_steps, self.final_subnetwork_weights)
        return sample_subnetworks(config, seed, step, self.subnetwork_sampling, self.sandwich_draws, odds)


def schedule_odds(
    config: HydraViTConfig,
    step: int,
    max_steps: int,
    curriculum_steps: int = 0,
    final_weights: list[float] | None = None,
) -> dict[int, float]:
    """Compute the odds of the head counts that a step draws from.

    Args:
        config: Configuration of the model. It has the `subnetwork_heads`, and the odds at the first step.
        step: Number of optimizer steps taken.
        max_steps: Optimizer steps of the whole training.
        curriculum_steps: Steps over which the widths enter, one after the other, the widest first. Narrow widths learn
            later so (progressive shrinking, https://arxiv.org/abs/1908.09791).
        final_weights: Odds at the last step. The odds move there linearly. None keeps the first ones.

    Raises:
        ValueError: There is not one positive sum of `final_weights`, with one for each of `subnetwork_heads`.

    Examples:
        >>> from hydravit_hf import HydraViTConfig
        >>> from hydravit_hf.training.steps import schedule_odds
        >>> config = HydraViTConfig(num_attention_heads=6)
        >>> [list(schedule_odds(config, step, max_steps=9, curriculum_steps=4)) for step in (0, 1, 4)]
        [[6], [5, 6], [3, 4, 5, 6]]
    """
    heads, odds = config.subnetwork_heads, np.array(config.subnetwork_odds)
    if final_weights is not None:
        last = np.array(final_weights, dtype=float)
        if last.shape != odds.shape or (last < 0).any() or not 0 < last.sum() < np.inf:
            raise ValueError(
                f"`final_subnetwork_weights` must be {len(heads)} odds, one for each of {heads}, not {final_weights}."
            )
        progress = min(1.0, step / max(1, max_steps - 1))
        odds = (1 - progress) * odds + progress * last / last.sum()
    entered = len(heads)
    if step < curriculum_steps:
        entered = min(entered, 1 + step * entered // curriculum_steps)
    odds = odds[-entered:] if odds[-entered:].any() else np.ones(entered)
    return dict(zip(heads[-entered:], odds.tolist(), strict=True))


def sample_subnetworks(
    config: HydraViTConfig,
    seed: int,
    step: int,
    sampling: str = "weighted",
    sandwich_draws: int = 1,
    odds: dict[int, float] | None = None,
) -> list[int]:
    """Draw the head counts that a step trains, the widest first.

    It is a pure function of its arguments, so all processes draw the same widths and a resumed run replays the draws.
    If `config.num_heads_active` pins a width, a step trains that width alone. With token recycling, a step trains the
    widest, because its pass runs all stages.

    Args:
        config: Configuration of the model. It has the `subnetwork_heads` to draw from and the odds,
            `subnetwork_weights`.
        seed: Seed of the run.
        step: Number of optimizer steps taken.
        sampling: Widths to draw. "weighted": one, by the odds of the configuration (paper, "weighted sampling").
            "uniform": one, with equal odds. "sandwich": the widest, the narrowest, and others by the odds
            (https://arxiv.org/abs/1903.05134). "open_sandwich": the narrowest, and others by the odds.
        sandwich_draws: Number of widths that a sandwich draws beside its ends, if there are as many.
        odds: Head counts to draw from and their odds, in place of those of the configuration; see `schedule_odds`.

    Raises:
        ValueError: The `sampling` is unknown, or token recycling meets another one than "weighted".

    Examples:
        >>> from hydravit_hf import HydraViTConfig, sample_subnetworks
        >>> sample_subnetworks(HydraViTConfig(), seed=0, step=0, sampling="sandwich")
        [12, 7, 3]
    """
    if sampling not in SAMPLING:
        raise ValueError(f"`sampling` must be one of {', '.join(SAMPLING)}, not {sampling!r}.")
    if config.token_recycling and sampling != "weighted":
        raise ValueError(f"Token recycling trains all its stages at each step: leave out the sampling '{sampling}'.")
    if config.num_heads_active is not None:
        return [config.num_heads_active]
    if config.token_recycling:
        return [config.num_attention_heads]
    if odds is None:
        odds = dict(zip(config.subnetwork_heads, config.subnetwork_odds, strict=True))
    heads, shares = [*odds], np.array([*odds.values()])
    generator = np.random.default_rng([seed, step])
    if sampling == "uniform":
        return [int(generator.choice(heads))]
    if sampling == "weighted":
        return [int(generator.choice(heads, p=shares / shares.sum()))]
    ends = {heads[0]} if sampling == "open_sandwich" else {heads[0], heads[-1]}
    others = {num_heads: share for num_heads, share in odds.items() if num_heads not in ends}
    # A race of exponential clocks draws without replacement, and takes odds of zero last
    times = generator.exponential(size=len(others)) / np.maximum([*others.values()], 1e-12)
    drawn = [[*others][index] for index in np.argsort(times)[:sandwich_draws]]
    return sorted({*ends, *drawn}, reverse=True)


def classification_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
    distillation_weight: float = 1.0,
    label_smoothing: float = 0.0,
    problem_type: str = SINGLE_LABEL,
) -> torch.Tensor:
    """Compute the mean loss with the labels and, by weight, with the predictions of a wider subnetwork.

    It is the cross-entropy, that of each label ("multi_label_classification"), or the squared error ("regression").

    Args:
        logits: Logits, (B, labels), or those of all stages of token recycling, (S, B, labels), which count alike.
        targets: Labels, (B,), or their probabilities, (B, labels). Those of several labels are (B, labels). The values
            of a regression are (B, labels), or (B,) for one of them.
        teacher_logits: Logits of the step's widest subnetwork, (B, labels) (in-place distillation,
            https://arxiv.org/abs/1903.05134). None learns from the targets alone.
        distillation_weight: Weight of the teacher, from 0 to 1.
        label_smoothing: Smoothing of the labels, from 0 to 1.
    """
    if logits.ndim == 3:
        logits, targets = logits.flatten(0, 1), torch.cat([targets] * len(logits))
    logits = logits.float()
    compare, predict = LOSSES[problem_type]
    if problem_type == SINGLE_LABEL:
        loss = compare(logits, targets, label_smoothing=label_smoothing)
    else:
        targets = targets.reshape(logits.shape).float()
        loss = compare(logits, targets + label_smoothing * (0.5 - targets))
    if teacher_logits is None:
        return loss
    return torch.lerp(loss, compare(logits, predict(teacher_logits.detach().float())), distillation_weight)


def check_targets(targets: torch.Tensor, config: HydraViTConfig):
    """Raise a `ValueError` if the labels of a batch, (B, ...), don't fit `problem_type_of` a configuration."""
    problem_type, shape, num_labels = problem_type_of(config), tuple(targets.shape[1:]), config.num_labels
    if problem_type == SINGLE_LABEL:
        is_index = shape == () and not targets.is_floating_point()
        fits = is_index or (shape == (num_labels,) and config.problem_type is not None)  # probabilities
    else:
        fits = shape == (num_labels,) or (problem_type == "regression" and num_labels == 1 and shape == ())
    if not fits:
        kind = "numbers" if targets.is_floating_point() else "integers"
        raise ValueError(
            f"Each image has {shape[0] if shape else 'one'} of {kind} as its label, which does not fit "
            f"problem_type={problem_type!r} and {num_labels} labels: set `config.problem_type`, or give one integer "
            "(single_label_classification), a 0 or 1 for each label (multi_label_classification) or a number for each "
            "(regression)."
        )


def check_loss(loss: torch.Tensor, num_heads: int, step: int):
    """Raise a `FloatingPointError` if a loss is not a number, before it gets into the weights."""
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"The loss at step {step}, with {num_heads} heads, is {loss.item()}: lower the learning rate, warm up for "
            "longer or clip the gradients, and check that the images hold numbers."
        )


class StepLoss:
    """Computes the losses of the widths of one step. The widest comes first and teaches the others.

    Args:
        num_widths: Number of widths in the step. Each loss is divided by it, so that their sum is their mean.
        distillation_weight, label_smoothing, problem_type: As in `classification_loss`.
        lesson: What a frozen teacher says to the images of the step. It teaches all widths.
    """

    def __init__(
        self,
        num_widths: int,
        distillation_weight: float = 0.0,
        label_smoothing: float = 0.0,
        lesson: Lesson | None = None,
        problem_type: str = SINGLE_LABEL,
    ):
        self.num_widths, self.distillation_weight = num_widths, distillation_weight
        self.label_smoothing, self.lesson, self.problem_type = label_smoothing, lesson, problem_type
        self.widest_logits: torch.Tensor | None = None

    def __call__(self, outputs, targets: torch.Tensor) -> torch.Tensor:
        logits = outputs.get("stage_logits", outputs.logits)
        options = (self.distillation_weight, self.label_smoothing, self.problem_type)
        loss = classification_loss(logits, targets, self.widest_logits, *options)
        if self.distillation_weight and self.widest_logits is None:
            self.widest_logits = outputs.logits.detach()
        if self.lesson is not None:
            loss = self.lesson.add_to(loss, logits, outputs.get("hidden_states"))
        return loss / self.num_widths


def backward_widths(
    model: nn.Module,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    heads: list[int],
    step: int,
    distillation_weight: float = 0.0,
    label_smoothing: float = 0.0,
    accelerator=None,
    teacher: Teacher | None = None,
) -> torch.Tensor:
    """Add the gradients of a batch at each width of a step.

    The widths go backward one after the other, so that a step needs the memory of its widest pass alone.

    Args:
        model: The classifier, or what `accelerator.prepare` made of it.
        pixel_values: Images, (B, C, H, W).
        targets: Labels, (B,), or their probabilities, (B, labels).
        heads: Head counts to train, the widest first.
        step: Number of optimizer steps taken, for the error message.
        distillation_weight, label_smoothing: As in `classification_loss`.
        accelerator: An `accelerate.Accelerator`. It scales the gradients, and shares them among processes at the last
            width only.
        teacher: Teaches every width.

    Returns:
        The mean loss of the widths, a scalar without gradient.

    Raises:
        FloatingPointError: A loss is not a number.
    """
    share_leading_gradients(model, heads[0])
    lesson = None if teacher is None else teacher(pixel_values)
    step_loss = StepLoss(len(heads), distillation_weight, label_smoothing, lesson)
    options = {"output_hidden_states": True} if teacher is not None and teacher.hidden_state_weight else {}
    total = 0.0
    for num_heads in heads:
        is_last = num_heads == heads[-1]
        with nullcontext() if is_last or accelerator is None else accelerator.no_sync(model):
            loss = step_loss(model(pixel_values, num_heads_active=num_heads, **options), targets)
            check_loss(loss, num_heads, step)
            loss.backward() if accelerator is None else accelerator.backward(loss)
        total += loss.detach()
    return total
