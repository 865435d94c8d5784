"""Averaged weights (EMA), and a `Trainer` that evaluates and saves them."""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback

TRAINED_WEIGHTS_NAME = "trained_weights.safetensors"  # lies in a checkpoint whose model has the averaged weights


class AveragedWeights:
    """Keeps an exponential moving average of a model's weights, which can take their place in the model.

    Args:
        model: The model. The average starts from its present weights.
        decay: Share of the average that remains at each update, from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.weights = dict(model.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._average_fn = get_ema_multi_avg_fn(decay)

    def update(self):
        """Add the present weights to the average. Call it after each optimizer step."""
        self._average_fn(list(self.average.values()), [weight.detach() for weight in self.weights.values()], None)

    @contextmanager
    def in_place(self):
        """Give the model the averaged weights within this context."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """Exchange the model's weights and their average, in place, because sharded weights must keep their memory."""
        for name, weight in self.weights.items():
            weights = weight.clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(weights)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, average: dict[str, torch.Tensor]):
        for name, tensor in self.average.items():
            tensor.copy_(average[name])


class _AveragingCallback(TrainerCallback):
    """Updates the average after each optimizer step, and leaves the averaged weights in the model after the last."""

    def __init__(self, trainer: "AveragingTrainer"):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.average is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.average.update()

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.swap()
            self.trainer.average = None


class AveragingTrainer(Trainer):
    """A `Trainer` whose `args.ema_decay`, if above 0, averages the weights of the model.

    It evaluates and saves the averaged weights, and leaves them in the model after training. A checkpoint also holds
    the weights that training goes on from.
    """

    def __init__(self, *args, **kwargs):
        self.average: AveragedWeights | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_AveragingCallback(self))

    def train(self, resume_from_checkpoint: str | None = None, *args, **kwargs):
        if resume_from_checkpoint:
            averaged = (Path(resume_from_checkpoint) / TRAINED_WEIGHTS_NAME).exists()
            if averaged != bool(self.args.ema_decay):
                raise ValueError(
                    f"`ema_decay` must be {'above 0' if averaged else '0'} to resume from '{resume_from_checkpoint}', "
                    f"which has {'' if averaged else 'no '}averaged weights, not {self.args.ema_decay}."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.ema_decay:
            self.average = AveragedWeights(self.model, self.args.ema_decay)
        return optimizer

    def evaluation_loop(self, *args, **kwargs):
        with nullcontext() if self.average is None else self.average.in_place():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args, **kwargs):
        with nullcontext() if self.average is None else self.average.in_place():
            super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            weights = {name: weight.detach().contiguous() for name, weight in self.average.weights.items()}
            save_file(weights, Path(output_dir) / TRAINED_WEIGHTS_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:  # the model has the averaged weights of the checkpoint
            weights = load_file(Path(checkpoint) / TRAINED_WEIGHTS_NAME)
            with torch.no_grad():
                for name, weight in self.average.weights.items():
                    weight.copy_(weights[name])

    def _load_best_model(self):
        super()._load_best_model()
        self.average = None  # the best model has the averaged weights of its time
