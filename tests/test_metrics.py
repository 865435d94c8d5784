"""The metric has the means of numpy for each width and score, in whatever order the scores come."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hydravit_hf.metrics import SubnetworkMetric, multi_label_metrics, name_by_width, regression_metrics


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_the_metric_has_numpys_means_of_scores_in_any_order(tmp_path, keep_in_memory):
    generator = np.random.default_rng(0)
    num_heads, scores = generator.choice([1, 3, 12], 60), generator.normal(size=(60, 2))
    metric = SubnetworkMetric(["accuracy", "loss"], keep_in_memory=keep_in_memory, cache_dir=str(tmp_path))
    for part in np.array_split(generator.permutation(60), [3, 4, 20]):
        for width in (12, 1, 3):
            metric.add_scores(scores[part][num_heads[part] == width], width)
    expected = {
        f"{width}_heads_{name}": scores[num_heads == width, column].mean()
        for width in (1, 3, 12)
        for column, name in enumerate(("accuracy", "loss"))
    }
    for name in ("accuracy", "loss"):
        expected[f"mean_{name}"] = np.mean([value for key, value in expected.items() if key.endswith(name)])
    found = metric.compute()
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in found.values())


def test_the_means_are_over_widths_and_not_over_images():
    metric = SubnetworkMetric(["accuracy"])
    metric.add_scores([[1.0], [1.0], [1.0]], num_heads=1)
    metric.add_scores(torch.tensor([[0.0]]), num_heads=2)
    assert metric.compute() == {"1_heads_accuracy": 1.0, "2_heads_accuracy": 0.0, "mean_accuracy": 0.5}


def test_a_metric_starts_anew_after_it_was_computed():
    metric = SubnetworkMetric(["loss"])
    for value in (1.0, 3.0):
        metric.add_scores([[value]], num_heads=4)
        assert metric.compute() == {"4_heads_loss": value, "mean_loss": value}


def test_scores_of_another_number_than_the_names_are_an_error():
    with pytest.raises(ValueError, match="argument"):
        SubnetworkMetric(["accuracy", "loss"]).add_scores([[1.0]], num_heads=3)


def test_the_metrics_of_widths_are_named_by_their_heads_and_averaged():
    named = name_by_width({3: {"hits": 1, "rows": 4}, 6: {"hits": 2, "rows": 4}})
    assert named == {
        **{"3_heads_hits": 1, "3_heads_rows": 4, "6_heads_hits": 2, "6_heads_rows": 4},
        **{"mean_hits": 1.5, "mean_rows": 4.0},
    }


def test_a_metric_that_is_no_number_or_that_a_width_lacks_has_no_mean():
    narrow = {"hits": np.int64(1), "names": ["cat"], "exact": True, "missing": None, "loss": np.float32(0.5), "own": 1}
    wide = {"hits": 2, "names": ["dog"], "exact": False, "missing": 1.0, "loss": 1.5}
    named = name_by_width({3: narrow, 6: wide})
    assert {name: value for name, value in named.items() if "_heads_" not in name} == {"mean_hits": 1.5, "mean_loss": 1}
    assert named["3_heads_names"] == ["cat"] and named["3_heads_own"] == 1 and "6_heads_own" not in named


def test_the_metrics_of_several_labels_are_the_mean_over_labels_that_some_image_has():
    logits = np.array([[3.0, 0.0, -1.0], [2.0, 5.0, -3.0], [1.0, 9.0, -2.0], [0.0, 1.0, -2.0]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    found = multi_label_metrics(EvalPrediction(logits, labels))
    ranks = [(1 / 1 + 2 / 3) / 2, 1 / 2]  # the precision at each image that has the label
    assert found["average_precision"] == pytest.approx(np.mean(ranks))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels).double())
    assert found["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("shape", [(50, 3), (50, 1)])
def test_the_metrics_of_a_regression_are_numpys(shape):
    generator = np.random.default_rng(0)
    values, labels = generator.normal(size=(2, *shape))
    found = regression_metrics(EvalPrediction(values, labels.squeeze(-1) if shape[1] == 1 else labels))
    assert found["mse"] == pytest.approx(((values - labels) ** 2).mean())
    assert found["mae"] == pytest.approx(abs(values - labels).mean())
    explained = 1 - ((values - labels) ** 2).sum(0) / ((labels - labels.mean(0)) ** 2).sum(0)
    assert found["r2"] == pytest.approx(explained.mean())
