"""Fine-tune a HydraViT on other labels, and at another image size, with the stock Trainer of transformers.

    python examples/finetune_trainer.py    # is a digit odd? A minute on a CPU, from what train_accelerate.py left
    python examples/finetune_trainer.py --model_name_or_path runs/imagenet --data_dir my_images --output_dir runs/mine
    python examples/finetune_trainer.py --from_vit facebook/deit-tiny-patch16-224 --data_dir my_images
    python examples/finetune_trainer.py --lora 8 --learning_rate 1e-3    # trains an adapter, 1 % of the parameters
    python examples/finetune_trainer.py --resume_from_checkpoint latest    # goes on where a run was stopped
    torchrun --nproc_per_node 4 examples/finetune_trainer.py --dataset_name ethz/food101 --image_size 384 --bf16 ...

In `train()` mode the model itself draws a width for each call, so the Trainer trains every subnetwork without knowing
of them. All options of `TrainingArguments` work.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import ClassLabel
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hydravit_hf import ModelCardCallback, reshard_checkpoint
from hydravit_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    SaveArguments,
    describe_card,
    find_checkpoint,
    make_datasets,
    make_model,
    option,
    parse_arguments,
    print_results,
)
from hydravit_hf.training.runs import ends_in_one_line

DIGITS = "runs/digits"  # where train_accelerate.py leaves its model
DEFAULTS = {
    "ignore_mismatched_sizes": True,  # other labels get a new classifier
    "output_dir": "runs/finetuned",
    "num_train_epochs": 5,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of all steps
    "weight_decay": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_strategy": "epoch",
    "report_to": "none",
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "ddp_find_unused_parameters": False,  # there are none: gradients outside of a width are zeros
    "remove_unused_columns": False,  # the transform makes the columns that the model takes
}


@dataclass
class LoraArguments:
    """What is trained."""

    _argument_group_name = "adapter (default: all weights are trained)"

    lora: int | None = option(None, "Train a LoRA adapter of this rank, and the classifier.")


class MergeCallback(TrainerCallback):
    """Saves the adapter and adds it to the weights when training ends, before the card measures what is saved."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(f"{args.output_dir}/adapter", is_main_process=state.is_world_process_zero)
        model.merge_adapter()


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main():
    classes = (DataArguments, ModelArguments, LoraArguments, TrainingArguments, SaveArguments)
    data_args, model_args, lora_args, training_args, files = parse_arguments(__doc__, classes, **DEFAULTS)
    set_seed(training_args.seed)  # for the new classifier; the Trainer seeds the rest
    logging.disable_progress_bar()  # those of loading and saving
    if not (model_args.model_name_or_path or model_args.from_vit):
        model_args.model_name_or_path = DIGITS
        if not Path(DIGITS).exists():
            sys.exit(
                f"There is no '{DIGITS}' yet: run examples/train_accelerate.py first, or give a model to start from."
            )

    # 1. Data, and the names of its classes
    with training_args.main_process_first():
        data = data_args.load()
    data = data_args.leave_out_broken(data)
    if data_args.is_digits:  # the checkpoint was trained on them, so they get other labels
        data = data.map(lambda label: {"label": label % 2}, input_columns="label")
        data = data.cast_column("label", ClassLabel(names=["even", "odd"]))

    # 2. Model: a new classifier, position embeddings for the new image size, all else from the start
    labels = data["train"].features["label"].names
    try:
        model, processor = make_model(data_args, model_args, labels, data["train"])
    except OSError as error:
        start = model_args.model_name_or_path or model_args.from_vit
        sys.exit(f"There is no model to start from at '{start}'. {str(error).splitlines()[0]}")
    train_images, test_images = make_datasets(data, processor)
    if lora_args.lora:  # needs the extra `lora`
        from peft import get_peft_model

        from hydravit_hf.lora import lora_config

        model = get_peft_model(model, lora_config(lora_args.lora))

    # 3. Train. The evaluations on the way run all heads; the callback evaluates every width and writes the model card
    card = describe_card(data_args, model_args, test_images)
    trainer = Trainer(
        model,
        training_args,
        train_dataset=train_images,
        eval_dataset=test_images,
        compute_metrics=accuracy,
        processing_class=processor,  # saved with the model
        callbacks=[*([MergeCallback()] if lora_args.lora else []), ModelCardCallback(test_images, **card)],
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(training_args))
    if lora_args.lora:
        trainer.model = trainer.model_wrapped = model.merge_and_unload()
    trainer.save_model()
    if files.shard_by_heads and trainer.is_world_process_zero():
        reshard_checkpoint(training_args.output_dir)

    # 4. How good each width is, and what it costs
    if trainer.is_world_process_zero():
        print_results(Path(training_args.output_dir), card["dataset_name"])


if __name__ == "__main__":
    with ends_in_one_line():
        main()
