"""A checkpoint changes its files and no bit of its weights."""

import json
import shutil

import pytest
import torch
from support.disks import contents, files_of_at_most
from support.models import EARLIER_CHECKPOINT, KINDS

from hydravit_hf import HydraViTForImageClassification, HydraViTModel, reshard_checkpoint
from hydravit_hf.resharding import is_weights

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [{}, {"max_shard_size": "40KB"}, {"shard_by_heads": [4]}])
def test_files_of_any_kind_become_those_that_a_save_writes_and_one_file_again(make_model, tmp_path, kind, shape):
    model = make_model(**KINDS[kind]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", **shape)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "by-width", shard_by_heads=True)
    reshard_checkpoint(tmp_path / "saved", tmp_path / "new")
    assert contents(tmp_path / "new") == contents(tmp_path / "by-width")
    reshard_checkpoint(str(tmp_path / "new"), str(tmp_path / "back"), shard_by_heads=False)
    assert contents(tmp_path / "back") == contents(tmp_path / "one")


def test_other_files_come_along_and_subfolders_do_not(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("# A model\n")
    (tmp_path / "saved" / "checkpoint-20").mkdir()
    reshard_checkpoint(tmp_path / "saved", tmp_path / "new", [3])
    names = {file.name for file in (tmp_path / "new").iterdir()}
    kept = {file.name for file in (tmp_path / "saved").iterdir()} - {"model.safetensors", "checkpoint-20"}
    assert names == kept | {INDEX, "model-03-heads.safetensors", "model-06-heads.safetensors"}


def test_a_folder_is_resharded_in_place(model, tmp_path):
    model.hydravit.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with files_of_at_most(10_000), pytest.raises(OSError, match="too large"):
        reshard_checkpoint(tmp_path)
    assert contents(tmp_path) == before
    reshard_checkpoint(tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "notes.txt").exists()
    loaded = HydraViTModel.from_pretrained(tmp_path, num_attention_heads=3)
    expected = model.hydravit.extract_subnetwork(3)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    reshard_checkpoint(tmp_path, shard_by_heads=False)
    assert contents(tmp_path) == before


def test_a_checkpoint_of_the_version_before_is_resharded(tmp_path):
    shutil.unpack_archive(EARLIER_CHECKPOINT, tmp_path / "earlier")
    expected = HydraViTForImageClassification.from_pretrained(tmp_path / "earlier", num_attention_heads=3)
    reshard_checkpoint(tmp_path / "earlier", tmp_path / "new")
    loaded = HydraViTForImageClassification.from_pretrained(tmp_path / "new", num_attention_heads=3)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_what_can_not_be_resharded_is_one_error_and_leaves_nothing(model, make_model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="`shard_by_heads` must list"):
        reshard_checkpoint(tmp_path / "saved", tmp_path / "new", [7])
    make_model(num_attention_heads=4, subnetwork_heads=[2, 4]).config.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"are not of the 4 heads in its config\.json"):
        reshard_checkpoint(tmp_path / "saved", tmp_path / "new")
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no safetensors files"):
        reshard_checkpoint(tmp_path / "saved", tmp_path / "new")
    with pytest.raises(OSError, match="nowhere"):
        reshard_checkpoint(tmp_path / "nowhere", tmp_path / "new")
    assert not list(tmp_path.glob("new/*"))


def test_the_files_of_the_weights_are_known_by_their_names(model, tmp_path):
    sizes = {"max_shard_size": "40KB"}
    for options in ({}, sizes, {"shard_by_heads": True}, {"shard_by_heads": [3]} | sizes):
        model.save_pretrained(tmp_path, **options)
        names = {file.name for file in tmp_path.iterdir()}
        found = set(filter(is_weights, names))
        assert found == {name for name in names if "safetensors" in name}
        if INDEX in names:
            assert found == {INDEX, *json.loads((tmp_path / INDEX).read_text())["weight_map"].values()}
    assert not any(map(is_weights, ("model-best-of-3.safetensors", "optimizer.safetensors", "model.safetensors.bak")))
