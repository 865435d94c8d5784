"""Folders of training runs: opened once, saved whole, and resumed where they stopped."""

import json
import os
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..folders import is_new_or_empty

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"


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
        previous = json.loads(file.read_text())
        changed = [key for key in settings | previous if settings.get(key) != previous.get(key)]
        if changed:
            changes = ", ".join(f"{key} was {previous.get(key)!r} and is {settings.get(key)!r}" for key in changed)
            raise ValueError(f"'{output_dir}' holds another run than the one to resume: {changes}.")
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
