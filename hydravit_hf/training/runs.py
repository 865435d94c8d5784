"""Folders of training runs: opened once, saved whole, and resumed where they stopped."""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..folders import is_new_or_empty

logger = logging.get_logger(__name__)

RUN_FILE, DATA_FILE = "run.json", "data.json"


def open_run(output_dir: Path, settings: dict, resume: bool, overwrite: bool):
    """Make `output_dir` the folder of this run, before any work is done.

    Args:
        output_dir: The folder.
        settings: Settings that identify the run, as JSON. A resumed run must have the same.
        resume: Whether to go on with the run that the folder holds.
        overwrite: Whether to start anew in a folder that is not empty. The checkpoints in it are deleted.

    Raises:
        ValueError: The folder holds other files, or another run than the one to resume.
    """
    file = output_dir / RUN_FILE
    settings = json.loads(json.dumps(settings))
    if resume:
        if not file.exists():
            raise ValueError(f"There is no run to resume in '{output_dir}'.")
        check_same_run(json.loads(file.read_text()), settings, output_dir)
        return
    if output_dir.is_file():
        raise ValueError(f"'{output_dir}' is a file, not a folder.")
    if not is_new_or_empty(output_dir) and not overwrite:
        raise ValueError(
            f"'{output_dir}' is not empty: choose another --output_dir, or go on with --resume_from_checkpoint, or "
            "start anew with --overwrite_output_dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    for checkpoint in list_checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def check_same_run(previous: dict, present: dict, folder: Path):
    """Raise a `ValueError` that names each setting in which a run differs from the one that `folder` holds."""
    changed = [key for key in present | previous if present.get(key) != previous.get(key)]
    if changed:
        changes = ", ".join(f"{key} was {previous.get(key)!r} and is {present.get(key)!r}" for key in changed)
        raise ValueError(f"'{folder}' holds another run than the one to resume: {changes}.")


def describe_data(dataset) -> dict:
    """What identifies the training data of a run: the number of images, and a hash of their labels in their order.

    Args:
        dataset: The images to train on. Only a `datasets.Dataset` with a column of labels, or `TrainingImages` of one,
            has a hash; only data with a length have a number.
    """
    described = {}
    with suppress(TypeError, AttributeError):
        described["images"] = len(dataset)
    source = getattr(dataset, "dataset", dataset)
    column = next((name for name in ("label", "labels") if name in (getattr(source, "column_names", None) or ())), None)
    if "images" in described and column is not None and hasattr(source, "with_format"):
        labels = json.dumps(list(source.select_columns(column).with_format(None)[column]))
        described["labels"] = hashlib.sha256(labels.encode()).hexdigest()[:16]
    return described


def open_data(output_dir: Path, dataset, resume: bool):
    """Note the training data of a run in its folder, or compare them with the noted ones if the run is resumed.

    Raises:
        ValueError: The data are others than those that the run began with.
    """
    file, described = output_dir / DATA_FILE, describe_data(dataset)
    if resume and file.exists():
        check_same_run(json.loads(file.read_text(encoding="utf-8")), described, output_dir)
    else:
        file.write_text(json.dumps(described) + "\n", encoding="utf-8")


class Preemption:
    """Notes SIGTERM, by which clusters announce the end of a process, so that a loop can save a checkpoint first.

    Use it as a context. Signals reach the main thread only; in other threads it does nothing.
    """

    def __init__(self):
        self.noted = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_):
        self.noted = True

    def __exit__(self, *_):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._former)

    def is_near(self, accelerator) -> bool:
        """Whether any process of an `accelerate.Accelerator` has got the signal. Call it in all processes alike."""
        if accelerator.num_processes == 1:
            return self.noted
        noted = torch.tensor([float(self.noted)], device=accelerator.device)
        return accelerator.reduce(noted, "sum").item() > 0


@contextmanager
def ends_in_one_line():
    """Within this context, Ctrl-C ends a script with one line and the exit code 130, as shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted. `--resume_from_checkpoint latest` goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


def save_checkpoint(accelerator, output_dir: Path, step: int, keep: int | None = None):
    """Save the state of a run as `checkpoint-{step}`. The folder gets its name when it is complete.

    Args:
        accelerator: The `accelerate.Accelerator` that prepared the objects to save.
        output_dir: The folder of the run.
        step: Number of optimizer steps taken.
        keep: Number of checkpoints to keep; the oldest ones are deleted. None keeps all.
    """
    unfinished = output_dir / "_checkpoint"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finished = output_dir / f"checkpoint-{step}"
        shutil.rmtree(finished, ignore_errors=True)  # left by a run that was resumed from an earlier one
        os.replace(unfinished, finished)
        for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
            shutil.rmtree(old)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, the oldest first."""
    folders = (folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name))
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Number of optimizer steps taken at a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_whole_checkpoint(output_dir: Path, world_size: int = 1) -> Path:
    """The last checkpoint of a `Trainer` that all of its processes finished. It warns of each that they did not.

    Raises:
        ValueError: There is none.
    """
    for checkpoint in reversed(list_checkpoints(output_dir)):
        if _is_whole(checkpoint, world_size):
            return checkpoint
        logger.warning(f"'{checkpoint}' was not saved whole: the one before it is used.")
    raise ValueError(f"There is no whole checkpoint to resume from in '{output_dir}'.")


def _is_whole(checkpoint: Path, world_size: int) -> bool:
    """Whether all processes finished a save. The main process writes the state of the training last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return world_size == 1 or all((checkpoint / f"rng_state_{rank}.pth").exists() for rank in range(world_size))
