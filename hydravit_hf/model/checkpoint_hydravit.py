# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Loading a checkpoint at any width, saving one, and extracting a subnetwork.

This file travels with each saved checkpoint as remote code.
"""

import copy
import json
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    resolve_revision,
)

from .configuration_hydravit import HydraViTConfig
from .files_hydravit import disk_errors, locked, move_checkpoint, read_header, staging, state_of
from .nesting_hydravit import (
    assemble,
    count_heads,
    fill_leading_blocks,
    fit_positions_to_grid,
    leading_blocks,
    own_parameters,
)
from .quantization_hydravit import carry_quantizer, check_groups, check_method, restore_weights
from .shards_hydravit import find_weights, is_by_heads, open_weights, resolve_shard_heads, write_by_heads

_LOADS = 20  # a load is tried so often while other processes save
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
_AUTO_MAP = {
    "AutoConfig": "configuration_hydravit.HydraViTConfig",
    "AutoModel": "modeling_hydravit.HydraViTModel",
    "AutoModelForImageClassification": "modeling_hydravit.HydraViTForImageClassification",
    "AutoBackbone": "modeling_hydravit.HydraViTBackbone",
}


class NestedCheckpointMixin:
    """Adds loading and saving at any width to the models, and `extract_subnetwork`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a checkpoint at any width and any image size.

        It takes the arguments of transformers, and these overrides of the configuration:

        - `num_heads_active=k` holds all heads and runs k of them by default.
        - `num_attention_heads=k` holds the leading k heads only. From files by width (`save_pretrained` with
          `shard_by_heads`), it downloads and reads only those that they need; from other safetensors files, it reads
          only the rows that they need. If the checkpoint has fewer heads, they fill the leading block and the others
          are newly initialised, with a warning.
        - `image_size` (pixels, or (height, width)) interpolates the position embeddings once. The result is an ordinary
          model of that image size.

        The folder of an adapter loads the model that the adapter belongs to, with the adapter on.

        Raises:
            ValueError: A width is out of range, the weights belong to another architecture, or they are quantized in a
                way that can't be cut to other widths.
            OSError: The checkpoint does not exist, or a file is truncated or damaged. The message names it.
            RuntimeError: The weights have other shapes than the configuration says.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        for _ in range(_LOADS):  # a save that replaces the files during a load makes it start again
            before = state_of(pretrained_model_name_or_path)
            try:
                return cls._load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            except (OSError, RuntimeError, ValueError, SafetensorError):
                if before == state_of(pretrained_model_name_or_path):
                    raise
        return cls._load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @classmethod
    def _load(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        # 1. Where is it? One revision holds for all files, whatever is pushed in the meantime.
        hub_kwargs = {name: kwargs.pop(name) for name in _HUB_KWARGS if name in kwargs}
        where = {name: hub_kwargs[name] for name in ("cache_dir", "local_files_only", "token") if name in hub_kwargs}
        hub_kwargs["revision"] = resolve_revision(pretrained_model_name_or_path, hub_kwargs.get("revision"), **where)
        kwargs.pop("trust_remote_code", None)
        path, adapter = _find_adapter(pretrained_model_name_or_path, kwargs.pop("adapter_kwargs", None), hub_kwargs)
        if adapter:
            kwargs["adapter_kwargs"] = adapter  # where weights are read whole, transformers adds the adapter
        if path != pretrained_model_name_or_path:
            return cls.from_pretrained(path, *model_args, config=config, **where, **kwargs)
        if not isinstance(config, PreTrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub_kwargs, **kwargs)
            kwargs |= dtype
        shards = []
        if kwargs.get("use_safetensors") is not False and kwargs.get("state_dict") is None:
            named = getattr(config, "transformers_weights", None)  # a file of another name, as transformers allows
            which = (config.num_attention_heads, kwargs.get("variant"), named)
            shards = find_weights(pretrained_model_name_or_path, *which, hub_kwargs)
        quantization = vars(config).get("quantization_config")
        check_method(quantization)
        check_method(kwargs.get("quantization_config"))
        by_heads = is_by_heads(shards)
        with open_weights(shards) as (stored, metadata):
            # 2. Does it fit?
            saved = _saved_config(pretrained_model_name_or_path, config, hub_kwargs) if shards else config
            if saved is not config and not kwargs.get("ignore_mismatched_sizes"):
                is_part = by_heads and shards[-1].total == saved.num_attention_heads  # else their shapes disagree
                _check_shapes(cls, stored, saved.resized(shards[-1].heads[1]) if is_part else saved)
            held = count_heads(stored, config)
            if by_heads and held != shards[-1].heads[1]:
                raise OSError(
                    f"The files up to '{shards[-1].path}' hold no class token of {shards[-1].heads[1]} heads."
                )
            is_whole = (held, saved.patch_grid) == (config.num_attention_heads, config.patch_grid)
            if held is None or (is_whole and not by_heads):
                loaded = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, config=config, **hub_kwargs, **kwargs
                )
                check_groups(loaded[0] if isinstance(loaded, tuple) else loaded)
                return loaded
            if quantization and held < config.num_attention_heads:
                raise ValueError(f"The weights are quantized: the checkpoint can't grow beyond its {held} heads.")
            # 3. The blocks of this width
            blocks = leading_blocks(stored, saved.resized(config.num_attention_heads))
        if quantization:
            blocks = restore_weights(blocks, metadata)
        blocks = fit_positions_to_grid(blocks, saved.patch_grid, config.patch_grid)
        if held < config.num_attention_heads:
            blocks = fill_leading_blocks(cls(config, *model_args), blocks)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=blocks, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple if the caller wants the loading info
        check_groups(model)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if adapter:
            source = {name: value for name, value in adapter.items() if name != "_adapter_model_path"}
            name = kwargs.get("adapter_name")
            model.load_adapter(adapter["_adapter_model_path"], name, adapter_kwargs=source)
        return loaded

    def load_adapter(self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None, **kwargs):
        """Load an adapter, as in transformers. The adapter of a model with more heads is cut like the weights.

        Raises:
            ValueError: It is a DoRA adapter of a model with another number of heads, or of a method other than LoRA.
        """
        from .lora_hydravit import fit_adapter, read_adapter

        if adapter_state_dict is None and peft_model_id is not None:
            given = kwargs | (kwargs.get("adapter_kwargs") or {})
            if kwargs.get("load_config") is not None:
                given = kwargs["load_config"].download_kwargs | given
            hub_kwargs = {name: given[name] for name in _HUB_KWARGS if given.get(name)}
            adapter_state_dict = read_adapter(peft_model_id, **hub_kwargs)
        if adapter_state_dict is not None:
            adapter_state_dict = fit_adapter(adapter_state_dict, self)
        return super().load_adapter(peft_model_id, adapter_name, peft_config, adapter_state_dict, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """As in torch. In this way PEFT loads an adapter, which is cut like the weights."""
        if any(".lora_" in name for name in state_dict) and not any(name.endswith("cls_token") for name in state_dict):
            from .lora_hydravit import fit_adapter

            state_dict |= fit_adapter(state_dict, self, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        variant=None,
        shard_by_heads: bool | list[int] = False,
        **kwargs,
    ):
        """Save the model, its configuration and its code, as in transformers.

        The files are written aside and then moved into place, the weights last. A save that is interrupted at any
        moment leaves the checkpoint that was there. Several processes and threads may save to one folder: the last one
        wins.

        With `shard_by_heads=True`, each of `subnetwork_heads` gets a file: the first one is the narrowest model, and
        each further one holds what its width adds. A list names the widths that get one; all heads always do.
        `max_shard_size` splits the files of a width further.

        Raises:
            OSError: The disk is full, or can't be written for another reason.
            ValueError: `shard_by_heads` names a width that was not trained, or comes with `variant`, `push_to_hub`,
                `distributed_checkpoint` or an adapter.
        """
        from .pipeline_hydravit import TASK, HydraViTImageClassificationPipeline  # this import makes its file travel

        impl = f"pipeline_hydravit.{HydraViTImageClassificationPipeline.__name__}"
        pipeline = {"impl": impl, "pt": ["AutoModelForImageClassification"], "type": "image"}
        self.config.auto_map, self.config.custom_pipelines = dict(_AUTO_MAP), {TASK: pipeline}
        if shard_by_heads is not False:
            options = {"variant": variant, "push_to_hub": push_to_hub} | kwargs
            heads = self._resolve_shard_heads(shard_by_heads, options)
        if not is_main_process or variant is not None or kwargs.get("distributed_checkpoint"):
            kwargs |= {"is_main_process": is_main_process, "push_to_hub": push_to_hub, "variant": variant}
            return super().save_pretrained(save_directory, **kwargs)
        directory = Path(save_directory)
        if push_to_hub:
            kwargs.setdefault("repo_id", directory.name)
        with disk_errors(directory), staging(directory) as folder:
            if shard_by_heads is False:
                super().save_pretrained(folder, push_to_hub=push_to_hub, **kwargs)
                if self._hf_peft_config_loaded:  # an adapter alone, which needs no code
                    for file in folder.glob("*.py"):
                        file.unlink()
            else:  # transformers writes one file, with all that it gathers from elsewhere
                super().save_pretrained(folder, **kwargs | {"max_shard_size": sys.maxsize})
                tensors = load_file(folder / SAFE_WEIGHTS_NAME)
                with open(folder / SAFE_WEIGHTS_NAME, "rb") as file:
                    _, metadata = read_header(file)
                (folder / SAFE_WEIGHTS_NAME).unlink()  # its memory map stays
                max_shard_size = kwargs.get("max_shard_size", "50GB")
                write_by_heads(folder, tensors, self.config, heads, max_shard_size, metadata)
            with locked(directory):
                move_checkpoint(folder, directory)

    def _resolve_shard_heads(self, shard_by_heads: bool | list[int], options: dict) -> list[int]:
        """The widths that get a file of their own, if this model can be saved in files by width."""
        if given := [name for name in ("variant", "push_to_hub", "distributed_checkpoint") if options.get(name)]:
            advice = " `push_checkpoint` publishes a saved folder." if "push_to_hub" in given else ""
            raise ValueError(f"`shard_by_heads` can't be combined with `{given[0]}`.{advice}")
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError("`shard_by_heads` can't split adapters into widths.")
        return resolve_shard_heads(shard_by_heads, self.config)

    @torch.inference_mode(False)  # the copies can be trained, and torchao's weights can be cut
    def extract_subnetwork(self, num_heads: int):
        """Copy the leading `num_heads` heads into a model of their own.

        The result gives equal outputs, is an ordinary HydraViT and shares no storage with this model.

        Raises:
            ValueError: `num_heads` is not from 1 to the heads held, or the parameters are offloaded or adapted.
        """
        config = self.config.resized(self.config.check_num_heads(num_heads))
        model = assemble(type(self), config, leading_blocks(own_parameters(self), config))
        return carry_quantizer(self, model).train(self.training)


def _find_adapter(checkpoint, adapter_kwargs: dict | None, hub_kwargs: dict) -> tuple:
    """Look for an adapter in a checkpoint.

    Returns where its model is, and the `adapter_kwargs` that make transformers load it, empty if there is none. The
    model is the checkpoint itself if a configuration lies beside the adapter. `AutoModel` has looked before: it passes
    on the model, and these arguments.
    """
    if adapter_kwargs and "_adapter_model_path" in adapter_kwargs:
        return checkpoint, adapter_kwargs
    file = find_adapter_config_file(checkpoint, **hub_kwargs)
    if file is None:
        return checkpoint, {}
    source = {name: hub_kwargs[name] for name in ("revision", "subfolder") if hub_kwargs.get(name)}
    adapter_kwargs = {"_adapter_model_path": str(checkpoint), **source}
    if cached_file(checkpoint, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs) is not None:
        return checkpoint, adapter_kwargs
    return json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"], adapter_kwargs


def _saved_config(checkpoint, config: HydraViTConfig, hub_kwargs: dict) -> HydraViTConfig:
    """The configuration beside a checkpoint: `config` without its overrides, or `config` if there is none."""
    if cached_file(checkpoint, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs) is None:
        return config
    values, _ = type(config).get_config_dict(checkpoint, **hub_kwargs)
    return type(config).from_dict(values)


def _check_shapes(model_class, stored: dict, config: HydraViTConfig):
    """Compare a checkpoint with the configuration beside it, before a model is made from either.

    It counts the layers, and compares the shape of each tensor with that of the parameter of its name. The loading that
    follows reports parameters that are missing or left over.
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
    config.num_hidden_layers = 1  # one layer stands for all of them
    with torch.device("meta"):
        model = model_class(config)
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
