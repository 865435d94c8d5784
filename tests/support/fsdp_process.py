"""Trains with torch's `fully_shard` (FSDP2), two processes, saves and resumes; see test_distributed.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import training
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.training.averaging import AveragedWeights
from hydravit_hf.training.optimizer import parameter_groups
from hydravit_hf.training.steps import backward_widths, sample_subnetworks

STEPS, BATCH = 6, 8


def make_model() -> HydraViTForImageClassification:
    sizes = {"num_hidden_layers": 2, "subnetwork_heads": [1, 2, 3, 4], "separate_classifiers": True}
    return training.make_model(**sizes).train()


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of all processes."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2 * BATCH, 3, 8, 8, generator=generator)
    return images, torch.randint(10, (2 * BATCH,), generator=generator)


def train(model, optimizer, average, steps: range, part: slice):
    """Train on a part of each batch, at a sandwich of widths."""
    for step in steps:
        images, labels = make_batch(step)
        heads = sample_subnetworks(model.config, seed=0, step=step, sampling="sandwich")
        backward_widths(model, images[part], labels[part], heads, step)
        optimizer.step()
        optimizer.zero_grad()
        average.update()


def shard(model) -> HydraViTForImageClassification:
    for layer in model.hydravit.layers:
        fully_shard(layer)
    return fully_shard(model)


def make_optimizer(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, weight_decay=0.05), lr=1e-3)


def train_and_save(output_dir: Path, rank: int):
    part = slice(rank * BATCH, (rank + 1) * BATCH)
    # 1. Half of the training, and a checkpoint of each process's part
    model = shard(make_model())
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    optimizer = make_optimizer(model)
    train(model, optimizer, AveragedWeights(model, 0.9), range(STEPS // 2), part)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=output_dir / "state")
    # 2. The other half, with a new model
    model = shard(make_model())
    optimizer = make_optimizer(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=output_dir / "state")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    average = AveragedWeights(model, 0.9)
    train(model, optimizer, average, range(STEPS // 2, STEPS), part)
    # 3. One ordinary checkpoint of the last weights, and one of the average
    for name in ("last", "average"):
        if name == "average":
            average.swap()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
        if rank == 0:
            model.save_pretrained(output_dir / name, state_dict=weights)
        dist.barrier()


def main(output_dir: Path):
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    train_and_save(output_dir, dist.get_rank())
    dist.destroy_process_group()
    os._exit(0)  # at once: FSDP keeps gloo's threads, and one that frees a tensor as Python ends aborts the process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
