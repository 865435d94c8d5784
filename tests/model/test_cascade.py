"""A cascade gives each image the answer of its narrowest certain width, and really skips the wider ones."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from support.thresholds import splitting
from transformers import pipeline

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
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


def test_temperatures_decide_which_images_go_on_and_leave_the_logits_alone(model, many):
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
        for number, answer in threads.map(call, range(120)):
            assert all(torch.equal(*pair) for pair in zip(answer, expected[number], strict=True))


def test_a_cascade_is_the_same_with_and_without_gradients(model, many):
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


def test_settings_that_make_no_cascade_are_refused_by_name(model, images):
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


# In the configuration

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


def test_a_model_that_trains_drops_its_cascade_and_says_so(make_model, tmp_path, logged):
    make_model(cascade=dict(SETTINGS)).save_pretrained(tmp_path)
    model = HydraViTForImageClassification.from_pretrained(tmp_path)
    assert model.eval().config.cascade == SETTINGS and not logged
    assert model.train().config.cascade is None and model.training
    assert len(logged) == 1 and "Fit it again after training" in logged[0]
    model.save_pretrained(tmp_path)
    assert HydraViTForImageClassification.from_pretrained(tmp_path).config.cascade is None


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


# In the pipeline


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
        ({"num_heads_active": HEADS, "thresholds": thresholds, "criterion": "probability"}, (HEADS, thresholds)),
        ({"num_heads_active": (1, 6), "thresholds": 0, "criterion": "probability"}, ([1, 6], 0)),
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
    (rows,) = pipe(PICTURES[:1], num_heads_active=HEADS, thresholds=INFINITY)
    assert rows[0]["num_heads"] == 1 and pipe([], num_heads_active=HEADS, thresholds=1) == []


def test_a_cascade_given_at_construction_is_the_default_of_calls(pipe):
    always = pipeline(TASK, pipe.model, image_processor=pipe.image_processor, num_heads_active=[1, 6], thresholds=0.0)
    assert always(PICTURES[0])[0]["num_heads"] == 6
    assert always(PICTURES[0], num_heads_active=3)[0].keys() == {"label", "score"}
    assert always(PICTURES[0], num_heads_active=[1, 3], thresholds=0)[0]["num_heads"] == 3


def test_images_that_cannot_be_read_leave_the_answers_of_the_others(pipe):
    kwargs = {"num_heads_active": [1, 6], "thresholds": 0.0, "errors": "return", "batch_size": 3}
    good, bad, again = pipe([PICTURES[0], "missing.png", PICTURES[0]], **kwargs)
    assert [pytest.approx(row) for row in good] == again and good[0]["num_heads"] == 6 and bad.keys() == {"error"}


def test_wrong_cascades_are_refused_before_any_image_is_read(pipe, make_model):
    wrong = [
        ({"num_heads_active": [3, 1], "thresholds": 0.5}, "in increasing order"),
        ({"num_heads_active": [], "thresholds": 0.5}, "list of integers from 1 to 6"),
        ({"num_heads_active": [1, 3]}, "must be 1 numbers"),
        ({"num_heads_active": [1, 3], "thresholds": math.nan}, "must be 1 numbers"),
        ({"num_heads_active": [1, 3], "thresholds": 1, "criterion": "doubt"}, "'doubt'"),
        ({"num_heads_active": 3, "thresholds": 0.5}, "belong to a cascade"),
        ({"thresholds": 0.5}, "belong to a cascade"),
        ({"num_heads_active": "cascades"}, "from 1 to 6"),
    ]
    for kwargs, message in wrong:
        with pytest.raises(ValueError, match=message):
            pipe(["missing.png"], **kwargs)
    pipe = pipeline(TASK, make_model(), image_processor=pipe.image_processor)
    with pytest.raises(ValueError, match="has no `cascade`"):
        pipe(["missing.png"], num_heads_active="cascade")
