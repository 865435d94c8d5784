"""Fine-tune a HydraViT on other labels, and at another image size, with the stock Trainer of transformers.

    python examples/finetune_trainer.py    # is a digit odd? A minute on a CPU, from what train_accelerate.py left
    python examples/finetune_trainer.py --model_name_or_path runs/imagenet --data_dir my_images --output_dir runs/mine
    torchrun --nproc_per_node 4 examples/finetune_trainer.py --dataset_name ethz/food101 --image_size 384 --bf16 ...

In `train()` mode the model itself draws a width for each call, so the Trainer trains every subnetwork without knowing
of them. All options of `TrainingArguments` work.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import ClassLabel
from transformers import AutoImageProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hydravit_hf import HydraViTForImageClassification, evaluate_subnetworks, make_image_processor
from hydravit_hf.data import load_images, to_pixel_values
from hydravit_hf.reporting import format_table

DIGITS = "runs/digits"  # where train_accelerate.py leaves its model


@dataclass
class Arguments:
    model_name_or_path: str = field(default=DIGITS, metadata={"help": "the HydraViT to start from"})
    dataset_name: str | None = field(default=None, metadata={"help": "a dataset id of the Hub"})
    data_dir: str | None = field(default=None, metadata={"help": "a local folder of images, or of parquet files"})
    image_size: int | None = field(default=None, metadata={"help": "in pixels; default: that of the checkpoint"})


def parse_args() -> tuple[Arguments, TrainingArguments]:
    parser = HfArgumentParser((Arguments, TrainingArguments), description=__doc__.partition("\n")[0])
    parser.set_defaults(
        output_dir="runs/finetuned",
        num_train_epochs=5,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a share of all steps
        weight_decay=0.05,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,  # there are none: what lies outside a width has zeros as gradients
        remove_unused_columns=False,  # the transform makes the columns that the model wants
    )
    return parser.parse_args_into_dataclasses()


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main():
    args, training_args = parse_args()
    set_seed(training_args.seed)  # of the new classifier; the Trainer seeds the rest

    # 1. Data, and what its classes are called
    if args.model_name_or_path == DIGITS and not Path(DIGITS).exists():
        sys.exit(f"There is no '{DIGITS}' yet: run examples/train_accelerate.py first, or give --model_name_or_path.")
    try:
        processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    except OSError as error:
        sys.exit(f"No HydraViT to start from at '{args.model_name_or_path}'. {str(error).splitlines()[0]}")
    with training_args.main_process_first():
        data = load_images(args.dataset_name, args.data_dir)
    if args.dataset_name is None and args.data_dir is None:  # the digits, on which the checkpoint was trained
        data = data.map(lambda label: {"label": label % 2}, input_columns="label")
        data = data.cast_column("label", ClassLabel(names=["even", "odd"]))
    labels = data["train"].features["label"].names

    # 2. Model: a new classifier, position embeddings for the new image size, all else from the checkpoint
    options = {} if args.image_size is None else {"image_size": args.image_size}
    model = HydraViTForImageClassification.from_pretrained(
        args.model_name_or_path,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        **options,
    )
    if args.image_size is not None:
        processor = make_image_processor(model.config, processor.image_mean, processor.image_std)
    data = data.with_transform(to_pixel_values(processor))

    # 3. Train; the evaluations on the way are of all heads
    trainer = Trainer(
        model,
        training_args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=accuracy,
        processing_class=processor,  # saved with the model
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    # 4. What each width is worth
    if trainer.is_world_process_zero():
        rows = evaluate_subnetworks(model, data["test"], batch_size=training_args.per_device_eval_batch_size)
        print(f"\n{format_table(rows)}\n\nAccuracy on {len(data['test'])} held-out images of {labels}")
        print(f"Saved the checkpoint to {training_args.output_dir}")


if __name__ == "__main__":
    main()
