"""A cascade is fitted to a goal, and gives on new images what it was fitted for."""

import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hydravit_hf import HydraViTConfig, evaluate_subnetworks
from hydravit_hf import cascade as fitting
from hydravit_hf.cascade import cascade_latencies, evaluate_cascade, fit_cascade, fit_temperature, save_cascade
from hydravit_hf.model.cascade_hydravit import run_cascade, uncertainty
from hydravit_hf.model.configuration_hydravit import CRITERIA

HEADS = [1, 3, 6]
INFINITY = math.inf
SETTINGS = {"num_heads": HEADS, "thresholds": [1.5, INFINITY], "criterion": "margin", "temperatures": [0.5, 1.0, 2.0]}
QUIET = {"disable_tqdm": True}


@pytest.fixture
def labelled(model, many):
    """Images of which the widest knows four fifths."""
    with torch.no_grad():
        labels = model(many).logits.argmax(-1)
    labels[::5] = (labels[::5] + 1) % 5
    return [{"pixel_values": image, "labels": label} for image, label in zip(many, labels, strict=True)]


def brute_force(model, dataset, heads, criterion="entropy"):
    """(accuracy, mean MACs) of every cascade of two widths that tells the images apart."""
    images = torch.stack([item["pixel_values"] for item in dataset])
    labels = torch.stack([item["labels"] for item in dataset])
    with torch.no_grad():
        narrow = uncertainty(model(images, num_heads_active=heads[0]).logits, criterion)
    for threshold in [0, *(narrow.sort().values[1:].double() - 1e-9).tolist(), INFINITY]:
        outputs = run_cascade(model, images, heads, threshold, criterion)
        yield (outputs.logits.argmax(-1) == labels).double().mean().item(), outputs.macs.double().mean().item()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_two_widths_are_fitted_as_well_as_can_be(model, labelled, criterion):
    narrow, wide = (model.config.count_macs(num_heads) for num_heads in (2, 6))
    cascades = list(brute_force(model, labelled, [2, 6], criterion))
    options = {"criterion": criterion, "calibrate": False, **QUIET}
    for share in (0.0, 0.3, 0.62, 1.0):
        budget = narrow + share * wide
        fitted = fit_cascade(model, labelled, [2, 6], max_macs=budget, **options)
        allowed = [
            (accuracy, -macs)
            for accuracy, macs in cascades
            if macs <= budget * (1 + 1e-9) and likely_most(macs, narrow, wide, images=40) <= 1.05 * budget
        ]
        assert (fitted["accuracy"], -fitted["macs"]) == pytest.approx(max(allowed))
    widest = cascades[0][0]
    for loss in (0.0, 0.1, 0.3):
        fitted = fit_cascade(model, labelled, [2, 6], max_accuracy_loss=loss, **options)
        assert fitted["accuracy"] >= widest - loss - 1e-9 and fitted["widest_accuracy"] == pytest.approx(widest)
        fewest = min(macs for accuracy, macs in cascades if accuracy >= widest - loss - 1e-9)
        assert fitted["macs"] == pytest.approx(fewest)


def likely_most(macs: float, narrow: float, wide: float, images: int) -> float:
    """The mean MACs that as many new images stay below with 95 % confidence, where a share of them goes on."""
    share = (macs - narrow) / wide
    return macs + 1.645 * wide * math.sqrt(max(0, share * (1 - share)) * 2 / images)


@pytest.mark.parametrize("heads", [[1, 6], [1, 3, 6], [1, 2, 4, 6], list(range(1, 7))])
def test_running_a_fitted_cascade_gives_what_the_fit_says(model, labelled, heads):
    budget = 0.6 * sum(model.config.count_macs(num_heads) for num_heads in heads)
    fitted = fit_cascade(model, labelled, heads, max_macs=budget, **QUIET)
    assert fitted["cascade"]["num_heads"] == heads and fitted["macs"] <= budget and fitted["images"] == 40
    model.train().config.cascade = fitted["cascade"]
    rows = [evaluate_cascade(model, labelled, batch_size=size, **QUIET) for size in (1, 64)]
    rows.append(evaluate_cascade(model, DataLoader(labelled, 16, collate_fn=default_data_collator), **QUIET))
    assert model.training and model.config.cascade is not None
    for row in rows:
        assert row["num_heads"] == heads and row["thresholds"] == fitted["cascade"]["thresholds"]
        for name in ("accuracy", "macs", "shares"):
            assert row[name] == pytest.approx(fitted[name])
    json.loads(json.dumps(fitted, allow_nan=False))


def test_cascades_that_stop_nowhere_and_everywhere_have_the_scores_of_the_widths(model, labelled):
    widths = evaluate_subnetworks(model, labelled, [1, 6], **QUIET)
    for threshold, row in zip((INFINITY, 0), widths, strict=True):
        found = evaluate_cascade(model, labelled, [1, 6], threshold, **QUIET)
        assert {name: found[name] for name in ("accuracy", "top5_accuracy", "loss")} == pytest.approx(
            {name: row[name] for name in ("accuracy", "top5_accuracy", "loss")}
        )
    assert found["shares"] == [0, 1]


def test_three_widths_are_no_worse_than_two_of_them(model, labelled):
    """The search is not exhaustive, but to run or to skip a step for all images is among what it tries."""
    first, second, third = (model.config.count_macs(num_heads) for num_heads in HEADS)
    for loss in (0.0, 0.1, 0.2):
        three = fit_cascade(model, labelled, HEADS, max_accuracy_loss=loss, **QUIET)
        two = fit_cascade(model, labelled, [1, 3], max_macs=first + second, **QUIET)
        if two["accuracy"] >= three["widest_accuracy"] - loss:
            assert three["macs"] <= two["macs"] * (1 + 1e-9)
        assert three["macs"] <= first + second + third


def test_a_budget_holds_on_new_images_where_it_was_fitted_to_few(monkeypatch):
    """Uncertainties and hits of a kind, drawn again and again."""
    monkeypatch.setattr(fitting, "COARSE", 300)
    generator, costs, met = np.random.default_rng(0), np.array([1.0, 4.0, 16.0]), []

    def draw(images: int = 300):
        uncertain = generator.exponential(size=(2, images))
        hits = generator.random((3, images)) < np.stack(
            [np.exp(-uncertain[0]), np.exp(-uncertain[1] / 2), uncertain[0] >= 0]
        )
        return uncertain, hits.astype(float)

    for budget in np.repeat([2.0, 4.0, 8.0], 10):
        uncertain, hits = draw()
        thresholds = fitting._search(uncertain, hits, costs, fitting._within("max_macs", budget, hits, costs))
        assert costs[fitting._exits(uncertain, thresholds)].mean() <= budget
        met.append(costs[fitting._exits(draw()[0], thresholds)].mean() <= 1.05 * budget)
    assert np.mean(met) >= 0.9


def test_latency_is_a_budget_too(model, labelled):
    fitted = fit_cascade(model, labelled, HEADS, max_latency_ms=5.0, latencies=[1.0, 4.0, 10.0], **QUIET)
    reached = np.array([1.0, 4.0, 10.0]) @ fitted["shares"]
    assert fitted["latency_ms"] == pytest.approx(reached) and reached <= 5.0
    for latencies in ([1.0, 4.0], [0.0, 4.0, 10.0], [1.0, math.nan, 10.0]):
        with pytest.raises(
            ValueError, match=r"`latencies` must be a positive number for each of the heads \[1, 3, 6\]"
        ):
            fit_cascade(model, labelled, HEADS, max_latency_ms=5.0, latencies=latencies, **QUIET)


def test_latencies_are_those_of_an_image_that_stops_at_each_width(model, labelled, monkeypatch):
    seen = []
    model.hydravit.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))

    def heads_that_ran(passes: dict, *_) -> dict:
        ran = {}
        for name, run in passes.items():
            seen.clear()
            run()
            assert all(images == 1 for images, _, _ in seen)
            ran[name] = [sum(width // 8 for _, _, width in seen)]
        return ran

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "time_interleaved", heads_that_ran)
        assert cascade_latencies(model.train(), HEADS) == [1, 4, 10] and model.training
    measured = fit_cascade(model, labelled, [1, 6], max_latency_ms=1e6, **QUIET)
    assert 0 < measured["latency_ms"] < 1e6


def test_a_goal_that_cannot_be_met_says_what_can(model, labelled):
    narrowest = model.config.count_macs(2)
    with pytest.raises(ValueError, match=r"the cheapest, 2 heads for all images, takes .* accuracy of .*%") as error:
        fit_cascade(model, labelled, [2, 6], max_macs=0.9 * narrowest, **QUIET)
    assert f"fits {0.9 * narrowest:.4g} MACs" in str(error.value) and f"takes {narrowest:.4g} MACs" in str(error.value)
    with pytest.raises(ValueError, match=r"fits 0\.001 ms an image: the cheapest"):
        fit_cascade(model, labelled, [2, 6], max_latency_ms=0.001, latencies=[1.0, 2.0], **QUIET)
    with pytest.raises(ValueError, match=r"accuracy of 130\.00%: the widest has 80\.00%, and the most accurate .*%"):
        fit_cascade(model, labelled, [2, 6], max_accuracy_loss=-0.5, **QUIET)


def test_wrong_arguments_of_fitting_are_named(model, labelled):
    for goals in ({}, {"max_macs": 1e9, "max_accuracy_loss": 0.1}):
        with pytest.raises(ValueError, match="exactly one goal of `max_macs`, `max_latency_ms`, `max_accuracy_loss`"):
            fit_cascade(model, labelled, HEADS, **goals)
    for limit in (0, -1.0, math.nan, INFINITY, True, "1"):
        with pytest.raises(ValueError, match="`max_macs` must be a number above 0"):
            fit_cascade(model, labelled, HEADS, max_macs=limit)
    with pytest.raises(ValueError, match="`heads` must be two head counts or more"):
        fit_cascade(model, labelled, [3], max_macs=1e9)
    with pytest.raises(ValueError, match="in increasing order"):
        fit_cascade(model, labelled, [6, 3], max_macs=1e9)
    with pytest.raises(ValueError, match="'doubt'"):
        fit_cascade(model, labelled, HEADS, max_macs=1e9, criterion="doubt")
    for call in (lambda: fit_cascade(model, [], HEADS, max_macs=1e9), lambda: evaluate_cascade(model, [], HEADS, 0.5)):
        with pytest.raises(ValueError, match="the dataset is empty"):
            call()


def test_the_heads_of_a_cascade_are_the_ends_and_the_middle_of_the_trained_widths():
    for trained, heads in ((list(range(3, 13)), [3, 6, 12]), ([3, 6, 12], [3, 6, 12]), ([2, 12], [2, 12])):
        config = HydraViTConfig(num_attention_heads=12, subnetwork_heads=trained)
        assert fitting._default_heads(config) == heads


def test_a_temperature_undoes_what_made_predictions_too_sure():
    """Labels drawn from the softmax itself: the temperature of scaled logits is the scale."""
    logits = 2 * torch.randn(4000, 6)
    labels = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    for scale in (0.5, 1.0, 3.0):
        assert fit_temperature(scale * logits, labels) == pytest.approx(scale, rel=0.1)
    grid = np.geomspace(0.5, 2, 400)
    losses = [torch.nn.functional.cross_entropy(logits / value, labels).item() for value in grid]
    assert fit_temperature(logits, labels) == pytest.approx(grid[np.argmin(losses)], rel=0.01)
    assert fit_temperature(logits, logits.argmax(-1)) == pytest.approx(0.05, rel=0.01)  # nothing to learn from


def test_saving_settings_that_the_model_does_not_hold_changes_nothing(model, tmp_path):
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    before = (folder / "config.json").read_bytes()
    for heads in ([1, 7], [3, 1]):
        with pytest.raises(ValueError, match="from 1 to 6"):
            save_cascade(folder, {"num_heads": heads, "thresholds": 0.5})
    assert (folder / "config.json").read_bytes() == before
    save_cascade(folder, {"num_heads": [1, 6], "thresholds": INFINITY})
    assert HydraViTConfig.from_pretrained(folder).cascade["thresholds"] == [INFINITY]
    with pytest.raises(FileNotFoundError):
        save_cascade(folder / "nowhere", dict(SETTINGS))
