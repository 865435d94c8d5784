# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""HydraViT configuration: one dial, the number of attention heads; every width is derived from it.

This file, `modeling_hydravit.py` and `pipeline_hydravit.py` travel with each saved checkpoint as remote code, so they
import the standard library, what transformers needs, and each other only.
"""

import math
from bisect import bisect_left
from itertools import pairwise

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, logging

logger = logging.get_logger(__name__)
_IS_REMOTE_CODE = __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


class HydraViTConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a HydraViT (https://arxiv.org/abs/2409.17978), a Vision Transformer whose leading heads, with
    the matching leading channels of every layer, are working subnetworks. The defaults are the paper's: the shapes of
    DeiT-B/16 at 12 heads, DeiT-S/16 at 6 and DeiT-Ti/16 at 3.

    Args:
        num_attention_heads: Heads that the model holds.
        head_dim: Channels of one head.
        num_hidden_layers: Transformer layers.
        mlp_ratio: Channels of the MLP over those of the residual stream.
        image_size: Side of the input in pixels, or (height, width); a multiple of `patch_size`.
        patch_size: Side of a patch in pixels, or (height, width).
        num_channels: Channels of the input.
        qkv_bias: Whether the query, key and value projections have a bias.
        hidden_act: Activation of the MLP, a name that transformers knows.
        layer_norm_eps: Epsilon of the layer norms.
        hidden_dropout_prob: Dropout after the embeddings, the attention and the MLP.
        attention_probs_dropout_prob: Dropout of the attention probabilities.
        drop_path_rate: Stochastic depth of the last layer; it grows linearly from 0 at the first.
        initializer_range: Standard deviation of the initial weights.
        num_heads_active: Heads that the model runs by default; None: all of them, or, in `train()` mode, a draw.
        subnetwork_heads: Head counts that the model is trained to run at, in increasing order; None: 3 up to all, or
            1 up to all where it holds fewer than 3.
        subnetwork_weights: Odds of drawing each of `subnetwork_heads` in training (paper, "weighted sampling"); they
            need not add up to 1. None: uniform.
        separate_classifiers: Whether each of `subnetwork_heads` has a classifier of its own (paper, "separate
            classifiers") rather than the leading columns of one.
        out_features, out_indices: Of `HydraViTBackbone`: the feature maps to give, by name ("stem", "stage1", ...) or
            number; None: the last one.
        apply_layernorm: Of `HydraViTBackbone`: whether the final layer norm is applied to the feature maps.
        reshape_hidden_states: Of `HydraViTBackbone`: whether feature maps are images, (B, D, rows, columns), or all
            tokens, (B, N, D).

    Raises:
        ValueError: An argument is out of its range, or `hidden_size` or `intermediate_size` is given and disagrees
            with the value derived from the others.
    """

    model_type = "hydravit"

    num_attention_heads: int = 12
    head_dim: int = 64
    num_hidden_layers: int = 12
    mlp_ratio: int = 4
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    num_heads_active: int | None = None
    subnetwork_heads: list[int] | None = None
    subnetwork_weights: list[float] | None = None
    separate_classifiers: bool = False
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(
        self, hidden_size=None, intermediate_size=None, out_features=None, out_indices=None, stage_names=None, **kwargs
    ):
        self._check_sizes()
        if not _IS_REMOTE_CODE:  # where the package is installed, its pipeline is registered and comes first
            kwargs.pop("custom_pipelines", None)
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(out_features, out_indices)
        for name, given in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if given is not None and given != getattr(self, name):
                raise ValueError(
                    f"`{name}={given}` disagrees with the {getattr(self, name)} that follows from "
                    f"num_attention_heads={self.num_attention_heads}, head_dim={self.head_dim} and mlp_ratio="
                    f"{self.mlp_ratio}: leave it out."
                )
        if self.subnetwork_heads is None:
            narrowest = 3 if self.num_attention_heads >= 3 else 1
            self.subnetwork_heads = list(range(narrowest, self.num_attention_heads + 1))
        super().__post_init__(**kwargs)
        self._check_subnetworks()

    @property
    def hidden_size(self) -> int:
        """Channels of the residual stream at full width."""
        return self.num_attention_heads * self.head_dim

    @property
    def intermediate_size(self) -> int:
        """Channels of the MLP at full width."""
        return self.mlp_ratio * self.hidden_size

    @property
    def subnetwork_odds(self) -> list[float]:
        """The probability of each of `subnetwork_heads` in training."""
        weights = self.subnetwork_weights or [1.0] * len(self.subnetwork_heads)
        return [weight / sum(weights) for weight in weights]

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of `image_size`."""
        return grid_of(self.image_size, self.patch_size)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; a `num_attention_heads` among the overrides resizes the subnetworks with it."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is a checkpoint of type '{model_type}', not '{cls.model_type}'. To start from a ViT or DeiT, "
                "use HydraViTForImageClassification.from_vit."
            )
        num_attention_heads = kwargs.pop("num_attention_heads", None)
        # Known before the rest is derived from them, or checked against it
        first = ("hidden_size", "intermediate_size", "num_hidden_layers")
        first = {name: kwargs.pop(name) for name in first if name in kwargs}
        if num_attention_heads is not None:
            config_dict = cls(**config_dict).resized(num_attention_heads).to_dict()
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict({**config_dict, **first}, return_unused_kwargs=True, **kwargs)
        config.validate()
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self):
        """As in transformers, without what follows from other values: the names of the layers, and the last one as
        the output of a backbone."""
        values = super().to_dict()
        stage_names = values.pop("stage_names", None)
        if stage_names and values["out_features"] == stage_names[-1:]:
            del values["out_features"], values["out_indices"]
        return values

    def resized(self, num_attention_heads: int) -> "HydraViTConfig":
        """This configuration with another number of heads held.

        Fewer heads keep the subnetworks that still fit, and the widest counts as one of them (with a warning, where
        it was not trained); more heads add a subnetwork for each new width. The order is kept, so that classifiers
        stay where they are. The model runs all its heads by default.
        """
        _check_integer("num_attention_heads", num_attention_heads)
        held, heads = self.num_attention_heads, self.subnetwork_heads
        weights = self.subnetwork_weights or [1.0] * len(heads)
        if num_attention_heads < held:
            self.warn_if_untrained(num_attention_heads)
            kept = bisect_left(heads, num_attention_heads)
            heads, weights = [*heads[:kept], num_attention_heads], [*weights, weights[-1]][: kept + 1]
        elif num_attention_heads > held:
            added = range(held + 1, num_attention_heads + 1)
            heads, weights = [*heads, *added], [*weights, *[weights[-1]] * len(added)]
        values = self.to_dict() | {
            "num_attention_heads": num_attention_heads,
            "subnetwork_heads": heads,
            "subnetwork_weights": weights if self.subnetwork_weights and any(weights) else None,
            "num_heads_active": None,
        }
        config = type(self)(**values)
        config._attn_implementation = self._attn_implementation
        config.name_or_path = self.name_or_path
        return config

    def check_num_heads(self, num_heads: int) -> int:
        """Return `num_heads` if the model can run it; raise a `ValueError` that names the range if not."""
        if not _is_count(num_heads, self.num_attention_heads):
            raise ValueError(
                f"`num_heads_active` must be an integer from 1 to {self.num_attention_heads}, the heads that this "
                f"model holds, not {num_heads!r}."
            )
        return num_heads

    def warn_if_untrained(self, num_heads: int):
        """Warn, once, that `num_heads` is a width that the model was not trained to run."""
        if num_heads not in self.subnetwork_heads:
            logger.warning_once(
                f"This model was not trained to run {num_heads} heads, and untrained widths are close to chance. Its "
                f"trained widths are {self.subnetwork_heads} heads."
            )

    def validate(self):
        """Check every argument; also called by `save_pretrained`, as attributes can be set at any time."""
        super().validate()
        self._check_sizes()
        self._check_subnetworks()

    def _check_sizes(self):
        for name in ("num_attention_heads", "head_dim", "num_hidden_layers", "mlp_ratio", "num_channels"):
            _check_integer(name, getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"`{name}` must be from 0 to below 1, not {value!r}.")
        for name in ("image_size", "patch_size"):
            pair = as_pair(getattr(self, name))
            if len(pair) != 2:
                raise ValueError(f"`{name}` must be a number or a (height, width) pair, not {getattr(self, name)!r}.")
            for side in pair:
                _check_integer(name, side)
        if any(side % patch for side, patch in zip(as_pair(self.image_size), as_pair(self.patch_size), strict=True)):
            raise ValueError(f"`image_size={self.image_size}` must be a multiple of `patch_size={self.patch_size}`.")

    def _check_subnetworks(self):
        heads, weights = self.subnetwork_heads, self.subnetwork_weights
        if not isinstance(heads, (list, tuple)) or not heads:
            raise ValueError(f"`subnetwork_heads` must be a list of head counts, not {heads!r}.")
        for num_heads in heads:
            _check_integer("subnetwork_heads", num_heads, self.num_attention_heads)
        if any(wider <= narrower for narrower, wider in pairwise(heads)):
            raise ValueError(f"`subnetwork_heads` must be in increasing order, not {heads!r}.")
        if weights is not None and (
            not isinstance(weights, (list, tuple))
            or len(weights) != len(heads)
            or not all(_is_number(weight) and 0 <= weight < math.inf for weight in weights)
            or sum(weights) == 0
        ):
            raise ValueError(
                f"`subnetwork_weights` must hold one non-negative number for each of the {len(heads)} "
                f"`subnetwork_heads`, and not only zeros: not {weights!r}."
            )
        if self.separate_classifiers and heads[-1] != self.num_attention_heads:
            raise ValueError(
                f"With `separate_classifiers`, `subnetwork_heads` must end with all {self.num_attention_heads} heads, "
                f"or the widest subnetwork has no classifier: not {heads!r}."
            )
        if self.num_heads_active is not None:
            self.check_num_heads(self.num_heads_active)


def as_pair(size) -> tuple[int, int]:
    """(height, width) of a size given as one number or as a pair."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def grid_of(image_size, patch_size) -> tuple[int, int]:
    """Rows and columns of the patches of an image, both sizes given as one number or as a pair."""
    (height, width), (patch_height, patch_width) = as_pair(image_size), as_pair(patch_size)
    return height // patch_height, width // patch_width


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool


def _is_count(value, largest=None) -> bool:
    is_integer = isinstance(value, int) and type(value) is not bool
    return is_integer and value >= 1 and (largest is None or value <= largest)


def _check_integer(name, value, largest=None):
    if not _is_count(value, largest):
        allowed = "a positive integer" if largest is None else f"from 1 to {largest}"
        raise ValueError(f"`{name}` must be {allowed}, not {value!r}.")


HydraViTConfig.register_for_auto_class()

__all__ = ["HydraViTConfig"]
