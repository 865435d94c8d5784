"""Train one HydraViT for all its widths with HydraViTTrainer, and report how good each width is and what it costs.

    python examples/train_trainer.py                                      # handwritten digits, two minutes on a CPU
    python examples/train_trainer.py --subnetwork_sampling sandwich --distillation_weight 0.5
    python examples/train_trainer.py --data_dir my_images --from_vit facebook/deit-tiny-patch16-224 --augment
    torchrun --nproc_per_node 4 examples/train_trainer.py --dataset_name ethz/food101 --bf16 --output_dir runs/food

All options of `HydraViTTrainingArguments`, and so of `TrainingArguments`, work. When training ends, the trainer leaves
one checkpoint with the averaged weights, and a model card with the table of all widths.
"""

import shlex
import sys
from pathlib import Path

import torch
from transformers import set_seed
from transformers.utils import logging

from hydravit_hf import HydraViTTrainer, HydraViTTrainingArguments, ModelCardCallback, reshard_checkpoint
from hydravit_hf.training.arguments import (
    AugmentationArguments,
    DataArguments,
    ModelArguments,
    SaveArguments,
    describe_card,
    describe_teacher,
    find_checkpoint,
    find_teacher,
    make_datasets,
    make_model,
    parse_arguments,
    print_results,
)
from hydravit_hf.training.runs import ends_in_one_line

DEFAULTS = {
    "output_dir": "runs/trainer-digits",
    "num_train_epochs": 25,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of all steps
    "weight_decay": 0.05,
    "label_smoothing_factor": 0.1,
    "ema_decay": 0.99,
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


def main():
    classes = (DataArguments, ModelArguments, AugmentationArguments, HydraViTTrainingArguments, SaveArguments)
    data_args, model_args, augmentation, training_args, files = parse_arguments(__doc__, classes, **DEFAULTS)
    set_seed(training_args.seed)  # for a new model; the trainer seeds the rest
    logging.disable_progress_bar()  # those of loading and saving

    # 1. Data and model
    with training_args.main_process_first():
        data = data_args.load()
    data = data_args.leave_out_broken(data)
    labels = data["train"].features["label"].names
    model, processor = make_model(data_args, model_args, labels, data["train"])
    train_images, test_images = make_datasets(data, processor, augmentation, training_args.seed)
    training_args.teacher = find_teacher(training_args.teacher, model_args, labels)

    # 2. The trainer, and a card that names the data and the command
    trainer = HydraViTTrainer(
        model,
        training_args,
        train_dataset=train_images,
        eval_dataset=test_images,
        processing_class=processor,  # saved with the model
    )
    card = describe_card(data_args, model_args, test_images)
    if trainer.teacher is not None and trainer.is_world_process_zero():
        card |= describe_teacher(training_args.teacher, trainer.teacher.model, test_images, card["dataset_name"])
    card["training"] = f"Made by\n\n```bash\n{shlex.join(['python', 'examples/train_trainer.py', *sys.argv[1:]])}\n```"
    if writer := trainer.pop_callback(ModelCardCallback):
        writer.card |= card
        trainer.add_callback(writer)

    # 3. Train the widths of each step, and save one checkpoint
    trainer.train(resume_from_checkpoint=find_checkpoint(training_args))
    trainer.save_model()
    if files.shard_by_heads and trainer.is_world_process_zero():
        reshard_checkpoint(training_args.output_dir)

    # 4. How good each width is, and what it costs
    if writer and trainer.is_world_process_zero():
        print_results(Path(training_args.output_dir), card["dataset_name"])


if __name__ == "__main__":
    with ends_in_one_line():
        main()
