"""What a training loop needs: draws that replay, parameters that each have one group, runs that are not lost."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.training import (
    checkpoint_step,
    list_checkpoints,
    open_run,
    parameter_groups,
    sample_num_heads,
    save_checkpoint,
)

SETTINGS = {"seed": 1, "learning_rate": 0.1, "heads": [3, 6], "name": None}


def make_config(**kwargs) -> HydraViTConfig:
    sizes = {"num_attention_heads": 6, "head_dim": 8, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    return HydraViTConfig(**sizes | kwargs)


# The draw of widths


def test_a_draw_is_a_function_of_the_seed_and_the_step():
    config = make_config(subnetwork_weights=[4, 3, 2, 1])
    draws = [sample_num_heads(config, seed=7, step=step) for step in range(200)]
    for generator in (random, np.random, torch.random):
        (generator.manual_seed if generator is torch.random else generator.seed)(123)
    backwards = [sample_num_heads(config, seed=7, step=step) for step in reversed(range(200))]
    assert backwards[::-1] == draws
    assert all(type(draw) is int for draw in draws)
    assert [sample_num_heads(config, seed=8, step=step) for step in range(200)] != draws
    assert [sample_num_heads(config, seed=7, step=step) for step in range(200, 400)] != draws
    assert [sample_num_heads(config, seed=8, step=step) for step in range(199)] != draws[1:]  # nor the same, shifted


def test_a_draw_leaves_the_generators_of_others_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    sample_num_heads(make_config(), seed=0, step=0)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("weights", [None, [1, 1, 1, 1], [1, 2, 3, 4], [0.7, 0, 0.2, 0.1], [0, 0, 5, 0]])
def test_widths_are_drawn_as_often_as_their_weights_say(weights):
    config, steps = make_config(subnetwork_weights=weights), 3000
    counts = Counter(sample_num_heads(config, seed=0, step=step) for step in range(steps))
    odds = np.divide(weights or [1] * 4, sum(weights or [1] * 4))
    assert counts.keys() <= {3, 4, 5, 6}
    for num_heads, probability in zip((3, 4, 5, 6), odds, strict=True):
        deviation = (steps * probability * (1 - probability)) ** 0.5
        assert abs(counts[num_heads] - steps * probability) <= 3 * deviation, num_heads  # none where it is impossible


def test_every_seed_draws_all_widths_from_the_first_steps_on():
    config = make_config(subnetwork_heads=[1, 6])
    first = Counter(sample_num_heads(config, seed=seed, step=0) for seed in range(1000))
    assert abs(first[1] - 500) < 3 * 250**0.5


# Parameter groups


@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_every_parameter_is_in_one_group_and_the_weights_of_linear_maps_decay(separate_classifiers):
    model = HydraViTForImageClassification(make_config(separate_classifiers=separate_classifiers))
    decaying, constant = parameter_groups(model, weight_decay=0.05)
    assert (decaying["weight_decay"], constant["weight_decay"]) == (0.05, 0.0)
    grouped = Counter(map(id, [*decaying["params"], *constant["params"]]))
    assert grouped == Counter(map(id, model.parameters()))
    maps = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    expected = {id(module.weight) for module in maps}
    if separate_classifiers:
        assert model.classifier not in maps
        expected.add(id(model.classifier.weight))
    assert {id(parameter) for parameter in decaying["params"]} == expected
    assert len(expected) == 2 * 6 + 2


def test_an_optimizer_shrinks_what_decays_and_nothing_else():
    model = HydraViTForImageClassification(make_config())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        decays = name.endswith(".weight") and isinstance(module, (nn.Linear, nn.Conv2d))
        torch.testing.assert_close(parameter, before[name] * (0.95 if decays else 1.0), msg=name)


# Runs


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


def test_overwriting_deletes_the_checkpoints_and_nothing_else(tmp_path):
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


def test_what_holds_no_run_is_not_resumed(tmp_path):
    (tmp_path / "notes.txt").write_text("no run")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"no run to resume in '{folder}'"):
            open_run(folder, SETTINGS, resume=True, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


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
