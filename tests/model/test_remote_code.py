"""A saved folder works with `trust_remote_code=True` in a process that has no hydravit_hf."""

import shutil

import pytest
import torch
from support.models import EARLIER_CHECKPOINT, HEADS, TRAVELLING
from support.thresholds import splitting

from hydravit_hf.image_processing import make_image_processor

EVERYTHING = """
import sys
import torch
from PIL import Image
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
from transformers import ViTForImageClassification, pipeline

folder, again, by_width = sys.argv[1:]
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

# saved in files by width from here, and cut between two files
full.save_pretrained(by_width, shard_by_heads=[2, 4])
for k in expected:
    check(load(by_width, num_attention_heads=k, **trust)(images).logits, k)
check(load(by_width, device_map="cpu", **trust)(images).logits, 6)
assert AutoModel.from_pretrained(by_width, num_attention_heads=3, **trust)(images).pooler_output.shape == (3, 24)

# in pipelines: ours by its name, or where no task is named, at a width of each call; the stock one at one width
for path, heads in ((folder, range(1, 7)), (again, range(1, 5)), (by_width, range(1, 7))):
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


@pytest.mark.parametrize("separate_classifiers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_loads_where_the_package_is_not_installed(
    make_model, images, tmp_path, run_without_the_package, separate_classifiers
):
    model = make_model(separate_classifiers=separate_classifiers)
    model.save_pretrained(tmp_path / "saved")
    make_image_processor(model.config).save_pretrained(tmp_path / "saved")
    expected = {num_heads: model(images, num_heads_active=num_heads).logits.detach() for num_heads in HEADS}
    torch.save({"images": images, **expected}, tmp_path / "saved" / "expected.pt")
    run_without_the_package(EVERYTHING, *(tmp_path / name for name in ("saved", "again", "by_width")))
    for name in ("again", "by_width"):
        assert {file.name for file in (tmp_path / name).glob("*.py")} == TRAVELLING


EARLIER = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

folder = sys.argv[1]
expected = load_file(f"{folder}/expected.safetensors")
images = expected["pixel_values"]
load, trust = AutoModelForImageClassification.from_pretrained, {"trust_remote_code": True}
full = load(folder, **trust)
for k in range(1, 7):
    for logits in (
        full(images, num_heads_active=k).logits,
        load(folder, num_heads_active=k, **trust)(images).logits,
        load(folder, num_attention_heads=k, **trust)(images).logits,
    ):
        torch.testing.assert_close(logits, expected[f"logits.{k}"], atol=1e-5, rtol=0)
outputs = full.cascade(images)
torch.testing.assert_close(outputs.logits, expected["cascade.logits"], atol=1e-5, rtol=0)
assert torch.equal(outputs.num_heads, expected["cascade.num_heads"])
"""

CASCADES = """
from PIL import Image
from transformers import pipeline

image = Image.radial_gradient("L").convert("RGB")
for folder in sys.argv[2:]:
    expected = torch.load(f"{folder}/expected.pt", weights_only=True)
    images, heads = expected["images"], expected["heads"]
    model = load(folder, **trust)
    model.save_pretrained(f"{folder}/again")
    for path in (folder, f"{folder}/again"):
        model = load(path, **trust)
        outputs = model.cascade(images)
        torch.testing.assert_close(outputs.logits, expected["logits"])
        assert torch.equal(outputs.num_heads, expected["num_heads"])
        small = load(path, num_attention_heads=3, **trust)
        torch.testing.assert_close(small(images).logits, model(images, num_heads_active=3).logits)
        pipe = pipeline("hydravit-image-classification", path, image_processor=folder, **trust)
        assert pipe(image, num_heads_active=heads, thresholds=0)[0]["num_heads"] == 6
        assert pipe(image, num_heads_active="cascade")[0]["macs"] > 0
"""


def test_earlier_checkpoints_cascades_and_recycled_tokens_work_where_the_package_is_not_installed(
    make_model, many, tmp_path, run_without_the_package
):
    earlier = tmp_path / "earlier"  # it works with its own code
    shutil.unpack_archive(EARLIER_CHECKPOINT, earlier)
    heads = [1, 3, 6]
    for name, options in (("plain", {}), ("recycling", {"subnetwork_heads": heads, "token_recycling": True})):
        model, folder = make_model(**options), tmp_path / name
        model.config.cascade = {"num_heads": heads, "thresholds": splitting(model, many, heads)}
        model.save_pretrained(folder)
        make_image_processor(model.config).save_pretrained(folder)
        outputs = model.cascade(many)
        expected = {"images": many, "heads": heads, "logits": outputs.logits, "num_heads": outputs.num_heads}
        torch.save(expected, folder / "expected.pt")
    run_without_the_package(EARLIER + CASCADES, earlier, tmp_path / "plain", tmp_path / "recycling")
    assert {file.name for file in (tmp_path / "recycling" / "again").glob("*.py")} == TRAVELLING
