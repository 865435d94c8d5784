"""The common tests of transformers on HydraViT. `model/test_transformers_common.py` runs this file in a process.

`TRANSFORMERS_TESTS` names the `tests` folder of transformers' source distribution.
"""

import os
import sys
import types
import unittest

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, MODEL_MAPPING_NAMES

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, HydraViTModel

package = types.ModuleType("transformers_tests")
package.__path__ = [os.environ["TRANSFORMERS_TESTS"]]
sys.modules[package.__name__] = package
# What the distribution lacks: the bases that test generation and export
for folder, name, base in (
    ("exporters", "test_export", "ExportTesterMixin"),
    ("generation", "test_utils", "GenerationTesterMixin"),
):
    module = types.ModuleType(name)
    setattr(module, base, type(base, (), {}))
    sys.modules[f"{package.__name__}.{folder}"] = types.ModuleType(folder)
    sys.modules[f"{package.__name__}.{folder}.{name}"] = module

from transformers_tests import test_modeling_common  # noqa: E402

MODEL_MAPPING_NAMES["hydravit"] = "HydraViTModel"
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["hydravit"] = "HydraViTForImageClassification"


class HydraViTModelTester:
    """Tiny models and inputs, with the interface that the common tests expect."""

    batch_size, seq_length, num_hidden_layers, num_attention_heads, hidden_size = 5, 17, 2, 4, 32
    is_training = True

    def prepare_config_and_inputs_for_common(self):
        config = HydraViTConfig(
            num_attention_heads=self.num_attention_heads,
            head_dim=8,
            num_hidden_layers=self.num_hidden_layers,
            image_size=8,
            patch_size=2,
            num_labels=4,
            subnetwork_heads=[self.num_attention_heads],  # these tests expect one width in training, as in evaluation
        )
        return config, {"pixel_values": torch.rand(self.batch_size, 3, 8, 8)}


class HydraViTModelTest(test_modeling_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (HydraViTModel, HydraViTForImageClassification)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = HydraViTModelTester()

    def test_model_get_set_embeddings(self):  # as transformers overrides it for ViT: the embeddings are of patches
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)
            self.assertIsNone(model.get_output_embeddings())
