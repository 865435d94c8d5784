# Copyright 2026 The hydravit_hf authors.
# The modules and their names follow transformers' modeling_vit.py, Copyright 2021 Google AI, Ross Wightman and
# The HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""HydraViT (https://arxiv.org/abs/2409.17978): a Vision Transformer whose leading attention heads are a subnetwork.

The one idea: the active width enters once, at the patch embedding. Every later layer is a `Prefix...` layer, which uses
the leading part of its parameters, as wide as the tensor that it is given. No module stores a width, so one model can
serve different widths to different threads. As a layer accepts any narrower tensor, the width is checked where it
enters, in `HydraViTModel.forward`, and nowhere else.

With token recycling (https://arxiv.org/abs/2507.10800) a width is several passes, those of `HydraViTConfig.stages`, and
each starts from the tokens of the narrower one before it as well.

Letters in shapes: B images, C channels of the input, H x W pixels, N tokens (class token and patches), k active heads,
D = k x head_dim, the active width.
"""

import copy
import math
import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    DeiTPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    ViTPreTrainedModel,
    initialization,
)
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import (
    CONFIG_NAME,
    TransformersKwargs,
    can_return_tuple,
    logging,
    resolve_revision,
)
from transformers.utils.output_capturing import capture_outputs

from .cascade_hydravit import CascadeOutput, run_cascade
from .checkpoint_hydravit import find_weights, move_checkpoint, read_header, saved_config
from .configuration_hydravit import HydraViTConfig, as_pair, grid_of
from .parameters_hydravit import (
    SHARED_WITH_VIT,
    assemble,
    at_grid,
    count_heads,
    grow,
    interpolate_positions,
    leading_blocks,
    vit_tensors,
)
from .pipeline_hydravit import TASK, HydraViTImageClassificationPipeline

logger = logging.get_logger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that use the leading part of their parameters
# ---------------------------------------------------------------------------------------------------------------------


class PrefixLinear(nn.Linear):
    """A linear layer between widths: a fraction of the input channels gives the same fraction of the output's."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width, weight, bias = hidden_states.shape[-1], self.weight, self.bias
        if width < self.in_features:
            out_width = self.out_features * width // self.in_features
            weight = weight[:out_width, :width]
            bias = None if bias is None else bias[:out_width]
        return nn.functional.linear(hidden_states, weight, bias)


class PrefixClassifier(nn.Linear):
    """A linear layer from any width to all labels."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight[:, : hidden_states.shape[-1]], self.bias)


class PrefixLayerNorm(nn.LayerNorm):
    """A layer norm over the channels that it is given."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width, weight, bias = hidden_states.shape[-1], self.weight, self.bias
        if width < len(weight):
            weight, bias = weight[:width], bias[:width]
        return nn.functional.layer_norm(hidden_states, (width,), weight, bias, self.eps)


class TokenRecycling(nn.Linear):
    """A linear layer from the tokens of any width to any other width: (B, N, D') -> (B, N, D).

    It starts at zero, so that a model that gets one works as before until it is trained.
    """

    def forward(self, tokens: torch.Tensor, width: int) -> torch.Tensor:
        return nn.functional.linear(tokens, self.weight[:width, : tokens.shape[-1]], self.bias[:width])


class SeparateClassifiers(nn.Module):
    """One classifier for each of the S subnetworks (paper, "separate classifiers"), picked by the width of the input.

    They are stacked in one weight, (S, labels, full width), in the order of `subnetwork_heads`: so every parameter has
    a gradient at each step, and the classifiers of a narrower model are a leading block, like all its parameters. A
    width that has none of its own uses the leading columns of the next wider one's.
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


# ---------------------------------------------------------------------------------------------------------------------
# The Vision Transformer
# ---------------------------------------------------------------------------------------------------------------------


class HydraViTPatchEmbeddings(nn.Module):
    """Images to patch embeddings of the width that is asked for: (B, C, H, W) -> (B, N - 1, D)."""

    def __init__(self, config: HydraViTConfig):
        super().__init__()
        self.patch_size = as_pair(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size)

    def forward(self, pixel_values: torch.Tensor, width: int) -> torch.Tensor:
        weight, bias = self.projection.weight[:width], self.projection.bias[:width]
        patches = nn.functional.conv2d(pixel_values, weight, bias, stride=self.patch_size)
        return patches.flatten(2).transpose(1, 2)


class HydraViTEmbeddings(nn.Module):
    """Class token, patch and position embeddings; here the width enters: (B, C, H, W) -> (B, N, D)."""

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
    """Attention written out: (B, k, N, head_dim) three times -> (B, N, k, head_dim) and the weights (B, k, N, N)."""
    weights = torch.matmul(query, key.transpose(-2, -1)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class HydraViTAttention(nn.Module):
    """Self-attention with as many heads as fit into the tensor: (B, N, D) -> (B, N, D) and k maps or None."""

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
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        attention: Callable = eager_attention_forward  # the only one that returns its maps
        if not kwargs.get("output_attentions"):
            implementation = self.config._attn_implementation
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        output, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(output.reshape(hidden_states.shape).contiguous()), weights


class HydraViTMLP(nn.Module):
    """Two linear layers with `mlp_ratio` times the channels in between: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: HydraViTConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = PrefixLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = PrefixLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def drop_path(hidden_states: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth (https://arxiv.org/abs/1603.09382): in training, drop a residual branch for whole images."""
    if rate == 0.0 or not training:
        return hidden_states
    kept = hidden_states.new_empty(len(hidden_states), 1, 1).bernoulli_(1 - rate)
    return hidden_states * kept / (1 - rate)


class HydraViTLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer: (B, N, D) -> (B, N, D)."""

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
# One checkpoint, any width
# ---------------------------------------------------------------------------------------------------------------------

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
_AUTO_MAP = {
    "AutoConfig": "configuration_hydravit.HydraViTConfig",
    "AutoModel": "modeling_hydravit.HydraViTModel",
    "AutoModelForImageClassification": "modeling_hydravit.HydraViTForImageClassification",
    "AutoBackbone": "modeling_hydravit.HydraViTBackbone",
}
_CUSTOM_PIPELINES = {
    TASK: {
        "impl": f"pipeline_hydravit.{HydraViTImageClassificationPipeline.__name__}",
        "pt": ["AutoModelForImageClassification"],
        "type": "image",
    }
}


class HydraViTPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and loading, saving and cutting out subnetworks."""

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

    def _resolve_num_heads(self, num_heads_active: int | None) -> int:
        """The one place where the width of a forward pass is decided."""
        config = self.config
        num_heads = config.num_heads_active if num_heads_active is None else num_heads_active
        if num_heads is None and (config.token_recycling or not self.training):
            return config.num_attention_heads
        if num_heads is None:
            odds = torch.tensor(config.subnetwork_odds, dtype=torch.float64, device="cpu")
            return config.subnetwork_heads[torch.multinomial(odds, 1).item()]
        config.check_num_heads(num_heads)
        if not torch.compiler.is_compiling():
            config.warn_if_untrained(num_heads)
        return num_heads

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a checkpoint at the width and the image size that are asked for.

        As in transformers, with three keywords worth knowing: `num_heads_active=k` holds all heads and runs k of them
        by default; `num_attention_heads=k` holds the leading k heads only and, from safetensors files, reads only the
        rows that they need. More heads than the checkpoint has: its weights fill the leading block and the rest is
        initialised, with a warning. `image_size` (pixels, or (height, width)) interpolates the position embeddings,
        once: the model is an ordinary one of that image size.

        Raises:
            ValueError: A width out of range, or weights of another architecture.
            OSError: No such checkpoint, or a truncated or damaged file; the message names it.
            RuntimeError: Weights of other shapes than the configuration asks for.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        hub_kwargs = {name: kwargs.pop(name) for name in _HUB_KWARGS if name in kwargs}
        kwargs.pop("trust_remote_code", None)
        # One commit for all the files, whatever is pushed in the meantime
        where = {name: hub_kwargs[name] for name in ("cache_dir", "local_files_only", "token") if name in hub_kwargs}
        hub_kwargs["revision"] = resolve_revision(pretrained_model_name_or_path, hub_kwargs.get("revision"), **where)
        if not isinstance(config, PreTrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub_kwargs, **kwargs)
            kwargs |= dtype
        paths = []
        if kwargs.get("use_safetensors") is not False and kwargs.get("state_dict") is None:
            paths = find_weights(pretrained_model_name_or_path, kwargs.get("variant"), hub_kwargs)
        with ExitStack() as files:  # open until all is read, so that a save in the meantime can't mix two checkpoints
            stored = {}
            for path in paths:
                header = read_header(files.enter_context(open(path, "rb")))
                if twice := stored.keys() & header.keys():
                    raise OSError(f"'{path}' holds '{min(twice)}', which another shard holds as well.")
                stored |= header
            saved = saved_config(pretrained_model_name_or_path, config, hub_kwargs) if paths else config
            if saved is not config and not kwargs.get("ignore_mismatched_sizes"):
                _check_shapes(stored, saved)
            held = count_heads(stored, config)
            resize = held is not None and (held, saved.patch_grid) != (config.num_attention_heads, config.patch_grid)
            blocks = leading_blocks(stored, saved.resized(config.num_attention_heads)) if resize else None
        if not resize:
            return super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, **hub_kwargs, **kwargs
            )
        blocks = at_grid(blocks, saved.patch_grid, config.patch_grid)
        if held < config.num_attention_heads:
            blocks = grow(cls(config, *model_args), blocks)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=blocks, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with the loading info where that is asked for
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, variant=None, **kwargs
    ):
        """Save the model, its configuration and its code, as in transformers.

        The files are written aside and then moved into place, the weights last, so that a save that is interrupted
        at any moment leaves the checkpoint that was there.

        Raises:
            OSError: The disk is full, or can't be written for another reason.
        """
        self.config.auto_map, self.config.custom_pipelines = dict(_AUTO_MAP), dict(_CUSTOM_PIPELINES)
        if not is_main_process or variant is not None or kwargs.get("distributed_checkpoint"):
            kwargs |= {"is_main_process": is_main_process, "push_to_hub": push_to_hub, "variant": variant}
            return super().save_pretrained(save_directory, **kwargs)
        directory = Path(save_directory)
        if push_to_hub:
            kwargs.setdefault("repo_id", directory.name)
        staging = directory / "_saving"  # the Trainer uploads nothing that starts with an underscore
        shutil.rmtree(staging, ignore_errors=True)  # left by a save that was killed
        staging.mkdir(parents=True)
        try:
            super().save_pretrained(staging, push_to_hub=push_to_hub, **kwargs)
            move_checkpoint(staging, directory)
        except Exception as error:
            failure = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors' own class of errors says it
            if failure is None:
                raise
            number = int(failure[1])
            raise OSError(number, os.strerror(number), str(directory)) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def extract_subnetwork(self, num_heads: int):
        """The subnetwork with the leading `num_heads` heads, as a model of its own that shares no storage with this
        one: equal outputs, an ordinary HydraViT.

        Raises:
            ValueError: `num_heads` is not from 1 to the heads held.
        """
        config = self.config.resized(self.config.check_num_heads(num_heads))
        return assemble(type(self), config, leading_blocks(self.state_dict(), config)).train(self.training)

    def to_vit(self, num_heads: int | None = None):
        """The subnetwork with the leading `num_heads` heads (None: the default width), as a stock
        `ViTForImageClassification` (or, for `HydraViTModel`, a `ViTModel` without pooling layer): equal outputs, and
        no custom code wherever it goes. Drop path, which the stock model lacks, is left behind.

        Raises:
            ValueError: `num_heads` is not from 1 to the heads held.
        """
        if num_heads is None:
            num_heads = self.config.num_heads_active or self.config.num_attention_heads
        config = self.config.resized(self.config.check_num_heads(num_heads))
        if config.token_recycling:
            raise ValueError(
                f"{num_heads} heads of this model are the passes of {config.subnetwork_heads} heads, as it "
                f"recycles tokens; a ViT is one pass, and so can only be its first stage, {config.subnetwork_heads[0]}."
            )
        shared = {name: getattr(config, name) for name in SHARED_WITH_VIT}
        vit_config = ViTConfig(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, **shared)
        vit_config.dtype = self.dtype
        blocks = leading_blocks(self.state_dict(), config)
        if config.separate_classifiers:
            blocks |= {name: block[-1] for name, block in blocks.items() if name.startswith("classifier.")}
        blocks = {re.sub("^hydravit[.]", "vit.", name): block for name, block in blocks.items()}
        if self.base_model is self:
            vit = assemble(ViTModel, vit_config, blocks, add_pooling_layer=False)
        else:
            vit = assemble(ViTForImageClassification, vit_config, blocks)
        return vit.train(self.training)

    @classmethod
    def from_vit(cls, vit_or_deit, num_attention_heads: int = 12, **config_kwargs):
        """Start from a published ViT or DeiT (paper, "initialised from DeiT-tiny").

        Args:
            vit_or_deit: A ViT or DeiT of transformers, with or without classifier, or its path or Hub id.
            num_attention_heads: Heads that the new model holds. Its leading block is filled from those given; more
                heads are newly initialised, with a warning, and of more only the leading ones are taken.
            config_kwargs: Further arguments of `HydraViTConfig`. Another `num_labels` gives a new classifier, another
                `image_size` interpolated position embeddings.

        A DeiT's distillation token, which a HydraViT lacks, is left behind, with a warning.

        Raises:
            TypeError: Not a ViT or DeiT.
            ValueError: One whose MLP is no multiple of its width.
        """
        if not isinstance(vit_or_deit, PreTrainedModel):
            vit_or_deit = AutoModelForImageClassification.from_pretrained(vit_or_deit)
        vit = vit_or_deit
        if not isinstance(vit, (ViTPreTrainedModel, DeiTPreTrainedModel)):
            raise TypeError(f"`vit_or_deit` must be a ViT or DeiT of transformers, not {type(vit).__name__}.")
        if vit.config.hidden_size % vit.config.num_attention_heads or (
            vit.config.intermediate_size % vit.config.hidden_size
        ):
            raise ValueError(
                f"The ViT's intermediate_size={vit.config.intermediate_size} must be a multiple of its hidden_size="
                f"{vit.config.hidden_size}, and that of its num_attention_heads={vit.config.num_attention_heads}."
            )
        shared = {name: getattr(vit.config, name) for name in SHARED_WITH_VIT if name != "num_attention_heads"}
        if "num_labels" in config_kwargs:
            shared = {name: value for name, value in shared.items() if name not in ("id2label", "label2id")}
        config = cls.config_class(
            num_attention_heads=num_attention_heads,
            head_dim=vit.config.hidden_size // vit.config.num_attention_heads,
            mlp_ratio=vit.config.intermediate_size // vit.config.hidden_size,
            **shared | config_kwargs,
        )
        grid = grid_of(vit.config.image_size, vit.config.patch_size)
        model = cls(config)
        blocks = leading_blocks(vit_tensors(vit, config), config)
        missing = model.load_state_dict(grow(model, at_grid(blocks, grid, config.patch_grid)), strict=False)[0]
        if missing:
            logger.warning(f"The ViT has no {', '.join(missing)} that fits: newly initialized.")
        return model.to(vit.device, vit.dtype).train(vit.training)


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------


class HydraViTModel(HydraViTPreTrainedModel):
    """The encoder, without a classifier."""

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
            num_heads_active: Heads to run, k. None: `config.num_heads_active`, else, in `train()` mode, a draw from
                `config.subnetwork_heads` by torch's default generator, else all heads.
            interpolate_pos_encoding: Whether to accept images of another size, by interpolating the position
                embeddings.
            recycled_tokens: With `config.token_recycling`, the `last_hidden_state` of the stage before, (B, N, D'), to
                run this one alone. None: the stages before are run first.
            kwargs: `output_attentions` (one (B, k, N, N) a layer), `output_hidden_states` ((B, N, D), one after the
                embeddings and one after each layer; of the last stage), `return_dict`.

        Returns:
            `last_hidden_state` (B, N, D), normalised, and `pooler_output` (B, D), its class token.

        Raises:
            ValueError: Images of a wrong shape, a width that the model doesn't hold, or tokens that it can't recycle.
        """
        num_heads = self._resolve_num_heads(num_heads_active)
        width = num_heads * self.config.head_dim
        *earlier, _ = self.config.stages(num_heads)
        if recycled_tokens is None and earlier:
            stage = {"num_heads_active": earlier[-1], "interpolate_pos_encoding": interpolate_pos_encoding}
            recycled_tokens = HydraViTModel.forward(self, pixel_values, **stage, return_dict=True).last_hidden_state
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, width, interpolate_pos_encoding)
        if recycled_tokens is not None:
            self._check_recycled_tokens(recycled_tokens, hidden_states)
            hidden_states = hidden_states + self.recycling(recycled_tokens, width)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])

    def _check_recycled_tokens(self, tokens: torch.Tensor, hidden_states: torch.Tensor):
        (batch, count, width), config = hidden_states.shape, self.config
        if not config.token_recycling:
            raise ValueError("`recycled_tokens` needs a model with `token_recycling`, which this one is not.")
        if tokens.ndim != 3 or tokens.shape[:2] != (batch, count) or tokens.shape[2] > width:
            raise ValueError(
                f"`recycled_tokens` must have the shape ({batch}, {count}, at most {width}), not {tuple(tokens.shape)}."
            )


class HydraViTBackbone(BackboneMixin, HydraViTModel):
    """The encoder as the backbone of a dense head, such as UPerNet, DPT or Mask2Former: feature maps of its layers.

    Its width is `config.num_heads_active` (None: all heads), in training too, as the head that sits on it is made for
    one number of channels. A head that reads `backbone_config.hidden_size`, as DPT's does, needs a backbone that holds
    no more than it runs: `num_attention_heads=k` rather than `num_heads_active=k`.
    """

    def __init__(self, config: HydraViTConfig):
        super().__init__(config)
        width = (config.num_heads_active or config.num_attention_heads) * config.head_dim
        self.num_features = [width] * len(self.stage_names)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_heads_active: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """Give the feature maps of the layers in `config.out_features`.

        Args:
            pixel_values: Images of any multiple of the patch size, (B, C, H, W); the position embeddings are
                interpolated where it is not `config.image_size`.
            num_heads_active: Heads to run, instead of `config.num_heads_active`.
            output_hidden_states: Whether to give all hidden states too.
            kwargs: `output_attentions`, `return_dict`.

        Returns:
            `feature_maps`: one (B, D, H / patch, W / patch) for each layer asked for, or, without
            `config.reshape_hidden_states`, (B, N, D) with the class token; `hidden_states`, `attentions`.
        """
        config = self.config
        if num_heads_active is None:
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
            if config.reshape_hidden_states:
                tokens = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
            feature_maps.append(tokens)
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )


@dataclass
class HydraViTStagesOutput(ImageClassifierOutput):
    """What a classifier that recycles tokens gives in `train()` mode.

    Args:
        loss, logits, hidden_states, attentions: As in `ImageClassifierOutput`.
        stage_logits: The logits of all S stages, the narrowest first, (S, B, labels).
    """

    stage_logits: torch.Tensor | None = None


class HydraViTForImageClassification(HydraViTPreTrainedModel):
    """The encoder with a linear classifier on its class token."""

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
        """Classify images with the leading heads. The arguments are those of `HydraViTModel.forward`, and:

        Args:
            labels: (B,) for `config.problem_type` "single_label_classification", (B, labels) for
                "multi_label_classification" and "regression", (B,) for the latter with one label. Gives a loss.

        Returns:
            `loss` (scalar, or None without `labels`), `logits` (B, labels), `hidden_states`, `attentions`. In `train()`
            mode with token recycling a `HydraViTStagesOutput`, whose loss is the mean of all stages.
        """
        tokens, stage_logits = None, []
        for stage in self.config.stages(self._resolve_num_heads(num_heads_active)):
            outputs = self.hydravit(
                pixel_values,
                num_heads_active=stage,
                interpolate_pos_encoding=interpolate_pos_encoding,
                recycled_tokens=tokens,
                **kwargs,
            )
            tokens = outputs.last_hidden_state
            stage_logits.append(self.classifier(outputs.pooler_output))
        trained, loss = stage_logits if self.training else stage_logits[-1:], None
        if labels is not None:
            losses = [self.loss_function(labels, logits, self.config, **kwargs) for logits in trained]
            loss = sum(losses) / len(losses)
        output = ImageClassifierOutput(
            loss=loss, logits=stage_logits[-1], hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if len(trained) == 1 else HydraViTStagesOutput(**output, stage_logits=torch.stack(trained))

    def cascade(
        self,
        pixel_values: torch.Tensor,
        num_heads: list[int] | None = None,
        thresholds: float | list[float] | None = None,
        criterion: str | None = None,
        temperatures: list[float] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> CascadeOutput:
        """Classify images with as many heads as each one needs: see `cascade_hydravit.run_cascade`. What is None is
        that of `config.cascade`."""
        return run_cascade(self, pixel_values, num_heads, thresholds, criterion, temperatures, interpolate_pos_encoding)


def _check_shapes(stored: dict, config: HydraViTConfig):
    """Compare a checkpoint with the configuration that lies beside it, before a model is made from either.

    Layers are counted, and what has the name of a parameter must have its shape. Other parameters that are missing or
    left over are reported by the loading that follows.
    """
    if "quantization_config" in vars(config):  # quantized weights have shapes of their own
        return
    advice = "one of the two is damaged or was changed. `ignore_mismatched_sizes=True` loads what fits."
    layer = r"(?:hydravit[.])?layers[.](\d+)[.]"
    num_layers = len({match[1] for name in stored if (match := re.match(layer, name))})
    if num_layers not in (0, config.num_hidden_layers):
        raise RuntimeError(
            f"{CONFIG_NAME} has num_hidden_layers={config.num_hidden_layers}, the weights have {num_layers}: {advice}"
        )
    config = copy.copy(config)
    config.num_hidden_layers = 1  # stands for all of them
    with torch.device("meta"):
        model = HydraViTForImageClassification(config)
    parameters = {name.removeprefix("hydravit."): parameter for name, parameter in model.named_parameters()}
    for name, tensor in stored.items():
        parameter = parameters.get(re.sub(layer, "layers.0.", name).removeprefix("hydravit."))
        if parameter is None:
            continue
        if list(tensor.shape) != list(parameter.shape) or not tensor.dtype.is_floating_point:
            raise RuntimeError(
                f"'{name}' is of {tensor.dtype} and shape {list(tensor.shape)} in the weights; by {CONFIG_NAME} it is "
                f"of floating point and shape {list(parameter.shape)}: {advice}"
            )


HydraViTModel.register_for_auto_class("AutoModel")
HydraViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
HydraViTBackbone.register_for_auto_class("AutoBackbone")

__all__ = ["HydraViTBackbone", "HydraViTForImageClassification", "HydraViTModel", "HydraViTPreTrainedModel"]
