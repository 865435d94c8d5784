"""Trains with `HydraViTTrainer` as a process that can be killed, or as several; see test_distributed.py."""

import json
import os
import sys
from pathlib import Path

import psutil
import torch
from torch.nn.parallel import DistributedDataParallel

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, make_image_processor
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.training.augmentation import TrainingAugmentation, TrainingImages
from hydravit_hf.training.trainer import HydraViTTrainer, HydraViTTrainingArguments


def main(output_dir: str, augment: bool = False, resume: bool = False, model: dict | None = None, **arguments):
    config = HydraViTConfig(
        num_attention_heads=4,
        head_dim=8,
        num_hidden_layers=1,
        image_size=8,
        patch_size=4,
        num_labels=10,
        subnetwork_heads=[1, 2, 4],
        **model or {},
    )
    torch.manual_seed(0)
    data, processor = load_digits(), make_image_processor(config)
    train = data["train"].with_transform(to_pixel_values(processor))
    if augment:
        train = TrainingImages(data["train"], TrainingAugmentation(processor))
    defaults = {"save_strategy": "no", "learning_rate": 3e-3, "logging_steps": 1, "max_steps": 12}
    defaults |= {"report_to": "none", "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
    trainer = HydraViTTrainer(
        HydraViTForImageClassification(config),
        HydraViTTrainingArguments(output_dir, **defaults | arguments),
        train_dataset=train,
        eval_dataset=data["test"].with_transform(to_pixel_values(processor)),
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
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (Path(output_dir) / "figures.json").write_text(json.dumps({"losses": losses, "metrics": metrics}))
    accelerator, threads = trainer.accelerator, psutil.Process().num_threads()
    accelerator.wait_for_everyone()
    del trainer  # DDP's hold on the process group: threads of gloo that outlive their group's end can abort at exit
    accelerator.free_memory()
    accelerator.end_training()
    assert world_size == 1 or psutil.Process().num_threads() <= threads - 2  # two that work, one that listens


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
