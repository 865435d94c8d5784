"""The tiny models of the tests: 6 heads of 8 channels, 2 layers, 16 patches."""

from pathlib import Path

import torch

import hydravit_hf.model
from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

HEADS = range(1, 7)
SIZES = {"num_attention_heads": 6, "head_dim": 8, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
KINDS = {
    "plain": {},
    "separate classifiers": {"separate_classifiers": True, "subnetwork_heads": [2, 4, 6]},
    "recycling": {"token_recycling": True, "subnetwork_heads": [2, 4, 6]},
}
EARLIER_CHECKPOINT = (
    Path(__file__).parents[1] / "checkpoint_0.1.zip"
)  # a folder that version 0.1 saved, and its answers
TRAVELLING = {file.name for file in Path(hydravit_hf.model.__file__).parent.glob("*_hydravit.py")}


def make_config(**kwargs) -> HydraViTConfig:
    """A configuration of these sizes, every width of which is trained; keyword arguments replace its values."""
    return HydraViTConfig(**SIZES | {"num_labels": 5, "subnetwork_heads": list(HEADS)} | kwargs)


def spread(model):
    """Move every weight off its initial value: zeros and ones would hide faults."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_model(**kwargs) -> HydraViTForImageClassification:
    """A model in evaluation mode; keyword arguments go to the configuration."""
    return spread(HydraViTForImageClassification(make_config(**kwargs))).eval()


def blocks_of(model, num_heads: int) -> dict[str, tuple[slice, ...]]:
    """The leading block of each parameter that a width owns, by the shapes of the extracted model."""
    extracted = model.extract_subnetwork(num_heads).state_dict()
    return {name: tuple(slice(size) for size in tensor.shape) for name, tensor in extracted.items()}


def shapes(model) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters by their names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
