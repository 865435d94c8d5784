# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""The files of a checkpoint: safetensors files read by rows, and folders replaced without ever losing a checkpoint.

This file travels with each saved checkpoint as remote code.
"""

import json
import math
import os
import re
import shutil
import struct
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

try:
    import fcntl  # locks; Windows has none of this kind
except ImportError:
    fcntl = None

DTYPES = {
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


def find_weights(checkpoint, variant: str | None, named: str | None, hub_kwargs: dict) -> list[str]:
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


@contextmanager
def open_weights(paths: list[str]):
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
            dtype, shape, start = DTYPES.get(entry["dtype"]), entry["shape"], end
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


def state_of(checkpoint) -> list:
    """What tells one state of a local checkpoint's files from another. Empty for a Hub id, whose revision is pinned."""
    files = (Path(checkpoint) / name for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    states = [file.stat() for file in files if file.is_file()]
    return [(state.st_ino, state.st_mtime_ns, state.st_size) for state in states]


@contextmanager
def locked(folder: Path, wait: bool = True):
    """Hold the lock of a folder, and yield whether it is held.

    The lock is the system's own: it leaves no file behind, and ends with its process. Without `wait`, a lock that
    another one holds is not held. Neither is any lock on Windows, or on a file system without locks.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_held = False
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_held = True
        yield is_held
    finally:
        os.close(descriptor)


@contextmanager
def staging(directory: Path):
    """A new folder inside `directory` to write a checkpoint in. Folders of saves that were killed are removed first."""
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with locked(directory):
            for left in directory.glob("_saving*"):  # the Trainer uploads nothing that starts with an underscore
                with suppress(FileNotFoundError), locked(left, wait=False) as is_held:
                    if is_held:
                        shutil.rmtree(left, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix="_saving-", dir=directory))
            held.enter_context(locked(staging))
        held.callback(shutil.rmtree, staging, ignore_errors=True)
        yield staging


def move_checkpoint(staging: Path, directory: Path):
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
