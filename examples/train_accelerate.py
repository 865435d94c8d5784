"""Train one HydraViT for all its widths, with Accelerate, and report what each width is worth.

    python examples/train_accelerate.py                                   # handwritten digits, two minutes on a CPU
    python examples/train_accelerate.py --subnetwork_sampling sandwich --distillation_weight 0.5
    python examples/train_accelerate.py --data_dir my_images --from_vit facebook/deit-tiny-patch16-224
    accelerate launch --config_file examples/accelerate_multi_gpu.yaml examples/train_accelerate.py \\
        --config examples/imagenet1k.yaml                                 # the recipe of the paper

Each step draws its widths, the same in all processes, and trains those subnetworks alone (paper, section 3). At the end
the averaged weights are saved as one checkpoint, which is loaded anew at every width for the table.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    HfArgumentParser,
    default_data_collator,
    get_cosine_with_min_lr_schedule_with_warmup,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file, logging

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.data import check_labels, load_images, to_pixel_values
from hydravit_hf.evaluation import evaluate_subnetworks
from hydravit_hf.hub import push_checkpoint
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model_card import save_model_card
from hydravit_hf.profiling import profile_subnetworks
from hydravit_hf.reporting import format_table
from hydravit_hf.training.augmentation import StreamedTrainingImages, TrainingAugmentation, TrainingImages, mix_images
from hydravit_hf.training.averaging import AveragedWeights
from hydravit_hf.training.optimizer import PrefixAdamW, parameter_groups
from hydravit_hf.training.runs import checkpoint_step, list_checkpoints, open_run, save_checkpoint
from hydravit_hf.training.steps import SubnetworkTrainingArguments, check_loss, classification_loss


def parse_args():
    parser = HfArgumentParser(SubnetworkTrainingArguments, description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="a YAML file of arguments; those of the command line come before it")
    data = parser.add_argument_group("data (default: the handwritten digits of scikit-learn)")
    data.add_argument("--dataset_name", help="a dataset id of the Hub")
    data.add_argument("--data_dir", help="a local folder of images, or of parquet files")
    data.add_argument("--streaming", action="store_true", help="read the images while training; no copy is made")
    data.add_argument("--steps_per_epoch", type=int, help="of a stream, whose length is unknown")
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
    model.add_argument(
        "--token_recycling",
        action="store_true",
        help="each of --subnetwork_heads starts from the tokens of the one before",
    )
    augmentation = parser.add_argument_group("augmentation (beside mixup and CutMix; default: none)")
    augmentation.add_argument("--augment", action="store_true", help="train on random crops, as below")
    augmentation.add_argument("--crop_scale", type=float, nargs=2, default=[0.08, 1.0])
    augmentation.add_argument("--flip", type=float, default=0.5)
    augmentation.add_argument("--rand_augment_magnitude", type=float, default=9)
    augmentation.add_argument("--color_jitter", type=float, default=0.0)
    augmentation.add_argument("--random_erasing", type=float, default=0.25)
    augmentation.add_argument("--crop_fraction", type=float, default=1.0, help="centre crop in evaluation")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--num_train_epochs", type=int, default=25)
    recipe.add_argument("--max_train_steps", type=int, help="optimizer steps, instead of epochs")
    recipe.add_argument("--per_device_train_batch_size", type=int, default=64)
    recipe.add_argument("--per_device_eval_batch_size", type=int, default=128)
    recipe.add_argument("--gradient_accumulation_steps", type=int, default=1)
    recipe.add_argument("--learning_rate", type=float, default=5e-4)
    recipe.add_argument("--min_learning_rate", type=float, default=0.0, help="at the end of the cosine")
    recipe.add_argument("--weight_decay", type=float, default=0.05)
    recipe.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps that warm up")
    recipe.add_argument("--label_smoothing", type=float, default=0.1)
    recipe.add_argument("--max_grad_norm", type=float, default=1.0, help="0: no clipping")
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
    parser.set_defaults(ema_decay=0.99)
    given = parser.parse_known_args()[0]
    if given.config is not None:
        values = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
        if given.data_dir is not None:
            values.pop("dataset_name", None)
        unknown = sorted(values.keys() - vars(parser.parse_args([])).keys())
        if unknown:
            parser.error(f"{given.config} has unknown arguments: {', '.join(unknown)}")
        parser.set_defaults(**values)
    args = parser.parse_args()
    args.output_dir = Path(args.output_dir)
    if args.model_name_or_path and args.from_vit:
        parser.error("give --model_name_or_path or --from_vit, not both")
    if args.checkpointing_steps not in (None, "epoch") and not str(args.checkpointing_steps).isdigit():
        parser.error("--checkpointing_steps must be a number or 'epoch'")
    if args.streaming and (args.steps_per_epoch is None or (args.dataset_name is None and args.data_dir is None)):
        parser.error("--streaming needs --dataset_name or --data_dir, and --steps_per_epoch")
    return args, SubnetworkTrainingArguments(
        **{name: getattr(args, name) for name in SubnetworkTrainingArguments.__dataclass_fields__}
    )


# What may differ between a run and its resumption
FREE = {"output_dir", "overwrite_output_dir", "num_workers", "evaluation_epochs", "checkpointing_steps", "report_to"}
FREE |= {"checkpoints_total_limit", "resume_from_checkpoint", "with_tracking", "push_to_hub", "hub_model_id", "config"}
AUGMENTATION = {"crop_scale", "flip", "rand_augment_magnitude", "color_jitter", "random_erasing"}
DIGITS = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 3}  # a small model for small images


def make_model(args, labels: list[str]):
    """The model to train, new or from a checkpoint, and its image processor."""
    on_digits = args.dataset_name is None and args.data_dir is None
    sizes = (DIGITS if on_digits else {}) | {
        name: getattr(args, name) for name in DIGITS if getattr(args, name) is not None
    }
    options = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    for name in ("drop_path_rate", "subnetwork_heads", "subnetwork_weights", "separate_classifiers", "token_recycling"):
        if getattr(args, name):
            options[name] = getattr(args, name)
    if args.token_recycling:
        options.setdefault("subnetwork_weights", None)  # of the checkpoint to start from: no width is drawn any more
    if args.from_vit:
        options |= {"num_attention_heads": args.num_attention_heads, "num_labels": len(labels)}
        model = HydraViTForImageClassification.from_vit(args.from_vit, **options)
    elif args.model_name_or_path:
        options["ignore_mismatched_sizes"] = args.ignore_mismatched_sizes
        model = HydraViTForImageClassification.from_pretrained(args.model_name_or_path, **options)
    else:
        config = HydraViTConfig(num_attention_heads=args.num_attention_heads, **sizes, **options)
        if on_digits and args.subnetwork_weights is None and not args.token_recycling:
            # the narrowest, a part of all others, more often
            config.subnetwork_weights = [3.0] + [1.0] * (len(config.subnetwork_heads) - 1)
        model = HydraViTForImageClassification(config)
    source = args.from_vit or args.model_name_or_path
    if source and cached_file(source, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False):
        return model, AutoImageProcessor.from_pretrained(source)
    if on_digits:
        return model, make_image_processor(model.config, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return model, make_image_processor(model.config, crop_fraction=args.crop_fraction)


def plain_view(image, seed, transform):
    """An image as it is evaluated, for training without augmentation."""
    return transform({"image": [image], "label": [0]})["pixel_values"][0]


def make_datasets(args, data, processor, accelerator):
    """What to train and to test on: items of `pixel_values` and `labels`, of this process where they are streamed."""
    transform = to_pixel_values(processor)
    train, test = data["train"], data["test"]
    view = partial(plain_view, transform=transform)
    if args.augment:
        view = TrainingAugmentation(
            processor,
            crop_scale=tuple(args.crop_scale),
            flip=args.flip,
            rand_augment_magnitude=args.rand_augment_magnitude,
            color_jitter=args.color_jitter,
            random_erasing=args.random_erasing,
        )
    if args.streaming:
        train = train.shuffle(args.seed, buffer_size=10_000)
        train = split_dataset_by_node(train, accelerator.process_index, accelerator.num_processes)
        return StreamedTrainingImages(train, view, args.seed), test.map(
            transform, batched=True, remove_columns=test.column_names
        )
    return TrainingImages(train, view, args.seed), test.with_transform(transform)


def backward(model, batch, step: int, seed: list[int], args, widths: SubnetworkTrainingArguments, accelerator):
    """The gradients of a batch at each width of the step, one after the other; gives the widths and the mean loss."""
    config = accelerator.unwrap_model(model).config
    pixel_values, targets = (batch[name].to(accelerator.device) for name in ("pixel_values", "labels"))
    if widths.mixup_alpha or widths.cutmix_alpha:
        pixel_values, targets = mix_images(
            pixel_values, targets, config.num_labels, seed, widths.mixup_alpha, widths.cutmix_alpha
        )
    heads = widths.sample(config, args.seed, step, accelerator.process_index)
    teacher_logits, total = None, 0.0
    for num_heads in heads:
        with nullcontext() if num_heads == heads[-1] else accelerator.no_sync(model):
            outputs = model(pixel_values, num_heads_active=num_heads)
            logits = outputs.get("stage_logits", outputs.logits)
            loss = classification_loss(
                logits, targets, teacher_logits, widths.distillation_weight, args.label_smoothing
            )
            check_loss(loss, num_heads, step)
            accelerator.backward(loss / len(heads))
        if widths.distillation_weight and teacher_logits is None:
            teacher_logits = logits.detach()
        total += loss.detach() / len(heads)
    return heads, total


def recipe(args) -> str:
    """The arguments that made the checkpoint, as a file for --config."""
    unused = FREE if args.augment else FREE | AUGMENTATION
    values = {name: value for name, value in vars(args).items() if name not in unused}
    values = {name: value for name, value in values.items() if value is not None and value is not False}
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def main():
    args, widths = parse_args()
    # 1. The run: its folder, its processes, its seed
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE and value is not None}
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    if accelerator.distributed_type == "FSDP" and (widths.ema_decay or widths.freeze_unused_weights):
        raise ValueError("--ema_decay and --freeze_unused_weights need whole weights: not with FSDP.")
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
        data = load_images(args.dataset_name, args.data_dir, streaming=args.streaming)
    model, processor = make_model(args, data["train"].features["label"].names)
    if not args.streaming:
        check_labels(data["train"], model.config.num_labels)
    train_images, test_images = make_datasets(args, data, processor, accelerator)
    train_loader = DataLoader(
        train_images,
        batch_size=args.per_device_train_batch_size,
        shuffle=None if args.streaming else True,
        drop_last=True,
        collate_fn=default_data_collator,
        num_workers=args.num_workers,
        generator=torch.Generator(),  # so that a resumed epoch doesn't advance the generator that dropout draws from
    )
    heads = model.config.subnetwork_heads
    evaluation = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.num_workers}
    evaluation |= {"accelerator": accelerator, "disable_tqdm": True}

    # 3. Optimizer, schedule, averaged weights
    if widths.freeze_unused_weights:
        optimizer = PrefixAdamW(model, lr=args.learning_rate, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    if not args.streaming:
        train_loader = accelerator.prepare(train_loader)
    steps_per_epoch = args.steps_per_epoch or len(train_loader) // args.gradient_accumulation_steps
    if steps_per_epoch == 0:
        raise ValueError(f"{len(train_images)} training images are fewer than one step takes.")
    by_epoch = args.checkpointing_steps == "epoch"
    checkpointing_steps = steps_per_epoch if by_epoch else int(args.checkpointing_steps or 0)
    max_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer.optimizer, round(args.warmup_ratio * max_steps), max_steps, min_lr=args.min_learning_rate
    )
    plain_model = accelerator.unwrap_model(model)
    average = AveragedWeights(plain_model, widths.ema_decay) if widths.ema_decay else None
    accelerator.register_for_checkpointing(scheduler, *filter(None, [average]))
    step = 0
    if args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        if args.resume_from_checkpoint == "latest":
            checkpoint = (list_checkpoints(args.output_dir) or [None])[-1]
        if checkpoint is not None:  # else the run stopped before its first checkpoint, and starts anew
            accelerator.load_state(str(checkpoint))
            step = checkpoint_step(checkpoint)
            accelerator.print(f"Resumed from {checkpoint}")

    # 4. Train the widths of each step
    accelerator.print(
        f"Training widths {heads} of {plain_model.num_parameters() / 1e6:.1f} M parameters for {max_steps} steps, on "
        f"{accelerator.device.type}, {accelerator.num_processes} processes"
    )
    progress = tqdm(total=max_steps, initial=step, desc="Training", disable=not accelerator.is_local_main_process)
    while step < max_steps:
        epoch, skipped = divmod(step, steps_per_epoch)
        if not args.streaming:
            train_loader.set_epoch(epoch)
        train_images.set_epoch(epoch)
        model.train()
        first = skipped * args.gradient_accumulation_steps
        for index, batch in enumerate(skip_first_batches(train_loader, first), start=first):
            if index == steps_per_epoch * args.gradient_accumulation_steps or step == max_steps:
                break
            with accelerator.accumulate(model):
                seed = [args.seed, epoch, index, accelerator.process_index]
                trained, loss = backward(model, batch, step, seed, args, widths, accelerator)
                if widths.freeze_unused_weights:
                    optimizer.optimizer.num_heads = widths.widest(
                        plain_model.config, args.seed, step, accelerator.num_processes
                    )
                if accelerator.sync_gradients and args.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            if average is not None:
                average.update()
            step += 1
            progress.update()
            if step % 10 == 0:
                loss = accelerator.reduce(loss, "mean").item()
                progress.set_postfix(loss=f"{loss:.3f}", heads=trained)
                accelerator.log({"loss": loss, "learning_rate": scheduler.get_last_lr()[0]}, step=step)
            if checkpointing_steps and step % checkpointing_steps == 0:
                save_checkpoint(accelerator, args.output_dir, step, keep=args.checkpoints_total_limit)
        if step < max_steps and step % steps_per_epoch:
            raise ValueError(f"The stream ended after {step % steps_per_epoch} of {steps_per_epoch} steps of an epoch.")
        if args.evaluation_epochs and (epoch + 1) % args.evaluation_epochs == 0 and step < max_steps:
            with nullcontext() if average is None else average.in_place():
                rows = evaluate_subnetworks(plain_model, test_images, heads, **evaluation)
            accelerator.log({f"{row['num_heads']}_heads_accuracy": row["accuracy"] for row in rows}, step=step)
            accelerator.print("\n" + format_table(rows))
    progress.close()

    # 5. Save one checkpoint, load it anew at every width, report
    if average is not None:
        average.swap()
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        plain_model.save_pretrained(args.output_dir, state_dict=state_dict)
        processor.save_pretrained(args.output_dir)
    accelerator.wait_for_everyone()
    rows = []
    for num_heads in tqdm(heads, desc="Evaluating widths", disable=not accelerator.is_local_main_process):
        subnetwork = HydraViTForImageClassification.from_pretrained(args.output_dir, num_attention_heads=num_heads)
        subnetwork.to(accelerator.device)
        rows += evaluate_subnetworks(subnetwork, test_images, [num_heads], **evaluation)
    accelerator.log({f"{row['num_heads']}_heads_accuracy": row["accuracy"] for row in rows}, step=step)
    if accelerator.is_main_process:
        costs = profile_subnetworks(plain_model, heads, rounds=10)
        rows = [cost | row for cost, row in zip(costs, rows, strict=True)]
        name = args.hub_model_id or args.output_dir.name
        source = args.dataset_name or args.data_dir or "the handwritten digits of scikit-learn"
        held_out = "held-out images" if args.streaming else f"{len(test_images)} held-out images"
        save_model_card(
            args.output_dir,
            plain_model,
            rows,
            title=name.rpartition("/")[2],
            model_id=name,
            dataset_name=f"{held_out} of {source}",
            dataset_id=args.dataset_name,
            base_model=args.from_vit,
            limits=None
            if args.streaming
            else f"One held-out image is {100 / len(test_images):.2f} points of accuracy.",
            training=f"Made by `examples/train_accelerate.py` of `hydravit_hf` with\n\n```yaml\n{recipe(args)}```",
        )
        mean = sum(row["accuracy"] for row in rows) / len(rows)
        shown = ("num_heads", "parameters", "macs", "latency_ms", "accuracy", "top5_accuracy", "loss")
        print(f"\n{format_table([{key: row[key] for key in shown} for row in rows])}")
        print(
            f"\nMean accuracy over the widths: {mean:.2%}, on {held_out}. Latency of one image on {costs[0]['device']}"
        )
        print(f"Saved the checkpoint, its card README.md, results.json and accuracy_over_macs.png to {args.output_dir}")
        if args.push_to_hub:
            print(push_checkpoint(args.output_dir, repo_id).commit_url)
    accelerator.wait_for_everyone()
    del model  # DDP's hold on the process group: threads of gloo that outlive their group's end can abort at exit
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
