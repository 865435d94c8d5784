"""A frozen model that teaches every width, such as the ViT that an elastic model was made from.

Letters in shapes: B images, C channels, H height, W width, N tokens, D channels of the teacher.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedConfig

from ..evaluation import SINGLE_LABEL, problem_type_of
from ..model.configuration_hydravit import HydraViTConfig, as_pair
from ..model.modeling_hydravit import HydraViTForImageClassification
from ..model.sources_hydravit import places_of_labels, read_source, read_timm_config


class Teacher:
    """A frozen classifier that teaches every width of a model. All widths of a step share its pass.

    Args:
        teacher: A classifier with the labels of the student in any order, or its path or Hub id, such as the ViT that
            the student was made from.
        config: Configuration of the student.
        weight: Weight of the teacher's predictions, from 0 to 1. The other loss has the rest.
        hidden_state_weight: Weight of the distance between the student's hidden states and the leading channels of the
            teacher's, as a share of their variance. Their channels must mean the same, so the teacher must be a
            HydraViT, such as a copy of the student before it learns.

    Raises:
        ValueError: The teacher has other labels, takes other images, or has no hidden states to compare.
    """

    def __init__(self, teacher, config: HydraViTConfig, weight: float = 0.7, hidden_state_weight: float = 0.0):
        if not isinstance(teacher, nn.Module):
            teacher = _load(teacher)
        self.model = teacher.eval().requires_grad_(False)
        self.weight, self.hidden_state_weight = weight, hidden_state_weight
        self._check(teacher.config, config)
        self._places = places_of_labels(config.id2label, teacher.config.id2label)

    @classmethod
    def of_arguments(cls, args, config: HydraViTConfig, teacher=None) -> "Teacher | None":
        """Make `teacher`, or else the one that `SubnetworkTrainingArguments` name. None if they name none."""
        teacher = args.teacher if teacher is None else teacher
        if teacher is not None:
            return cls(teacher, config, args.teacher_weight, args.hidden_state_weight)
        if args.hidden_state_weight:
            raise ValueError("`hidden_state_weight` needs a `teacher`.")
        return None

    def _check(self, teacher: PreTrainedConfig, student: HydraViTConfig):
        if problem_type_of(student) != SINGLE_LABEL:
            raise ValueError(f"A teacher teaches single-label classifiers, not {problem_type_of(student)}.")
        own, others = ([config.id2label[index] for index in sorted(config.id2label)] for config in (student, teacher))
        if len(own) != len(others) or (sorted(own) != sorted(others) and not {"LABEL_0"} & {own[0], others[0]}):
            raise ValueError(
                f"The teacher must have the labels of the student: {len(own)}, from {own[0]} to {own[-1]}, and not "
                f"{len(others)}, from {others[0]} to {others[-1]}."
            )
        for name in ("image_size", "num_channels"):
            expected, given = getattr(student, name), getattr(teacher, name, None)
            if given is not None and as_pair(given) != as_pair(expected):
                raise ValueError(f"The teacher must take the student's images, of {name} {expected}, not {given}.")
        if self.hidden_state_weight and getattr(teacher, "head_dim", None) != student.head_dim:
            raise ValueError(
                "`hidden_state_weight` needs a teacher whose leading channels mean what the student's do: a HydraViT "
                f"with head_dim={student.head_dim}, such as a copy of the student."
            )

    def __call__(self, pixel_values: torch.Tensor) -> "Lesson":
        """Run the teacher on images, (B, C, H, W)."""
        if self.model.device != pixel_values.device:
            self.model.to(pixel_values.device)
        with torch.no_grad():
            outputs = self.model(pixel_values, output_hidden_states=bool(self.hidden_state_weight))
        logits = outputs.logits if self._places is None else outputs.logits[:, self._places]
        return Lesson(logits, outputs.hidden_states, self.weight, self.hidden_state_weight)


def _load(path: str) -> nn.Module:
    if read_timm_config(path) is None:
        return AutoModelForImageClassification.from_pretrained(path)
    source = read_source(path)  # so that timm need not be installed
    return HydraViTForImageClassification.from_vit(source, source.arguments["num_attention_heads"])


@dataclass
class Lesson:
    """What a teacher says to the images of one step: logits, (B, labels), and hidden states, (B, N, D) a layer."""

    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    weight: float = 0.7
    hidden_state_weight: float = 0.0

    def add_to(self, loss: torch.Tensor, logits: torch.Tensor, hidden_states: tuple | None) -> torch.Tensor:
        """Mix the loss of a width with that of following the teacher."""
        targets = self.logits.float().softmax(-1).expand_as(logits)  # the same for all stages of token recycling
        following = nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten(0, -2))
        loss = torch.lerp(loss, following, self.weight)
        if self.hidden_state_weight:
            distance = sum(map(_relative_distance, hidden_states, self.hidden_states)) / len(hidden_states)
            loss = loss + self.hidden_state_weight * distance
        return loss


def _relative_distance(own: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
    """The mean squared distance to the leading channels of the teacher's states, as a share of their variance."""
    leading = teachers[..., : own.shape[-1]].float()
    return nn.functional.mse_loss(own.float(), leading) / leading.var()
