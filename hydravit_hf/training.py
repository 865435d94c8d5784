"""What a training loop needs beyond the model: the draw of widths, parameter groups, and runs that survive a crash."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from torch import nn

from .configuration_hydravit import HydraViTConfig

RUN_FILE = "run.json"


def sample_num_heads(config: HydraViTConfig, seed: int, step: int) -> int:
    """The heads to train at `step`, drawn from `config.subnetwork_heads` with `config.subnetwork_weights`.

    A pure function of its arguments: every process draws the same width, and a resumed run replays the draws. (In the
    original each process draws its own, so that a step of two processes averages two widths.)
    """
    return int(np.random.default_rng([seed, step]).choice(config.subnetwork_heads, p=config.subnetwork_odds))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimizer: matrices and kernels decay; biases, norms, tokens and positions do not."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.endswith("weight") and parameter.ndim > 1].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def open_run(output_dir: Path, settings: dict, resume: bool, overwrite: bool):
    """Make `output_dir` the folder of this run, before any work is done.

    Args:
        output_dir: The folder.
        settings: What makes this run the one that it is, as JSON; a resumed run must have the same.
        resume: Whether to go on with the run that the folder holds.
        overwrite: Whether to start anew in a folder that is not empty; the checkpoints in it are deleted.

    Raises:
        ValueError: The folder holds something else, or another run than that to resume.
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
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise ValueError(
            f"'{output_dir}' is not empty: choose another --output_dir, or go on with --resume_from_checkpoint, or "
            "start anew with --overwrite_output_dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    for checkpoint in list_checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def save_checkpoint(accelerator, output_dir: Path, step: int, keep: int | None = None):
    """Save the state of a run as `checkpoint-{step}`; the folder gets its name once it is complete.

    Args:
        accelerator: The `accelerate.Accelerator` that prepared what is to be saved.
        output_dir: The folder of the run.
        step: Optimizer steps taken.
        keep: Checkpoints to keep; the oldest ones go. None: all.
    """
    unfinished = output_dir / "_checkpoint"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finished = output_dir / f"checkpoint-{step}"
        shutil.rmtree(finished, ignore_errors=True)  # of a run that resumed from an earlier one
        os.replace(unfinished, finished)
        for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
            shutil.rmtree(old)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(output_dir.glob("checkpoint-[0-9]*"), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer steps taken at a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
