# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""The weights of a checkpoint: one file, shards of any size, or files by width, of which a width needs the first ones.

The first of the files by width is the narrowest model, under the ordinary names. Each further one holds what its width
adds. To widen a parameter NAME from 3 to 6 heads, concatenate `NAME.heads_4_to_6.dim_1` to it along dimension 1 (the
right part of a matrix), then `NAME.heads_4_to_6.dim_0` along dimension 0 (its lower part, or the end of a vector). The
index lists the files of each width under `metadata.heads`. Index and files name the checkpoint that they belong to.

This file travels with each saved checkpoint as remote code.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration_hydravit import HydraViTConfig
from .files_hydravit import StoredTensor, advise, empty_slice, read_header, save_tensors
from .nesting_hydravit import leading_shapes
from .quantization_hydravit import cut_metadata

PART = re.compile(r"(?P<name>.+)[.]heads_(?P<first>\d+)_to_(?P<last>\d+)[.]dim_(?P<dim>\d)")
FILE_METADATA = ("format", "checkpoint", "heads")  # the others describe quantized weights


class Shard(NamedTuple):
    """A file of weights. The other fields are what the index says of a file by width."""

    path: str
    heads: tuple[int, int] | None = None  # the first and the last of those that it adds
    total: int | None = None  # the heads of the whole checkpoint
    names: frozenset[str] = frozenset()
    checkpoint: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def find_weights(checkpoint, num_heads: int, variant: str | None, named: str | None, hub_kwargs: dict) -> list[Shard]:
    """The safetensors files of a checkpoint that a width needs, downloaded if need be. Empty if it has none."""

    def find(name: str) -> str | None:
        if variant is not None:
            name = f".{variant}.".join(name.rsplit(".", 1))
        return cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)

    if named is not None:
        if not re.fullmatch(r"[^/\\:]+[.]safetensors([.]index[.]json)?", named):
            raise ValueError(f"`transformers_weights` must name a safetensors file or index, not {named!r}.")
        weights = index = cached_file(checkpoint, named, **hub_kwargs)
        if named.endswith(".safetensors"):
            return [Shard(weights)]
    elif (weights := find(SAFE_WEIGHTS_NAME)) is not None:
        return [Shard(weights)]
    elif (index := find(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    needed = [shard for shard in read_index(index) if shard.heads is None or shard.heads[0] <= num_heads]
    return [shard._replace(path=cached_file(checkpoint, shard.path, **hub_kwargs)) for shard in needed]


def read_index(file: str | Path) -> list[Shard]:
    """The shards in an index, the narrowest width first. They lie beside it and nowhere else."""
    try:
        index = json.loads(Path(file).read_text(encoding="utf-8"))
        weight_map, metadata = index["weight_map"], index["metadata"]
        shards = sorted(set(weight_map.values()))
        if not isinstance(metadata, dict) or not shards:
            raise ValueError("it names no shards, or has no metadata")
        for shard in shards:
            if not re.fullmatch(r"[^/\\:]+[.]safetensors", shard):
                raise ValueError(f"'{shard}' is not the name of a safetensors file beside it")
        if "heads" not in metadata:
            return [Shard(shard) for shard in shards]
        return list(_read_widths(weight_map, metadata["heads"], metadata["checkpoint"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"'{file}' is not an index of shards: {type(error).__name__}: {error}") from error


def _read_widths(weight_map: dict[str, str], heads: dict[str, list[str]], checkpoint: str) -> Iterator[Shard]:
    widths = {int(last): files for last, files in heads.items()}
    listed = [file for files in widths.values() for file in files]
    if len(widths) < len(heads) or min(widths) < 1 or sorted(listed) != sorted(set(weight_map.values())):
        raise ValueError("`heads` must list each file of `weight_map` once, by the last head that it holds")
    first = 1
    for last, files in sorted(widths.items()):
        for file in files:
            names = frozenset(name for name, found in weight_map.items() if found == file)
            for match in filter(None, map(PART.fullmatch, names)):
                if (int(match["first"]), int(match["last"])) != (first, last):
                    raise ValueError(f"'{match[0]}' can't be in '{file}', which adds heads {first} to {last}")
            yield Shard(file, (first, last), max(widths), names, checkpoint)
        first = last + 1


@contextmanager
def open_weights(shards: list[Shard]):
    """The tensors in the files of a checkpoint, and the metadata of the widest file. The files stay open until all is
    read, so that a save in the meantime can't mix two checkpoints."""
    with ExitStack() as files:
        stored, described = {}, {}
        for shard in shards:
            file = files.enter_context(open(shard.path, "rb"))
            header, metadata = read_header(file)
            if shard.heads is not None:
                _check_shard(shard, header.keys(), metadata)
            if twice := stored.keys() & header.keys():
                raise OSError(f"'{shard.path}' holds '{min(twice)}', which another shard holds as well.")
            advise(file, is_needed_whole=shard.heads is not None)
            stored, described = stored | header, described | metadata
        yield _join(stored) if is_by_heads(shards) else stored, described


def is_by_heads(shards: list[Shard]) -> bool:
    return any(shard.heads is not None for shard in shards)


def _check_shard(shard: Shard, names: set[str], metadata: dict[str, str]):
    """Compare a file by width with what its index says of it."""
    heads = "{}-{}".format(*shard.heads)
    if metadata.get("heads") != heads:
        raise OSError(f"'{shard.path}' holds the heads {metadata.get('heads')}; its index says {heads}.")
    if metadata.get("checkpoint") != shard.checkpoint:
        raise OSError(f"'{shard.path}' belongs to another checkpoint than its index.")
    if other := shard.names ^ names:
        where = "only in the index" if min(other) in shard.names else "not in the index"
        raise OSError(f"'{shard.path}' has other tensors than its index says: '{min(other)}' is {where}.")


class JoinedTensor:
    """A tensor whose parts lie in the files of several widths. Slicing it reads each part into its place."""

    def __init__(self, block: StoredTensor):
        self.parts, self.dtype, self.shape = [([0] * len(block.shape), block)], block.dtype, list(block.shape)

    def append(self, part: StoredTensor, dim: int):
        """Concatenate a part along a dimension."""
        shape = [*self.shape[:dim], *part.shape[dim : dim + 1], *self.shape[dim + 1 :]]
        if dim >= len(self.shape) or part.shape != shape or part.dtype != self.dtype:
            raise ValueError(f"it is of {part.dtype} and shape {part.shape} beside {self.dtype} and {self.shape}")
        start = [self.shape[dim] if other == dim else 0 for other in range(len(shape))]
        self.parts.append((start, part))
        self.shape[dim] += part.shape[dim]

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        target = empty_slice(self, slices)
        for start, part in self.parts:
            cuts = zip(start, part.shape, target.shape, strict=True)
            part.read_into(target[tuple(slice(begin, min(begin + size, end)) for begin, size, end in cuts)])
        return target


def _join(stored: dict[str, StoredTensor]) -> dict[str, JoinedTensor]:
    """Put the parts of each tensor together, in the order of the widths, the right part of a matrix first."""
    parts = [match for match in map(PART.fullmatch, stored) if match]
    joined = {name: JoinedTensor(tensor) for name, tensor in stored.items() if not PART.fullmatch(name)}
    for match in sorted(parts, key=lambda match: (int(match["first"]), -int(match["dim"]))):
        part = stored[match[0]]
        try:
            joined[match["name"]].append(part, int(match["dim"]))
        except (KeyError, ValueError) as error:
            raise OSError(f"'{match[0]}' of '{part.file.name}' fits on no narrower part: {error}") from error
    return joined


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def resolve_shard_heads(shard_by_heads: bool | list[int], config: HydraViTConfig) -> list[int]:
    """The widths that get a file: the trained ones, or those of a list, and always all heads.

    Raises:
        ValueError: The list is empty, or names a width that was not trained.
    """
    trained = sorted({*config.subnetwork_heads, config.num_attention_heads})
    heads = trained if shard_by_heads is True else shard_by_heads
    if not isinstance(heads, (list, tuple)) or not heads or any(type(k) is not int or k not in trained for k in heads):
        raise ValueError(f"`shard_by_heads` must list some of {trained}, or be True or False, not {shard_by_heads!r}.")
    return sorted({*heads, config.num_attention_heads})


def write_by_heads(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: HydraViTConfig,
    heads: list[int],
    max_shard_size: int | str = "50GB",
    metadata: dict[str, str] | None = None,
):
    """Write the weights of a model into a folder, in files by width.

    Args:
        folder: A folder without weights.
        tensors: Parameters by their names. Equal ones give equal files.
        config: Configuration of the model.
        heads: The widths that get a file, with all heads last.
        max_shard_size: Size beyond which the files of one width are split further.
        metadata: Metadata of quantized weights. Each file gets those of its width.
    """
    checkpoint = _hash(tensors)
    saved = {name: text for name, text in sorted((metadata or {}).items()) if name not in FILE_METADATA}
    metadata, weight_map = {"checkpoint": checkpoint, "heads": {}}, {}
    for first, last, parts in split_by_heads(tensors, config, heads):
        described = cut_metadata(saved, leading_shapes(tensors, config.resized(last)))
        split = split_torch_state_dict_into_shards(
            parts, filename_pattern=f"model-{last:02d}-heads{{suffix}}.safetensors", max_shard_size=max_shard_size
        )
        for file, names in split.filename_to_tensors.items():
            held = {"format": "pt", "checkpoint": checkpoint, "heads": f"{first}-{last}"} | described
            save_tensors({name: parts[name] for name in names}, folder / file, held)
        weight_map |= split.tensor_to_filename
        metadata["heads"][str(last)] = sorted(split.filename_to_tensors)
    metadata["total_parameters"] = sum(tensor.numel() for tensor in tensors.values())
    metadata["total_size"] = sum(tensor.nbytes for tensor in tensors.values())
    index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index, encoding="utf-8")


def split_by_heads(
    tensors: dict[str, torch.Tensor], config: HydraViTConfig, heads: list[int]
) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
    """Split parameters into what each width adds: its first head, its last head, and the parts by their names."""
    shapes = [{}, *(leading_shapes(tensors, config.resized(last)) for last in heads)]
    for (narrower, wider), (before, last) in zip(pairwise(shapes), pairwise([0, *heads]), strict=True):
        parts = {}
        for name, shape in wider.items():
            tensor, held = tensors[name], narrower.get(name)
            if held is None:
                parts[name] = tensor[tuple(map(slice, shape))].contiguous()
                continue
            for dim in range(len(shape)):
                if held[dim] < shape[dim]:
                    cuts = (*map(slice, held[:dim]), slice(held[dim], shape[dim]), *map(slice, shape[dim + 1 :]))
                    parts[f"{name}.heads_{before + 1}_to_{last}.dim_{dim}"] = tensor[cuts].contiguous()
        yield before + 1, last, parts


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    """A name for the checkpoint of these tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
