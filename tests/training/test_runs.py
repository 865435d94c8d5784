"""A run has one folder that is mixed with nothing else; its checkpoints are whole, and the last one is resumed."""

import json
import os
import signal
import threading

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from support.training import make_config
from torch import nn

from hydravit_hf import make_image_processor
from hydravit_hf.training.augmentation import TrainingAugmentation, TrainingImages
from hydravit_hf.training.runs import (
    Preemption,
    checkpoint_step,
    describe_data,
    last_whole_checkpoint,
    list_checkpoints,
    open_data,
    open_run,
    save_checkpoint,
)

SETTINGS = {"seed": 1, "learning_rate": 0.1, "heads": [3, 6], "name": None}

# Folders


def test_a_new_run_makes_its_folder_and_notes_its_settings(tmp_path):
    folder = tmp_path / "some" / "run"
    open_run(folder, SETTINGS, resume=False, overwrite=False)
    assert [file.name for file in folder.iterdir()] == ["run.json"]
    assert json.loads((folder / "run.json").read_text()) == SETTINGS
    (tmp_path / "empty").mkdir()
    open_run(tmp_path / "empty", SETTINGS, resume=False, overwrite=False)
    assert (tmp_path / "empty" / "run.json").exists()


def test_a_folder_that_is_not_empty_is_left_alone_unless_it_may_be_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear to somebody")
    with pytest.raises(ValueError, match=r"is not empty.*--resume_from_checkpoint.*--overwrite_output_dir"):
        open_run(tmp_path, SETTINGS, resume=False, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder_for_a_run(tmp_path, overwrite):
    file = tmp_path / "file"
    file.write_text("dear to somebody")
    with pytest.raises(ValueError, match=f"'{file}'"):
        open_run(file, SETTINGS, resume=False, overwrite=overwrite)
    assert file.read_text() == "dear to somebody"


def test_overwriting_a_run_deletes_its_checkpoints_and_nothing_else(tmp_path):
    open_run(tmp_path, {"seed": 0}, resume=False, overwrite=False)
    for name in ("checkpoint-3", "checkpoint-12", "logs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("something")
    (tmp_path / "model.safetensors").write_text("something")
    open_run(tmp_path, SETTINGS, resume=False, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"logs", "model.safetensors", "run.json"}
    assert (tmp_path / "logs" / "file").exists()
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_is_resumed_with_the_settings_that_it_had_and_changes_nothing(tmp_path, overwrite):
    open_run(tmp_path, SETTINGS, resume=False, overwrite=False)
    (tmp_path / "checkpoint-3").mkdir()
    text = (tmp_path / "run.json").read_text()
    open_run(tmp_path, SETTINGS | {"heads": (3, 6)}, resume=True, overwrite=overwrite)  # a list, once in a file
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint-3", "run.json"}
    assert (tmp_path / "run.json").read_text() == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS | {"seed": 2}, "another run.*: seed was 1 and is 2[.]$"),
        (SETTINGS | {"seed": 2, "heads": [3]}, r": seed was 1 and is 2, heads was \[3, 6\] and is \[3\][.]$"),
        (SETTINGS | {"new": "x"}, "new was None and is 'x'"),
        ({"seed": 1, "heads": [3, 6]}, "learning_rate was 0.1 and is None"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(tmp_path, settings, message):
    open_run(tmp_path, SETTINGS, resume=False, overwrite=False)
    with pytest.raises(ValueError, match=message):
        open_run(tmp_path, settings, resume=True, overwrite=True)
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    (tmp_path / "notes.txt").write_text("no run")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"no run to resume in '{folder}'"):
            open_run(folder, SETTINGS, resume=True, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_data_are_described_by_the_labels_in_their_order():
    data = Dataset.from_dict({"label": [3, 1, 2], "number": [0, 1, 2]})
    augmentation = TrainingAugmentation(make_image_processor(make_config()))
    described = describe_data(data)
    assert described.keys() == {"images", "labels"} and described["images"] == 3
    same = [data.with_transform(lambda batch: batch), data.with_format("torch"), TrainingImages(data, augmentation)]
    same += [data.rename_column("label", "labels"), data.remove_columns("number")]
    assert [describe_data(other) for other in same] == [described] * 5
    for others in ([3, 2, 1], [3, 1], [3, 1, 2, 2]):
        assert describe_data(Dataset.from_dict({"label": others})) != described
    assert describe_data([{"labels": 3}]) == {"images": 1}
    assert describe_data(iter([])) == describe_data(data.to_iterable_dataset()) == {}


def test_the_data_of_a_run_are_noted_and_a_resumed_run_has_the_same(tmp_path):
    data = Dataset.from_dict({"label": [3, 1, 2]})
    open_data(tmp_path, data, resume=True)  # of a run whose data were not noted yet
    noted = (tmp_path / "data.json").read_text()
    open_data(tmp_path, data.with_format("torch"), resume=True)
    with pytest.raises(ValueError, match=f"'{tmp_path}' holds another run than the one to resume: images was 3 and is"):
        open_data(tmp_path, data.select([0, 1]), resume=True)
    assert (tmp_path / "data.json").read_text() == noted
    open_data(tmp_path, data.select([0, 1]), resume=False)
    assert (tmp_path / "data.json").read_text() != noted


# Preemption


def test_a_signal_to_end_is_noted_within_the_context_only():
    accelerator, former = Accelerator(cpu=True), signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.is_near(accelerator)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.is_near(accelerator)
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_thread_that_gets_no_signals_has_none_noted():
    former, near = signal.getsignal(signal.SIGTERM), []

    def run():
        with Preemption() as preemption:
            near.append(preemption.is_near(Accelerator(cpu=True)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert near == [False] and signal.getsignal(signal.SIGTERM) is former


# Checkpoints


def test_checkpoints_are_listed_by_their_steps_and_unfinished_ones_are_not(tmp_path):
    for name in ("checkpoint-10", "checkpoint-100", "checkpoint-9", "_checkpoint", "logs"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert [checkpoint_step(folder) for folder in list_checkpoints(tmp_path)] == [9, 10, 100]
    assert list_checkpoints(tmp_path / "logs") == []


@pytest.mark.parametrize(("keep", "kept"), [(None, [8, 9, 10, 11]), (1, [11]), (3, [9, 10, 11]), (9, [8, 9, 10, 11])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, kept):
    accelerator = Accelerator()
    (tmp_path / "_checkpoint").mkdir()  # left by a run that was killed while it saved
    (tmp_path / "_checkpoint" / "rest").write_text("something")
    for step in (8, 9, 10, 11):
        save_checkpoint(accelerator, tmp_path, step, keep)
        assert not (tmp_path / "_checkpoint").exists()
    assert [checkpoint_step(folder) for folder in list_checkpoints(tmp_path)] == kept
    assert not any((folder / "rest").exists() for folder in list_checkpoints(tmp_path))


def test_a_checkpoint_brings_model_optimizer_and_random_numbers_back(tmp_path):
    accelerator = Accelerator()
    model = nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))

    def train(steps: int) -> torch.Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(3, 2).to(accelerator.device)).pow(2).mean().backward()
            optimizer.step()
        return model.weight.detach().clone()

    train(2)
    save_checkpoint(accelerator, tmp_path, 1)
    save_checkpoint(accelerator, tmp_path, 1)  # again, as a resumed run does
    expected = train(3)
    assert not torch.equal(train(1), expected)
    accelerator.load_state(str(tmp_path / "checkpoint-1"))
    assert torch.equal(train(3), expected)


def test_the_last_whole_checkpoint_is_that_which_all_processes_finished(tmp_path, caplog):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        for rank in range(2 if step < 10 else 1):
            (tmp_path / f"checkpoint-{step}" / f"rng_state_{rank}.pth").touch()
    (tmp_path / "checkpoint-12-copy").mkdir()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-10" and not caplog.text
    assert last_whole_checkpoint(tmp_path, world_size=2).name == "checkpoint-4"
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"half')
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    caplog.clear()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"
    for step in (4, 10):
        assert f"checkpoint-{step}' was not saved whole" in caplog.text
    for folder, world_size in ((tmp_path, 3), (tmp_path / "new", 1)):
        with pytest.raises(ValueError, match=f"no whole checkpoint to resume from in '{folder}'"):
            last_whole_checkpoint(folder, world_size)
