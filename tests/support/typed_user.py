"""A user's file that calls every public name. mypy reads it (test_package.py); nothing runs it."""

from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTForImageClassification
from transformers.image_processing_utils import BaseImageProcessor

import hydravit_hf
from hydravit_hf import (
    HydraViTBackbone,
    HydraViTConfig,
    HydraViTForImageClassification,
    HydraViTImageClassificationPipeline,
    HydraViTModel,
    HydraViTTrainer,
    HydraViTTrainingArguments,
    ModelCardCallback,
    choose_num_heads,
    convert_original_checkpoint,
    create_model_card,
    elastify,
    evaluate_cascade,
    evaluate_subnetworks,
    export_cascade,
    export_subnetwork,
    export_subnetworks,
    fit_cascade,
    make_image_processor,
    profile_subnetworks,
    push_checkpoint,
    reshard_checkpoint,
    sample_subnetworks,
)

version: str = hydravit_hf.__version__
config = HydraViTConfig(num_attention_heads=12, subnetwork_heads=[3, 6, 12], num_labels=10)
width: int = config.hidden_size
macs: int = config.count_macs(3)
narrow: HydraViTConfig = config.resized(3)
images: torch.Tensor = torch.zeros(1, 3, 224, 224)
loader: DataLoader = DataLoader([{"pixel_values": images[0], "labels": 0}])

model: HydraViTForImageClassification = HydraViTForImageClassification(config)
logits: torch.Tensor | None = model(images, num_heads_active=3).logits
small: HydraViTForImageClassification = model.extract_subnetwork(3)
vit: ViTForImageClassification = model.to_vit(3)
again: HydraViTForImageClassification = HydraViTForImageClassification.from_vit(vit, num_attention_heads=12)
loaded = HydraViTForImageClassification.from_pretrained("runs/digits", num_attention_heads=3)
loaded.save_pretrained("runs/again", shard_by_heads=[3])
heads_taken: torch.Tensor | None = model.cascade(images, [3, 12], thresholds=0.5).num_heads
features: torch.Tensor | None = HydraViTModel(config)(images).pooler_output
feature_maps: tuple[torch.Tensor, ...] | None = HydraViTBackbone(config)(images).feature_maps

processor: BaseImageProcessor = make_image_processor(config)
classify = HydraViTImageClassificationPipeline(model=model, image_processor=processor)
labels: list[dict] = classify(Image.new("RGB", (8, 8)), num_heads_active=3)
rows: list[dict] = profile_subnetworks(model, [3, 12])
num_heads: int = choose_num_heads(rows, max_latency_ms=50)
accuracies: list[dict] = evaluate_subnetworks(model, loader, heads=[3])
fitted: dict = fit_cascade(model, loader, [3, 12], max_macs=1e9)
reached: dict = evaluate_cascade(model, loader, [3, 12], thresholds=0.5)

args = HydraViTTrainingArguments("runs/trainer", subnetwork_sampling="sandwich", distillation_weight=0.5)
trainer = HydraViTTrainer(model, args, train_dataset=loader.dataset, callbacks=[ModelCardCallback(loader)])
trainer.train()
drawn: list[int] = sample_subnetworks(config, seed=0, step=1, sampling="sandwich")
elastic: HydraViTForImageClassification = elastify(vit, loader, num_attention_heads=12)
converted: HydraViTForImageClassification = convert_original_checkpoint("model_best.pth.tar")

export_subnetwork(model, 3, "onnx", Path("3_heads.onnx"), processor)
export_subnetworks(model, [3, 12], "hydravit.onnx", processor)
export_cascade(model, "cascade.onnx", processor)
reshard_checkpoint("runs/digits", "runs/by-width", shard_by_heads=[3])
url: str = push_checkpoint("runs/digits", "user/digits").commit_url
create_model_card(model, accuracies, "digits", dataset_name="digits").save("README.md")
