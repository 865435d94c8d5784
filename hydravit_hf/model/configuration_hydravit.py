# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""The configuration: one dial, the number of attention heads. Every width, and what it costs, follows from it.

This file travels with each saved checkpoint as remote code.
"""

import math
from bisect import bisect_left
from itertools import accumulate, pairwise
from numbers import Integral, Real

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import CONFIG_NAME, TRANSFORMERS_DYNAMIC_MODULE_NAME, logging

logger = logging.get_logger(__name__)
CRITERIA = ("entropy", "margin", "probability")  # see `cascade_hydravit.uncertainty`
LARGEST_SIZE = 10**6  # no real model is larger; a larger number in a damaged file would fill the memory
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_IS_REMOTE_CODE = __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


class HydraViTConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a HydraViT (https://arxiv.org/abs/2409.17978).

    A HydraViT is a Vision Transformer whose leading heads, with the matching leading channels of every layer, form
    working subnetworks. The defaults are the paper's: the shape of DeiT-B/16 at 12 heads, of DeiT-S/16 at 6 heads and
    of DeiT-Ti/16 at 3 heads.

    Args:
        num_attention_heads: Number of heads that the model holds.
        head_dim: Channels of one head.
        num_hidden_layers: Number of transformer layers.
        mlp_ratio: Channels of the MLP, as a multiple of the width.
        image_size: Side of the input in pixels, or (height, width). It must be a multiple of `patch_size`.
        patch_size: Side of a patch in pixels, or (height, width).
        num_channels: Channels of the input.
        qkv_bias: Whether the query, key and value projections have a bias.
        hidden_act: Activation of the MLP, by its name in transformers.
        layer_norm_eps: Epsilon of the layer norms.
        hidden_dropout_prob: Dropout after the embeddings, the attention and the MLP.
        attention_probs_dropout_prob: Dropout of the attention probabilities.
        drop_path_rate: Stochastic depth of the last layer. The rate grows linearly from 0 at the first layer.
        initializer_range: Standard deviation of the initial weights.
        num_heads_active: Number of heads that the model runs by default. None runs all of them, or, in `train()` mode,
            draws from `subnetwork_heads`.
        subnetwork_heads: Head counts that the model is trained to run at, in increasing order. None means 3 up to all,
            or 1 up to all if the model holds fewer than 3.
        subnetwork_weights: Odds of drawing each of `subnetwork_heads` in training (paper, "weighted sampling"). They
            need not add up to 1. None means uniform odds.
        separate_classifiers: Whether each of `subnetwork_heads` has its own classifier (paper, "separate classifiers").
            Otherwise, each uses the leading columns of one classifier.
        token_recycling: Whether each of `subnetwork_heads` is a stage that starts from the tokens of the narrower stage
            as well (ThinkingViT, https://arxiv.org/abs/2507.10800). To run k heads then means to run all stages up to
            k. Every training step trains all stages, so name few, such as [3, 6].
        cascade: Settings of `HydraViTForImageClassification.cascade`, as `fit_cascade` finds them:
            `{"num_heads": [3, 6, 12], "thresholds": [0.5, 0.3], "criterion": "entropy", "temperatures": [1.0, 1.0,
            1.0]}`. The last two have these defaults. One threshold may stand for all. None means no cascade.
        out_features, out_indices: Feature maps that `HydraViTBackbone` returns, by name ("stem", "stage1", ...) or by
            number. None means the last one.
        apply_layernorm: Whether `HydraViTBackbone` applies the final layer norm to its feature maps.
        reshape_hidden_states: Whether `HydraViTBackbone` returns feature maps as images, (B, D, rows, columns), or as
            tokens, (B, N, D).
        pad_feature_maps: Whether `HydraViTBackbone` fills its feature maps with zeros up to the channels of all heads
            that it holds. A dense head is then built for that one number of channels, and works at every width.

    Raises:
        ValueError: An argument is out of its range, or `hidden_size` or `intermediate_size` disagrees with the value
            that follows from the other arguments.

    Examples:
        >>> from hydravit_hf import HydraViTConfig
        >>> config = HydraViTConfig(num_attention_heads=6)
        >>> config.hidden_size, config.subnetwork_heads
        (384, [3, 4, 5, 6])
        >>> config.count_macs(3), config.count_parameters(3)
        (1253491584, 5524802)
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
    token_recycling: bool = False
    cascade: dict | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    pad_feature_maps: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(
        self, hidden_size=None, intermediate_size=None, out_features=None, out_indices=None, stage_names=None, **kwargs
    ):
        self._check_sizes()
        if not _IS_REMOTE_CODE:  # the installed package has registered its pipeline, which comes first
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
            if self.token_recycling:
                raise ValueError("`token_recycling` needs its stages: give `subnetwork_heads`, such as [3, 6].")
            narrowest = 3 if self.num_attention_heads >= 3 else 1
            self.subnetwork_heads = list(range(narrowest, self.num_attention_heads + 1))
        if kwargs.get("num_labels", 0) != 0 or kwargs.get("num_labels") is False:
            _check_integer("num_labels", kwargs["num_labels"])
        super().__post_init__(**kwargs)
        self._check_subnetworks()
        for name in (name for name, kind in _ALLOWED.items() if kind is _SIZE):
            setattr(self, name, int(getattr(self, name)))  # numpy's integers can't be saved
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            setattr(self, name, int(size) if isinstance(size, Integral) else type(size)(map(int, size)))
        self.subnetwork_heads = [int(num_heads) for num_heads in self.subnetwork_heads]
        if self.cascade is not None:
            self.cascade = self._check_cascade()

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
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers. A missing configuration is an error; transformers would build a default model."""
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise OSError(f"'{pretrained_model_name_or_path}' has no {CONFIG_NAME}, or an empty one.")
        return config_dict, unused

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """As in transformers, with one error for any file that is not a JSON object."""
        try:
            values = super()._dict_from_json_file(json_file)
        except (ValueError, RecursionError) as error:
            raise OSError(f"'{json_file}' is not a valid JSON file: {error}") from error
        if not isinstance(values, dict):
            raise OSError(f"'{json_file}' must hold a JSON object, not {type(values).__name__}.")
        return values

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers. An override of `num_attention_heads` resizes the subnetworks too. Other labels drop the
        cascade, because it was fitted to the former ones."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is a checkpoint of type '{model_type}', not '{cls.model_type}'. To start from a ViT or DeiT, "
                "use HydraViTForImageClassification.from_vit."
            )
        num_attention_heads = kwargs.pop("num_attention_heads", None)
        # The other values are derived from these or checked against them, so these come first
        first = ("hidden_size", "intermediate_size", "num_hidden_layers")
        first = {name: kwargs.pop(name) for name in first if name in kwargs}
        if num_attention_heads is not None:
            config_dict = cls(**config_dict).resized(num_attention_heads).to_dict()
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        config_dict = {**config_dict, **first}
        labels = cls(**config_dict).id2label if config_dict.get("cascade") else None
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        if labels is not None and config.id2label != labels and "cascade" not in kwargs:
            config.cascade = None
        config.validate()
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self):
        """As in transformers, without values that follow from others: the layers' names and a backbone's last layer."""
        values = super().to_dict()
        stage_names = values.pop("stage_names", None)
        if stage_names and values["out_features"] == stage_names[-1:]:
            del values["out_features"], values["out_indices"]
        return values

    def resized(self, num_attention_heads: int) -> "HydraViTConfig":
        """Copy this configuration for another number of heads held.

        Fewer heads keep the subnetworks that still fit. The widest becomes one of them, with a warning if it was not
        trained. More heads add a subnetwork for each new width, or one stage with token recycling. The order is kept,
        so that separate classifiers stay in place. The copy runs all its heads by default. It has no cascade, because a
        cascade is fitted to the widths that it names, and no token recycling if one stage is left.
        """
        _check_integer("num_attention_heads", num_attention_heads)
        held, heads = self.num_attention_heads, self.subnetwork_heads
        weights = self.subnetwork_weights or [1.0] * len(heads)
        if num_attention_heads < held:
            self.warn_if_untrained(num_attention_heads)
            kept = bisect_left(heads, num_attention_heads)
            heads, weights = [*heads[:kept], num_attention_heads], [*weights, weights[-1]][: kept + 1]
        elif num_attention_heads > held:
            added = range(num_attention_heads if self.token_recycling else held + 1, num_attention_heads + 1)
            heads, weights = [*heads, *added], [*weights, *[weights[-1]] * len(added)]
        values = self.to_dict() | {
            "num_attention_heads": num_attention_heads,
            "subnetwork_heads": heads,
            "subnetwork_weights": weights if self.subnetwork_weights and any(weights) else None,
            "num_heads_active": None,
            "token_recycling": self.token_recycling and len(heads) > 1,
            "cascade": self.cascade if num_attention_heads == held else None,
        }
        config = type(self)(**values)
        config._attn_implementation = self._attn_implementation
        config.name_or_path = self.name_or_path
        return config

    def check_num_heads(self, num_heads: int) -> int:
        """Return `num_heads` if the model holds that many, else raise a `ValueError` that names the range."""
        if not _is_count(num_heads, self.num_attention_heads):
            raise ValueError(
                f"`num_heads_active` must be an integer from 1 to {self.num_attention_heads}, the heads that this "
                f"model holds, not {num_heads!r}."
            )
        return int(num_heads)

    def warn_if_untrained(self, num_heads: int):
        """Warn, once, that `num_heads` is a width that the model was not trained to run."""
        if num_heads not in self.subnetwork_heads:
            logger.warning_once(
                f"This model was not trained to run {num_heads} heads, and untrained widths are close to chance. Its "
                f"trained widths are {self.subnetwork_heads} heads."
            )

    def stages(self, num_heads: int) -> list[int]:
        """The head counts of the passes that `num_heads` heads take: one pass, or with token recycling one a stage."""
        if not self.token_recycling:
            return [num_heads]
        return [stage for stage in self.subnetwork_heads if stage < num_heads] + [num_heads]

    def count_macs(self, num_heads: int, image_size: int | tuple[int, int] | None = None) -> int:
        """Count the multiply-accumulate operations of one image at `num_heads` heads.

        It counts the matrix products, as the paper does (4.60 G at 6 heads of the default model).

        Args:
            num_heads: Number of heads that run.
            image_size: Side of the image in pixels, or (height, width). None means `self.image_size`.
        """
        stages = self.stages(self.check_num_heads(num_heads))
        patches = math.prod(grid_of(image_size or self.image_size, self.patch_size))
        tokens, macs = 1 + patches, 0
        for width in (stage * self.head_dim for stage in stages):
            embeddings = patches * width * self.num_channels * math.prod(as_pair(self.patch_size))
            projections = tokens * (4 + 2 * self.mlp_ratio) * width * width
            attention = 2 * tokens * tokens * width
            macs += embeddings + self.num_hidden_layers * (projections + attention) + width * self.num_labels
        recycling = sum(tokens * narrower * wider for narrower, wider in pairwise(stages))
        return macs + recycling * self.head_dim**2

    def count_parameters(self, num_heads: int) -> int:
        """Count the parameters of the classifier that `extract_subnetwork(num_heads)` gives, without the separate
        classifiers of narrower widths."""
        width = self.check_num_heads(num_heads) * self.head_dim
        tokens = 1 + math.prod(self.patch_grid)
        projection = (self.num_channels * math.prod(as_pair(self.patch_size)) + 1) * width
        embeddings = projection + (1 + tokens) * width
        matrices = (4 + 2 * self.mlp_ratio) * width * width
        biases = (3 * self.qkv_bias + 1 + self.mlp_ratio + 1) * width
        layer_norms = 4 * width
        recycling = (width + 1) * width if len(self.stages(num_heads)) > 1 else 0
        classifier = self.num_labels * (width + 1)
        layers = self.num_hidden_layers * (matrices + biases + layer_norms)
        return embeddings + layers + 2 * width + recycling + classifier

    def count_cascade_macs(self, heads: list[int], image_size: int | tuple[int, int] | None = None) -> list[int]:
        """Count the multiply-accumulate operations of an image that exits a cascade of `heads` at each of them."""
        macs = [self.count_macs(num_heads, image_size) for num_heads in heads]
        return macs if self.token_recycling else list(accumulate(macs))

    def resolve_cascade(
        self,
        num_heads: list[int] | None = None,
        thresholds: float | list[float] | None = None,
        criterion: str | None = None,
        temperatures: list[float] | None = None,
    ) -> dict:
        """Complete the settings of a cascade: one threshold for each step, one temperature for each width.

        Args:
            num_heads: Head counts in increasing order. None takes the settings that are None from `self.cascade`.
            thresholds: Uncertainty from which an image goes on to the next width: one number for all steps, or a list.
            criterion: One of `CRITERIA`. None means "entropy".
            temperatures: Temperature of each width's softmax. None means 1.

        Raises:
            ValueError: A setting is out of its range or missing.
        """
        given = {"num_heads": num_heads, "thresholds": thresholds, "criterion": criterion, "temperatures": temperatures}
        settings = {name: value for name, value in given.items() if value is not None}
        if num_heads is None:
            if self.cascade is None:
                raise ValueError("The configuration has no `cascade`: give the cascade's `num_heads` and `thresholds`.")
            if settings and thresholds is None:
                raise ValueError("Another `criterion` or other `temperatures` need `thresholds` of their own.")
            settings = self.cascade | settings
        heads = settings["num_heads"]
        if (
            not isinstance(heads, (list, tuple))
            or not heads
            or not all(_is_count(count, self.num_attention_heads) for count in heads)
            or any(wider <= narrower for narrower, wider in pairwise(heads))
        ):
            raise ValueError(
                f"`num_heads` of a cascade must be a list of integers from 1 to {self.num_attention_heads}, the heads "
                f"that this model holds, in increasing order: not {heads!r}."
            )
        if self.token_recycling and not set(heads) <= set(self.subnetwork_heads):
            raise ValueError(
                f"`num_heads` of a cascade with token recycling must be among its stages, {self.subnetwork_heads}: not "
                f"{heads!r}."
            )
        criterion, thresholds = settings.get("criterion", "entropy"), settings.get("thresholds")
        if criterion not in CRITERIA:
            raise ValueError(f"`criterion` of a cascade must be one of {', '.join(CRITERIA)}, not {criterion!r}.")
        steps = len(heads) - 1
        if isinstance(thresholds, Real):
            thresholds = [thresholds] * steps
        if not _are_numbers(thresholds, steps, least=0):
            raise ValueError(
                f"`thresholds` of a cascade of {len(heads)} widths must be {steps} numbers from 0 to infinity, or one "
                f"for all steps: not {thresholds!r}."
            )
        temperatures = settings.get("temperatures", [1.0] * len(heads))
        if not _are_numbers(temperatures, len(heads), least=1e-6, most=1e6):
            raise ValueError(
                f"`temperatures` of a cascade of {len(heads)} widths must be {len(heads)} positive numbers, not "
                f"{temperatures!r}."
            )
        return {
            "num_heads": [int(count) for count in heads],
            "thresholds": [float(value) for value in thresholds],
            "criterion": criterion,
            "temperatures": [float(value) for value in temperatures],
        }

    def validate(self):
        """Check every argument. `save_pretrained` calls it too, because attributes can be set at any time."""
        super().validate()
        self._check_sizes()
        self._check_subnetworks()
        if self.cascade is not None:
            self._check_cascade()

    def _check_cascade(self) -> dict:
        names = ("num_heads", "thresholds", "criterion", "temperatures")
        if not isinstance(self.cascade, dict) or not {"num_heads", "thresholds"} <= set(self.cascade) <= set(names):
            raise ValueError(
                f"`cascade` must have the keys 'num_heads' and 'thresholds', and may have 'criterion' and "
                f"'temperatures': not {self.cascade!r}."
            )
        return self.resolve_cascade(**self.cascade)

    def _check_sizes(self):
        for name, (allowed, is_allowed) in _ALLOWED.items():
            if not is_allowed(getattr(self, name)):
                raise ValueError(f"`{name}` must be {allowed}, not {getattr(self, name)!r}.")
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
            or not all(_is_number(weight, 0) and weight < math.inf for weight in weights)
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
        if self.token_recycling and (len(heads) < 2 or weights is not None):
            raise ValueError(
                "With `token_recycling`, `subnetwork_heads` must be two stages or more, and `subnetwork_weights` None, "
                f"as no width is drawn: not {heads!r} and {weights!r}."
            )
        if self.num_heads_active is not None:
            self.num_heads_active = self.check_num_heads(self.num_heads_active)


def as_pair(size) -> tuple[int, int]:
    """Turn a size, one number or a pair, into (height, width)."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def grid_of(image_size, patch_size) -> tuple[int, int]:
    """Rows and columns of patches in an image. Each size is one number or a (height, width) pair."""
    (height, width), (patch_height, patch_width) = as_pair(image_size), as_pair(patch_size)
    return height // patch_height, width // patch_width


def _is_number(value, least=-math.inf, most=math.inf) -> bool:
    return isinstance(value, Real) and type(value) is not bool and least <= value <= most


def _are_numbers(values, count: int, least: float, most: float = math.inf) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(_is_number(value, least, most) for value in values)
    )


def _is_count(value, largest=LARGEST_SIZE) -> bool:
    return isinstance(value, Integral) and type(value) is not bool and 1 <= value <= largest


def _check_integer(name, value, largest=LARGEST_SIZE):
    if not _is_count(value, largest):
        allowed = _SIZE[0] if largest == LARGEST_SIZE else f"from 1 to {largest}"
        raise ValueError(f"`{name}` must be {allowed}, not {value!r}.")


_SIZE = f"a positive integer up to {LARGEST_SIZE}", _is_count
_RATE = "from 0 to below 1", lambda value: _is_number(value, 0) and value < 1
_FLAG = "True or False", lambda value: type(value) is bool
_LABELS = "a dictionary", lambda value: isinstance(value, (dict, type(None)))
# What each argument must be, in words, and a test of it
_ALLOWED = {
    **dict.fromkeys(("num_attention_heads", "head_dim", "num_hidden_layers", "mlp_ratio", "num_channels"), _SIZE),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"), _RATE),
    **dict.fromkeys(("qkv_bias", "separate_classifiers", "token_recycling"), _FLAG),
    **dict.fromkeys(("apply_layernorm", "reshape_hidden_states"), _FLAG),
    **dict.fromkeys(("id2label", "label2id"), _LABELS),
    "hidden_act": ("the name of an activation", lambda value: isinstance(value, str) and value in ACT2FN),
    "initializer_range": ("a positive number", lambda value: _is_number(value, 0, LARGEST_SIZE) and value > 0),
    "layer_norm_eps": ("from 0 to 1", lambda value: _is_number(value, 0, 1)),
    "dtype": (
        f"one of {', '.join(DTYPES)}",
        lambda value: value is None or str(value).removeprefix("torch.") in DTYPES,
    ),
}

HydraViTConfig.register_for_auto_class()

__all__ = ["HydraViTConfig"]
