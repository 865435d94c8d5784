"""A step draws widths that replay, has the losses that it says, and adds the gradients of each width."""

import math
import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.training import assert_close, make_config, make_model, weights_of
from torch import nn

from hydravit_hf.training.steps import (
    SubnetworkTrainingArguments,
    backward_widths,
    check_loss,
    classification_loss,
    sample_subnetworks,
    schedule_odds,
)

SAMPLING = ["weighted", "uniform", "sandwich", "open_sandwich"]
SIX = {"num_attention_heads": 6, "subnetwork_heads": [1, 2, 3, 4, 5, 6]}


def check_odds(counts: Counter, odds: dict[int, float], draws: int):
    """Check that counts are within four standard deviations of their odds."""
    assert counts.keys() <= odds.keys()
    for num_heads, probability in odds.items():
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[num_heads] - draws * probability) <= 4 * deviation + 1e-9, num_heads


# The draw of widths


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_draw_is_a_function_of_the_seed_and_the_step(sampling):
    config = make_config(**SIX | {"subnetwork_heads": [1, 2, 3, 4, 6], "subnetwork_weights": [4, 3, 2, 1, 1]})

    def draw(seed: int, steps) -> list[list[int]]:
        return [sample_subnetworks(config, seed, step, sampling) for step in steps]

    def states() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    draws = draw(7, range(200))
    assert states() == before  # the generators of others are left alone
    for generator in (random, np.random, torch.random):  # and not read
        (generator.manual_seed if generator is torch.random else generator.seed)(123)
    assert draw(7, reversed(range(200)))[::-1] == draws
    assert all(type(num_heads) is int for heads in draws for num_heads in heads)
    assert all(heads == sorted(set(heads), reverse=True) for heads in draws)
    assert draw(8, range(200)) != draws
    assert draw(7, range(200, 400)) != draws
    assert draw(8, range(199)) != draws[1:]  # nor the same, shifted


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        ("weighted", None),
        ("weighted", [0.7, 0, 0.2, 0.1]),
        ("weighted", [0, 0, 5, 0]),
        ("uniform", [0.7, 0, 0.2, 0.1]),
    ],
)
def test_widths_are_drawn_as_often_as_their_weights_say_or_equally_often(sampling, weights):
    config, draws = make_config(num_attention_heads=6, subnetwork_weights=weights), 4000
    counts = Counter(num_heads for step in range(draws) for num_heads in sample_subnetworks(config, 0, step, sampling))
    odds = [1.0] * 4 if weights is None or sampling == "uniform" else weights
    check_odds(counts, {3 + index: weight / sum(odds) for index, weight in enumerate(odds)}, draws)
    assert counts.total() == draws


def test_every_seed_draws_all_widths_from_the_first_steps_on():
    config = make_config(subnetwork_heads=[1, 4])
    first = Counter(sample_subnetworks(config, seed=seed, step=0)[0] for seed in range(1000))
    check_odds(first, {1: 0.5, 4: 0.5}, 1000)


@pytest.mark.parametrize("sampling", ["sandwich", "open_sandwich"])
@pytest.mark.parametrize("weights", [None, [0, 1, 2, 3, 4, 0]])
def test_a_sandwich_has_its_ends_and_as_many_others_as_there_are(sampling, weights):
    config = make_config(**SIX, subnetwork_weights=weights)
    ends = {1, 6} if sampling == "sandwich" else {1}
    for draws in (0, 1, 2, 3, 4, 5, 9):
        for step in range(50):
            heads = sample_subnetworks(config, 0, step, sampling, draws)
            assert set(heads) >= ends
            assert len(heads) == len(ends) + min(draws, 6 - len(ends))


@pytest.mark.parametrize("weights", [None, [9, 1, 2, 3, 4, 9], [1, 1, 1, 1, 97, 1]])
def test_the_others_of_a_sandwich_are_drawn_by_their_odds_one_after_the_other(weights):
    config, draws = make_config(**SIX, subnetwork_weights=weights), 2500
    odds = dict(zip((2, 3, 4, 5), (weights or [1] * 6)[1:-1], strict=True))
    odds = {num_heads: weight / sum(odds.values()) for num_heads, weight in odds.items()}
    one = Counter(sample_subnetworks(config, 0, step, "sandwich", 1)[1] for step in range(draws))
    check_odds(one, odds, draws)
    two = Counter(tuple(sample_subnetworks(config, 1, step, "sandwich", 2)[1:-1]) for step in range(draws))
    pairs = {
        (b, a): odds[a] * odds[b] / (1 - odds[a]) + odds[b] * odds[a] / (1 - odds[b]) for a, b in combinations(odds, 2)
    }
    assert sum(pairs.values()) == pytest.approx(1)
    check_odds(two, pairs, draws)


@pytest.mark.parametrize("small", [1.0, 1e-6])
def test_widths_with_odds_of_zero_are_taken_last(small):
    config = make_config(**SIX, subnetwork_weights=[1, 0, small, 0, small, 1])
    for step in range(300):
        assert sample_subnetworks(config, 0, step, "sandwich", 1)[1] in (3, 5)
        assert sample_subnetworks(config, 0, step, "sandwich", 2) == [6, 5, 3, 1]
        assert set(sample_subnetworks(config, 0, step, "sandwich", 3)) > {1, 3, 5, 6}
    last = Counter(num_heads for step in range(300) for num_heads in sample_subnetworks(config, 0, step, "sandwich", 3))
    assert last[2] > 100 and last[4] > 100


@pytest.mark.parametrize("sampling", SAMPLING)
def test_one_width_is_always_drawn_and_two_are_a_sandwich_without_others(sampling):
    one, two = make_config(subnetwork_heads=[4]), make_config(subnetwork_heads=[2, 4], subnetwork_weights=[1, 3])
    pinned, both = make_config(num_heads_active=3), Counter()
    for step in range(400):
        assert sample_subnetworks(one, 0, step, sampling, 3) == [4]
        assert sample_subnetworks(pinned, 0, step, sampling, 3) == [3]
        both[tuple(sample_subnetworks(two, 0, step, sampling, 3))] += 1
    if sampling.endswith("sandwich"):
        assert both == {(4, 2): 400}
    else:
        check_odds(both, {(2,): 0.25, (4,): 0.75} if sampling == "weighted" else {(2,): 0.5, (4,): 0.5}, 400)


def test_token_recycling_trains_the_widest_at_each_step():
    config = make_config(token_recycling=True, subnetwork_heads=[1, 2, 4])
    assert [sample_subnetworks(config, 0, step) for step in range(5)] == [[4]] * 5
    for sampling in SAMPLING[1:]:
        with pytest.raises(
            ValueError, match=f"trains all its stages at each step: leave out the sampling '{sampling}'"
        ):
            sample_subnetworks(config, 0, 0, sampling)


def test_an_unknown_sampling_is_an_error_that_names_those_that_there_are():
    with pytest.raises(ValueError, match="weighted, uniform, sandwich, open_sandwich, not 'widest'"):
        sample_subnetworks(make_config(), 0, 0, "widest")


# The arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subnetwork_sampling": "widest"}, "one of weighted, uniform, sandwich, open_sandwich, not 'widest'"),
        ({"distillation_weight": 0.5}, "`distillation_weight` needs subnetwork_sampling='sandwich'"),
        ({"distillation_weight": 0.5, "subnetwork_sampling": "uniform"}, "`distillation_weight` needs"),
        ({"distillation_weight": 1.5, "subnetwork_sampling": "sandwich"}, "`distillation_weight` must be .* not 1.5"),
        ({"distillation_weight": -0.1, "subnetwork_sampling": "sandwich"}, "`distillation_weight` must be .* not -0.1"),
        ({"distillation_weight": math.nan, "subnetwork_sampling": "sandwich"}, "`distillation_weight` must .* not nan"),
        ({"ema_decay": 1.01}, "`ema_decay` must be from 0 to"),
        ({"ema_decay": 1.0}, "`ema_decay` must be from 0 to"),
        ({"ema_decay": -1.0}, "`ema_decay` must be from 0 to"),
        ({"mixup_alpha": -0.1}, "`mixup_alpha` must not be negative, not -0.1"),
        ({"cutmix_alpha": -1.0}, "`cutmix_alpha` must not be negative, not -1.0"),
        ({"sandwich_draws": -1}, "`sandwich_draws` must not be negative, not -1"),
    ],
)
def test_an_argument_that_is_out_of_range_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        SubnetworkTrainingArguments(**options)


def test_the_ends_of_the_ranges_are_allowed():
    SubnetworkTrainingArguments()
    for weight in (0, 1):
        SubnetworkTrainingArguments("sandwich", sandwich_draws=0, distillation_weight=weight, ema_decay=0.9999)
        SubnetworkTrainingArguments("open_sandwich", distillation_weight=weight)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_arguments_draw_what_they_say(sampling):
    config, arguments = make_config(**SIX), SubnetworkTrainingArguments(sampling, sandwich_draws=2)
    for step in range(100):
        assert arguments.sample(config, 3, step, 100) == sample_subnetworks(config, 3, step, sampling, 2)


# Losses


@pytest.fixture
def logits():
    return 3 * torch.randn(7, 5, dtype=torch.float64).float()


@pytest.fixture
def labels():
    return torch.tensor([0, 4, 1, 1, 2, 3, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_with_labels_or_probabilities(logits, labels, smoothing):
    log_probabilities = logits.double().log_softmax(-1)
    one_hot = nn.functional.one_hot(labels, 5).double()
    targets = one_hot * (1 - smoothing) + smoothing / 5
    expected = -(targets * log_probabilities).sum(-1).mean().float()
    for given in (labels, one_hot.float()):
        torch.testing.assert_close(classification_loss(logits, given, label_smoothing=smoothing), expected)
    assert torch.equal(
        classification_loss(logits, labels, label_smoothing=smoothing),
        nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing),
    )


def test_the_teachers_part_is_its_divergence_and_its_entropy(logits, labels):
    teacher = torch.randn(7, 5)
    probabilities = teacher.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    divergence = nn.functional.kl_div(logits.log_softmax(-1), probabilities, reduction="batchmean")
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    for weight in (0.0, 0.3, 0.5, 1.0):
        found = classification_loss(logits, labels, teacher, weight, label_smoothing=0.1)
        torch.testing.assert_close(found, (1 - weight) * loss + weight * (divergence + entropy))
    assert torch.equal(classification_loss(logits, labels, teacher, 0.0, 0.1), loss)
    own = classification_loss(logits, labels, logits, 1.0)  # who is its own teacher has nothing to learn
    torch.testing.assert_close(own, torch.distributions.Categorical(logits=logits).entropy().mean())


def test_the_loss_of_stages_is_the_mean_of_theirs(labels):
    stages, teacher = torch.randn(3, 7, 5), None
    expected = torch.stack([classification_loss(logits, labels, teacher, 0.4, 0.1) for logits in stages]).mean()
    torch.testing.assert_close(classification_loss(stages, labels, teacher, 0.4, 0.1), expected)


def test_no_gradient_flows_to_the_teacher(logits, labels):
    student, teacher = logits.clone().requires_grad_(), torch.randn(7, 5).requires_grad_()
    classification_loss(student, labels, teacher, 0.5).backward()
    assert teacher.grad is None
    expected = (student.softmax(-1) - 0.5 * nn.functional.one_hot(labels, 5) - 0.5 * teacher.softmax(-1)) / 7
    torch.testing.assert_close(student.grad, expected.detach())


def test_the_loss_of_half_precision_logits_is_computed_in_single_precision(logits, labels):
    half, teacher = logits.bfloat16(), torch.randn(7, 5).bfloat16()
    expected = classification_loss(half.float(), labels, teacher.float(), 0.5)
    found = classification_loss(half, labels, teacher, 0.5)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_an_error_that_names_the_step_and_the_width(value):
    check_loss(torch.tensor(3.0), num_heads=5, step=17)
    with pytest.raises(FloatingPointError, match=f"loss at step 17, with 5 heads, is {value}"):
        check_loss(torch.tensor(value), num_heads=5, step=17)


# The gradients of a step


def make_batch(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, 8, 8), torch.randint(10, (count,))


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def one_by_one(model, pixel_values, labels, heads, weight: float, smoothing: float):
    """The mean loss of some widths and its gradients, written down: the widest teaches the others."""
    losses, teacher = [], None
    for num_heads in heads:
        logits = model(pixel_values, num_heads_active=num_heads).logits
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        if teacher is not None:
            loss = (1 - weight) * loss + weight * nn.functional.cross_entropy(logits, teacher)
        teacher = logits.detach().softmax(-1) if teacher is None else teacher
        losses.append(loss)
    assert len({loss.item() for loss in losses}) == len(heads)
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    return loss, dict(zip(weights_of(model), gradients, strict=True))


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("separate_classifiers", [False, True])
@pytest.mark.parametrize(("heads", "weight", "smoothing"), [([4, 3, 1], 0.4, 0.1), ([4, 1], 1.0, 0.0), ([2], 0.0, 0.1)])
def test_backward_widths_adds_the_gradient_of_each_width(accelerated, separate_classifiers, heads, weight, smoothing):
    model = make_model(separate_classifiers=separate_classifiers, subnetwork_heads=[1, 2, 3, 4]).train()
    batch, accelerator = make_batch(), Accelerator(cpu=True) if accelerated else None
    loss, gradients = one_by_one(model, *batch, heads, weight, smoothing)
    prepared = accelerator.prepare(model) if accelerated else model
    found = backward_widths(prepared, *batch, heads, 0, weight, smoothing, accelerator)
    torch.testing.assert_close(found, loss.detach())
    assert not found.requires_grad
    assert_close(gradients_of(model), gradients)
    backward_widths(prepared, *batch, heads, 0, weight, smoothing, accelerator)  # adds them once more
    assert_close(gradients_of(model), {name: 2 * gradient for name, gradient in gradients.items()})


def test_backward_widths_of_two_accumulated_batches_are_those_of_one():
    model, (pixel_values, labels), heads = make_model().train(), make_batch(), [4, 3]
    loss, gradients = one_by_one(model, pixel_values, labels, heads, 0.5, 0.1)
    accelerator, losses = Accelerator(cpu=True, gradient_accumulation_steps=2), []
    prepared = accelerator.prepare(model)
    for part in (slice(4), slice(4, 8)):
        with accelerator.accumulate(prepared):
            batch = pixel_values[part], labels[part]
            losses.append(backward_widths(prepared, *batch, heads, 0, 0.5, 0.1, accelerator))
    torch.testing.assert_close(sum(losses) / 2, loss.detach())
    assert_close(gradients_of(model), gradients)


def test_backward_widths_shares_gradients_at_the_last_width_only(monkeypatch):
    model, accelerator, passes = make_model().train(), Accelerator(cpu=True), []
    no_sync, alone = accelerator.no_sync, False

    class Alone:
        def __init__(self, model):
            self.context = no_sync(model)

        def __enter__(self):
            nonlocal alone
            alone = True
            return self.context.__enter__()

        def __exit__(self, *error):
            nonlocal alone
            alone = False
            return self.context.__exit__(*error)

    monkeypatch.setattr(accelerator, "no_sync", Alone)
    model.register_forward_hook(lambda module, args, outputs: passes.append(alone))
    for heads, expected in (([4, 3, 1], [True, True, False]), ([2], [False])):
        passes.clear()
        backward_widths(model, *make_batch(), heads, 0, accelerator=accelerator)
        assert passes == expected


def test_backward_widths_trains_all_stages_of_token_recycling_alike():
    model, batch = make_model(token_recycling=True, subnetwork_heads=[1, 2, 4]).train(), make_batch()
    stages = model(batch[0], num_heads_active=4).stage_logits
    loss = torch.stack([nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.1) for logits in stages]).mean()
    assert len(stages) == 3
    gradients = dict(zip(weights_of(model), torch.autograd.grad(loss, [*model.parameters()]), strict=True))
    torch.testing.assert_close(backward_widths(model, *batch, [4], 0, label_smoothing=0.1), loss.detach())
    assert_close(gradients_of(model), gradients)


def test_backward_widths_takes_probabilities_as_mixing_makes_them():
    model, (pixel_values, labels) = make_model().train(), make_batch()
    loss, gradients = one_by_one(model, pixel_values, labels, [4, 3], 0.5, 0.1)
    targets = nn.functional.one_hot(labels, 10).float()
    torch.testing.assert_close(backward_widths(model, pixel_values, targets, [4, 3], 0, 0.5, 0.1), loss.detach())
    assert_close(gradients_of(model), gradients)


def test_backward_widths_stops_at_a_loss_that_is_no_number_before_its_gradient_is_added():
    model, (pixel_values, labels) = make_model().train(), make_batch()
    pixel_values[3, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="The loss at step 7, with 4 heads, is nan"):
        backward_widths(model, pixel_values, labels, [4, 3], 7)
    assert all(gradient is None for gradient in gradients_of(model).values())


# Odds that change over the run


def test_widths_enter_one_after_the_other_the_widest_first():
    config = make_config(**SIX)
    entered = [len(schedule_odds(config, step, 100, curriculum_steps=30)) for step in range(40)]
    assert entered == sorted(entered)
    assert entered[0] == 1
    assert set(entered) == {1, 2, 3, 4, 5, 6}
    assert entered[29:] == [6] * 11
    for step in range(40):
        odds = schedule_odds(config, step, 100, curriculum_steps=30)
        assert list(odds) == config.subnetwork_heads[-len(odds) :]
        for sampling in SAMPLING:
            assert set(sample_subnetworks(config, 0, step, sampling, 2, odds)) <= set(odds)


def test_without_a_curriculum_the_draws_are_those_of_the_configuration():
    config = make_config(**SIX | {"subnetwork_weights": [6, 5, 4, 3, 2, 1]})
    for sampling in SAMPLING:
        for step in range(50):
            odds = schedule_odds(config, step, 50)
            assert sample_subnetworks(config, 3, step, sampling, 2, odds) == sample_subnetworks(
                config, 3, step, sampling, 2
            )


def test_odds_move_linearly_to_those_at_the_end():
    config = make_config(num_attention_heads=4, subnetwork_weights=[3, 1])
    final = [0, 5]
    assert schedule_odds(config, 0, 11, final_weights=final) == {3: 0.75, 4: 0.25}
    halfway = schedule_odds(config, 5, 11, final_weights=final)
    assert halfway == pytest.approx({3: 0.375, 4: 0.625})
    for step in (10, 11, 99):  # a resumed run may be longer
        assert schedule_odds(config, step, 11, final_weights=final) == {3: 0, 4: 1}


@pytest.mark.parametrize("final", [[1], [1, 2, 3], [0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1]])
def test_final_odds_that_fit_no_widths_are_refused(final):
    with pytest.raises(ValueError, match=r"2 odds, one for each of \[3, 4\]"):
        schedule_odds(make_config(num_attention_heads=4), 0, 10, final_weights=final)


def test_widths_without_odds_enter_with_equal_ones():
    config = make_config(num_attention_heads=4, subnetwork_weights=[1, 0])
    assert schedule_odds(config, 0, 10, curriculum_steps=4) == {4: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_weight": 1.1}, "`teacher_weight` must be from 0 to 1"),
        ({"hidden_state_weight": -1}, "`hidden_state_weight` must not be negative"),
        ({"curriculum_steps": -1}, "`curriculum_steps` must not be negative"),
        ({"final_subnetwork_weights": [1], "subnetwork_sampling": "uniform"}, "another subnetwork_sampling"),
    ],
)
def test_arguments_out_of_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SubnetworkTrainingArguments(**options)
