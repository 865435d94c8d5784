"""Train one HydraViT for all its widths, with Accelerate, and report what each width is worth.

    python examples/train_accelerate.py                                   # handwritten digits, two minutes on a CPU
    accelerate launch examples/train_accelerate.py --dataset_name ILSVRC/imagenet-1k --output_dir runs/imagenet
    python examples/train_accelerate.py --data_dir my_images --from_vit facebook/deit-tiny-patch16-224

Each step draws one width, the same in all processes, and trains that subnetwork alone (paper, section 3). At the end
the averaged weights are saved as one checkpoint, which is loaded anew at every width for the table.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from huggingface_hub import HfApi
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, default_data_collator, get_cosine_schedule_with_warmup
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file, logging

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.data import load_images, to_pixel_values
from hydravit_hf.evaluation import evaluate_subnetworks
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.profiling import count_macs, count_parameters
from hydravit_hf.reporting import format_table, plot_accuracy
from hydravit_hf.training import (
    checkpoint_step,
    list_checkpoints,
    open_run,
    parameter_groups,
    sample_num_heads,
    save_checkpoint,
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data (default: the handwritten digits of scikit-learn)")
    data.add_argument("--dataset_name", help="a dataset id of the Hub")
    data.add_argument("--data_dir", help="a local folder of images, or of parquet files")
    data.add_argument("--num_workers", type=int, default=0, help="processes that load images")
    model = parser.add_argument_group("model (default: a new one)")
    model.add_argument("--model_name_or_path", help="start from this HydraViT")
    model.add_argument("--from_vit", help="start from this ViT or DeiT")
    model.add_argument("--ignore_mismatched_sizes", action="store_true", help="new classifier for other labels")
    model.add_argument("--num_attention_heads", type=int, default=12)
    model.add_argument("--num_hidden_layers", type=int, help="default: 12, or 3 for the digits")
    model.add_argument("--image_size", type=int, help="default: 224, or 8 for the digits")
    model.add_argument("--patch_size", type=int, help="default: 16, or 4 for the digits")
    model.add_argument("--drop_path_rate", type=float, default=0.0)
    model.add_argument("--subnetwork_heads", type=int, nargs="+", help="widths to train; default: 3 up to all")
    model.add_argument(
        "--subnetwork_weights", type=float, nargs="+", help="their odds; default: uniform, or 3 1 1 ... for the digits"
    )
    model.add_argument("--separate_classifiers", action="store_true", help="one classifier for each width")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--num_train_epochs", type=int, default=25)
    recipe.add_argument("--max_train_steps", type=int, help="optimizer steps, instead of epochs")
    recipe.add_argument("--per_device_train_batch_size", type=int, default=64)
    recipe.add_argument("--per_device_eval_batch_size", type=int, default=128)
    recipe.add_argument("--gradient_accumulation_steps", type=int, default=1)
    recipe.add_argument("--learning_rate", type=float, default=5e-4)
    recipe.add_argument("--weight_decay", type=float, default=0.05)
    recipe.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps that warm up")
    recipe.add_argument("--label_smoothing", type=float, default=0.1)
    recipe.add_argument("--max_grad_norm", type=float, default=1.0)
    recipe.add_argument("--ema_decay", type=float, default=0.99, help="of the averaged weights; 0: no averaging")
    recipe.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    recipe.add_argument("--seed", type=int, default=0)
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, default=Path("runs/digits"))
    run.add_argument("--overwrite_output_dir", action="store_true")
    run.add_argument(
        "--evaluation_epochs", type=int, help="evaluate all widths every so many epochs, not only at the end"
    )
    run.add_argument("--checkpointing_steps", help="save the state every so many steps, or 'epoch'")
    run.add_argument("--checkpoints_total_limit", type=int, help="checkpoints to keep")
    run.add_argument("--resume_from_checkpoint", help="a checkpoint folder of this run, or 'latest'")
    run.add_argument("--with_tracking", action="store_true")
    run.add_argument("--report_to", default="all", help="tensorboard, wandb, ...; all: those that are installed")
    run.add_argument("--push_to_hub", action="store_true")
    run.add_argument("--hub_model_id", help="default: the name of the output folder")
    args = parser.parse_args()
    if args.model_name_or_path and args.from_vit:
        parser.error("give --model_name_or_path or --from_vit, not both")
    if args.checkpointing_steps not in (None, "epoch") and not str(args.checkpointing_steps).isdigit():
        parser.error("--checkpointing_steps must be a number or 'epoch'")
    return args


# What may differ between a run and its resumption
FREE = {"output_dir", "overwrite_output_dir", "num_workers", "evaluation_epochs", "checkpointing_steps", "report_to"}
FREE |= {"checkpoints_total_limit", "resume_from_checkpoint", "with_tracking", "push_to_hub", "hub_model_id"}
DIGITS = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 3}  # a small model for small images


def make_model(args, labels: list[str]):
    """The model to train, new or from a checkpoint, and its image processor."""
    on_digits = args.dataset_name is None and args.data_dir is None
    sizes = (DIGITS if on_digits else {}) | {
        name: getattr(args, name) for name in DIGITS if getattr(args, name) is not None
    }
    options = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    for name in ("drop_path_rate", "subnetwork_heads", "subnetwork_weights", "separate_classifiers"):
        if getattr(args, name):
            options[name] = getattr(args, name)
    if args.from_vit:
        options |= {"num_attention_heads": args.num_attention_heads, "num_labels": len(labels)}
        model = HydraViTForImageClassification.from_vit(args.from_vit, **options)
    elif args.model_name_or_path:
        options["ignore_mismatched_sizes"] = args.ignore_mismatched_sizes
        model = HydraViTForImageClassification.from_pretrained(args.model_name_or_path, **options)
    else:
        config = HydraViTConfig(num_attention_heads=args.num_attention_heads, **sizes, **options)
        if on_digits and args.subnetwork_weights is None:  # the narrowest, a part of all others, more often
            config.subnetwork_weights = [3.0] + [1.0] * (len(config.subnetwork_heads) - 1)
        model = HydraViTForImageClassification(config)
    source = args.from_vit or args.model_name_or_path
    if source and cached_file(source, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False):
        return model, AutoImageProcessor.from_pretrained(source)
    if on_digits:
        return model, make_image_processor(model.config, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return model, make_image_processor(model.config)


def main():
    args = parse_args()
    # 1. The run: its folder, its processes, its seed
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE and value is not None}
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    if accelerator.is_main_process:
        if args.push_to_hub:  # first, as it fails without a token
            repo_id = HfApi().create_repo(args.hub_model_id or args.output_dir.name, exist_ok=True).repo_id
        open_run(args.output_dir, settings, args.resume_from_checkpoint is not None, args.overwrite_output_dir)
    accelerator.wait_for_everyone()
    if args.with_tracking:
        accelerator.init_trackers("hydravit", config=settings)
    set_seed(args.seed)
    logging.disable_progress_bar()

    # 2. Data and model
    with accelerator.main_process_first():
        data = load_images(args.dataset_name, args.data_dir)
    model, processor = make_model(args, data["train"].features["label"].names)
    data = data.with_transform(to_pixel_values(processor))
    train_loader = DataLoader(
        data["train"],
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=default_data_collator,
        num_workers=args.num_workers,
        generator=torch.Generator(),  # so that a resumed epoch doesn't advance the generator that dropout draws from
    )
    heads = model.config.subnetwork_heads
    evaluation = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.num_workers}
    evaluation |= {"accelerator": accelerator, "disable_tqdm": True}

    # 3. Optimizer, schedule, averaged weights
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate, fused=True)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    steps_per_epoch = len(train_loader) // args.gradient_accumulation_steps
    if steps_per_epoch == 0:
        raise ValueError(f"{len(data['train'])} training images are fewer than one step takes.")
    by_epoch = args.checkpointing_steps == "epoch"
    checkpointing_steps = steps_per_epoch if by_epoch else int(args.checkpointing_steps or 0)
    max_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    scheduler = get_cosine_schedule_with_warmup(optimizer.optimizer, round(args.warmup_ratio * max_steps), max_steps)
    plain_model = accelerator.unwrap_model(model)
    average = AveragedModel(plain_model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    accelerator.register_for_checkpointing(scheduler, average)
    step = 0
    if args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        if args.resume_from_checkpoint == "latest":
            checkpoint = (list_checkpoints(args.output_dir) or [None])[-1]
        if checkpoint is not None:  # else the run stopped before its first checkpoint, and starts anew
            accelerator.load_state(str(checkpoint))
            step = checkpoint_step(checkpoint)
            accelerator.print(f"Resumed from {checkpoint}")

    # 4. Train one width a step
    accelerator.print(
        f"Training widths {heads} of {plain_model.num_parameters() / 1e6:.1f} M parameters for {max_steps} steps, on "
        f"{len(data['train'])} images, {accelerator.device.type}, {accelerator.num_processes} processes"
    )
    progress = tqdm(total=max_steps, initial=step, desc="Training", disable=not accelerator.is_local_main_process)
    while step < max_steps:
        epoch, skipped = divmod(step, steps_per_epoch)
        train_loader.set_epoch(epoch)
        model.train()
        for index, batch in enumerate(skip_first_batches(train_loader, skipped * args.gradient_accumulation_steps)):
            if index >= (steps_per_epoch - skipped) * args.gradient_accumulation_steps or step == max_steps:
                break
            with accelerator.accumulate(model):
                num_heads = sample_num_heads(plain_model.config, args.seed, step)
                logits = model(batch["pixel_values"], num_heads_active=num_heads).logits
                loss = torch.nn.functional.cross_entropy(
                    logits.float(), batch["labels"], label_smoothing=args.label_smoothing
                )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            average.update_parameters(plain_model)
            step += 1
            progress.update()
            if step % 10 == 0:
                figures = {"loss": loss.item(), "num_heads": num_heads, "learning_rate": scheduler.get_last_lr()[0]}
                progress.set_postfix(loss=f"{figures['loss']:.3f}", heads=num_heads)
                accelerator.log(figures, step=step)
            if checkpointing_steps and step % checkpointing_steps == 0:
                save_checkpoint(accelerator, args.output_dir, step, keep=args.checkpoints_total_limit)
        if args.evaluation_epochs and (epoch + 1) % args.evaluation_epochs == 0 and step < max_steps:
            rows = evaluate_subnetworks(average.module, data["test"], heads, **evaluation)
            accelerator.log({f"{row['num_heads']}_heads_accuracy": row["accuracy"] for row in rows}, step=step)
            accelerator.print("\n" + format_table(rows))
    progress.close()

    # 5. Save one checkpoint, load it anew at every width, report
    if accelerator.is_main_process:
        average.module.save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
    accelerator.wait_for_everyone()
    rows = []
    for num_heads in tqdm(heads, desc="Evaluating widths", disable=not accelerator.is_local_main_process):
        subnetwork = HydraViTForImageClassification.from_pretrained(args.output_dir, num_attention_heads=num_heads)
        subnetwork.to(accelerator.device)
        (row,) = evaluate_subnetworks(subnetwork, data["test"], [num_heads], **evaluation)
        cost = {"parameters": count_parameters(subnetwork.config, num_heads)}
        rows.append({**row, **cost, "macs": count_macs(subnetwork.config, num_heads)})
    accelerator.log({f"{row['num_heads']}_heads_accuracy": row["accuracy"] for row in rows}, step=step)
    if accelerator.is_main_process:
        (args.output_dir / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
        images = len(data["test"])
        plot_accuracy(rows, args.output_dir / "accuracy_over_macs.png", f"Accuracy on {images} held-out images")
        mean = sum(row["accuracy"] for row in rows) / len(rows)
        print(f"\n{format_table(rows)}\n\nMean accuracy over the widths: {mean:.2%}, on {images} held-out images")
        print(f"Saved the checkpoint, results.json and accuracy_over_macs.png to {args.output_dir}")
        if args.push_to_hub:
            ignored = ["checkpoint-*", "_*", "run.json"]
            HfApi().upload_folder(repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=ignored)
    accelerator.end_training()


if __name__ == "__main__":
    main()
