"""The `Trainer` of transformers for all widths at once: which ones a step trains, and how good each one is.

from hydravit_hf.trainer import HydraViTTrainer, HydraViTTrainingArguments

args = HydraViTTrainingArguments("runs/sandwich", subnetwork_sampling="sandwich", distillation_weight=0.5,
                                 eval_strategy="epoch", metric_for_best_model="mean_accuracy")
HydraViTTrainer(model, args, train_dataset=train, eval_dataset=test).train()
"""

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, has_length
from transformers.utils import is_datasets_available, logging

from .augmentation import StreamedTrainingImages, TrainingImages
from .evaluation import score
from .optimization import PrefixAdamW
from .training import (
    AveragedWeights,
    SubnetworkArguments,
    check_loss,
    classification_loss,
    list_checkpoints,
    mix_images,
)

logger = logging.get_logger(__name__)

TRAINED_WEIGHTS_NAME = "trained_weights.safetensors"  # of a checkpoint whose model has the averaged weights


class _Callback(TrainerCallback):
    """New views for each epoch, which accelerate's loaders of several processes leave out, and the averaged weights."""

    def __init__(self, trainer: "HydraViTTrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if isinstance(train_dataloader.dataset, (TrainingImages, StreamedTrainingImages)):
            train_dataloader.dataset.set_epoch(int(state.epoch))

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer._average is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer._average.update()


@dataclass
class HydraViTTrainingArguments(SubnetworkArguments, TrainingArguments):
    """`TrainingArguments` with those of `SubnetworkArguments`, and `eval_num_heads`.

    Two defaults differ: columns that the model doesn't know are kept, as transforms make `pixel_values` of them, and
    DDP doesn't search for unused parameters, as there are none.
    """

    eval_num_heads: list[int] | None = field(
        default=None, metadata={"help": "Head counts to evaluate; default: all that are trained."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "See TrainingArguments."})
    ddp_find_unused_parameters: bool = field(default=False, metadata={"help": "See TrainingArguments."})

    def __post_init__(self):
        SubnetworkArguments.__post_init__(self)
        TrainingArguments.__post_init__(self)


class HydraViTTrainer(Trainer):
    """A `Trainer` that trains the widths which `HydraViTTrainingArguments` ask for, and evaluates each of them.

    - The widths of a step are a function of the seed and the step (`sample_subnetworks`); the passes of a sandwich go
      backward one after the other, so that they take no more memory than the widest.
    - `evaluate` runs every width in one pass over the data: `eval_3_heads_accuracy`, `eval_3_heads_loss`, ..., and
      their means `eval_mean_accuracy`, `eval_mean_loss`. `compute_metrics`, where given, is called for each width.
      `predict` runs the default width, as ever.
    - With `ema_decay`, the averaged weights are those that are evaluated, saved, and left in the model after training.
    - `train(resume_from_checkpoint=True)` goes on from the last checkpoint that was saved whole.

    The arguments are those of `Trainer`; the model is a single-label classifier, the datasets give `pixel_values` and
    `labels`.

    Raises:
        ValueError: Arguments or data that can't be trained with; before training, where that can be known.
        FloatingPointError: A loss that is not a number.
    """

    def __init__(self, *args, compute_metrics=None, preprocess_logits_for_metrics=None, **kwargs):
        self._user_metrics, self._user_preprocess = compute_metrics, preprocess_logits_for_metrics
        self._every_width = False
        self._average: AveragedWeights | None = None
        self._teacher_logits: torch.Tensor | None = None
        super().__init__(
            *args,
            compute_metrics=self._compute_metrics,
            preprocess_logits_for_metrics=self._preprocess_logits,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # the loss of a batch is its mean
        self.add_callback(_Callback(self))
        if not isinstance(self.args, HydraViTTrainingArguments):
            raise ValueError(f"`args` must be HydraViTTrainingArguments, not {type(self.args).__name__}.")
        if self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` is not called: HydraViTTrainer has a loss of its own.")
        if preprocess_logits_for_metrics is not None and compute_metrics is None:
            raise ValueError("`preprocess_logits_for_metrics` needs `compute_metrics`.")
        if self.args.freeze_unused_weights and (self.optimizer, self.optimizer_cls_and_kwargs) != (None, None):
            raise ValueError("`freeze_unused_weights` brings an optimizer of its own: leave out the other one.")
        config = self._config = self.model.config
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(f"HydraViTTrainer trains single-label classifiers, not {config.problem_type}.")
        self._eval_heads = [config.check_num_heads(k) for k in self.args.eval_num_heads or config.subnetwork_heads]
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and (self.args.ema_decay or self.args.freeze_unused_weights):
            raise ValueError("`ema_decay` and `freeze_unused_weights` need whole weights: not with FSDP or DeepSpeed.")

    # --- Training ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        self._check_train_dataset()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_whole_checkpoint()
        if resume_from_checkpoint:
            averaged = (Path(resume_from_checkpoint) / TRAINED_WEIGHTS_NAME).exists()
            if averaged != bool(self.args.ema_decay):
                raise ValueError(
                    f"`ema_decay` must be {'above 0' if averaged else '0'} to resume from '{resume_from_checkpoint}', "
                    f"which has {'' if averaged else 'no '}averaged weights, not {self.args.ema_decay}."
                )
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._average is not None:
            self._average.swap()
            self._average = None
        return output

    def _check_train_dataset(self):
        dataset = self.train_dataset
        if not has_length(dataset):
            return  # a stream can't be looked at in advance
        source = dataset.dataset if isinstance(dataset, TrainingImages) else dataset
        if is_datasets_available():
            from .data import Dataset, check_labels

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

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and self.args.freeze_unused_weights:
            lr, betas = self.args.learning_rate, (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = PrefixAdamW(self.model, lr, betas, self.args.adam_epsilon, self.args.weight_decay)
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.ema_decay:
            self._average = AveragedWeights(self.model, self.args.ema_decay)
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        args, step = self.args, self.state.global_step
        inputs = self._prepare_inputs(inputs)
        if args.mixup_alpha or args.cutmix_alpha:
            inputs["pixel_values"], inputs["labels"] = mix_images(
                inputs["pixel_values"],
                inputs["labels"],
                self._config.num_labels,
                seed=[torch.randint(2**31, ()).item(), args.process_index],  # its state is restored on a resume
                mixup_alpha=args.mixup_alpha,
                cutmix_alpha=args.cutmix_alpha,
            )
        heads = args.sample(self._config, args.seed, step, args.process_index)
        if args.freeze_unused_weights:
            self.optimizer.optimizer.num_heads = args.widest(self._config, args.seed, step, args.world_size)
        self._teacher_logits, loss = None, 0.0
        for num_heads in heads:
            is_last = num_heads == heads[-1]
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                width_inputs = {**inputs, "num_heads_active": num_heads, "num_widths": len(heads)}
                width_loss = super().training_step(model, width_inputs, num_items_in_batch)
            check_loss(width_loss, num_heads, step)
            loss += width_loss
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, num_widths = inputs.pop("labels"), inputs.pop("num_widths")
        outputs = model(**inputs)
        loss = classification_loss(
            outputs.get("stage_logits", outputs.logits),
            labels,
            self._teacher_logits,
            self.args.distillation_weight,
            self.args.label_smoothing_factor,
        )
        if self.args.distillation_weight and self._teacher_logits is None:
            self._teacher_logits = outputs.logits.detach()
        loss = loss / num_widths
        return (loss, outputs) if return_outputs else loss

    # --- Evaluation ---

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        nested, self._every_width = self._every_width, True  # it calls itself for each of several datasets
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._every_width = nested

    def evaluation_loop(self, *args, **kwargs):
        with nullcontext() if self._average is None else self._average.in_place():
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`; in `evaluate` the logits are (B, S, labels), those of all S widths."""
        if not self._every_width:
            return super().prediction_step(model, inputs, *args, **kwargs)
        losses, logits = [], []
        for num_heads in self._eval_heads:
            width_inputs = {**inputs, "num_heads_active": num_heads}
            loss, width_logits, labels = super().prediction_step(model, width_inputs, *args, **kwargs)
            losses.append(loss)
            logits.append(width_logits)
        if losses[0] is None:
            raise ValueError("There is nothing to evaluate by: the dataset has no `labels`.")
        return torch.stack(losses).mean(), None if logits[0] is None else torch.stack(logits, dim=1), labels

    def _preprocess_logits(self, logits, labels):
        """What is kept of each batch: without metrics of the user's, a loss and a hit for each image and width."""
        if not self._every_width:
            return logits if self._user_preprocess is None else self._user_preprocess(logits, labels)
        if self._user_preprocess is not None:
            return torch.stack([self._user_preprocess(of_width, labels) for of_width in logits.unbind(1)], dim=1)
        if self._user_metrics is not None:
            return logits
        return torch.stack([score(of_width, labels) for of_width in logits.unbind(1)], dim=1)

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        compute = self._user_metrics or _mean_scores
        if not self._every_width:
            if self._user_metrics is None:
                logits, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
                prediction = EvalPrediction(score(logits, labels).numpy(), prediction.label_ids)
            return compute(prediction)
        widths = [
            compute(EvalPrediction(predictions=prediction.predictions[:, index], label_ids=prediction.label_ids))
            for index in range(len(self._eval_heads))
        ]
        metrics = {
            f"{num_heads}_heads_{name}": value
            for num_heads, of_width in zip(self._eval_heads, widths, strict=True)
            for name, value in of_width.items()
        }
        means = {f"mean_{name}": float(np.mean([of_width[name] for of_width in widths])) for name in widths[0]}
        return metrics | means

    # --- Checkpoints ---

    def save_model(self, *args, **kwargs):
        with nullcontext() if self._average is None else self._average.in_place():
            super().save_model(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # of a run that was resumed from an earlier one: no longer whole
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            weights = {name: weight.detach().contiguous() for name, weight in self._average.weights.items()}
            save_file(weights, os.path.join(output_dir, TRAINED_WEIGHTS_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._average is not None and checkpoint is not None:  # the model has the averaged weights of the checkpoint
            weights = load_file(os.path.join(checkpoint, TRAINED_WEIGHTS_NAME))
            with torch.no_grad():
                for name, weight in self._average.weights.items():
                    weight.copy_(weights[name])

    def _load_best_model(self):
        super()._load_best_model()
        self._average = None  # the best model has the averaged weights of its time

    def _last_whole_checkpoint(self) -> str:
        for checkpoint in reversed(list_checkpoints(Path(self.args.output_dir))):
            if _is_whole(checkpoint, self.args.world_size):
                return str(checkpoint)
            logger.warning(f"'{checkpoint}' was not saved whole: the one before it is used.")
        raise ValueError(f"There is no whole checkpoint to resume from in '{self.args.output_dir}'.")


def _is_whole(checkpoint: Path, world_size: int) -> bool:
    """Whether all processes finished a save; the state of the training is what the main process writes last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return world_size == 1 or all((checkpoint / f"rng_state_{rank}.pth").exists() for rank in range(world_size))


def _mean_scores(prediction: EvalPrediction) -> dict[str, float]:
    hits, _, losses = prediction.predictions.astype(np.float64).mean(0)
    return {"accuracy": float(hits), "loss": float(losses)}
