"""The study on Fashion-MNIST spends equal budgets, and its baselines are the networks that their papers describe."""

import numpy as np
import pytest
import torch
from support.benchmarks import DOCS


@pytest.fixture
def study(load_module):
    return load_module("fashion_study")


@pytest.fixture
def images(study, monkeypatch):
    """Few images in place of Fashion-MNIST."""
    splits = {
        name: (torch.rand(count, 1, 28, 28) * 2 - 1, torch.randint(10, (count,)))
        for name, count in (("train", 16), ("validation", 500))
    }
    monkeypatch.setattr(study, "load", lambda folder: splits)
    monkeypatch.setattr(study, "BATCH", 8)
    monkeypatch.setattr(study, "SIZES", study.SIZES | {"num_hidden_layers": 1})


@pytest.mark.parametrize("method", ["this package's best", "MatFormer", "SortedNet", "DynaBERT", "Scala"])
def test_each_method_spends_the_budget_and_has_an_accuracy_for_each_width(study, images, method):
    ten = sum(study.make_config(study.HEADS).count_macs(num_heads) for num_heads in study.HEADS)
    run = study.train(0, "validation", None, epochs=8, **study.METHODS[method])
    assert run["macs"] == pytest.approx(ten * 16 * 3 * 8 / 3, rel=1e-6)
    assert len(run["accuracy"]) == 10 and run["steps"] > 8
    assert study.train(0, "validation", None, epochs=8, **study.METHODS[method]) == run


@pytest.mark.parametrize("name", ["narrow widths later", "taught by the average of the widest"])
def test_an_attempt_trains(study, images, name):
    assert study.train(0, "validation", None, epochs=1, **study.ATTEMPTS[name])["steps"] > 2


def test_a_model_of_one_width_trains_for_its_epochs(study, images):
    run = study.train(0, "validation", None, epochs=3, heads=[4], share=None)
    assert run["steps"] == 3 * 16 // 8 and len(run["accuracy"]) == 1


def test_half_of_the_images_are_mirrored(study):
    images = torch.rand(2000, 1, 28, 28)
    mirrored = study.mirror(images, torch.Generator().manual_seed(0))
    is_mirrored = (mirrored == images.flip(-1)).flatten(1).all(1)
    assert (is_mirrored ^ (mirrored == images).flatten(1).all(1)).all() and 900 < is_mirrored.sum() < 1100


def test_the_area_is_the_mean_over_budgets_and_guesses_below_the_narrowest_width(study):
    config = study.make_config(study.HEADS)
    least, most = config.count_macs(3), config.count_macs(12)
    assert study.area([least, most], np.array([[80.0, 90.0], [90.0, 90.0]])) == pytest.approx([85.0, 90.0])
    assert study.area([(least + most) / 2, most], np.array([[90.0, 90.0]])) == pytest.approx([50.0], abs=0.1)


def test_the_report_pairs_methods_with_the_models_of_their_own(study, tmp_path):
    rows = [{"run": f"Scala/2/{seed}", "accuracy": [0.4 + 0.2 * seed] * 10, "steps": 1000} for seed in (1, 0)]
    rows += [{"run": f"alone, {k}/2/{seed}", "accuracy": [0.3 + 0.2 * seed]} for k in study.ALONE for seed in (0, 1)]
    rows += [{"run": "Scala/3/0", "accuracy": [0.1] * 10, "steps": 1}]
    summary, alone = study.summarise(rows, 2), study.alone_accuracies(rows, 2)
    assert study.gains(summary[0], alone) == pytest.approx(np.full((2, 5), 10.0))
    table = study.format_rows(summary, alone).splitlines()
    assert table[2].startswith("| a model for each width | 2 | | 40.00 ± 10.00 |")
    assert table[3].startswith("| Scala | 2 | 1,000 | 50.00 ± 10.00 |") and len(table) == 4
    assert table[3].endswith("| 10.00 ± 0.00 | 10.00 |")
    study.plot(summary, alone, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_the_table_on_training_is_that_of_the_results(study):
    rows = study.read_rows(study.RESULTS / "fashion_study.jsonl")
    alone = study.alone_accuracies(rows, study.EPOCHS)
    table = study.format_rows(study.summarise(rows, study.EPOCHS), alone)
    assert table in (DOCS / "training.md").read_text(encoding="utf-8") and table.count("\n") > 3
