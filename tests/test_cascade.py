"""A cascade gives each image what its narrowest certain width gives, and really skips the wider ones."""

import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.thresholds import splitting
from torch.utils.data import DataLoader
from transformers import default_data_collator, pipeline

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, evaluate_subnetworks
from hydravit_hf import cascade as fitting
from hydravit_hf.cascade import cascade_latencies, evaluate_cascade, fit_cascade, fit_temperature, save_cascade
from hydravit_hf.data import load_digits
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model.cascade_hydravit import run_cascade, uncertainty
from hydravit_hf.model.configuration_hydravit import CRITERIA
from hydravit_hf.model.pipeline_hydravit import TASK

HEADS = [1, 3, 6]
INFINITY = math.inf


def by_hand(logits: np.ndarray, criterion: str, temperature: float = 1.0) -> float:
    """The uncertainty of one prediction, from the definitions."""
    odds = np.exp(logits.astype(np.float64) / temperature)
    probabilities = np.sort(odds / odds.sum())[::-1]
    if criterion == "entropy":
        return -sum(p * math.log(p) for p in probabilities if p > 0)
    return 1 - (probabilities[0] - probabilities[1] * (criterion == "margin"))


def one_by_one(model, images, heads, thresholds, criterion="entropy", temperatures=None):
    """The cascade again, slowly: for each image, widths one after the other until one is certain."""
    answers = []
    for image in images:
        macs = 0
        for stage, num_heads in enumerate(heads):
            with torch.no_grad():
                logits = model(image[None], num_heads_active=num_heads).logits[0]
            macs += model.config.count_macs(num_heads)
            temperature = temperatures[stage] if temperatures else 1.0
            if stage < len(thresholds) and by_hand(logits.numpy(), criterion, temperature) < thresholds[stage]:
                break
        answers.append((logits, num_heads, macs))
    logits, num_heads, macs = zip(*answers, strict=True)
    return torch.stack(logits), torch.tensor(num_heads), torch.tensor(macs)


@pytest.mark.parametrize("separate_classifiers", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_each_image_has_the_answer_that_it_would_have_alone(make_model, many, criterion, separate_classifiers):
    model = make_model(separate_classifiers=separate_classifiers)
    thresholds = splitting(model, many, HEADS, criterion=criterion)
    outputs = model.cascade(many, HEADS, thresholds, criterion)
    logits, num_heads, macs = one_by_one(model, many, HEADS, thresholds, criterion)
    torch.testing.assert_close(outputs.logits, logits)
    assert torch.equal(outputs.num_heads, num_heads) and set(num_heads.tolist()) == set(HEADS)
    assert torch.equal(outputs.macs, macs)
    with torch.no_grad():
        for num_heads in HEADS:
            of_width = model(many, num_heads_active=num_heads).logits[outputs.num_heads == num_heads]
            torch.testing.assert_close(outputs.logits[outputs.num_heads == num_heads], of_width)


def test_temperatures_decide_who_goes_on_and_leave_the_logits_alone(model, many):
    temperatures, thresholds = [0.1, 2.0, 1.0], [1.0, 1.6]
    logits, num_heads, _ = one_by_one(model, many, HEADS, thresholds, temperatures=temperatures)
    outputs = model.cascade(many, HEADS, thresholds, temperatures=temperatures)
    torch.testing.assert_close(outputs.logits, logits)
    assert torch.equal(outputs.num_heads, num_heads)
    assert not torch.equal(num_heads, model.cascade(many, HEADS, thresholds).num_heads)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_thresholds_of_zero_and_of_infinity_are_exactly_the_widest_and_the_narrowest(model, many, criterion):
    model.classifier.weight.data *= 100  # some predictions are as certain as floating point can tell
    with torch.no_grad():
        narrow, wide = (model(many, num_heads_active=num_heads).logits for num_heads in (1, 6))
    outputs = model.cascade(many, HEADS, 0, criterion)
    assert torch.equal(outputs.logits, wide) and outputs.num_heads.tolist() == [6] * 40
    assert outputs.macs.tolist() == [sum(model.config.count_macs(num_heads) for num_heads in HEADS)] * 40
    outputs = model.cascade(many, HEADS, INFINITY, criterion)
    assert torch.equal(outputs.logits, narrow) and outputs.num_heads.tolist() == [1] * 40
    assert outputs.macs.tolist() == [model.config.count_macs(1)] * 40
    outputs = model.cascade(many, [3], [], criterion)
    assert torch.equal(outputs.logits, model(many, num_heads_active=3).logits)


def test_a_wider_pass_sees_only_the_images_that_go_on(model, many):
    seen = []
    model.hydravit.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    thresholds = splitting(model, many, HEADS, share=0.25)
    seen.clear()
    outputs = model.cascade(many, HEADS, thresholds)
    reached = [(outputs.num_heads >= num_heads).sum().item() for num_heads in HEADS]
    assert seen == [(count, 17, 8 * num_heads) for count, num_heads in zip(reached, HEADS, strict=True) if count]
    assert reached[0] == 40 and reached[1] == 10
    seen.clear()
    model.cascade(many, HEADS, INFINITY)
    assert seen == [(40, 17, 8)]


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_answers_are_the_same_whatever_the_batch_size_and_the_order(model, many, batch_size):
    thresholds = splitting(model, many, HEADS)
    whole, order = model.cascade(many, HEADS, thresholds), torch.randperm(40)
    parts = [model.cascade(batch, HEADS, thresholds) for batch in many[order].split(batch_size)]
    torch.testing.assert_close(torch.cat([part.logits for part in parts]), whole.logits[order])
    for name in ("num_heads", "macs"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name][order])


def test_threads_with_other_settings_never_mix(model, many):
    choices = [
        (HEADS, splitting(model, many, HEADS)),
        ([1, 6], splitting(model, many, [1, 6], share=0.3)),
        ([2, 3], [0.0]),
    ]
    expected = [model.cascade(many, *choice).to_tuple() for choice in choices]

    def call(number: int):
        return number % 3, model.cascade(many, *choices[number % 3]).to_tuple()

    with ThreadPoolExecutor(4) as threads:
        for number, answer in threads.map(call, range(300)):
            assert all(torch.equal(*pair) for pair in zip(answer, expected[number], strict=True))


def test_it_is_the_same_with_and_without_gradients(model, many):
    thresholds = splitting(model, many, HEADS)
    outputs = model.cascade(many.clone().requires_grad_(), HEADS, thresholds)
    assert not outputs.logits.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = run_cascade(model, many, HEADS, thresholds)
        assert torch.equal(again.logits, outputs.logits) and torch.equal(again.num_heads, outputs.num_heads)


def test_half_precision_decides_in_single(model, many):
    model = model.to(torch.bfloat16)
    outputs = model.cascade(many, HEADS, splitting(model, many, HEADS))
    assert outputs.logits.dtype == torch.bfloat16 and len(set(outputs.num_heads.tolist())) > 1


def test_an_empty_batch_gives_nothing_and_runs_nothing(model):
    model.hydravit.register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
    outputs = model.cascade(torch.empty(0, 3, 16, 16), HEADS, 0.5)
    assert outputs.logits.shape == (0, 5) and outputs.num_heads.shape == outputs.macs.shape == (0,)


def test_macs_are_those_of_the_images_that_came(model):
    images = torch.randn(2, 3, 24, 32)
    outputs = model.cascade(images, [1, 6], 0, interpolate_pos_encoding=True)
    larger = HydraViTConfig(**model.config.to_dict() | {"image_size": (24, 32)})
    assert outputs.macs.tolist() == [larger.count_macs(1) + larger.count_macs(6)] * 2
    assert model.config.count_macs(1) != larger.count_macs(1)
    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        model.cascade(images, [1, 6], 0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_uncertainty_is_what_its_definition_says(criterion):
    logits = 5 * torch.randn(50, 7)
    for temperature in (0.3, 1.0, 4.0):
        found = uncertainty(logits, criterion, temperature)
        wanted = [by_hand(row.numpy(), criterion, temperature) for row in logits]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-6)
    certain, torn = torch.tensor([[1e4, 0.0, 0.0]]), torch.zeros(1, 3)
    assert uncertainty(certain, criterion).item() == 0
    assert uncertainty(torn, criterion).item() == pytest.approx(by_hand(np.zeros(3), criterion))
    assert uncertainty(torch.full((1, 3), math.nan), criterion).item() > 1e9
    assert uncertainty(torn.bfloat16(), criterion).dtype == torch.float32


def test_what_makes_no_cascade_is_refused_by_name(model, images):
    for heads in ([], [3, 3], [6, 3], [0, 3], [3, 7], [True, 3], [1.0, 3], 3, "36"):
        with pytest.raises(ValueError, match="`num_heads` of a cascade must be a list of integers from 1 to 6"):
            model.cascade(images, heads, 0.5)
    for thresholds in (None, math.nan, -0.1, [0.5, -1], [0.5], [0.5, 0.5, 0.5], ["0.5", 0.5], True, [[0.5], 0.5]):
        with pytest.raises(ValueError, match="`thresholds` of a cascade of 3 widths must be 2 numbers from 0"):
            model.cascade(images, HEADS, thresholds)
    with pytest.raises(ValueError, match=r"`criterion` .* one of entropy, margin, probability, not 'doubt'"):
        model.cascade(images, HEADS, 0.5, "doubt")
    with pytest.raises(ValueError, match="'doubt'"):
        uncertainty(torch.zeros(1, 3), "doubt")
    for temperatures in (
        [1.0, 1.0],
        [1.0, 0.0, 1.0],
        [1.0, math.inf, 1.0],
        [1.0, -1.0, 1.0],
        [1.0, math.nan, 1.0],
        1.0,
    ):
        with pytest.raises(ValueError, match="`temperatures` of a cascade of 3 widths must be 3 positive numbers"):
            model.cascade(images, HEADS, 0.5, temperatures=temperatures)
    with pytest.raises(ValueError, match="has no `cascade`: give"):
        model.cascade(images)


@pytest.mark.parametrize("kwargs", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_a_model_that_chooses_no_label_has_no_cascade(make_model, images, kwargs):
    with pytest.raises(ValueError, match="chooses one of several labels"):
        make_model(**kwargs).cascade(images, HEADS, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# In the configuration
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = {"num_heads": HEADS, "thresholds": [1.5, INFINITY], "criterion": "margin", "temperatures": [0.5, 1.0, 2.0]}


def test_the_cascade_of_the_configuration_is_saved_and_is_the_default(make_model, many, tmp_path):
    model = make_model(cascade=dict(SETTINGS))
    model.save_pretrained(tmp_path)
    loaded = HydraViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.cascade == SETTINGS
    expected, found = model.cascade(many, *SETTINGS.values()), loaded.cascade(many)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.num_heads, expected.num_heads)
    replaced = loaded.cascade(many, thresholds=0, criterion="entropy")
    assert torch.equal(replaced.logits, loaded(many, num_heads_active=6).logits)
    with pytest.raises(ValueError, match="need `thresholds` of their own"):
        loaded.cascade(many, criterion="entropy")
    assert make_model(cascade={"num_heads": HEADS, "thresholds": 0.5}).config.cascade == {
        "num_heads": HEADS,
        "thresholds": [0.5, 0.5],
        "criterion": "entropy",
        "temperatures": [1.0, 1.0, 1.0],
    }


def test_a_model_of_other_heads_has_no_cascade(make_model, tmp_path):
    model = make_model(cascade=dict(SETTINGS))
    assert model.config.resized(6).cascade == SETTINGS
    assert model.config.resized(8).cascade is None and model.extract_subnetwork(3).config.cascade is None
    model.save_pretrained(tmp_path)
    assert HydraViTForImageClassification.from_pretrained(tmp_path, num_attention_heads=3).config.cascade is None
    assert HydraViTForImageClassification.from_pretrained(tmp_path, num_heads_active=3).config.cascade == SETTINGS


def test_a_model_of_other_labels_has_no_cascade(make_model, tmp_path):
    make_model(cascade=dict(SETTINGS), num_labels=5).save_pretrained(tmp_path)
    load = HydraViTForImageClassification.from_pretrained
    assert load(tmp_path, num_labels=5).config.cascade == SETTINGS
    assert load(tmp_path, id2label={index: f"LABEL_{index}" for index in range(5)}).config.cascade == SETTINGS
    for labels in ({"num_labels": 7}, {"id2label": dict(enumerate("abcde"))}):
        assert load(tmp_path, ignore_mismatched_sizes=True, **labels).config.cascade is None
    kept = load(tmp_path, ignore_mismatched_sizes=True, num_labels=7, cascade=dict(SETTINGS))
    assert kept.config.cascade == SETTINGS


@pytest.mark.parametrize(
    "cascade",
    [
        {},
        {"num_heads": HEADS},
        {"num_heads": None, "thresholds": 0.5},
        SETTINGS | {"num_heads": [1, 3, 7]},
        SETTINGS | {"thresholds": [0.5]},
        SETTINGS | {"criterion": "doubt"},
        SETTINGS | {"temperature": 1.0},
    ],
)
def test_the_configuration_refuses_what_makes_no_cascade(make_model, tmp_path, cascade):
    with pytest.raises(ValueError, match="cascade"):
        make_model(cascade=cascade)
    model = make_model()
    model.config.cascade = cascade
    with pytest.raises(ValueError, match="cascade"):
        model.save_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# In the pipeline
# ---------------------------------------------------------------------------------------------------------------------


def noise(number: int, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


PICTURES = [noise(number) for number in range(30)]


@pytest.fixture
def pipe(make_model):
    model = make_model(cascade=dict(SETTINGS))
    return pipeline(TASK, model, image_processor=make_image_processor(model.config))


@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_the_pipeline_says_what_the_model_says_and_what_each_image_took(pipe, batch_size):
    pixel_values = pipe.image_processor(PICTURES, return_tensors="pt").pixel_values
    model, thresholds = pipe.model, splitting(pipe.model, pixel_values, HEADS, criterion="probability")
    calls = [
        ({"num_heads_active": HEADS, "threshold": thresholds, "criterion": "probability"}, (HEADS, thresholds)),
        ({"num_heads_active": (1, 6), "threshold": 0, "criterion": "probability"}, ([1, 6], 0)),
    ]
    for kwargs, settings in calls:
        expected = model.cascade(pixel_values, *settings, "probability")
        outputs = pipe(PICTURES, batch_size=batch_size, top_k=2, **kwargs)
        for number, rows in enumerate(outputs):
            scores = expected.logits[number].softmax(-1).topk(2).values.tolist()
            assert [row["score"] for row in rows] == pytest.approx(scores, rel=1e-4)
            for row in rows:
                assert row.keys() == {"label", "score", "num_heads", "macs"}
                assert row["num_heads"] == expected.num_heads[number] and row["macs"] == expected.macs[number]
    of_config = pipe(PICTURES, num_heads_active="cascade", batch_size=batch_size)
    assert [rows[0]["num_heads"] for rows in of_config] == model.cascade(pixel_values).num_heads.tolist()
    assert pipe(PICTURES[0])[0].keys() == {"label", "score"}
    (rows,) = pipe(PICTURES[:1], num_heads_active=HEADS, threshold=INFINITY)
    assert rows[0]["num_heads"] == 1 and pipe([], num_heads_active=HEADS, threshold=1) == []


def test_a_cascade_given_at_construction_is_the_default_of_calls(pipe):
    always = pipeline(TASK, pipe.model, image_processor=pipe.image_processor, num_heads_active=[1, 6], threshold=0.0)
    assert always(PICTURES[0])[0]["num_heads"] == 6
    assert always(PICTURES[0], num_heads_active=3)[0].keys() == {"label", "score"}
    assert always(PICTURES[0], num_heads_active=[1, 3], threshold=0)[0]["num_heads"] == 3


def test_images_that_cannot_be_read_leave_the_others_theirs(pipe):
    kwargs = {"num_heads_active": [1, 6], "threshold": 0.0, "errors": "return", "batch_size": 3}
    good, bad, again = pipe([PICTURES[0], "missing.png", PICTURES[0]], **kwargs)
    assert [pytest.approx(row) for row in good] == again and good[0]["num_heads"] == 6 and bad.keys() == {"error"}


def test_wrong_cascades_are_refused_before_any_image_is_read(pipe, make_model):
    wrong = [
        ({"num_heads_active": [3, 1], "threshold": 0.5}, "in increasing order"),
        ({"num_heads_active": [], "threshold": 0.5}, "list of integers from 1 to 6"),
        ({"num_heads_active": [1, 3]}, "must be 1 numbers"),
        ({"num_heads_active": [1, 3], "threshold": math.nan}, "must be 1 numbers"),
        ({"num_heads_active": [1, 3], "threshold": 1, "criterion": "doubt"}, "'doubt'"),
        ({"num_heads_active": 3, "threshold": 0.5}, "are of a cascade"),
        ({"threshold": 0.5}, "are of a cascade"),
        ({"num_heads_active": "cascades"}, "from 1 to 6"),
    ]
    for kwargs, message in wrong:
        with pytest.raises(ValueError, match=message):
            pipe(["missing.png"], **kwargs)
    pipe = pipeline(TASK, make_model(), image_processor=pipe.image_processor)
    with pytest.raises(ValueError, match="has no `cascade`"):
        pipe(["missing.png"], num_heads_active="cascade")


# ---------------------------------------------------------------------------------------------------------------------
# Fitting and evaluating
# ---------------------------------------------------------------------------------------------------------------------

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
def test_what_was_fitted_is_what_running_it_gives(model, labelled, heads):
    budget = 0.6 * sum(model.config.count_macs(num_heads) for num_heads in heads)
    fitted = fit_cascade(model, labelled, heads, max_macs=budget, **QUIET)
    assert fitted["cascade"]["num_heads"] == heads and fitted["macs"] <= budget and fitted["images"] == 40
    model.config.cascade = fitted["cascade"]
    model.train()
    rows = [evaluate_cascade(model, labelled, batch_size=size, **QUIET) for size in (1, 64)]
    rows.append(evaluate_cascade(model, DataLoader(labelled, 16, collate_fn=default_data_collator), **QUIET))
    assert model.training
    for row in rows:
        assert row["num_heads"] == heads and row["thresholds"] == fitted["cascade"]["thresholds"]
        for name in ("accuracy", "macs", "shares"):
            assert row[name] == pytest.approx(fitted[name])
    json.loads(json.dumps(fitted, allow_nan=False))


def test_cascades_that_stop_nowhere_and_everywhere_are_worth_what_the_widths_are(model, labelled):
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


# ---------------------------------------------------------------------------------------------------------------------
# From the command, and where the package is not installed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_model, tmp_path):
    model = make_model(image_size=8, num_labels=10)
    model.save_pretrained(tmp_path / "tiny")
    make_image_processor(model.config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_command_fits_saves_and_runs_a_cascade(hydravit, folder, tmp_path):
    image = tmp_path / "digit.png"
    load_digits()["test"][0]["image"].save(image)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    budget = 2 * HydraViTConfig.from_pretrained(folder).count_macs(3)
    goal = ["--heads", 1, "--heads", 3, "--heads", 6, "--max-macs", budget]
    code, out, _ = hydravit("cascade", folder, "digits", *goal, "--json")
    fitted = json.loads(out)
    assert code == 0 and fitted["cascade"]["num_heads"] == HEADS and fitted["macs"] <= budget
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    code, out, _ = hydravit("cascade", folder, "digits", *goal, "--save")
    assert code == 0 and "3 heads: answers " in out and f"Accuracy {fitted['accuracy']:.2%} at " in out and "360" in out
    loaded = HydraViTForImageClassification.from_pretrained(folder)
    assert loaded.config.cascade == fitted["cascade"]
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    values = json.loads(after.pop("config.json"))
    assert values == json.loads(before.pop("config.json")) | {"cascade": fitted["cascade"]} and before == after
    code, out, _ = hydravit("predict", folder, image, "--cascade", "--json")
    (answer,) = json.loads(out)
    assert code == 0 and answer["output"][0]["num_heads"] in HEADS


def test_predict_runs_a_cascade_of_the_widths_that_it_is_given(hydravit, folder, tmp_path):
    image = tmp_path / "digit.png"
    load_digits()["test"][0]["image"].save(image)
    widths = ["--num-heads-active", 3, "--num-heads-active", 6]
    for threshold, num_heads in ((0, 6), (1e9, 3)):
        code, out, _ = hydravit("predict", folder, image, *widths, "--threshold", threshold, "--json")
        assert code == 0 and {row["num_heads"] for row in json.loads(out)[0]["output"]} == {num_heads}
        code, out, _ = hydravit("predict", folder, image, *widths, "--threshold", threshold, "--criterion", "margin")
        assert code == 0 and out.endswith(f"({num_heads} heads)\n")
    three = ["--num-heads-active", 1, *widths, "--threshold", 0, "--threshold", 1e9]
    assert json.loads(hydravit("predict", folder, image, *three, "--json")[1])[0]["output"][0]["num_heads"] == 3


def test_the_command_says_what_is_wrong_in_one_line(hydravit, folder):
    wrong = [
        (["cascade", folder, "digits"], "exactly one goal"),
        (["cascade", folder, "digits", "--max-macs", 1], "the cheapest, 1 heads"),
        (["cascade", "user/model", "digits", "--max-macs", 1, "--save"], "local folder, which 'user/model' is not"),
        (["predict", folder, "missing.png", "--cascade"], "has no `cascade`"),
        (["predict", folder, "missing.png", "--cascade", "--num-heads-active", 3], "not both"),
        (["predict", folder, "missing.png", "--num-heads-active", 1, "--num-heads-active", 3], "`thresholds`"),
        (["predict", folder, "missing.png", "--threshold", 1], "are of a cascade"),
    ]
    for arguments, message in wrong:
        code, out, err = hydravit(*arguments)
        *_, line = err.splitlines()
        assert code == 1 and line.startswith("error: ") and message in line and out == ""


def test_saving_settings_that_the_model_does_not_hold_changes_nothing(folder):
    before = (folder / "config.json").read_bytes()
    for heads in ([1, 7], [3, 1]):
        with pytest.raises(ValueError, match="from 1 to 6"):
            save_cascade(folder, {"num_heads": heads, "thresholds": 0.5})
    assert (folder / "config.json").read_bytes() == before
    save_cascade(folder, {"num_heads": [1, 6], "thresholds": INFINITY})
    assert HydraViTConfig.from_pretrained(folder).cascade["thresholds"] == [INFINITY]
    with pytest.raises(FileNotFoundError):
        save_cascade(folder / "nowhere", dict(SETTINGS))


WITHOUT_THE_PACKAGE = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

folder, again = sys.argv[1:]
expected = torch.load(f"{folder}/expected.pt", weights_only=True)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
for path in (folder, again):
    model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
    outputs = model.cascade(expected["images"])
    torch.testing.assert_close(outputs.logits, expected["logits"])
    assert torch.equal(outputs.num_heads, expected["num_heads"])
    pipe = pipeline("hydravit-image-classification", path, image_processor=folder, trust_remote_code=True)
    image = Image.radial_gradient("L").convert("RGB")
    assert pipe(image, num_heads_active=[1, 6], threshold=0)[0]["num_heads"] == 6
    assert pipe(image, num_heads_active="cascade")[0]["macs"] > 0
"""


def test_a_checkpoint_cascades_where_the_package_is_not_installed(make_model, many, tmp_path, run_without_the_package):
    model = make_model()
    model.config.cascade = {"num_heads": HEADS, "thresholds": splitting(model, many, HEADS)}
    model.save_pretrained(tmp_path / "saved")
    make_image_processor(model.config).save_pretrained(tmp_path / "saved")
    outputs = model.cascade(many)
    expected = {"images": many, "logits": outputs.logits, "num_heads": outputs.num_heads}
    torch.save(expected, tmp_path / "saved" / "expected.pt")
    run_without_the_package(WITHOUT_THE_PACKAGE, tmp_path / "saved", tmp_path / "again")
    assert (tmp_path / "again" / "cascade_hydravit.py").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# The examples
# ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(*arguments) -> list[str]:
    """The lines of the tables that it prints."""
    command = [sys.executable, str(EXAMPLES / arguments[0]), *map(str, arguments[1:])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [line for line in result.stdout.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("option", [None, "--token_recycling", "--onnx"])
def test_the_benchmark_prints_a_row_for_each_share(option):
    if option == "--onnx":
        for package in ("onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    options = [option] if option else []
    lines = run_example("benchmark_cascade.py", "--heads", 1, 2, "--batch_size", 4, "--rounds", 1, *options)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 50%", "| 80%"]


def test_the_tables_of_the_study_are_those_of_its_measurements(tmp_path):
    shutil.copy(EXAMPLES.parent / "docs" / "cascade_study.json", tmp_path)
    lines = run_example("cascade_study.py", "--report", "--output_dir", tmp_path)
    for method in ("3, 6, 12 heads", "3, 6, 12 heads, all stages"):
        cascades = [line.split(" | ") for line in lines if line.startswith(f"| cascade {method} |")]
        assert len(cascades) >= 10 and all(float(cells[4]) > 0 for cells in cascades)
    with Image.open(tmp_path / "cascade_study.png") as plot:
        assert plot.format == "PNG"
    text = (EXAMPLES.parent / "docs" / "cascade.md").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if re.match(r"\| (cascade )?\d.* heads.* \| \d", line)]
    assert len(shown) > 60 and set(shown) <= set(lines)


def test_the_study_trains_what_it_says(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    study = importlib.import_module("cascade_study")
    monkeypatch.setattr(study, "STEPS", {"digits": 3})
    threads = torch.get_num_threads()
    for training, (heads, recycling) in {
        "any width": (list(range(3, 13)), False),
        "all stages": ([3, 6, 12], False),
        "recycling": ([3, 6, 12], True),
        "recycling, equal compute": ([3, 6, 12], True),
    }.items():
        folder = study.train("digits", 0, training, tmp_path)
        config = HydraViTConfig.from_pretrained(folder)
        assert (config.subnetwork_heads, config.token_recycling) == (heads, recycling)
    torch.set_num_threads(threads)
    parts = study.split("digits", 0)
    assert [len(part) for part in parts] == [1078, 359, 360]
