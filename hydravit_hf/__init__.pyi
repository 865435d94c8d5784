# The public names, for editors and type checkers. At run time, `__init__.py` imports most of them when they are used.
from .cascade import evaluate_cascade, fit_cascade
from .convert_checkpoint import convert_original_checkpoint
from .elastification import elastify
from .evaluation import evaluate_subnetworks
from .export import export_cascade, export_subnetwork, export_subnetworks
from .hub import push_checkpoint
from .image_processing import make_image_processor
from .model.configuration_hydravit import HydraViTConfig
from .model.modeling_hydravit import HydraViTBackbone, HydraViTForImageClassification, HydraViTModel
from .model.pipeline_hydravit import HydraViTImageClassificationPipeline
from .model_card import ModelCardCallback, create_model_card
from .profiling import choose_num_heads, profile_subnetworks
from .resharding import reshard_checkpoint
from .training.steps import sample_subnetworks
from .training.trainer import HydraViTTrainer, HydraViTTrainingArguments

__version__: str

__all__ = [
    "HydraViTBackbone",
    "HydraViTConfig",
    "HydraViTForImageClassification",
    "HydraViTImageClassificationPipeline",
    "HydraViTModel",
    "HydraViTTrainer",
    "HydraViTTrainingArguments",
    "ModelCardCallback",
    "choose_num_heads",
    "convert_original_checkpoint",
    "create_model_card",
    "elastify",
    "evaluate_cascade",
    "evaluate_subnetworks",
    "export_cascade",
    "export_subnetwork",
    "export_subnetworks",
    "fit_cascade",
    "make_image_processor",
    "profile_subnetworks",
    "push_checkpoint",
    "reshard_checkpoint",
    "sample_subnetworks",
]
