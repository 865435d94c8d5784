"""Train one HydraViT for all its widths with Accelerate, and report how good each width is and what it costs.

    python examples/train_accelerate.py                                   # handwritten digits, two minutes on a CPU
    python examples/train_accelerate.py --subnetwork_sampling sandwich --distillation_weight 0.5
    python examples/train_accelerate.py --data_dir my_images --from_vit google/vit-base-patch16-224 --elastify
    accelerate launch --config_file examples/accelerate_multi_gpu.yaml examples/train_accelerate.py \\
        --config examples/imagenet1k.yaml                                 # the recipe of the paper

Each step draws its widths, the same in all processes, and trains those subnetworks alone (paper, section 3). At the end
the script saves the averaged weights as one checkpoint, and loads it anew at every width for the table.
"""

import sys
from contextlib import nullcontext
from dataclasses import asdict

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator, get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils import logging

from hydravit_hf import HydraViTForImageClassification, evaluate_subnetworks, profile_subnetworks
from hydravit_hf.folders import short_name
from hydravit_hf.hub import push_checkpoint
from hydravit_hf.model_card import save_model_card
from hydravit_hf.reporting import format_table
from hydravit_hf.training import arguments, runs
from hydravit_hf.training.augmentation import mix_images
from hydravit_hf.training.averaging import AveragedWeights
from hydravit_hf.training.optimizer import PrefixAdamW, parameter_groups
from hydravit_hf.training.steps import SubnetworkTrainingArguments, backward_widths
from hydravit_hf.training.teacher import Teacher


def main(preemption: runs.Preemption):
    # 1. The arguments, and the run: its folder, its processes, its seed
    classes = (arguments.DataArguments, arguments.ModelArguments, arguments.AugmentationArguments)
    classes += (SubnetworkTrainingArguments, arguments.LoopArguments, arguments.RunArguments)
    classes += (arguments.SaveArguments,)
    parsed = arguments.parse_arguments(__doc__, classes, ema_decay=0.99)
    data_args, model_args, augmentation, widths, loop, run, files = parsed
    if data_args.streaming and loop.steps_per_epoch is None:
        sys.exit("error: --streaming needs --steps_per_epoch")
    recipe = {name: value for args in parsed[:-2] for name, value in asdict(args).items() if value is not None}
    settings = {name: str(value) for name, value in recipe.items()}
    accelerator = Accelerator(
        mixed_precision=loop.mixed_precision,
        gradient_accumulation_steps=loop.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with=run.report_to if run.with_tracking else None,
        project_dir=run.output_dir,
    )
    if accelerator.distributed_type == "FSDP" and (widths.ema_decay or widths.freeze_unused_weights):
        raise ValueError("--ema_decay and --freeze_unused_weights need whole weights: not with FSDP.")
    model_id = run.hub_model_id or run.output_dir.name
    if accelerator.is_main_process:
        if run.push_to_hub:  # first, because it fails without a token
            repo_id = HfApi().create_repo(model_id, exist_ok=True).repo_id
        runs.open_run(run.output_dir, settings, run.is_resumed, run.overwrite_output_dir)
    accelerator.wait_for_everyone()
    if run.with_tracking:
        accelerator.init_trackers("hydravit", config=settings)
    set_seed(loop.seed)
    logging.disable_progress_bar()

    # 2. Data and model
    with accelerator.main_process_first():
        data = data_args.load()
    data = data_args.leave_out_broken(data)
    labels = data["train"].features["label"].names
    model, processor = arguments.make_model(data_args, model_args, labels, data["train"])
    config = model.config
    widths.teacher = arguments.find_teacher(widths.teacher, model_args, labels)
    teacher = Teacher.of_arguments(widths, config)
    train_images, test_images = arguments.make_datasets(
        data, processor, augmentation, loop.seed, accelerator.process_index, accelerator.num_processes
    )
    if accelerator.is_main_process:
        runs.open_data(run.output_dir, train_images, run.is_resumed)
    train_loader = DataLoader(
        train_images,
        batch_size=loop.per_device_train_batch_size,
        shuffle=None if data_args.streaming else True,
        drop_last=True,
        collate_fn=default_data_collator,
        num_workers=run.num_workers,
        generator=torch.Generator(),  # so that a resumed epoch doesn't advance the generator that dropout draws from
    )
    alphas, loss_options = (widths.mixup_alpha, widths.cutmix_alpha), (widths.distillation_weight, loop.label_smoothing)
    evaluation = {"batch_size": loop.per_device_eval_batch_size, "num_workers": run.num_workers}
    evaluation |= {"accelerator": accelerator, "disable_tqdm": True}

    # 3. Optimizer, schedule, averaged weights
    if widths.freeze_unused_weights:
        optimizer = PrefixAdamW(model, lr=loop.learning_rate, weight_decay=loop.weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameter_groups(model, loop.weight_decay), lr=loop.learning_rate, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    if not data_args.streaming:
        train_loader = accelerator.prepare(train_loader)
    accumulation = loop.gradient_accumulation_steps
    steps_per_epoch = loop.steps_per_epoch or len(train_loader) // accumulation
    if steps_per_epoch == 0:
        raise ValueError(f"{len(train_images)} training images are fewer than one step takes.")
    max_steps = loop.max_train_steps or loop.num_train_epochs * steps_per_epoch
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer.optimizer, round(loop.warmup_ratio * max_steps), max_steps, min_lr=loop.min_learning_rate
    )
    plain_model = accelerator.unwrap_model(model)
    average = AveragedWeights(plain_model, widths.ema_decay) if widths.ema_decay else None
    accelerator.register_for_checkpointing(scheduler, *filter(None, [average]))
    checkpointing_steps = steps_per_epoch if run.checkpointing_steps == "epoch" else int(run.checkpointing_steps or 0)
    step = 0
    if checkpoint := run.find_checkpoint():
        accelerator.load_state(str(checkpoint))
        step = runs.checkpoint_step(checkpoint)
        accelerator.print(f"Resumed from {checkpoint}")

    # 4. Train the widths of each step
    accelerator.print(
        f"Training widths {config.subnetwork_heads} of {plain_model.num_parameters() / 1e6:.1f} M parameters for "
        f"{max_steps} steps, on {accelerator.device.type}, {accelerator.num_processes} processes"
    )
    progress = tqdm(total=max_steps, initial=step, desc="Training", disable=not accelerator.is_local_main_process)
    while step < max_steps:
        epoch, skipped = divmod(step, steps_per_epoch)
        if not data_args.streaming:
            train_loader.set_epoch(epoch)
        train_images.set_epoch(epoch)
        model.train()
        first = skipped * accumulation
        for index, batch in enumerate(skip_first_batches(train_loader, first), start=first):
            if index == steps_per_epoch * accumulation or step == max_steps:
                break
            with accelerator.accumulate(model):
                images, labels = (batch[name].to(accelerator.device) for name in ("pixel_values", "labels"))
                if widths.mixup_alpha or widths.cutmix_alpha:
                    seed = [loop.seed, epoch, index, accelerator.process_index]
                    images, labels = mix_images(images, labels, config.num_labels, seed, *alphas)
                heads = widths.sample(config, loop.seed, step, max_steps)
                loss = backward_widths(model, images, labels, heads, step, *loss_options, accelerator, teacher)
                if widths.freeze_unused_weights:
                    optimizer.optimizer.num_heads = heads[0]
                if accelerator.sync_gradients and loop.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), loop.max_grad_norm)
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
                progress.set_postfix(loss=f"{loss:.3f}", heads=heads)
                accelerator.log({"loss": loss, "learning_rate": scheduler.get_last_lr()[0]}, step=step)
            ends_soon = preemption.is_near(accelerator)  # SIGTERM announces the end of this process
            if ends_soon or (checkpointing_steps and step % checkpointing_steps == 0):
                runs.save_checkpoint(accelerator, run.output_dir, step, keep=run.checkpoints_total_limit)
            if ends_soon:
                model, optimizer = accelerator.free_memory(model, optimizer)
                accelerator.end_training()
                sys.exit(0)
        if step < max_steps and step % steps_per_epoch:
            raise ValueError(f"The stream ended after {step % steps_per_epoch} of {steps_per_epoch} steps of an epoch.")
        if run.evaluation_epochs and (epoch + 1) % run.evaluation_epochs == 0 and step < max_steps:
            with nullcontext() if average is None else average.in_place():
                rows = evaluate_subnetworks(plain_model, test_images, **evaluation)
            accelerator.log({f"{row['num_heads']}_heads_accuracy": row["accuracy"] for row in rows}, step=step)
            accelerator.print("\n" + format_table(rows))
    progress.close()

    # 5. Save one checkpoint, load it anew at every width, report
    if average is not None:
        average.swap()
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        plain_model.save_pretrained(run.output_dir, state_dict=state_dict, shard_by_heads=files.shard_by_heads)
        processor.save_pretrained(run.output_dir)
    accelerator.wait_for_everyone()
    rows = []
    for num_heads in tqdm(config.subnetwork_heads, desc="Evaluating", disable=not accelerator.is_local_main_process):
        narrow = HydraViTForImageClassification.from_pretrained(run.output_dir, num_attention_heads=num_heads)
        rows += evaluate_subnetworks(narrow.to(accelerator.device), test_images, [num_heads], **evaluation)
    accelerator.log({f"{row['num_heads']}_heads_accuracy": row["accuracy"] for row in rows}, step=step)
    if accelerator.is_main_process:
        costs = profile_subnetworks(plain_model, config.subnetwork_heads, rounds=10)
        rows = [cost | row for cost, row in zip(costs, rows, strict=True)]
        unused = () if augmentation.augment else asdict(augmentation)
        recipe = {name: value for name, value in recipe.items() if name not in unused and value is not False}
        recipe |= {name: short_name(value) for name, value in recipe.items() if isinstance(value, str)}
        recipe = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None)
        card = arguments.describe_card(data_args, model_args, test_images)
        if teacher is not None:
            card |= arguments.describe_teacher(widths.teacher, teacher.model, test_images, card["dataset_name"])
        card |= {"title": model_id.rpartition("/")[2], "model_id": model_id}
        card["training"] = f"Made by `examples/train_accelerate.py` of `hydravit_hf` with\n\n```yaml\n{recipe}```"
        save_model_card(run.output_dir, plain_model, rows, **card)
        arguments.print_results(run.output_dir, card["dataset_name"])
        if run.push_to_hub:
            print(push_checkpoint(run.output_dir, repo_id).commit_url)
    accelerator.wait_for_everyone()
    del model  # DDP's hold on the process group: threads of gloo that outlive their group's end can abort at exit
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    with runs.ends_in_one_line(), runs.Preemption() as preemption:
        main(preemption)
