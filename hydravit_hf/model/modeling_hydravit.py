# Copyright 2026 The hydravit_hf authors.
# The modules and their names follow transformers' modeling_vit.py, Copyright 2021 Google AI, Ross Wightman and
# The HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""HydraViT (https://arxiv.org/abs/2409.17978): a Vision Transformer whose leading attention heads form a subnetwork.

The one idea: the active width enters once, at the patch embedding. Every later layer is a `Prefix...` layer: it reads
the width off the tensor that it receives and uses that leading part of its parameters. No module stores a width, so
one model can serve different widths to different threads. Because a layer accepts any narrower tensor, the model checks
the width where it enters, in `_resolve_num_heads`, and nowhere else.

Letters in shapes: B images, C channels of the input, H x W pixels, N tokens (class token and patches), k active heads,
D = k x head_dim, the active width.
"""

import math
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .cascade_hydravit import CascadeOutput, run_cascade
from .checkpoint_hydravit import NestedCheckpointMixin
from .configuration_hydravit import HydraViTConfig, as_pair, grid_of
from .nesting_hydravit import interpolate_positions
from .quantization_hydravit import cut_weight, refuse_layer, refuse_qconfig
from .recycling_hydravit import TokenRecycling, forward_stages
from .vit_hydravit import ViTConversionMixin

logger = logging.get_logger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Layers that use the leading part of their parameters
# ---------------------------------------------------------------------------------------------------------------------


class PrefixLinear(nn.Linear):
    """Maps one width to another: a fraction of the input channels gives the same fraction of the output channels.

    It reads the width off its input, so there is no state to set before a call and none that two threads could share.
    Slicing costs no copy, and the parameters keep the names, the shapes and the initialisation of `nn.Linear`.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width, weight, bias = hidden_states.shape[-1], self.weight, self.bias
        if width < self.in_features:
            out_width = self.out_features * width // self.in_features
            weight = cut_weight(weight, out_width, width)
            bias = None if bias is None else bias[:out_width]
        return nn.functional.linear(hidden_states, weight, bias)


class PrefixClassifier(nn.Linear):
    """Maps any width to all labels. Only its input is cut, because every subnetwork predicts the same labels."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = cut_weight(self.weight, self.out_features, hidden_states.shape[-1])
        return nn.functional.linear(hidden_states, weight, self.bias)


class PrefixLayerNorm(nn.LayerNorm):
    """Normalises over the channels that it receives, because a subnetwork knows nothing of the channels beyond them."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width, weight, bias = hidden_states.shape[-1], self.weight, self.bias
        if width < len(weight):
            weight, bias = weight[:width], bias[:width]
        return nn.functional.layer_norm(hidden_states, (width,), weight, bias, self.eps)


class PrefixConv2d(nn.Conv2d):
    """Projects images to the width that the caller gives: the width enters here, because images carry none.

    It casts images to the precision of its weights, so that a model in half precision takes the output of any
    processor.
    """

    def forward(self, pixel_values: torch.Tensor, width: int) -> torch.Tensor:
        weight, bias = self.weight[:width], None if self.bias is None else self.bias[:width]
        return nn.functional.conv2d(pixel_values.to(weight.dtype), weight, bias, stride=self.stride)


PREFIX_LAYERS = (PrefixLinear, PrefixClassifier, PrefixConv2d, TokenRecycling)


class SeparateClassifiers(nn.Module):
    """Holds one classifier for each of the S subnetworks (paper, "separate classifiers").

    It picks the classifier by the width of its input. A width without a classifier of its own uses the leading columns
    of the next wider one. One weight stacks them all, (S, labels, full width), in the order of `subnetwork_heads`, so
    that every parameter has a gradient in each step and a narrower model owns a leading block of it.
    """

    def __init__(self, config: HydraViTConfig):
        super().__init__()
        self.subnetwork_widths = [num_heads * config.head_dim for num_heads in config.subnetwork_heads]
        self.weight = nn.Parameter(torch.empty(len(self.subnetwork_widths), config.num_labels, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(len(self.subnetwork_widths), config.num_labels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width = hidden_states.shape[-1]
        index = bisect_left(self.subnetwork_widths, width)
        return nn.functional.linear(hidden_states, self.weight[index, :, :width], self.bias[index])


class AdaptableModule(nn.Module):
    """Holds `Prefix...` layers that an adapter may wrap, and a quantizer may not replace.

    PEFT replaces a layer of the model by one of its own around it, which knows nothing of widths. Here it learns of
    them: so every way to add an adapter, or to load one, gives an adapter for every width. The layers that quantizers
    put in place of a `Prefix...` layer can't learn it, and are refused.
    """

    def __setattr__(self, name: str, value):
        if isinstance(value, nn.Module) and hasattr(value, "base_layer"):
            from .lora_hydravit import adopt

            adopt(value)
        elif isinstance(value, nn.Module) and isinstance(self._modules.get(name), PREFIX_LAYERS):
            refuse_layer(value, self._modules[name])
        super().__setattr__(name, value)


# ---------------------------------------------------------------------------------------------------------------------
# The Vision Transformer
# ---------------------------------------------------------------------------------------------------------------------


class HydraViTPatchEmbeddings(AdaptableModule):
    """Turns images into patch embeddings of the given width: (B, C, H, W) -> (B, N - 1, D)."""

    def __init__(self, config: HydraViTConfig):
        super().__init__()
        self.patch_size = as_pair(config.patch_size)
        self.projection = PrefixConv2d(config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size)

    def forward(self, pixel_values: torch.Tensor, width: int) -> torch.Tensor:
        return self.projection(pixel_values, width).flatten(2).transpose(1, 2)


class HydraViTEmbeddings(nn.Module):
    """Joins class token, patch and position embeddings: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, config: HydraViTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.image_size = as_pair(config.image_size)
        self.patch_grid = config.patch_grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embeddings = HydraViTPatchEmbeddings(config)
        num_patches = math.prod(self.patch_grid)
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + num_patches, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, width: int, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        self._check_images(pixel_values, interpolate_pos_encoding)
        patches = self.patch_embeddings(pixel_values, width)
        cls_token = self.cls_token[..., :width].expand(patches.shape[0], -1, -1)
        position_embeddings = self.position_embeddings[..., :width]
        if interpolate_pos_encoding:
            grid = grid_of(tuple(pixel_values.shape[2:]), self.patch_embeddings.patch_size)
            position_embeddings = interpolate_positions(position_embeddings, self.patch_grid, grid)
        return self.dropout(torch.cat((cls_token, patches), dim=1) + position_embeddings)

    def _check_images(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool):
        expected = f"(batch, {self.num_channels}, {self.image_size[0]}, {self.image_size[1]})"
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` must have the shape {expected}, not {tuple(pixel_values.shape)}: check its channels."
            )
        height, width = pixel_values.shape[2:]
        if not interpolate_pos_encoding and (height, width) != self.image_size:
            raise ValueError(
                f"`pixel_values` must have the shape {expected}, not {tuple(pixel_values.shape)}: resize the images, "
                "or pass `interpolate_pos_encoding=True`."
            )
        patch_height, patch_width = self.patch_embeddings.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"The size of `pixel_values`, {height} x {width} pixels, must be a multiple of the patch size, "
                f"{patch_height} x {patch_width}."
            )


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Write attention out: three (B, k, N, head_dim) -> the output (B, N, k, head_dim) and the maps (B, k, N, N)."""
    weights = torch.matmul(query, key.transpose(-2, -1)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class HydraViTAttention(AdaptableModule):
    """Runs as many heads as fit into the tensor: (B, N, D) -> (B, N, D) and the maps (B, k, N, N) or None.

    The leading channels are the leading heads, so a narrow tensor runs whole heads and needs no mask.
    """

    def __init__(self, config: HydraViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        self.q_proj = PrefixLinear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = PrefixLinear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = PrefixLinear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = PrefixLinear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]):
        heads_shape = (*hidden_states.shape[:-1], hidden_states.shape[-1] // self.head_dim, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        attention: Callable = eager_attention_forward  # only eager attention returns its maps, or takes an empty batch
        if not kwargs.get("output_attentions") and hidden_states.shape[0] > 0:
            implementation = self.config._attn_implementation
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        output, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(output.reshape(hidden_states.shape).contiguous()), weights


class HydraViTMLP(AdaptableModule):
    """Applies two linear layers with `mlp_ratio` x D channels in between: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: HydraViTConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = PrefixLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = PrefixLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def drop_path(hidden_states: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Drop a residual branch for whole images in training (stochastic depth, https://arxiv.org/abs/1603.09382)."""
    if rate == 0.0 or not training:
        return hidden_states
    kept = hidden_states.new_empty(len(hidden_states), 1, 1).bernoulli_(1 - rate)
    return hidden_states * kept / (1 - rate)


class HydraViTLayer(GradientCheckpointingLayer):
    """Applies attention and an MLP, each after a layer norm: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: HydraViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        self.attention = HydraViTAttention(config)
        self.layernorm_before = PrefixLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = PrefixLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HydraViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attention_output, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        attention_output = self.dropout(attention_output)
        hidden_states = hidden_states + drop_path(attention_output, self.drop_path_rate, self.training)
        mlp_output = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states + drop_path(mlp_output, self.drop_path_rate, self.training)


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------


class HydraViTPreTrainedModel(NestedCheckpointMixin, ViTConversionMixin, AdaptableModule, PreTrainedModel):
    """Initialises weights and resolves the width. Its mixins load, save, extract and convert."""

    config_class = HydraViTConfig
    config: HydraViTConfig
    base_model_prefix = "hydravit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["HydraViTEmbeddings", "HydraViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HydraViTLayer, "attentions": HydraViTAttention}
    _input_embed_layer = "patch_embeddings"

    def __setattr__(self, name: str, value):
        if name == "qconfig":  # `torch.ao.quantization` sets it on all that it is about to quantize
            refuse_qconfig()
        super().__setattr__(name, value)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HydraViTEmbeddings):
            initialization.trunc_normal_(module.cls_token, std=std)
            initialization.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, SeparateClassifiers):
            initialization.normal_(module.weight, std=std)
            initialization.zeros_(module.bias)
        elif isinstance(module, TokenRecycling):
            initialization.zeros_(module.weight)

    def train(self, mode: bool = True):
        """As in torch. A model that goes into `train()` mode drops its cascade, which is fitted to the weights."""
        if mode and self.config.cascade is not None:
            self.config.cascade = None
            logger.warning(
                "The model goes into `train()` mode, so it drops the cascade in its configuration, which was fitted to "
                "the weights as they were. Fit it again after training."
            )
        return super().train(mode)

    def _resolve_num_heads(self, num_heads_active: int | None) -> int:
        """Resolve the width of a pass: the argument, else the configuration, else a draw in training, else all."""
        config = self.config
        num_heads = config.num_heads_active if num_heads_active is None else num_heads_active
        if num_heads is None and (config.token_recycling or not self.training):
            return config.num_attention_heads
        if num_heads is None:
            odds = torch.tensor(config.subnetwork_odds, dtype=torch.float64, device="cpu")
            return config.subnetwork_heads[torch.multinomial(odds, 1).item()]
        num_heads = config.check_num_heads(num_heads)
        if not torch.compiler.is_compiling():
            config.warn_if_untrained(num_heads)
        return num_heads

    def _warn_if_not_elastic(self, num_heads_active: int | None):
        """Warn, once, that a loop trains in `eval()` mode, in which `from_pretrained` leaves a model."""
        if num_heads_active is None and self.config.num_heads_active is None and len(self.config.subnetwork_heads) > 1:
            logger.warning_once(
                "A loss with gradients is computed in `eval()` mode, in which the model draws no widths: it trains its "
                "widest subnetwork only. Call `model.train()` first, or evaluate under `torch.no_grad()`."
            )


class HydraViTModel(HydraViTPreTrainedModel):
    """The encoder, without a classifier.

    Examples:
        >>> import torch
        >>> from hydravit_hf import HydraViTConfig, HydraViTModel
        >>> model = HydraViTModel(HydraViTConfig(num_hidden_layers=2, image_size=32)).eval()
        >>> model(torch.zeros(1, 3, 32, 32), num_heads_active=3).last_hidden_state.shape
        torch.Size([1, 5, 192])
    """

    def __init__(self, config: HydraViTConfig):
        super().__init__(config)
        self.embeddings = HydraViTEmbeddings(config)
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.layers = nn.ModuleList([HydraViTLayer(config, rate) for rate in rates])
        self.layernorm = PrefixLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.token_recycling:
            self.recycling = TokenRecycling(config.hidden_size, config.hidden_size)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_heads_active: int | None = None,
        interpolate_pos_encoding: bool = False,
        recycled_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images with the leading heads.

        Args:
            pixel_values: Images, (B, C, H, W).
            num_heads_active: Number of heads to run, k. None means `config.num_heads_active`. If that is None too,
                `train()` mode draws from `config.subnetwork_heads` with torch's default generator, and `eval()` mode
                runs all heads.
            interpolate_pos_encoding: Whether to accept images of another size, by interpolating the position
                embeddings.
            recycled_tokens: The `last_hidden_state` of the narrower stage, (B, N, D'), for a model with
                `config.token_recycling`. None runs the narrower stages first.
            kwargs: `output_attentions` returns one (B, k, N, N) a layer. `output_hidden_states` returns the embeddings
                and the output of each layer, (B, N, D). Both describe the last stage. `return_dict` is as in
                transformers.

        Returns:
            `last_hidden_state`, (B, N, D), after the final layer norm, and its class token `pooler_output`, (B, D).

        Raises:
            ValueError: The images have a wrong shape, the model does not hold the width, or it can't recycle the
                tokens.
        """
        num_heads = self._resolve_num_heads(num_heads_active)
        hidden_states = self.embeddings(pixel_values, num_heads * self.config.head_dim, interpolate_pos_encoding)
        if self.config.token_recycling or recycled_tokens is not None:
            hidden_states = self._recycle(
                hidden_states, recycled_tokens, num_heads, pixel_values, interpolate_pos_encoding
            )
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])

    def _recycle(self, hidden_states, tokens, num_heads: int, pixel_values, interpolate_pos_encoding: bool):
        """Add the narrower stage's tokens to the embeddings of this one. Without `tokens`, run that stage first."""
        if not self.config.token_recycling:
            raise ValueError("`recycled_tokens` needs a model with `token_recycling`, which this one is not.")
        *narrower, _ = self.config.stages(num_heads)
        if tokens is None and narrower:
            stage = {"num_heads_active": narrower[-1], "interpolate_pos_encoding": interpolate_pos_encoding}
            tokens = HydraViTModel.forward(self, pixel_values, **stage, return_dict=True).last_hidden_state
        return self.recycling(hidden_states, tokens)


class HydraViTBackbone(BackboneMixin, HydraViTModel):
    """The encoder as the backbone of a dense head, such as UPerNet, DPT or Mask2Former. It gives feature maps.

    It runs `config.num_heads_active` heads (None: all of them), in training too, because a dense head is built for one
    number of channels. Some heads, such as DPT's, read `backbone_config.hidden_size`. They need a backbone that holds
    no more heads than it runs: load it with `num_attention_heads=k`, not with `num_heads_active=k`.

    With `config.pad_feature_maps`, the feature maps have the channels of all heads at every width, and zeros in those
    of the heads that do not run. `train()` mode then draws a width for each call, so that backbone and head learn every
    width. To run another one, set `backbone.config.num_heads_active`, as dense heads pass no width on.
    """

    def __init__(self, config: HydraViTConfig):
        super().__init__(config)
        num_heads = None if config.pad_feature_maps else config.num_heads_active
        width = (num_heads or config.num_attention_heads) * config.head_dim
        self.num_features = [width] * len(self.stage_names)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_heads_active: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """Compute the feature maps of the layers in `config.out_features`.

        Args:
            pixel_values: Images, (B, C, H, W), whose sides are multiples of the patch size. The position embeddings are
                interpolated if the sides differ from `config.image_size`.
            num_heads_active: Number of heads to run, in place of `config.num_heads_active`.
            output_hidden_states: Whether to return all hidden states too.
            kwargs: `output_attentions`, `return_dict`.

        Returns:
            `feature_maps`, `hidden_states` and `attentions`. A feature map is (B, D, H / patch, W / patch), or
            (B, N, D) with the class token if `config.reshape_hidden_states` is False.
        """
        config = self.config
        if num_heads_active is None and not config.pad_feature_maps:
            num_heads_active = config.num_heads_active or config.num_attention_heads
        outputs = HydraViTModel.forward(
            self,
            pixel_values,
            num_heads_active=num_heads_active,
            interpolate_pos_encoding=True,
            output_hidden_states=True,
            **kwargs | {"return_dict": True},
        )
        grid = grid_of(pixel_values.shape[-2:], config.patch_size)
        feature_maps = []
        for index in self.out_indices:
            tokens = outputs.hidden_states[index]
            if config.apply_layernorm:
                tokens = self.layernorm(tokens)
            if config.pad_feature_maps:
                tokens = nn.functional.pad(tokens, (0, config.hidden_size - tokens.shape[-1]))
            if config.reshape_hidden_states:
                tokens = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
            feature_maps.append(tokens)
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )


class HydraViTForImageClassification(HydraViTPreTrainedModel):
    """The encoder with a linear classifier on its class token.

    Examples:
        >>> import torch
        >>> from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
        >>> config = HydraViTConfig(num_hidden_layers=2, image_size=32, num_labels=10)
        >>> model = HydraViTForImageClassification(config).eval()
        >>> images = torch.zeros(4, 3, 32, 32)
        >>> model(images, num_heads_active=3).logits.shape  # runs 3 of the 12 heads
        torch.Size([4, 10])
        >>> small = model.extract_subnetwork(3)  # holds only these
        >>> torch.allclose(small(images).logits, model(images, num_heads_active=3).logits, atol=1e-5)
        True
    """

    def __init__(self, config: HydraViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.hydravit = HydraViTModel(config)
        if config.num_labels == 0:
            self.classifier = nn.Identity()
        elif config.separate_classifiers:
            self.classifier = SeparateClassifiers(config)
        else:
            self.classifier = PrefixClassifier(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_heads_active: int | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify images with the leading heads.

        Args:
            pixel_values: Images, (B, C, H, W).
            labels: Targets, from which a loss is computed: (B,) for `config.problem_type`
                "single_label_classification", (B, labels) for "multi_label_classification" and "regression", or (B,)
                for a regression of one value.
            num_heads_active: Number of heads to run, k. None means `config.num_heads_active`. If that is None too,
                `train()` mode draws from `config.subnetwork_heads` with torch's default generator, and `eval()` mode
                runs all heads.
            interpolate_pos_encoding: Whether to accept images of another size, by interpolating the position
                embeddings.
            kwargs: `output_attentions`, `output_hidden_states` and `return_dict`, as in `HydraViTModel.forward`.

        Returns:
            `loss` (scalar, or None without `labels`), `logits` (B, labels), `hidden_states` and `attentions`. With
            token recycling, `train()` mode returns a `HydraViTStagesOutput`.

        Raises:
            ValueError: The images have a wrong shape, or the model does not hold the width.
        """
        if self.config.token_recycling and self.training:
            return forward_stages(self, pixel_values, labels, num_heads_active, interpolate_pos_encoding, **kwargs)
        outputs = self.hydravit(
            pixel_values,
            num_heads_active=num_heads_active,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
            if loss.requires_grad and not self.training and not torch.compiler.is_compiling():
                self._warn_if_not_elastic(num_heads_active)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def cascade(
        self,
        pixel_values: torch.Tensor,
        num_heads: list[int] | None = None,
        thresholds: float | list[float] | None = None,
        criterion: str | None = None,
        temperatures: list[float] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> CascadeOutput:
        """Classify each image with as many heads as it needs: the narrowest first, and the uncertain ones at the next.

        It computes no gradients.

        Args:
            pixel_values: Images, (B, C, H, W).
            num_heads: Head counts in increasing order. None takes the arguments that are None from `config.cascade`.
            thresholds: An image goes on if its `uncertainty` is at least the threshold of the step: one number for all
                steps, or a list. With 0, all images go on to the widest. With infinity, all stop at the narrowest.
            criterion: Measure of the uncertainty: "entropy", "margin" or "probability". None means "entropy".
            temperatures: Temperature of the uncertainty at each of `num_heads`. None means 1.
            interpolate_pos_encoding: As in `forward`.

        Returns:
            `logits`, (B, labels), and the `num_heads` and `macs` that each image took, (B,).

        Raises:
            ValueError: An argument is out of its range, or the model does not choose one of several labels.
        """
        return run_cascade(self, pixel_values, num_heads, thresholds, criterion, temperatures, interpolate_pos_encoding)


HydraViTModel.register_for_auto_class("AutoModel")
HydraViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
HydraViTBackbone.register_for_auto_class("AutoBackbone")

__all__ = ["HydraViTBackbone", "HydraViTForImageClassification", "HydraViTModel", "HydraViTPreTrainedModel"]
