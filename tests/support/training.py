"""A tiny model to train, callbacks that record and spoil, and comparisons of weights."""

import torch
from transformers import TrainerCallback

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, evaluate_subnetworks

QUIET = {"report_to": "none", "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
SANDWICH = {"subnetwork_sampling": "sandwich", "distillation_weight": 0.5}


def make_config(**kwargs) -> HydraViTConfig:
    """A configuration of 4 heads of 8 channels, for digits of 8 x 8 pixels."""
    sizes = {"num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    return HydraViTConfig(**sizes | {"num_labels": 10} | kwargs)


def make_model(**kwargs) -> HydraViTForImageClassification:
    """A new model of such a configuration. Its weights are the same ones in each call."""
    torch.manual_seed(0)
    return HydraViTForImageClassification(make_config(**kwargs))


def weights_of(model) -> dict[str, torch.Tensor]:
    """A copy of the weights by their names."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_equal(found: dict, expected: dict):
    """Check that two models have the same weights, bit by bit."""
    assert found.keys() == expected.keys()
    different = [name for name, weight in expected.items() if not torch.equal(found[name], weight)]
    assert not different


def assert_close(found: dict, expected: dict, **tolerance):
    """Check that the weights of a model are close to those of another."""
    assert found.keys() >= expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def shells(weights: dict, narrow) -> dict:
    """A copy of weights with zeros in place of those that a narrower model has."""
    weights = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in narrow.named_parameters():
        weights[name][tuple(map(slice, weight.shape))] = 0
    return weights


class Record(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights_of(model))


class Crash(TrainerCallback):
    """Ends a run after a step, as a power cut does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("the power is out")


class Wreck(TrainerCallback):
    """Spoils the weights before a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            for weight in model.parameters():
                weight.data.add_(torch.randn_like(weight))


def metrics_of(model, items, heads=None, prefix: str = "eval") -> dict[str, float]:
    """What `HydraViTTrainer` should report, by `evaluate_subnetworks`."""
    rows = evaluate_subnetworks(model, items, heads, disable_tqdm=True)
    metrics = {f"{prefix}_{row['num_heads']}_heads_{name}": row[name] for row in rows for name in ("accuracy", "loss")}
    return metrics | {
        f"{prefix}_mean_{name}": sum(row[name] for row in rows) / len(rows) for name in ("accuracy", "loss")
    }


def own(metrics: dict, prefix: str = "eval") -> dict[str, float]:
    """The metrics of widths."""
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith(prefix) and ("_heads_" in name or "_mean_" in name)
    }


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
