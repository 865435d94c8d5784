"""Trains with `HydraViTTrainer` in this process, in one that can be killed, or in several; see test_distributed.py."""

import json
import os
import sys
from pathlib import Path

import psutil
import torch
from support.training import QUIET, losses_of, make_model
from torch.nn.parallel import DistributedDataParallel

from hydravit_hf import HydraViTTrainer, HydraViTTrainingArguments, evaluate_subnetworks, make_image_processor
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.training.augmentation import TrainingAugmentation, TrainingImages


def train(
    output_dir: str,
    augment: bool = False,
    resume: bool = False,
    model: dict | None = None,
    lora: bool = False,
    **arguments,
):
    """Train on the digits, save the model, and write what was measured to `figures.json`. Returns the trainer."""
    model = make_model(**{"subnetwork_heads": [1, 2, 4]} | (model or {}))
    data, processor = load_digits(), make_image_processor(model.config)
    if lora:
        from peft import get_peft_model

        from hydravit_hf.lora import lora_config

        model = get_peft_model(model, lora_config(r=2))
    test = data["test"].with_transform(to_pixel_values(processor))
    if augment:
        train = TrainingImages(data["train"], TrainingAugmentation(processor))
    else:
        train = data["train"].with_transform(to_pixel_values(processor))
    defaults = {"save_strategy": "no", "learning_rate": 3e-3, "logging_steps": 1, "max_steps": 12}
    trainer = HydraViTTrainer(
        model,
        HydraViTTrainingArguments(output_dir, **QUIET | defaults | {"write_model_card": False} | arguments),
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
    )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    assert trainer.args.world_size == world_size
    trainer.train(resume_from_checkpoint=resume)
    if world_size > 1:
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        assert not trainer.model_wrapped.find_unused_parameters
        for weight in trainer.model.parameters():  # the processes have the same weights
            assert all(torch.equal(weight, other) for other in trainer.accelerator.gather(weight[None]))
    trainer.save_model()
    few = [test[index] for index in range(37)]  # which processes can't share evenly
    options = {"batch_size": 5, "accelerator": trainer.accelerator, "disable_tqdm": True}
    figures = {"losses": losses_of(trainer), "metrics": trainer.evaluate()}
    figures["rows"] = evaluate_subnetworks(trainer.model, few, **options)
    if trainer.is_world_process_zero():
        (Path(output_dir) / "figures.json").write_text(json.dumps(figures))
    return trainer


def main(runs: list[dict]):
    torch.set_num_threads(1)
    for options in runs:
        trainer = train(**options)
    accelerator, threads = trainer.accelerator, psutil.Process().num_threads()
    accelerator.wait_for_everyone()
    several = accelerator.num_processes > 1
    del trainer  # DDP's hold on the process group: threads of gloo that outlive their group's end can abort at exit
    accelerator.free_memory()
    accelerator.end_training()
    assert not several or psutil.Process().num_threads() <= threads - 2  # two that work, one that listens


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
