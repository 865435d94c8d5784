"""HydraViT for transformers: one Vision Transformer, one checkpoint, any number of attention heads.

Importing the package registers its classes with `AutoConfig`, `AutoModel` and `AutoModelForImageClassification`.
"""

from importlib import import_module

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_hydravit import HydraViTConfig
from .modeling_hydravit import HydraViTForImageClassification, HydraViTModel

AutoConfig.register("hydravit", HydraViTConfig)
AutoModel.register(HydraViTConfig, HydraViTModel)
AutoModelForImageClassification.register(HydraViTConfig, HydraViTForImageClassification)

# Functions and their files, imported when they are first used: some need the extras, and one file is also a command
_FUNCTIONS = {
    "convert_original_checkpoint": "convert_checkpoint",
    "count_macs": "profiling",
    "count_parameters": "profiling",
    "HydraViTTrainer": "trainer",
    "HydraViTTrainingArguments": "trainer",
    "evaluate_subnetworks": "evaluation",
    "make_image_processor": "image_processing",
    "sample_subnetworks": "training",
}

__all__ = ["HydraViTConfig", "HydraViTForImageClassification", "HydraViTModel", *_FUNCTIONS]


def __getattr__(name: str):
    if name not in _FUNCTIONS:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f".{_FUNCTIONS[name]}", __name__), name)
