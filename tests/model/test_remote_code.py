"""A saved folder works by `trust_remote_code=True` in a process that has no hydravit_hf."""

import pytest
import torch

from hydravit_hf.image_processing import make_image_processor

WITHOUT_THE_PACKAGE = """
import sys
import torch
from PIL import Image
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
from transformers import ViTForImageClassification, pipeline

folder, again = sys.argv[1:]
expected = torch.load(f"{folder}/expected.pt", weights_only=True)
images = expected.pop("images")
image = Image.radial_gradient("L").convert("RGB")
trust = {"trust_remote_code": True}
load = AutoModelForImageClassification.from_pretrained

def check(logits, num_heads):
    torch.testing.assert_close(logits, expected[num_heads], atol=1e-5, rtol=0)

full = load(folder, **trust)
for k in expected:
    check(full(images, num_heads_active=k).logits, k)
    check(load(folder, num_heads_active=k, **trust)(images).logits, k)
    narrow = load(folder, num_attention_heads=k, **trust)
    assert narrow.config.hidden_size == 8 * k
    check(narrow(images).logits, k)
    check(full.extract_subnetwork(k)(images).logits, k)
    stock = full.to_vit(k)
    assert type(stock) is ViTForImageClassification
    check(stock(images).logits, k)
    check(type(full).from_vit(stock, num_attention_heads=k)(images).logits, k)
grown = load(folder, num_attention_heads=8, **trust)
check(grown(images, num_heads_active=6).logits, 6)
assert AutoModel.from_pretrained(folder, **trust)(images).pooler_output.shape == (3, 48)
assert AutoConfig.from_pretrained(folder, num_attention_heads=2, **trust).subnetwork_heads == [1, 2]

# at another image size, at every width
larger = torch.nn.functional.interpolate(images, (24, 32))
for k in (2, 6):
    loaded = load(folder, image_size=(24, 32), num_attention_heads=k, **trust)
    assert loaded.config.image_size == (24, 32)
    wanted = full(larger, num_heads_active=k, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(loaded(larger).logits, wanted)

# saved again from here, in shards and narrower, it still carries its code
narrow = load(folder, num_attention_heads=4, **trust)
narrow.save_pretrained(again, max_shard_size="20KB")
check(load(again, num_attention_heads=3, **trust)(images).logits, 3)
assert AutoModel.from_pretrained(again, **trust)(images).pooler_output.shape == (3, 32)

# in pipelines: ours by its name, or where no task is named, at a width of each call; the stock one at one width
for path, heads in ((folder, range(1, 7)), (again, range(1, 5))):
    for task in ("hydravit-image-classification", None):
        pipe = pipeline(task, path, image_processor=folder, **trust)
        assert type(pipe).__name__ == "HydraViTImageClassificationPipeline"
        pixel_values = pipe.image_processor(image, return_tensors="pt").pixel_values
        for k in heads:
            score = full(pixel_values, num_heads_active=k).logits.softmax(-1).max().item()
            assert abs(pipe(image, num_heads_active=k)[0]["score"] - score) < 1e-5
stock = pipeline("image-classification", folder, model_kwargs={"num_attention_heads": 6}, **trust)
assert abs(stock(image)[0]["score"] - full(pixel_values).logits.softmax(-1).max().item()) < 1e-5

# as a backbone
config = AutoConfig.from_pretrained(folder, num_attention_heads=3, out_features=["stage1", "stage2"], **trust)
backbone = AutoBackbone.from_config(config, **trust)
assert backbone.channels == [24, 24] and len(backbone(images).feature_maps) == 2

# and it trains
loss = full.train()(images, labels=torch.tensor([0, 1, 2])).loss
loss.backward()
"""


@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_a_folder_loads_where_the_package_is_not_installed(
    make_model, images, tmp_path, run_without_the_package, separate_classifiers
):
    model = make_model(separate_classifiers=separate_classifiers)
    model.save_pretrained(tmp_path / "saved")
    make_image_processor(model.config).save_pretrained(tmp_path / "saved")
    expected = {k: model(images, num_heads_active=k).logits.detach() for k in range(1, 7)}
    torch.save({"images": images, **expected}, tmp_path / "saved" / "expected.pt")
    run_without_the_package(WITHOUT_THE_PACKAGE, tmp_path / "saved", tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == {
        "cascade_hydravit.py",
        "checkpoint_hydravit.py",
        "configuration_hydravit.py",
        "modeling_hydravit.py",
        "parameters_hydravit.py",
        "pipeline_hydravit.py",
    }
