# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Loading a checkpoint at any width, and saving one without ever losing the checkpoint that was there.

A narrow load reads the leading rows of the safetensors files and cuts the columns in memory. This file travels with
each saved checkpoint as remote code.
"""

import copy
import json
import math
import os
import re
import shutil
import struct
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from transformers import PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    resolve_revision,
)

from .configuration_hydravit import HydraViTConfig
from .nesting_hydravit import (
    assemble,
    count_heads,
    fill_leading_blocks,
    fit_positions_to_grid,
    leading_blocks,
    own_parameters,
)

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
        - `num_attention_heads=k` holds the leading k heads only. From safetensors files, it reads only the rows that
          they need. If the checkpoint has fewer heads, they fill the leading block and the others are newly
          initialised, with a warning.
        - `image_size` (pixels, or (height, width)) interpolates the position embeddings once. The result is an ordinary
          model of that image size.

        Raises:
            ValueError: A width is out of range, or the weights belong to another architecture.
            OSError: The checkpoint does not exist, or a file is truncated or damaged. The message names it.
            RuntimeError: The weights have other shapes than the configuration says.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        # 1. Where is it? One revision holds for all files, whatever is pushed in the meantime.
        hub_kwargs = {name: kwargs.pop(name) for name in _HUB_KWARGS if name in kwargs}
        where = {name: hub_kwargs[name] for name in ("cache_dir", "local_files_only", "token") if name in hub_kwargs}
        hub_kwargs["revision"] = resolve_revision(pretrained_model_name_or_path, hub_kwargs.get("revision"), **where)
        kwargs.pop("trust_remote_code", None)
        if not isinstance(config, PreTrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub_kwargs, **kwargs)
            kwargs |= dtype
        paths = []
        if kwargs.get("use_safetensors") is not False and kwargs.get("state_dict") is None:
            named = getattr(config, "transformers_weights", None)  # a file of another name, as transformers allows
            paths = _find_weights(pretrained_model_name_or_path, kwargs.get("variant"), named, hub_kwargs)
        with _open_weights(paths) as stored:
            # 2. Does it fit?
            saved = _saved_config(pretrained_model_name_or_path, config, hub_kwargs) if paths else config
            if saved is not config and not kwargs.get("ignore_mismatched_sizes"):
                _check_shapes(cls, stored, saved)
            held = count_heads(stored, config)
            if held is None or (held, saved.patch_grid) == (config.num_attention_heads, config.patch_grid):
                return super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, config=config, **hub_kwargs, **kwargs
                )
            # 3. The blocks of this width
            blocks = leading_blocks(stored, saved.resized(config.num_attention_heads))
        blocks = fit_positions_to_grid(blocks, saved.patch_grid, config.patch_grid)
        if held < config.num_attention_heads:
            blocks = fill_leading_blocks(cls(config, *model_args), blocks)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=blocks, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple if the caller wants the loading info
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, variant=None, **kwargs
    ):
        """Save the model, its configuration and its code, as in transformers.

        The files are written aside and then moved into place, the weights last. A save that is interrupted at any
        moment leaves the checkpoint that was there.

        Raises:
            OSError: The disk is full, or can't be written for another reason.
        """
        from .pipeline_hydravit import TASK, HydraViTImageClassificationPipeline  # this import makes its file travel

        impl = f"pipeline_hydravit.{HydraViTImageClassificationPipeline.__name__}"
        pipeline = {"impl": impl, "pt": ["AutoModelForImageClassification"], "type": "image"}
        self.config.auto_map, self.config.custom_pipelines = dict(_AUTO_MAP), {TASK: pipeline}
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
            _move_checkpoint(staging, directory)
        except Exception as error:
            failure = re.search(r"\(os error (\d+)\)", str(error))  # safetensors raises a class of its own
            if failure is None:
                raise
            number = int(failure[1])
            raise OSError(number, os.strerror(number), str(directory)) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def extract_subnetwork(self, num_heads: int):
        """Copy the leading `num_heads` heads into a model of their own.

        The result gives equal outputs, is an ordinary HydraViT and shares no storage with this model.

        Raises:
            ValueError: `num_heads` is not from 1 to the heads held, or the parameters are offloaded or adapted.
        """
        config = self.config.resized(self.config.check_num_heads(num_heads))
        return assemble(type(self), config, leading_blocks(own_parameters(self), config)).train(self.training)


def _find_weights(checkpoint, variant: str | None, named: str | None, hub_kwargs: dict) -> list[str]:
    """Paths of a checkpoint's safetensors files, downloaded if need be. Empty if it has none."""

    def find(name: str) -> str | None:
        if variant is not None:
            name = f".{variant}.".join(name.rsplit(".", 1))
        return cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)

    if named is not None:
        if not re.fullmatch(r"[^/\\:]+[.]safetensors([.]index[.]json)?", named):
            raise ValueError(f"`transformers_weights` must name a safetensors file or index, not {named!r}.")
        weights = index = cached_file(checkpoint, named, **hub_kwargs)
        if named.endswith(".safetensors"):
            return [weights]
    elif (weights := find(SAFE_WEIGHTS_NAME)) is not None:
        return [weights]
    elif (index := find(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    return [cached_file(checkpoint, shard, **hub_kwargs) for shard in _read_index(index)]


def _read_index(file: str) -> list[str]:
    """The names of the shards in an index. They lie beside it and nowhere else."""
    try:
        index = json.loads(Path(file).read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
        if not isinstance(index["metadata"], dict) or not shards:
            raise ValueError("it names no shards, or has no metadata")
        for shard in shards:
            if not re.fullmatch(r"[^/\\:]+[.]safetensors", shard):
                raise ValueError(f"'{shard}' is not the name of a safetensors file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"'{file}' is not an index of shards: {type(error).__name__}: {error}") from error
    return shards


def _saved_config(checkpoint, config: HydraViTConfig, hub_kwargs: dict) -> HydraViTConfig:
    """The configuration beside a checkpoint: `config` without its overrides, or `config` if there is none."""
    if cached_file(checkpoint, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs) is None:
        return config
    values, _ = type(config).get_config_dict(checkpoint, **hub_kwargs)
    return type(config).from_dict(values)


@contextmanager
def _open_weights(paths: list[str]):
    """The tensors of all safetensors files of a checkpoint. The files stay open until all is read, so that a save in
    the meantime can't mix two checkpoints."""
    with ExitStack() as files:
        stored = {}
        for path in paths:
            header = read_header(files.enter_context(open(path, "rb")))
            if twice := stored.keys() & header.keys():
                raise OSError(f"'{path}' holds '{min(twice)}', which another shard holds as well.")
            stored |= header
        yield stored


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


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class StoredTensor:
    """A tensor in an open safetensors file. Slicing it reads the leading rows of the slice and nothing else.

    The rows of a matrix are contiguous, so one read fetches them. Columns are cut in memory, because they share their
    pages with the rest of the row. A memory map (safetensors' `get_slice`) would make the kernel read the whole file.
    """

    def __init__(self, file: BinaryIO, dtype: torch.dtype, shape: list[int], start: int, scratch: bytearray):
        self.file, self.dtype, self.shape, self.start = file, dtype, shape, start
        self.scratch = scratch  # shared by all tensors of a file: fresh memory for each would cost more than its read

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        shape = [len(range(*slices[0].indices(self.shape[0]))), *self.shape[1:]] if slices else []
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=self.dtype)[slices]
        size = count * self.dtype.itemsize
        self.scratch.extend(bytes(max(0, size - len(self.scratch))))
        self.file.seek(self.start)
        if self.file.readinto(memoryview(self.scratch)[:size]) < size:
            raise OSError(f"'{self.file.name}' was cut while it was read.")
        rows = torch.frombuffer(self.scratch, dtype=self.dtype, count=count).view(shape)
        return rows[slices].clone(memory_format=torch.contiguous_format)


def read_header(file: BinaryIO) -> dict[str, StoredTensor]:
    """Read the tensors of a safetensors file: 8 bytes with the header's length, the header (JSON), the data."""
    try:
        file_size = os.fstat(file.fileno()).st_size
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size > file_size:
            raise ValueError("the header does not fit into the file")
        header = json.loads(file.read(header_size))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"its metadata must be strings, not {metadata!r}")
        tensors, scratch, end = {}, bytearray(), 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, start = _SAFETENSORS_DTYPES.get(entry["dtype"]), entry["shape"], end
            if dtype is None or any(type(size) is not int or size < 0 for size in shape + entry["data_offsets"]):
                raise ValueError(f"'{name}' is {entry}")
            end = start + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [start, end]:
                raise ValueError(f"the data of '{name}' does not follow on that of the tensor before it")
            tensors[name] = StoredTensor(file, dtype, shape, 8 + header_size + start, scratch)
        if 8 + header_size + end != file_size:
            raise ValueError(f"it has {file_size} bytes where its header asks for {8 + header_size + end}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise OSError(f"'{file.name}' is not a whole safetensors file: {error}") from error
    if hasattr(os, "posix_fadvise"):  # on Linux; elsewhere the kernel may read somewhat ahead
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return tensors


def _move_checkpoint(staging: Path, directory: Path):
    """Replace the checkpoint in `directory` by the one in `staging`.

    Each file moves in one step. Loading starts from `model.safetensors` or from the index of the shards, so that file
    moves last. No shard takes the name of a shard that the present index needs.
    """
    index_file = staging / SAFE_WEIGHTS_INDEX_NAME
    shards: dict[str, str] = {}
    if index_file.exists():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        for name in set(index["weight_map"].values()):
            copy = 0
            while (directory / shards.get(name, name)).exists():
                copy += 1
                shards[name] = name.replace("model-", f"model-{copy}-", 1)
            shards.setdefault(name, name)
        index["weight_map"] = {tensor: shards[shard] for tensor, shard in index["weight_map"].items()}
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    entries = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    entry = next((name for name in entries if (staging / name).exists()), None)
    for file in sorted(staging.iterdir(), key=lambda file: (file.name == entry, file.name == CONFIG_NAME)):
        os.replace(file, directory / shards.get(file.name, file.name))
    if entry is None:
        return
    for name in set(entries) - {entry}:
        (directory / name).unlink(missing_ok=True)
    for file in directory.iterdir():
        if re.fullmatch(r"model-(\d+-)?\d{5}-of-\d{5}[.]safetensors", file.name) and file.name not in shards.values():
            file.unlink()
