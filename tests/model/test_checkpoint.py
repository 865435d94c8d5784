"""One checkpoint loads at any width, and no accident leaves less than one whole checkpoint."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.disks import FULL, contents, files_of_at_most, fill
from support.drawing import configs, configs_and_widths, costly, make
from support.models import EARLIER_CHECKPOINT, HEADS, TRAVELLING, shapes
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, HydraViTModel
from hydravit_hf.model import checkpoint_hydravit
from hydravit_hf.model.configuration_hydravit import as_pair

CLASSIFIER = HydraViTForImageClassification
close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@pytest.fixture(params=[False, True], ids=["one classifier in one file", "separate classifiers in shards"])
def any_model(request, make_model):
    return make_model(separate_classifiers=request.param)


@pytest.fixture
def folder(any_model, tmp_path):
    shards = any_model.config.separate_classifiers
    any_model.save_pretrained(tmp_path, max_shard_size="60KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors").exists() != shards
    return tmp_path


@pytest.mark.parametrize("num_heads", [1, 4, 6])
def test_every_way_of_loading_a_width_agrees(any_model, folder, images, num_heads):
    expected = any_model(images, num_heads_active=num_heads).logits
    active = CLASSIFIER.from_pretrained(folder, num_heads_active=num_heads)
    assert active.config.num_attention_heads == 6
    held = CLASSIFIER.from_pretrained(folder, num_attention_heads=num_heads)
    assert shapes(held) == shapes(any_model.extract_subnetwork(num_heads))
    config = HydraViTConfig.from_pretrained(folder, num_attention_heads=num_heads)
    for loaded in (
        active,
        held,
        CLASSIFIER.from_pretrained(str(folder), config=config),
        AutoModelForImageClassification.from_pretrained(folder, num_attention_heads=num_heads),
        AutoModelForImageClassification.from_pretrained(folder, num_heads_active=num_heads),
    ):
        assert not loaded.training
        assert loaded.name_or_path == loaded.config.name_or_path == str(folder)
        torch.testing.assert_close(loaded(images).logits, expected, atol=1e-5, rtol=0)
    states = AutoModel.from_pretrained(folder, num_attention_heads=num_heads)(images).last_hidden_state
    expected = any_model.hydravit(images, num_heads_active=num_heads).last_hidden_state
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


@costly
@given(configs_and_widths(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["1GB", "4KB"]))
def test_a_width_from_disk_is_the_extracted_model_bit_by_bit(pair, dtype, max_shard_size):
    config, num_heads = pair
    model = make(config)[0].to(dtype)
    expected = model.extract_subnetwork(num_heads)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        narrow = CLASSIFIER.from_pretrained(folder, num_attention_heads=num_heads)
        active = CLASSIFIER.from_pretrained(folder, num_heads_active=num_heads)
    assert narrow.config.subnetwork_heads == expected.config.subnetwork_heads
    for loaded, origin in ((narrow, expected), (active, model)):
        assert loaded.dtype == dtype
        tensors = origin.state_dict()
        assert loaded.state_dict().keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    assert active.config.num_heads_active == num_heads


def test_a_checkpoint_of_the_version_before_gives_its_logits_at_every_width(tmp_path):
    folder = tmp_path / "earlier"
    shutil.unpack_archive(EARLIER_CHECKPOINT, folder)
    expected = load_file(folder / "expected.safetensors")
    images = expected["pixel_values"]
    full = CLASSIFIER.from_pretrained(folder)
    for num_heads in HEADS:
        for loaded, active in (
            (full, num_heads),
            (CLASSIFIER.from_pretrained(folder, num_heads_active=num_heads), None),
            (CLASSIFIER.from_pretrained(folder, num_attention_heads=num_heads), None),
            (AutoModelForImageClassification.from_pretrained(folder, num_attention_heads=num_heads), None),
        ):
            close(loaded(images, num_heads_active=active).logits, expected[f"logits.{num_heads}"])
    outputs = full.cascade(images)
    close(outputs.logits, expected["cascade.logits"])
    assert torch.equal(outputs.num_heads, expected["cascade.num_heads"])
    full.save_pretrained(folder)  # by the new code, over the old one
    close(CLASSIFIER.from_pretrained(folder, num_attention_heads=3)(images).logits, expected["logits.3"])


def test_a_checkpoint_saved_from_any_of_them_loads_again_everywhere(any_model, folder, images, tmp_path_factory):
    expected = any_model(images, num_heads_active=2).logits
    for number, model in enumerate(
        (
            CLASSIFIER.from_pretrained(folder, num_attention_heads=4),
            CLASSIFIER.from_pretrained(folder, num_heads_active=4),
            CLASSIFIER.from_pretrained(folder, num_attention_heads=8),
            any_model.extract_subnetwork(4),
        )
    ):
        again = tmp_path_factory.mktemp(str(number))
        model.save_pretrained(again)
        assert {file.name for file in again.iterdir()} == {"config.json", "model.safetensors", *TRAVELLING}
        for loaded in (
            CLASSIFIER.from_pretrained(again, num_attention_heads=2),
            CLASSIFIER.from_pretrained(again, num_heads_active=2),
            AutoModelForImageClassification.from_pretrained(again, num_attention_heads=2),
        ):
            torch.testing.assert_close(loaded(images).logits, expected, atol=1e-5, rtol=0)


def test_more_heads_than_the_checkpoint_has_keep_its_function(any_model, folder, images, logged):
    grown = CLASSIFIER.from_pretrained(folder, num_attention_heads=8)
    assert any("heads 7 to 8 and all that belongs to them are newly initialized" in message for message in logged)
    for num_heads in HEADS:
        expected = any_model(images, num_heads_active=num_heads).logits
        torch.testing.assert_close(grown(images, num_heads_active=num_heads).logits, expected, atol=1e-5, rtol=0)
    assert grown.config.subnetwork_heads == list(range(1, 9))
    weight = grown.hydravit.layers[0].mlp.fc1.weight
    assert weight[:, 48:].count_nonzero() == weight[:, 48:].numel()  # initialised, not left empty
    encoder = HydraViTModel.from_pretrained(folder, num_attention_heads=8)
    states = any_model.hydravit(images, num_heads_active=6).last_hidden_state
    torch.testing.assert_close(encoder(images, num_heads_active=6).last_hidden_state, states, atol=1e-5, rtol=0)


@costly
@given(configs(), st.integers(1, 3))
def test_what_was_grown_and_cut_again_is_the_original(config, more):
    model, images = make(config)
    held = config.num_attention_heads
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        grown = CLASSIFIER.from_pretrained(folder, num_attention_heads=held + more)
    assert all(parameter.isfinite().all() for parameter in grown.parameters())
    cut = grown.extract_subnetwork(held)
    tensors = model.state_dict()
    for name, tensor in cut.state_dict().items():
        block = tuple(slice(size) for size in tensors[name].shape)
        assert torch.equal(tensor[block], tensors[name]), name
    close(cut(images).logits, model(images, num_heads_active=held).logits)


def test_dtype_and_device_map_hold_at_every_width(any_model, folder):
    for num_heads in (3, 6, 8):
        loaded = CLASSIFIER.from_pretrained(
            folder, num_attention_heads=num_heads, dtype=torch.bfloat16, device_map="cpu"
        )
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    any_model.to(torch.bfloat16).save_pretrained(folder / "half")
    assert CLASSIFIER.from_pretrained(folder / "half", num_attention_heads=3).dtype == torch.bfloat16


def test_an_extracted_subnetwork_shares_nothing_with_its_origin(any_model):
    extracted = any_model.train().extract_subnetwork(6)
    assert extracted.training
    storages = {parameter.untyped_storage().data_ptr() for parameter in any_model.parameters()}
    assert storages.isdisjoint(parameter.untyped_storage().data_ptr() for parameter in extracted.parameters())
    extracted.config.num_labels = 3
    assert any_model.config.num_labels == 5


def test_a_narrow_load_reads_the_leading_rows_only(make_model, tmp_path):
    if not os.path.exists("/proc/self/io"):
        pytest.skip("the kernel counts no reads")

    def bytes_read() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    model = make_model(num_attention_heads=12, head_dim=32, num_hidden_layers=4, subnetwork_heads=None)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    before = bytes_read()
    CLASSIFIER.from_pretrained(tmp_path, num_attention_heads=3)
    assert bytes_read() - before < 0.3 * size


@pytest.mark.parametrize("size", [16, 32])
def test_other_labels_need_ignore_mismatched_sizes_at_every_width(any_model, folder, size):
    images = torch.randn(3, 3, size, size)
    states = any_model.hydravit(images, num_heads_active=3, interpolate_pos_encoding=True).last_hidden_state
    for num_heads in (3, 6, 8):
        options = {"num_attention_heads": num_heads, "num_labels": 400, "image_size": size}
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            CLASSIFIER.from_pretrained(folder, **options)
        loaded, report = CLASSIFIER.from_pretrained(
            folder, **options, ignore_mismatched_sizes=True, output_loading_info=True
        )
        torch.testing.assert_close(loaded.hydravit(images, num_heads_active=3).last_hidden_state, states)
        assert loaded(images).logits.shape == (3, 400)
        assert {name for name, *_ in report["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
        assert not report["missing_keys"] and not report["unexpected_keys"]
        weight, bias = loaded.classifier.weight, loaded.classifier.bias  # initialised, not left empty
        assert weight.std().item() == pytest.approx(0.02, rel=0.1) and weight.abs().max() < 0.2
        assert bias.count_nonzero() == 0


@pytest.mark.parametrize("size", [8, 32, (12, 20), (8, 32)])  # the last one has as many patches as 16 x 16
def test_another_image_size_at_load_is_the_interpolation_of_every_call(any_model, folder, tmp_path_factory, size):
    images = torch.randn(3, 3, *as_pair(size))
    again = tmp_path_factory.mktemp("again")
    loads = [CLASSIFIER.from_pretrained(folder, image_size=size, num_attention_heads=heads) for heads in (3, 6, 8)]
    loads[-1].save_pretrained(again)
    loads += [
        CLASSIFIER.from_pretrained(again),
        CLASSIFIER.from_pretrained(folder, image_size=size),
        CLASSIFIER.from_pretrained(folder, config=HydraViTConfig.from_pretrained(folder, image_size=size)),
        AutoModelForImageClassification.from_pretrained(folder, image_size=size),
        AutoModelForImageClassification.from_pretrained(folder, image_size=size, num_attention_heads=3),
    ]
    for loaded in loads:
        assert as_pair(loaded.config.image_size) == as_pair(size)
        assert shapes(loaded) == shapes(CLASSIFIER(loaded.config))
        for num_heads in {1, 3, min(6, loaded.config.num_attention_heads)}:
            expected = any_model(images, num_heads_active=num_heads, interpolate_pos_encoding=True).logits
            torch.testing.assert_close(loaded(images, num_heads_active=num_heads).logits, expected)
    expected = any_model.hydravit(images, interpolate_pos_encoding=True).last_hidden_state
    for encoder in (HydraViTModel, AutoModel):
        states = encoder.from_pretrained(folder, image_size=size)(images).last_hidden_state
        torch.testing.assert_close(states, expected)


def test_another_image_size_of_rectangular_patches(make_model, tmp_path):
    model, images = make_model(image_size=(8, 12), patch_size=(4, 2)), torch.randn(3, 3, 20, 14)
    model.save_pretrained(tmp_path)
    loaded = CLASSIFIER.from_pretrained(tmp_path, image_size=(20, 14), num_attention_heads=4)
    expected = model(images, num_heads_active=4, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(loaded(images).logits, expected)
    with pytest.raises(ValueError, match=r"`image_size=15` must be a multiple of `patch_size="):
        CLASSIFIER.from_pretrained(tmp_path, image_size=15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_image_size_keeps_the_dtype(make_model, tmp_path, dtype):
    make_model().to(dtype).save_pretrained(tmp_path)
    for num_heads in (3, 6, 8):
        loaded = CLASSIFIER.from_pretrained(tmp_path, image_size=32, num_attention_heads=num_heads)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_another_image_size_from_the_cache_of_the_hub(model, tmp_path):
    snapshot = tmp_path / "models--someone--hydravit" / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    model.save_pretrained(tmp_path / "folder" / "inside")
    images = torch.randn(2, 3, 32, 8)
    expected = model(images, num_heads_active=3, interpolate_pos_encoding=True).logits
    for source in (
        {"pretrained_model_name_or_path": "someone/hydravit", "cache_dir": tmp_path},
        {"pretrained_model_name_or_path": tmp_path / "folder", "subfolder": "inside"},
    ):
        for load in (CLASSIFIER.from_pretrained, AutoModelForImageClassification.from_pretrained):
            loaded = load(**source, image_size=(32, 8))
            torch.testing.assert_close(loaded(images, num_heads_active=3).logits, expected)


def test_positions_whose_grid_is_unknown_and_other_patches_stay_a_mismatch(model, tmp_path):
    model.save_pretrained(tmp_path)
    for num_heads in (3, 6, 8):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            CLASSIFIER.from_pretrained(tmp_path, patch_size=8, num_attention_heads=num_heads)
    config = HydraViTConfig.from_pretrained(tmp_path, image_size=32)
    config.save_pretrained(tmp_path)  # by hand, and so for other positions than those in the file
    for options in ({}, {"image_size": 24}, {"num_attention_heads": 3}):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            CLASSIFIER.from_pretrained(tmp_path, **options)
    (tmp_path / "config.json").unlink()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        CLASSIFIER.from_pretrained(tmp_path, config=config)
    for num_heads in (3, 6):
        loaded = CLASSIFIER.from_pretrained(tmp_path, config=model.config.resized(num_heads))
        assert shapes(loaded) == shapes(model.extract_subnetwork(num_heads))


def test_the_classifier_of_one_width_never_passes_for_that_of_another(make_model, tmp_path):
    make_model(separate_classifiers=True).save_pretrained(tmp_path)
    for num_heads, size in ((4, 16), (6, 16), (6, 32), (8, 16)):
        options = {"num_attention_heads": num_heads, "subnetwork_heads": [2, num_heads], "image_size": size}
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            CLASSIFIER.from_pretrained(tmp_path, **options)


def test_one_classifier_never_passes_for_separate_ones(make_model, tmp_path):
    make_model(num_labels=8).save_pretrained(tmp_path)  # as many labels as there will be subnetworks
    for num_heads in (3, 6, 8):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            CLASSIFIER.from_pretrained(tmp_path, num_attention_heads=num_heads, separate_classifiers=True)


@pytest.mark.parametrize("keyword", ["num_heads_active", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "3"])
def test_a_wrong_width_is_an_error_at_load(model, tmp_path, keyword, value):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=keyword):
        CLASSIFIER.from_pretrained(tmp_path, **{keyword: value})


def test_a_misspelt_keyword_is_an_error(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="num_head_active"):
        CLASSIFIER.from_pretrained(tmp_path, num_head_active=3)
    with pytest.raises(ValueError, match="hidden_size"):
        CLASSIFIER.from_pretrained(tmp_path, hidden_size=24)


def test_a_foreign_checkpoint_is_an_error(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_vit"):
        CLASSIFIER.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        CLASSIFIER.from_pretrained(tmp_path / "nowhere", num_attention_heads=3)


def test_a_width_that_is_no_multiple_of_the_head_is_an_error(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="48 channels wide"):
        CLASSIFIER.from_pretrained(tmp_path, head_dim=7)


def test_a_second_save_replaces_the_first_and_leaves_no_file_of_it(make_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-best-of-3.safetensors").write_text("mine too")
    images = torch.randn(2, 3, 16, 16)
    for shard_size in ("1GB", "20KB", "30KB", "20KB", "1GB"):
        model = make_model()
        model.save_pretrained(tmp_path, max_shard_size=shard_size)
        torch.testing.assert_close(CLASSIFIER.from_pretrained(tmp_path)(images).logits, model(images).logits)
        weights = {file.name for file in tmp_path.glob("*.safetensors")} - {"model-best-of-3.safetensors"}
        if shard_size == "1GB":
            assert weights == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert weights == set(index["weight_map"].values())
        assert not list(tmp_path.glob("_saving*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model-best-of-3.safetensors").read_text() == "mine too"
    assert not (tmp_path / "model.safetensors.index.json").exists()


KILL_WHILE_SAVING = """
import itertools, json, os, random, signal, sys, time, traceback, torch
from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

root, ways, kills = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
config = HydraViTConfig(num_attention_heads=6, head_dim=16, num_hidden_layers=2, image_size=16, patch_size=4)
model = HydraViTForImageClassification(config)

def save_forever(report, folder, options):
    for number in itertools.count(1):
        for parameter in model.parameters():
            parameter.data.fill_(number)
        model.save_pretrained(folder, **options)
        os.write(report, b".")

def in_child(work, *arguments):
    child = os.fork()  # this process itself never starts a thread, so that its children can
    if child == 0:
        status = 1
        try:
            work(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child

def check(saved, folder):
    loaded = HydraViTForImageClassification.from_pretrained(folder)
    (number,) = {value.item() for parameter in loaded.parameters() for value in parameter.unique()}
    assert number in (saved, saved + 1), (number, saved)  # all of one save: the last reported, or the one after it

random.seed(0)
for number in range(kills):
    options = ways[number % len(ways)]
    folder = f"{root}/{number % len(ways)}"
    read, write = os.pipe()
    child = in_child(save_forever, write, folder, options)
    os.close(write)
    os.read(read, 1)  # one save is done
    time.sleep(random.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saved = 1
    while dots := os.read(read, 1000):
        saved += len(dots)
    os.close(read)
    assert os.waitpid(in_child(check, saved, folder), 0)[1] == 0
for number, options in enumerate(ways):
    model.save_pretrained(f"{root}/{number}", **options)
print("whole after every kill")
"""


@pytest.mark.slow  # its fast sibling is test_a_save_that_stops_at_any_step_leaves_one_whole_checkpoint
def test_a_save_that_is_killed_leaves_the_last_checkpoint_whole(tmp_path):
    ways = [{}, {"max_shard_size": "100KB"}, {"shard_by_heads": True}]
    command = [sys.executable, "-c", KILL_WHILE_SAVING, str(tmp_path), json.dumps(ways), "60"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "whole after every kill\n", result.stderr[-2000:]
    assert not list(tmp_path.rglob("_saving*"))


class Stop(BaseException):
    """What no code catches, as if the process ended here."""


def stop_after(steps: int, patch) -> list[str]:
    """Let `steps` files be replaced or removed, and stop at the next one. Returns the steps that were done."""
    done = []

    def stopping(call):
        def step(*arguments, **options):
            if len(done) == steps:
                raise Stop
            done.append(call.__name__)
            return call(*arguments, **options)

        return step

    patch.setattr(os, "replace", stopping(os.replace))
    patch.setattr(Path, "unlink", stopping(Path.unlink))
    return done


BY_WIDTH = {"shard_by_heads": [2, 4]}


@pytest.mark.parametrize(
    "options",
    [
        ({}, {}),
        ({"max_shard_size": "90KB"}, {}),
        ({}, {"max_shard_size": "90KB"}),
        ({"max_shard_size": "90KB"}, {"max_shard_size": "120KB"}),
        (BY_WIDTH, {}),
        ({}, BY_WIDTH),
        (BY_WIDTH, BY_WIDTH),
        ({"max_shard_size": "90KB"}, BY_WIDTH | {"max_shard_size": "60KB"}),
    ],
)
def test_a_save_that_stops_at_any_step_leaves_one_whole_checkpoint(make_model, tmp_path, monkeypatch, options):
    models = make_model(), make_model()
    for value, model in enumerate(models):
        for parameter in model.parameters():
            parameter.data.fill_(value)
    models[0].save_pretrained(tmp_path / "saved", **options[0])
    found = []
    while True:
        folder = shutil.copytree(tmp_path / "saved", tmp_path / str(len(found)))
        with monkeypatch.context() as patch, suppress(Stop):
            done = stop_after(len(found), patch)
            models[1].save_pretrained(folder, **options[1])
        if len(done) < len(found):  # it came to its end
            break
        loads = (CLASSIFIER.from_pretrained(folder, num_attention_heads=heads) for heads in (6, 3))
        (value,) = {value.item() for load in loads for weight in load.parameters() for value in weight.unique()}
        found.append(value)
    assert found == sorted(found) and set(found) == {0, 1}


def test_a_save_during_a_load_never_mixes_two_checkpoints(make_model, tmp_path, monkeypatch):
    old, new = make_model(), make_model()
    old.save_pretrained(tmp_path)
    cut = checkpoint_hydravit.leading_blocks

    def save_then_cut(stored, config):  # between the header and the data
        new.save_pretrained(tmp_path)
        return cut(stored, config)

    monkeypatch.setattr(checkpoint_hydravit, "leading_blocks", save_then_cut)
    loaded = CLASSIFIER.from_pretrained(tmp_path, num_attention_heads=3)
    monkeypatch.undo()
    for name, tensor in old.extract_subnetwork(3).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "300KB"}])
def test_a_save_on_a_full_disk_keeps_the_checkpoint_that_was_there(large_model, disk, options):
    folder = disk / "saved"
    large_model.save_pretrained(folder, **options)
    before = contents(folder)
    for parameter in large_model.parameters():
        parameter.data += 1
    with pytest.raises(OSError, match=FULL):
        large_model.save_pretrained(folder, **options)
    assert contents(folder) == before
    with pytest.raises(OSError, match=FULL):
        large_model.save_pretrained(folder, shard_by_heads=True)
    assert contents(folder) == before
    assert not list(folder.glob("_saving*"))
    with pytest.raises(OSError, match=FULL):
        large_model.extract_subnetwork(5).save_pretrained(disk / "other")
    assert contents(disk / "other") == {}
    blocks = fill(disk)
    with pytest.raises(OSError, match=FULL):
        large_model.extract_subnetwork(1).save_pretrained(folder)
    assert contents(folder) == before
    blocks.unlink()
    loaded = CLASSIFIER.from_pretrained(folder)
    for old, new in zip(loaded.parameters(), large_model.parameters(), strict=True):
        assert torch.equal(old + 1, new)
    del loaded, old  # they are mapped from the file
    shutil.rmtree(folder)
    large_model.save_pretrained(folder, **options)  # with room again, it works again


def test_a_save_of_too_large_a_file_keeps_the_checkpoint_that_was_there(large_model, tmp_path):
    large_model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with files_of_at_most(100_000), pytest.raises(OSError, match="too large"):
        large_model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_weights_under_another_name_load_at_every_width(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "best.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"transformers_weights": "best.safetensors"}))
    for num_heads in (3, 6, 8):
        loaded = CLASSIFIER.from_pretrained(tmp_path, num_attention_heads=num_heads)
        expected = model(images, num_heads_active=3).logits
        close(loaded(images, num_heads_active=3).logits, expected)
    (tmp_path / "config.json").write_text(json.dumps(values | {"transformers_weights": "../best.safetensors"}))
    with pytest.raises(ValueError, match="`transformers_weights` must name a safetensors file or index"):
        CLASSIFIER.from_pretrained(tmp_path)
