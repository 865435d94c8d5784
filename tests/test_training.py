"""What a training loop needs: draws that replay, losses, mixed images, averaged weights, runs that are not lost."""

import inspect
import json
import math
import random
import re
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.training.augmentation import mix_images
from hydravit_hf.training.averaging import AveragedWeights
from hydravit_hf.training.runs import checkpoint_step, list_checkpoints, open_run, save_checkpoint
from hydravit_hf.training.steps import SubnetworkTrainingArguments, check_loss, classification_loss, sample_subnetworks

SETTINGS = {"seed": 1, "learning_rate": 0.1, "heads": [3, 6], "name": None}
SAMPLING = ["weighted", "uniform", "sandwich", "open_sandwich"]


def make_config(**kwargs) -> HydraViTConfig:
    sizes = {"num_attention_heads": 6, "head_dim": 8, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    return HydraViTConfig(**sizes | kwargs)


def check_odds(counts: Counter, odds: dict[int, float], draws: int):
    """That counts are within four standard deviations of their odds, and none where there are none."""
    assert counts.keys() <= odds.keys()
    for num_heads, probability in odds.items():
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[num_heads] - draws * probability) <= 4 * deviation + 1e-9, num_heads


# The draw of widths


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("process_index", [None, 0, 1])
def test_a_draw_is_a_function_of_the_seed_and_the_step(sampling, process_index):
    config = make_config(subnetwork_heads=[1, 2, 3, 4, 6], subnetwork_weights=[4, 3, 2, 1, 1])

    def draw(seed: int, steps) -> list[list[int]]:
        return [sample_subnetworks(config, seed, step, sampling, process_index=process_index) for step in steps]

    draws = draw(7, range(200))
    for generator in (random, np.random, torch.random):
        (generator.manual_seed if generator is torch.random else generator.seed)(123)
    assert draw(7, reversed(range(200)))[::-1] == draws
    assert all(type(num_heads) is int for heads in draws for num_heads in heads)
    assert all(heads == sorted(set(heads), reverse=True) for heads in draws)
    assert draw(8, range(200)) != draws
    assert draw(7, range(200, 400)) != draws
    assert draw(8, range(199)) != draws[1:]  # nor the same, shifted


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_draw_leaves_the_generators_of_others_alone(sampling):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    sample_subnetworks(make_config(), seed=0, step=0, sampling=sampling)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("sampling", ["weighted", "uniform"])
@pytest.mark.parametrize("weights", [None, [1, 2, 3, 4], [0.7, 0, 0.2, 0.1], [0, 0, 5, 0]])
def test_widths_are_drawn_as_often_as_their_weights_say_or_equally_often(sampling, weights):
    config, draws = make_config(subnetwork_weights=weights), 10_000
    counts = Counter(num_heads for step in range(draws) for num_heads in sample_subnetworks(config, 0, step, sampling))
    odds = [1.0] * 4 if weights is None or sampling == "uniform" else weights
    check_odds(counts, {3 + index: weight / sum(odds) for index, weight in enumerate(odds)}, draws)
    assert counts.total() == draws


def test_every_seed_draws_all_widths_from_the_first_steps_on():
    config = make_config(subnetwork_heads=[1, 6])
    first = Counter(sample_subnetworks(config, seed=seed, step=0)[0] for seed in range(1000))
    check_odds(first, {1: 0.5, 6: 0.5}, 1000)


@pytest.mark.parametrize("sampling", ["sandwich", "open_sandwich"])
@pytest.mark.parametrize("draws", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("weights", [None, [0, 1, 2, 3, 4, 0]])
def test_a_sandwich_has_its_ends_and_as_many_others_as_there_are(sampling, draws, weights):
    config = make_config(subnetwork_heads=[1, 2, 3, 4, 5, 6], subnetwork_weights=weights)
    ends = {1, 6} if sampling == "sandwich" else {1}
    for step in range(50):
        heads = sample_subnetworks(config, 0, step, sampling, draws)
        assert set(heads) >= ends
        assert len(heads) == len(ends) + min(draws, 6 - len(ends))


@pytest.mark.parametrize("weights", [None, [9, 1, 2, 3, 4, 9], [1, 1, 1, 1, 97, 1]])
def test_the_others_of_a_sandwich_are_drawn_by_their_odds_one_after_the_other(weights):
    config, draws = make_config(subnetwork_heads=[1, 2, 3, 4, 5, 6], subnetwork_weights=weights), 5000
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


@pytest.mark.parametrize("small", [1.0, 1e-3, 1e-6])
def test_widths_with_odds_of_zero_are_taken_last(small):
    weights = [1, 0, small, 0, small, 1]
    config = make_config(subnetwork_heads=[1, 2, 3, 4, 5, 6], subnetwork_weights=weights)
    for step in range(300):
        assert sample_subnetworks(config, 0, step, "sandwich", 1)[1] in (3, 5)
        assert sample_subnetworks(config, 0, step, "sandwich", 2) == [6, 5, 3, 1]
        assert set(sample_subnetworks(config, 0, step, "sandwich", 3)) > {1, 3, 5, 6}
    last = Counter(num_heads for step in range(300) for num_heads in sample_subnetworks(config, 0, step, "sandwich", 3))
    assert last[2] > 100 and last[4] > 100


@pytest.mark.parametrize("sampling", SAMPLING)
def test_one_width_is_always_drawn_and_two_are_a_sandwich_without_others(sampling):
    one, two = make_config(subnetwork_heads=[4]), make_config(subnetwork_heads=[2, 4], subnetwork_weights=[1, 3])
    both = Counter()
    for step in range(400):
        assert sample_subnetworks(one, 0, step, sampling, 3) == [4]
        both[tuple(sample_subnetworks(two, 0, step, sampling, 3))] += 1
    if sampling.endswith("sandwich"):
        assert both == {(4, 2): 400}
    else:
        check_odds(both, {(2,): 0.25, (4,): 0.75} if sampling == "weighted" else {(2,): 0.5, (4,): 0.5}, 400)


@pytest.mark.parametrize("sampling", ["weighted", "uniform", "sandwich"])
def test_a_process_draws_for_itself_where_it_is_named(sampling):
    config, index = make_config(subnetwork_heads=range_of(6)), slice(1, 2) if sampling == "sandwich" else slice(1)
    draws = {
        process: [tuple(sample_subnetworks(config, 0, step, sampling, process_index=process)) for step in range(3000)]
        for process in (0, 1, 2)
    }
    kinds = len(set(draws[0]))
    assert kinds == (4 if sampling == "sandwich" else 6)
    for one, other in combinations(draws, 2):  # as if there were no other
        same = sum(a[index] == b[index] for a, b in zip(draws[one], draws[other], strict=True))
        assert abs(same - 3000 / kinds) < 4 * (3000 / kinds) ** 0.5


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_pinned_width_is_trained_alone(sampling):
    config = make_config(num_heads_active=5)
    assert all(sample_subnetworks(config, 0, step, sampling, 3, step % 2) == [5] for step in range(20))


def test_an_unknown_sampling_is_an_error_that_names_those_that_there_are():
    with pytest.raises(ValueError, match="weighted, uniform, sandwich, open_sandwich, not 'widest'"):
        sample_subnetworks(make_config(), 0, 0, "widest")


def test_two_processes_with_widths_of_their_own_take_as_long_as_the_docstring_says():
    config = HydraViTConfig()
    macs = [config.count_macs(num_heads) for num_heads in config.subnetwork_heads]
    assert config.subnetwork_heads == [*range(3, 13)]
    widest = sum(map(max, product(macs, macs))) / len(macs) ** 2
    (claim,) = re.findall(r"two processes and uniform draws from 3[.][.]12, ([0-9.]+) times the MACs", one_line())
    assert f"{widest / (sum(macs) / len(macs)):.2f}" == claim


def one_line() -> str:
    return " ".join(inspect.getdoc(sample_subnetworks).split())


def range_of(count: int) -> list[int]:
    return [*range(1, count + 1)]


# The options


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
def test_an_option_that_is_out_of_range_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        SubnetworkTrainingArguments(**options)


def test_the_ends_of_the_ranges_are_allowed():
    SubnetworkTrainingArguments()
    for weight in (0, 1):
        SubnetworkTrainingArguments("sandwich", sandwich_draws=0, distillation_weight=weight, ema_decay=0.9999)
        SubnetworkTrainingArguments("open_sandwich", distillation_weight=weight)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_options_draw_for_all_processes_or_for_each_and_know_the_widest(sampling):
    config, draws = make_config(subnetwork_heads=range_of(6)), 2
    shared = SubnetworkTrainingArguments(sampling, sandwich_draws=draws)
    own = SubnetworkTrainingArguments(sampling, sandwich_draws=draws, one_width_per_process=True)
    seen = set()
    for step in range(100):
        expected = sample_subnetworks(config, 3, step, sampling, draws)
        assert [shared.sample(config, 3, step, process) for process in range(4)] == [expected] * 4
        assert shared.widest(config, 3, step, 4) == expected[0]
        each = [sample_subnetworks(config, 3, step, sampling, draws, process) for process in range(4)]
        assert [own.sample(config, 3, step, process) for process in range(4)] == each
        assert own.widest(config, 3, step, 4) == max(map(max, each))
        seen.add(len(set(map(tuple, each))))
    assert max(seen) > 1


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


# Mixed images


def make_constant_images(classes: int, size: tuple[int, int] = (6, 10)) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of each class, of which every pixel is the class."""
    labels = torch.randperm(classes)
    return labels.float()[:, None, None, None].expand(-1, 3, *size).clone(), labels


def shares(pixel_values: torch.Tensor, classes: int) -> torch.Tensor:
    """The part of each image's pixels that are of each class."""
    return torch.stack([(pixel_values == label).float().mean((1, 2, 3)) for label in range(classes)], dim=1)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.3, 0.3), (1e-3, 1e-3)])
def test_targets_are_the_parts_that_the_classes_have_in_the_pixels(alphas):
    classes = 12
    pixel_values, labels = make_constant_images(classes)
    one_hot = nn.functional.one_hot(labels, classes).float()[:, :, None, None].expand(-1, -1, 6, 10)
    methods = set()
    for seed in range(20):
        mixed, targets = mix_images(pixel_values, labels, classes, [seed, 1], *alphas)
        torch.testing.assert_close(targets.sum(-1), torch.ones(classes))
        assert (targets >= 0).all() and ((targets > 0).sum(-1) <= 2).all()
        # the mean pixel of an image of constants, and the mean of each channel of one-hot images
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(classes).float())
        parts, same_targets = mix_images(one_hot, labels, classes, [seed, 1], *alphas)
        assert torch.equal(same_targets, targets)
        torch.testing.assert_close(parts.mean((2, 3)), targets)
        is_cut = (shares(mixed, classes) - targets).abs().amax(-1) < 1e-5
        is_mixed = mixed.flatten(1).std(1) < 1e-5
        assert (is_cut | is_mixed).all()
        methods |= {"cutmix"} if (~is_mixed).any() else set()
        methods |= {"mixup"} if (~is_cut).any() else set()
    assert methods == {name for name, alpha in zip(("mixup", "cutmix"), alphas, strict=True) if alpha}


def test_what_is_cut_in_is_one_rectangle():
    pixel_values, labels = make_constant_images(8)
    for seed in range(30):
        mixed, _ = mix_images(pixel_values, labels, 8, [seed], cutmix_alpha=1.0)
        for image, label in zip(mixed, labels, strict=True):
            foreign = image[0] != label
            assert all(torch.equal(channel, image[0]) for channel in image)
            assert torch.equal(foreign, foreign.any(1, keepdim=True) & foreign.any(0, keepdim=True))
            for side in (foreign.any(0), foreign.any(1)):
                places = side.nonzero().flatten()
                assert len(places) == 0 or places[-1] - places[0] + 1 == len(places)


def test_each_method_has_half_of_the_images_and_each_image_a_draw_of_its_own():
    classes = 200
    pixel_values, labels = make_constant_images(classes)
    mixed, targets = mix_images(pixel_values, labels, classes, [0], 1.0, 1.0)
    is_mixed = mixed.flatten(1).std(1) < 1e-4
    assert abs(is_mixed.sum() - 100) < 40
    own = targets[torch.arange(classes), labels]
    assert len(own.unique()) > 120
    partners = targets.scatter(1, labels[:, None], 0).argmax(-1)[own < 1]
    assert len(partners.unique()) == len(partners)  # each image is a partner once


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_shares_of_mixup_have_the_distribution_that_its_alpha_says(alpha):
    pixel_values, labels = make_constant_images(2000, (1, 1))
    _, targets = mix_images(pixel_values, labels, 2000, [5], mixup_alpha=alpha)
    own = targets[torch.arange(2000), labels].double()
    assert own.mean() == pytest.approx(0.5, abs=0.05)
    assert own.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mixing_is_a_function_of_the_seed_that_changes_nothing_in_place(dtype):
    pixel_values, labels = torch.randn(9, 3, 8, 4).to(dtype), torch.randint(5, (9,))
    given, states = (pixel_values.clone(), labels.clone()), (np.random.get_state()[1].tolist(), torch.get_rng_state())
    mixed, targets = mix_images(pixel_values, labels, 5, [3, 1], 0.8, 1.0)
    assert torch.equal(pixel_values, given[0]) and torch.equal(labels, given[1])
    assert np.random.get_state()[1].tolist() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert mixed.shape == pixel_values.shape and mixed.dtype == dtype
    assert targets.shape == (9, 5) and targets.dtype == torch.float32
    torch.manual_seed(1)
    again = mix_images(pixel_values, labels, 5, [3, 1], 0.8, 1.0)
    assert torch.equal(mixed, again[0]) and torch.equal(targets, again[1])
    for seed in ([3, 2], [4, 1], [3]):
        assert not torch.equal(mixed, mix_images(pixel_values, labels, 5, seed, 0.8, 1.0)[0])
    tolerance = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    single = mix_images(pixel_values.float(), labels, 5, [3, 1], 0.8, 1.0)[0]
    torch.testing.assert_close(mixed.float(), single, **tolerance)


def test_one_image_is_its_own_partner():
    image = torch.randn(1, 3, 8, 8)
    mixed, targets = mix_images(image, torch.tensor([2]), 4, [0], 0.8, 1.0)
    torch.testing.assert_close(mixed, image)
    torch.testing.assert_close(targets, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))


def test_mixing_needs_a_method():
    with pytest.raises(ValueError, match="`mixup_alpha` or `cutmix_alpha` must be above 0"):
        mix_images(*make_constant_images(3), 3, [0])


# Averaged weights


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_that_of_torch_and_of_the_closed_form(decay):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    average, reference = AveragedWeights(model, decay), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    reference.update_parameters(model)  # its first update is a copy
    history = [[weight.detach().clone() for weight in model.parameters()]]
    for _ in range(6):
        for weight in model.parameters():
            weight.data.add_(torch.randn_like(weight))
        history.append([weight.detach().clone() for weight in model.parameters()])
        average.update()
        reference.update_parameters(model)
    for mean, other in zip(average.average.values(), reference.parameters(), strict=True):
        torch.testing.assert_close(mean, other.detach())
    shares = [decay**6, *((1 - decay) * decay ** (6 - step) for step in range(1, 7))]
    for index, mean in enumerate(average.average.values()):
        closed_form = sum(part * weights[index] for part, weights in zip(shares, history, strict=True))
        torch.testing.assert_close(mean, closed_form)


def make_averaged_model():
    model = HydraViTForImageClassification(make_config(num_labels=4)).eval()
    average = AveragedWeights(model, 0.6)
    for _ in range(3):
        for weight in model.parameters():
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
        average.update()
    return model, average


def test_the_averaged_weights_take_the_place_of_the_models_and_give_it_back_also_after_an_error():
    model, average = make_averaged_model()
    images = torch.randn(2, 3, 8, 8)
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    mean = {name: weight.clone() for name, weight in average.state_dict().items()}
    with torch.no_grad():
        outputs = model(images).logits
        expected = torch.func.functional_call(model, mean, (images,)).logits
        with pytest.raises(KeyError, match="some error"), average.in_place():
            assert torch.equal(model(images).logits, expected)
            raise KeyError("some error")
        assert torch.equal(model(images).logits, outputs) and not torch.equal(outputs, expected)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trained[name]) and torch.equal(average.average[name], mean[name])
        assert weight.requires_grad and weight.is_leaf and not average.average[name].requires_grad
    average.swap()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, mean[name]) and torch.equal(average.average[name], trained[name])
    assert torch.equal(model(images).logits, expected)


def test_an_optimizer_goes_on_with_the_trained_weights_after_the_average_was_in_place():
    def train(visits: bool) -> dict:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer, average = torch.optim.AdamW(model.parameters(), lr=0.1), AveragedWeights(model, 0.5)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).pow(2).sum().backward()
            optimizer.step()
            average.update()
            if visits:
                with average.in_place():
                    model(torch.zeros(1, 3))
        return dict(model.named_parameters()) | {f"mean.{name}": mean for name, mean in average.state_dict().items()}

    visited, straight = train(True), train(False)
    assert all(torch.equal(visited[name], weight) for name, weight in straight.items())


def test_a_restored_average_goes_on_as_the_one_that_was_saved(tmp_path):
    model, average = make_averaged_model()
    torch.save(average.state_dict(), tmp_path / "average.pt")
    other = AveragedWeights(model, 0.6)
    other.load_state_dict(torch.load(tmp_path / "average.pt"))
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight))
    average.update()
    other.update()
    assert all(torch.equal(other.average[name], mean) for name, mean in average.average.items())
    other.load_state_dict(dict(model.named_parameters()))  # of which it becomes no function
    assert not any(mean.requires_grad for mean in other.average.values())


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
