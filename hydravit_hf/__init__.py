"""HydraViT for transformers: one Vision Transformer, one checkpoint, any number of attention heads.

Importing the package registers its classes with `AutoConfig`, `AutoModel` and `AutoModelForImageClassification`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_hydravit import HydraViTConfig
from .modeling_hydravit import HydraViTForImageClassification, HydraViTModel

AutoConfig.register("hydravit", HydraViTConfig)
AutoModel.register(HydraViTConfig, HydraViTModel)
AutoModelForImageClassification.register(HydraViTConfig, HydraViTForImageClassification)

__all__ = ["HydraViTConfig", "HydraViTForImageClassification", "HydraViTModel"]
