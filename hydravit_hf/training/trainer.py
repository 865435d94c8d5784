"""The `Trainer` of transformers for all widths at once: it trains the widths of each step and evaluates every width.

from hydravit_hf import HydraViTTrainer, HydraViTTrainingArguments

args = HydraViTTrainingArguments("runs/sandwich", subnetwork_sampling="sandwich", distillation_weight=0.5,
                                 eval_strategy="epoch", metric_for_best_model="mean_accuracy")
HydraViTTrainer(model, args, train_dataset=train, eval_dataset=test).train()
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, has_length
from transformers.utils import is_datasets_available, logging

from ..evaluation import SCORES, SINGLE_LABEL, problem_type_of, score
from ..metrics import SubnetworkMetric, multi_label_metrics, name_by_width, regression_metrics
from ..model_card import ModelCardCallback
from .augmentation import StreamedTrainingImages, TrainingImages, mix_images
from .averaging import AveragingTrainer
from .gradients import share_leading_gradients
from .optimizer import PrefixAdamW
from .runs import RUN_FILE, Preemption, check_same_run, describe_data, last_whole_checkpoint
from .steps import StepLoss, SubnetworkTrainingArguments, check_loss, check_targets
from .teacher import Teacher

logger = logging.get_logger(__name__)

METRICS = {"multi_label_classification": multi_label_metrics, "regression": regression_metrics}
REPORTED = ("accuracy", "loss")  # the scores that `evaluate` reports without `compute_metrics`


class _EpochCallback(TrainerCallback):
    """Sets the epoch of augmented datasets, which accelerate does not with several processes."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if isinstance(train_dataloader.dataset, (TrainingImages, StreamedTrainingImages)):
            train_dataloader.dataset.set_epoch(int(state.epoch))


class _PreemptionCallback(TrainerCallback):
    """Saves a checkpoint and ends the training after SIGTERM."""

    def __init__(self, trainer: "HydraViTTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.preemption.is_near(self.trainer.accelerator):
            control.should_save = control.should_training_stop = self.trainer.is_preempted = True
            control.should_evaluate = False


@dataclass
class HydraViTTrainingArguments(SubnetworkTrainingArguments, TrainingArguments):
    """`TrainingArguments` with `SubnetworkTrainingArguments` and two arguments of its own.

    Two defaults differ from `TrainingArguments`. Columns that the model does not know are kept, because a transform
    makes `pixel_values` of them. DDP does not search for unused parameters, because there are none.
    """

    eval_heads: list[int] | None = field(
        default=None, metadata={"help": "Head counts to evaluate. Default: all that are trained."}
    )
    write_model_card: bool = field(
        default=True,
        metadata={"help": "Write the model card with its table of all widths when training ends."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "See TrainingArguments."})
    ddp_find_unused_parameters: bool = field(default=False, metadata={"help": "See TrainingArguments."})

    def __post_init__(self):
        SubnetworkTrainingArguments.__post_init__(self)
        TrainingArguments.__post_init__(self)


class HydraViTTrainer(AveragingTrainer):
    """A `Trainer` that trains the widths that `HydraViTTrainingArguments` ask for, and evaluates each of them.

    - The widths of a step are a function of the seed and the step (`sample_subnetworks`). The widths of a sandwich go
      backward one after the other, so that they take no more memory than the widest.
    - `evaluate` runs every width in one pass over the data. It returns `eval_3_heads_accuracy`, `eval_3_heads_loss`,
      ..., and their means `eval_mean_accuracy`, `eval_mean_loss`. It calls `compute_metrics`, if given, for each width.
      `predict` runs the default width.
    - With `ema_decay`, the averaged weights are evaluated and saved, and stay in the model after training.
    - `train(resume_from_checkpoint=True)` goes on from the last checkpoint that was saved whole. It refuses a run with
      another seed, other labels or other data, and warns about another number of processes or batch size.
    - After SIGTERM, `train` saves a checkpoint and ends the process with exit code 0.
    - When training ends, it writes the model card with a table of all widths into `output_dir`, if there is an
      `eval_dataset`.

    The datasets give `pixel_values` and `labels`: an index, a number for each label if `config.problem_type` is
    "multi_label_classification", or numbers for "regression". The reports of these two have the metrics of
    `multi_label_metrics` and `regression_metrics`, and there is no card.

    Args:
        teacher: A frozen classifier with the same labels, or its path or Hub id, that teaches every width, such as the
            ViT that the model was made from. None means `args.teacher`. All widths of a step share its pass.
        args, kwargs: As in `Trainer`.

    Raises:
        ValueError: The arguments or the data can't be trained with. It is raised before training if possible.
        FloatingPointError: A loss is not a number.
    """

    def __init__(self, *args, teacher=None, compute_metrics=None, preprocess_logits_for_metrics=None, **kwargs):
        self._user_metrics, self._user_preprocess = compute_metrics, preprocess_logits_for_metrics
        self._every_width = False
        self._eval_width: int | None = None  # the width of a pass that evaluates one alone
        self._metric: SubnetworkMetric | None = None
        self._step_loss: StepLoss | None = None
        self.is_preempted = False
        super().__init__(
            *args,
            compute_metrics=self._compute_metrics,
            preprocess_logits_for_metrics=self._preprocess_logits,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # the loss of a batch is its mean
        self._check_arguments()
        config = self._config = self.model.config
        self._problem_type = problem_type_of(config)
        self._user_metrics = self._user_metrics or METRICS.get(self._problem_type)
        self._eval_heads = [config.check_num_heads(k) for k in self.args.eval_heads or config.subnetwork_heads]
        self.teacher = Teacher.of_arguments(self.args, config, teacher)
        self.add_callback(_EpochCallback)
        self.add_callback(_PreemptionCallback(self))
        has_card = self.args.write_model_card and self._problem_type == SINGLE_LABEL
        if has_card and self.eval_dataset is not None:
            self.add_callback(ModelCardCallback(self._card_dataloader))

    def _check_arguments(self):
        if not isinstance(self.args, HydraViTTrainingArguments):
            raise ValueError(f"`args` must be HydraViTTrainingArguments, not {type(self.args).__name__}.")
        if self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` is not called: HydraViTTrainer has a loss of its own.")
        if self._user_preprocess is not None and self._user_metrics is None:
            raise ValueError("`preprocess_logits_for_metrics` needs `compute_metrics`.")
        if self.args.freeze_unused_weights and (self.optimizer, self.optimizer_cls_and_kwargs) != (None, None):
            raise ValueError("`freeze_unused_weights` brings an optimizer of its own: leave out the other one.")
        problem_type = problem_type_of(self.model.config)
        if problem_type == "regression" and self.args.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` smoothes the labels of classes, not the values of a regression.")
        if problem_type != SINGLE_LABEL and self._user_metrics is None and self.args.batch_eval_metrics:
            raise ValueError(f"`batch_eval_metrics` needs `compute_metrics` for the problem type {problem_type}.")
        if self.args.freeze_unused_weights and any(".lora_" in name for name, _ in self.model.named_parameters()):
            raise ValueError("`freeze_unused_weights` knows the weights of the model only: not with an adapter.")
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and (self.args.ema_decay or self.args.freeze_unused_weights):
            raise ValueError("`ema_decay` and `freeze_unused_weights` need whole weights: not with FSDP or DeepSpeed.")

    # --- Training ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        self._check_train_dataset()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole_checkpoint(Path(self.args.output_dir), self.args.world_size))
        self._run, self._batches = self._describe_run()
        if resume_from_checkpoint:
            self._check_resumed(Path(resume_from_checkpoint))
        with Preemption() as self.preemption:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.is_preempted:
            self._leave_processes()
            raise SystemExit(0)
        return output

    def _leave_processes(self):
        """End the process group with all that holds it. The threads of gloo can abort a process that ends before."""
        self.accelerator.wait_for_everyone()
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _describe_run(self) -> tuple[dict, dict]:
        """The settings that a resumed run must share, and those that only change its batches."""
        labels = [self._config.id2label[index] for index in sorted(self._config.id2label)]
        run = {"seed": self.args.seed, "id2label": labels, "data": describe_data(self.train_dataset)}
        accumulated = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return run, {"processes": self.args.world_size, "images a step and process": accumulated}

    def _check_resumed(self, checkpoint: Path):
        file = checkpoint / RUN_FILE
        if not file.exists():
            return
        previous = json.loads(file.read_text(encoding="utf-8"))
        check_same_run(previous["run"], self._run, checkpoint)
        for name, value in self._batches.items():
            if value != previous["batches"].get(name):
                logger.warning(
                    f"Resuming with other {name}, {value} instead of {previous['batches'].get(name)}: the run sees "
                    "other batches than one that was not stopped."
                )

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: `Trainer` would take one more step
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _check_train_dataset(self):
        dataset = self.train_dataset
        if not has_length(dataset):
            return  # a stream can't be looked at in advance
        source = dataset.dataset if isinstance(dataset, TrainingImages) else dataset
        if is_datasets_available():
            from ..data import Dataset, check_labels

            if isinstance(source, Dataset):
                check_labels(source, self._config.num_labels)
        if len(dataset) == 0:
            raise ValueError("There is nothing to train on: the dataset is empty.")
        if self.data_collator is not default_data_collator:
            return  # it may make them of anything
        item = dataset[0]
        names = {"labels" if name in ("label", "label_ids") else name for name in item}  # in a batch
        missing = [name for name in ("pixel_values", "labels") if name not in names]
        if missing:
            raise ValueError(
                f"The items of the dataset lack {' and '.join(missing)}; they have {', '.join(item)}. "
                "`hydravit_hf.data.to_pixel_values` makes them of images and labels."
            )
        label = next(item[name] for name in ("labels", "label", "label_ids") if name in item)
        check_targets(torch.as_tensor(label)[None], self._config)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and self.args.freeze_unused_weights:
            lr, betas = self.args.learning_rate, (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = PrefixAdamW(self.model, lr, betas, self.args.adam_epsilon, self.args.weight_decay)
        return super().create_optimizer(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        args, step = self.args, self.state.global_step
        inputs = self._prepare_inputs(inputs)
        check_targets(inputs["labels"], self._config)
        if self._problem_type != SINGLE_LABEL:
            inputs["labels"] = inputs["labels"].float()
        if args.mixup_alpha or args.cutmix_alpha:
            inputs["pixel_values"], inputs["labels"] = mix_images(
                inputs["pixel_values"],
                inputs["labels"],
                self._config.num_labels,
                seed=[torch.randint(2**31, ()).item(), args.process_index],  # a resume restores this generator's state
                mixup_alpha=args.mixup_alpha,
                cutmix_alpha=args.cutmix_alpha,
            )
        heads = args.sample(self._config, args.seed, step, self.state.max_steps)
        share_leading_gradients(model, heads[0])
        if args.freeze_unused_weights:
            self.optimizer.optimizer.num_heads = heads[0]
        lesson = None
        if self.teacher is not None:
            with self.compute_loss_context_manager():
                lesson = self.teacher(inputs["pixel_values"])
            inputs["output_hidden_states"] = bool(args.hidden_state_weight)
        options = (args.distillation_weight, args.label_smoothing_factor, lesson, self._problem_type)
        self._step_loss = StepLoss(len(heads), *options)
        loss = 0.0
        for num_heads in heads:  # as `backward_widths` does, with the backward pass of `Trainer`
            with nullcontext() if num_heads == heads[-1] else self.accelerator.no_sync(model):
                width_loss = super().training_step(model, {**inputs, "num_heads_active": num_heads}, num_items_in_batch)
            check_loss(width_loss, num_heads, step)
            loss += width_loss
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            if self._problem_type != SINGLE_LABEL and "labels" in inputs:
                inputs = {**inputs, "labels": inputs["labels"].float()}  # as the loss of the model needs them
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self._step_loss(outputs, labels)
        return (loss, outputs) if return_outputs else loss

    # --- Evaluation ---

    @property
    def _keeps_losses(self) -> bool:
        return self._user_metrics is not None and "loss" in (self.args.include_for_metrics or [])

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        nested, self._every_width = self._every_width, True  # it calls itself for each of several datasets
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._every_width = nested

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in `Trainer`. A metric that is computed batch by batch has a state, so each width gets its own pass."""
        if not (self._every_width and self.args.batch_eval_metrics and self._user_metrics):
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics, losses = {}, []
        for num_heads in self._eval_heads:
            self._eval_width = num_heads
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            of_width = {name.removeprefix(f"{metric_key_prefix}_"): value for name, value in output.metrics.items()}
            losses.append(of_width.pop("loss", None))
            of_width.pop("model_preparation_time", None)  # it belongs to no width
            metrics[num_heads] = of_width
        self._eval_width = None
        named = {f"{metric_key_prefix}_{name}": value for name, value in name_by_width(metrics).items()}
        if None not in losses:
            named[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        return output._replace(metrics=named)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`. In `evaluate`, the logits are those of all S widths, (B, S, labels)."""
        if self._eval_width is not None:
            inputs = {**inputs, "num_heads_active": self._eval_width}
        if not self._every_width or self._eval_width is not None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        losses, logits = [], []
        for num_heads in self._eval_heads:
            width_inputs = {**inputs, "num_heads_active": num_heads}
            loss, width_logits, labels = super().prediction_step(model, width_inputs, *args, **kwargs)
            losses.append(loss)
            logits.append(width_logits)
        if losses[0] is None:
            raise ValueError("There is nothing to evaluate by: the dataset has no `labels`.")
        if logits[0] is None:
            return torch.stack(losses).mean(), None, labels
        stacked = torch.stack(logits, dim=1)
        if self._keeps_losses:  # beside the logits, (B, S): `Trainer` itself keeps one loss for all widths
            stacked = (stacked, torch.stack(losses).expand(len(stacked), -1).contiguous())
        return torch.stack(losses).mean(), stacked, labels

    def _preprocess_logits(self, logits, labels):
        """Reduce each batch to what the metrics need: without `compute_metrics`, the scores (B, S, 3) of each width."""
        if not self._every_width or self._eval_width is not None:
            return logits if self._user_preprocess is None else self._user_preprocess(logits, labels)
        if self._keeps_losses:
            logits, losses = logits
            return self._preprocess_widths(logits, labels), losses
        return self._preprocess_widths(logits, labels)

    def _preprocess_widths(self, logits, labels):
        if self._user_preprocess is not None:
            return torch.stack([self._user_preprocess(of_width, labels) for of_width in logits.unbind(1)], dim=1)
        if self._user_metrics is not None:
            return logits
        return torch.stack([score(of_width, labels) for of_width in logits.unbind(1)], dim=1)

    def _compute_metrics(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        if not self._every_width or self._eval_width is not None:
            if self._user_metrics is not None:
                options = {"compute_result": compute_result} if self.args.batch_eval_metrics else {}
                return self._user_metrics(prediction, **options)
            scores = score(torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids))
            accuracy, _, loss = scores.double().mean(0).tolist()
            return {"accuracy": accuracy, "loss": loss}
        if self._user_metrics is None:
            metric = self._metric = self._metric or SubnetworkMetric(REPORTED)
            columns = [SCORES.index(name) for name in REPORTED]
            for index, num_heads in enumerate(self._eval_heads):
                metric.add_scores(prediction.predictions[:, index, columns], num_heads)
            if not compute_result:  # more batches follow
                return {}
            self._metric = None
            return metric.compute()
        metrics, predictions, losses = {}, prediction.predictions, None
        if self._keeps_losses:
            predictions, losses = predictions
        for index, num_heads in enumerate(self._eval_heads):
            of_width = {"predictions": predictions[:, index], "label_ids": prediction.label_ids}
            of_width |= {"inputs": prediction.inputs, "losses": None if losses is None else losses[:, index]}
            metrics[num_heads] = self._user_metrics(EvalPrediction(**of_width))
        return name_by_width(metrics)

    # --- Checkpoints and the card ---

    def _card_dataloader(self):
        if self.is_preempted:  # there is no time for a card
            return None
        datasets = self.eval_dataset
        return self.get_eval_dataloader(next(iter(datasets)) if isinstance(datasets, dict) else None)

    def create_model_card(self, *args, **kwargs):
        """Write transformers' card, unless training has written the card with all widths."""
        if not (Path(self.args.output_dir) / "accuracy_over_macs.png").exists():
            super().create_model_card(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # a run that was resumed from an earlier checkpoint writes over this one
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            settings = {"run": self._run, "batches": self._batches}
            (Path(output_dir) / RUN_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
