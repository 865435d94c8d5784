"""A saved folder works by `trust_remote_code=True` in a process that has no hydravit_hf."""

import subprocess
import sys

import pytest
import torch

WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "hydravit_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPackage())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTForImageClassification
from transformers import ViTConfig

folder, again = sys.argv[1:]
expected = torch.load(f"{folder}/expected.pt", weights_only=True)
images = expected.pop("images")
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

# and it trains
loss = full.train()(images, labels=torch.tensor([0, 1, 2])).loss
loss.backward()
assert not [name for name in sys.modules if name.partition(".")[0] == "hydravit_hf"]
print("done")
"""


@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_a_folder_loads_where_the_package_is_not_installed(
    make_model, images, tmp_path, monkeypatch, separate_classifiers
):
    model = make_model(separate_classifiers=separate_classifiers)
    model.save_pretrained(tmp_path / "saved")
    expected = {k: model(images, num_heads_active=k).logits.detach() for k in range(1, 7)}
    torch.save({"images": images, **expected}, tmp_path / "saved" / "expected.pt")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        WITHOUT_THE_PACKAGE,
        str(tmp_path / "saved"),
        str(tmp_path / "again"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "done\n"
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == {
        "configuration_hydravit.py",
        "modeling_hydravit.py",
    }
