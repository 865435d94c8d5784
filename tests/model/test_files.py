"""The files of a checkpoint are replaced whole, whoever else saves, loads or is killed."""

import threading
import time
from multiprocessing import get_context

import pytest
from support.saving import constant_model, save_often

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.model.files_hydravit import locked, staging


def values(model) -> set[float]:
    return {value for parameter in model.parameters() for value in parameter.unique().tolist()}


@pytest.mark.slow
def test_two_processes_save_to_one_folder_while_a_third_loads(tmp_path):
    context = get_context("spawn")
    errors, folder = context.Queue(), tmp_path / "saved"
    constant_model(1.0).save_pretrained(folder)
    ways = {
        1.0: [{"max_shard_size": 4000}, {"shard_by_heads": True}],
        2.0: [{"max_shard_size": 8000}, {}, {"shard_by_heads": [3]}],
    }
    savers = [context.Process(target=save_often, args=(folder, value, ways[value], 8, errors)) for value in ways]
    for saver in savers:
        saver.start()
    loads = 0
    while any(saver.is_alive() for saver in savers):
        for num_heads in (6, 3):
            loaded = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=num_heads)
            assert len(values(loaded)) == 1
            loads += 1
    assert loads > 10 and errors.empty()
    assert not [file.name for file in folder.iterdir() if file.name.startswith(("_", "."))]


def test_threads_save_to_one_folder(tmp_path):
    errors = get_context("spawn").Queue()
    savers = [
        threading.Thread(target=save_often, args=(tmp_path, value, [kwargs], 5, errors))
        for value, kwargs in ((1.0, {"max_shard_size": "20KB"}), (2.0, {"shard_by_heads": True}), (3.0, {}))
    ]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    assert errors.empty()
    assert len(values(HydraViTForImageClassification.from_pretrained(tmp_path))) == 1


def test_the_folder_of_a_killed_save_is_removed_and_that_of_a_running_one_is_not(tmp_path):
    (tmp_path / "_saving").mkdir()  # an earlier version's
    (tmp_path / "_saving-killed").mkdir()
    with staging(tmp_path) as running:
        (running / "model.safetensors").write_bytes(b"being written")
        constant_model(1.0).save_pretrained(tmp_path)
        assert [file.name for file in tmp_path.glob("_*")] == [running.name]
        assert (running / "model.safetensors").exists()
    assert not list(tmp_path.glob("_*"))


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    with locked(tmp_path) as first, locked(tmp_path, wait=False) as second:
        assert first and not second
    order = []

    def wait():
        with locked(tmp_path):
            order.append("second")

    with locked(tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_an_error_that_no_save_explains_is_raised_at_once(tmp_path):
    constant_model(1.0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    start = time.monotonic()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        HydraViTForImageClassification.from_pretrained(tmp_path)
    assert time.monotonic() - start < 5
