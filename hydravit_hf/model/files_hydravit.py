# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Safetensors files read by rows, and folders replaced without ever losing a checkpoint.

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
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

try:
    import fcntl  # locks; Windows has none of this kind
except ImportError:
    fcntl = None

# What a load starts from, and what an index leads to: shards of a size, of a width, or of a size within a width
ENTRIES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
SHARD = re.compile(r"model-(\d+-)?(\d{5}-of-\d{5}|\d{2,}-heads(-\d{5}-of-\d{5})?)[.]safetensors")
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


class StoredTensor:
    """A tensor in an open safetensors file. Slicing it reads the leading rows of the slice and nothing else.

    The rows of a matrix are contiguous, so one read fetches them. Columns are cut in memory, because they share their
    pages with the rest of the row. A memory map (safetensors' `get_slice`) would make the kernel read the whole file.
    """

    def __init__(self, file: BinaryIO, dtype: torch.dtype, shape: list[int], start: int, scratch: bytearray):
        self.file, self.dtype, self.shape, self.start = file, dtype, shape, start
        self.scratch = scratch  # shared by all tensors of a file: fresh memory for each would cost more than its read

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        return self.read_into(empty_slice(self, slices))

    def read_into(self, target: torch.Tensor) -> torch.Tensor:
        """Fill `target`, which may be a part of a larger tensor, from the leading block of its shape."""
        shape = [*target.shape[:1], *self.shape[1:]]
        count = math.prod(shape)
        if target.numel() == 0:
            return target
        size = count * self.dtype.itemsize
        if shape == list(target.shape) and target.is_contiguous():
            self._read(memoryview(target.flatten().view(torch.uint8).numpy()))
            return target
        self.scratch.extend(bytes(max(0, size - len(self.scratch))))
        self._read(memoryview(self.scratch)[:size])
        rows = torch.frombuffer(self.scratch, dtype=self.dtype, count=count).view(shape)
        return target.copy_(rows[tuple(map(slice, target.shape))])

    def _read(self, memory: memoryview):
        self.file.seek(self.start)
        if self.file.readinto(memory) < len(memory):
            raise OSError(f"'{self.file.name}' was cut while it was read.")


def empty_slice(tensor, slices: tuple[slice, ...]) -> torch.Tensor:
    """Memory for a slice of a stored tensor."""
    shape = [len(range(*cut.indices(size))) for cut, size in zip(slices, tensor.shape, strict=True)]
    return torch.empty(shape, dtype=tensor.dtype)


def read_header(file: BinaryIO) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read what a safetensors file holds, its tensors and its metadata: 8 bytes with the header's length, the header
    (JSON), the data."""
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
    return tensors, metadata


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]):
    """Write a safetensors file, the same bytes each time: safetensors draws the order of the metadata."""
    save_file(tensors, path, metadata)
    with open(path, "r+b") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size)) | {"__metadata__": metadata}
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(header_size))


def advise(file: BinaryIO, is_needed_whole: bool):
    """Tell the kernel, on Linux, to read a file far ahead, or only what is asked for."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL if is_needed_whole else os.POSIX_FADV_RANDOM)


def state_of(checkpoint) -> list:
    """What tells one state of a local checkpoint's files from another. Empty for a Hub id, whose revision is pinned."""
    files = (Path(checkpoint) / name for name in (CONFIG_NAME, *ENTRIES))
    states = [file.stat() for file in files if file.is_file()]
    return [(state.st_ino, state.st_mtime_ns, state.st_size) for state in states]


@contextmanager
def disk_errors(directory: Path):
    """Raise the errors of a disk that safetensors reports as `OSError`, as Python does."""
    try:
        yield
    except SafetensorError as error:
        failure = re.search(r"\(os error (\d+)\)", str(error))
        if failure is None:
            raise
        number = int(failure[1])
        raise OSError(number, os.strerror(number), str(directory)) from error


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
        if heads := index["metadata"].get("heads"):  # files by width
            index["metadata"]["heads"] = {width: [shards[name] for name in names] for width, names in heads.items()}
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    entry = next((name for name in ENTRIES if (staging / name).exists()), None)
    for file in sorted(staging.iterdir(), key=lambda file: (file.name == entry, file.name == CONFIG_NAME)):
        os.replace(file, directory / shards.get(file.name, file.name))
    if entry is None:
        return
    for name in set(ENTRIES) - {entry}:
        (directory / name).unlink(missing_ok=True)
    for file in directory.iterdir():
        if SHARD.fullmatch(file.name) and file.name not in shards.values():
            file.unlink()
