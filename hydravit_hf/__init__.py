"""HydraViT for transformers: one Vision Transformer, one checkpoint, any number of attention heads.

Importing the package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and
`AutoBackbone`, and its pipeline as the task "hydravit-image-classification".
"""

from importlib import import_module

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .model.configuration_hydravit import HydraViTConfig
from .model.modeling_hydravit import HydraViTBackbone, HydraViTForImageClassification, HydraViTModel
from .model.pipeline_hydravit import TASK, HydraViTImageClassificationPipeline

__version__ = "0.2.0"

AutoConfig.register("hydravit", HydraViTConfig)
AutoModel.register(HydraViTConfig, HydraViTModel)
AutoModelForImageClassification.register(HydraViTConfig, HydraViTForImageClassification)
AutoBackbone.register(HydraViTConfig, HydraViTBackbone)
PIPELINE_REGISTRY.register_pipeline(
    TASK, HydraViTImageClassificationPipeline, AutoModelForImageClassification, type="image"
)

# Public names and their files. A file is imported when its name is first used, because some need the extras. Editors
# read the names and their types in `__init__.pyi`.
_LAZY_NAMES = {
    "choose_num_heads": "profiling",
    "convert_original_checkpoint": "convert_checkpoint",
    "create_model_card": "model_card",
    "elastify": "elastification",
    "evaluate_cascade": "cascade",
    "evaluate_subnetworks": "evaluation",
    "export_cascade": "export",
    "export_subnetwork": "export",
    "export_subnetworks": "export",
    "fit_cascade": "cascade",
    "make_image_processor": "image_processing",
    "profile_subnetworks": "profiling",
    "push_checkpoint": "hub",
    "reshard_checkpoint": "resharding",
    "sample_subnetworks": "training.steps",
    "HydraViTTrainer": "training.trainer",
    "HydraViTTrainingArguments": "training.trainer",
    "ModelCardCallback": "model_card",
}

__all__ = [
    "HydraViTBackbone",
    "HydraViTConfig",
    "HydraViTForImageClassification",
    "HydraViTImageClassificationPipeline",
    "HydraViTModel",
    *_LAZY_NAMES,
]


def __getattr__(name: str):
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f".{_LAZY_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
