"""Optimizers: parameters that each have one group, and an AdamW that at any width is that of the subnetwork."""

import copy
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from support.training import assert_close, make_config, weights_of
from torch import nn

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.training.optimizer import PrefixAdamW, parameter_groups

HYPERPARAMETERS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}
DECAY = 0.3
CLOSE = {"rtol": 1e-6, "atol": 1e-8}  # of double precision; the corrections of the moments are single


def make_model(**kwargs) -> HydraViTForImageClassification:
    """Four heads of four channels, of weights that all matter, in double precision."""
    sizes = {"head_dim": 4, "subnetwork_heads": [1, 2, 3, 4], "num_labels": 5}
    model = HydraViTForImageClassification(make_config(**sizes | kwargs)).double()
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=0.3)
    return model.train()


def make_adamw(model) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, DECAY), foreach=False, **HYPERPARAMETERS)


def make_prefix_adamw(model) -> PrefixAdamW:
    return PrefixAdamW(model, weight_decay=DECAY, **HYPERPARAMETERS)


def make_batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))) for _ in range(count)]


def step(model, optimizer, batch, num_heads: int):
    """A step at one width."""
    if isinstance(optimizer, PrefixAdamW):
        optimizer.num_heads = num_heads
    optimizer.zero_grad()
    pixel_values, labels = batch
    model(pixel_values, labels=labels, num_heads_active=num_heads).loss.backward()
    optimizer.step()


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
    assert len(expected) == 6 + 2


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


# Full width


@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_the_optimizer_at_full_width_is_the_adamw_of_torch(separate_classifiers):
    ours = make_model(separate_classifiers=separate_classifiers)
    theirs = copy.deepcopy(ours)
    optimizer, reference, before = make_prefix_adamw(ours), make_adamw(theirs), weights_of(ours)
    for batch in make_batches(8):
        step(ours, optimizer, batch, 4)
        step(theirs, reference, batch, 4)
    found, expected = weights_of(ours), weights_of(theirs)
    for kind in ("exp_avg", "exp_avg_sq"):
        found |= {f"{kind} {name}": optimizer.state[weight][kind] for name, weight in ours.named_parameters()}
        expected |= {f"{kind} {name}": reference.state[weight][kind] for name, weight in theirs.named_parameters()}
    if separate_classifiers:  # those of other widths stay as they are, where AdamW would let them decay
        assert torch.equal(found["classifier.weight"][:3], before["classifier.weight"][:3])
        found["classifier.weight"][:3] = expected["classifier.weight"][:3]
    assert_close(found, expected, **CLOSE)
    assert all((weight != before[name]).any() for name, weight in ours.named_parameters())


def test_the_first_step_is_as_exact_as_that_of_torch_in_single_precision():
    ours = make_model().float()
    theirs = copy.deepcopy(ours)
    options = {"lr": 1.0, "weight_decay": 0.0}  # so that the step is not lost in the weights
    optimizer, reference = PrefixAdamW(ours, **options), torch.optim.AdamW(theirs.parameters(), **options)
    for model in (ours, theirs):
        for weight in model.parameters():
            weight.data.zero_()
            weight.grad = torch.full_like(weight, 0.1)
    optimizer.step()
    reference.step()
    assert_close(weights_of(ours), weights_of(theirs), rtol=5e-7, atol=0)


def test_a_closure_gives_the_loss_that_step_returns():
    model = make_model()
    ((pixel_values, labels),) = make_batches(1)
    optimizer = make_prefix_adamw(model)
    before = weights_of(model)

    def closure():
        optimizer.zero_grad()
        loss = model(pixel_values, labels=labels, num_heads_active=4).loss
        loss.backward()
        return loss

    with torch.no_grad():
        expected = model(pixel_values, labels=labels, num_heads_active=4).loss
    torch.testing.assert_close(optimizer.step(closure).detach(), expected)
    assert all((weight != before[name]).any() for name, weight in model.named_parameters())
    assert make_prefix_adamw(model).step() is None


def test_weights_without_a_gradient_stay_as_they_are():
    model = make_model()
    model.hydravit.embeddings.requires_grad_(False)
    optimizer, before = make_prefix_adamw(model), weights_of(model)
    for batch in make_batches(2):
        step(model, optimizer, batch, 4)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == name.startswith("hydravit.embeddings."), name


# A narrow width


@pytest.mark.parametrize("num_heads", [1, 2, 3])
@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_nothing_outside_the_subnetwork_moves(num_heads, separate_classifiers):
    model = make_model(separate_classifiers=separate_classifiers)
    optimizer = make_prefix_adamw(model)
    for batch in make_batches(2):  # so that there are moments that could move it
        step(model, optimizer, batch, 4)

    def outside() -> dict:
        """All weights and moments with those of the subnetwork set to zero."""
        tensors = weights_of(model)
        for name, weight in model.named_parameters():
            for kind in ("exp_avg", "exp_avg_sq"):
                tensors[f"{kind} {name}"] = optimizer.state[weight][kind].clone()
        sizes = {name: weight.shape for name, weight in model.extract_subnetwork(num_heads).named_parameters()}
        for name, tensor in tensors.items():
            block = [slice(size) for size in sizes[name.rpartition(" ")[2]]]
            if separate_classifiers and "classifier" in name:
                block[0] = num_heads - 1
            tensor[tuple(block)] = 0
        return tensors

    before, moved = outside(), weights_of(model)
    for batch in make_batches(3):
        step(model, optimizer, batch, num_heads)
    after = outside()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert any(tensor.any() for tensor in after.values())
    assert all((weight != moved[name]).any() for name, weight in model.named_parameters())


@pytest.mark.parametrize("separate_classifiers", [False, True])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_training_a_width_is_training_its_extracted_subnetwork(num_heads, separate_classifiers):
    model = make_model(separate_classifiers=separate_classifiers)
    subnetwork = model.extract_subnetwork(num_heads).train()
    optimizer = make_prefix_adamw(model)
    reference = make_prefix_adamw(subnetwork) if separate_classifiers else make_adamw(subnetwork)
    for batch in make_batches(6):
        step(model, optimizer, batch, num_heads)
        step(subnetwork, reference, batch, num_heads)
    assert_close(weights_of(model.extract_subnetwork(num_heads)), weights_of(subnetwork), **CLOSE)


def test_a_width_trains_after_wider_steps_as_its_extracted_subnetwork_with_their_moments():
    model = make_model()
    optimizer, batches = make_prefix_adamw(model), make_batches(9)
    for batch, num_heads in zip(batches[:5], (4, 3, 2, 4, 3), strict=True):
        step(model, optimizer, batch, num_heads)
    subnetwork = model.extract_subnetwork(2).train()
    reference = make_adamw(subnetwork)
    originals = dict(model.named_parameters())
    for name, weight in subnetwork.named_parameters():
        state, block = optimizer.state[originals[name]], tuple(slice(size) for size in weight.shape)
        moments = {kind: state[kind][block].clone() for kind in ("exp_avg", "exp_avg_sq")}
        reference.state[weight] = {"step": torch.tensor(5.0), **moments}
    for batch in batches[5:]:
        step(model, optimizer, batch, 2)
        step(subnetwork, reference, batch, 2)
    assert_close(weights_of(model.extract_subnetwork(2)), weights_of(subnetwork), **CLOSE)


@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_heads_that_are_used_late_start_as_those_of_a_new_optimizer(separate_classifiers):
    model = make_model(separate_classifiers=separate_classifiers)
    optimizer, batches = make_prefix_adamw(model), make_batches(6)
    for batch in batches[:4]:
        step(model, optimizer, batch, 2)
    late = copy.deepcopy(model)
    reference = make_adamw(late)
    for batch in batches[4:]:
        step(model, optimizer, batch, 4)
        for weight, other in zip(model.parameters(), late.parameters(), strict=True):
            other.grad = weight.grad.clone()
        reference.step()
    blocks = {name: weight.shape for name, weight in model.extract_subnetwork(2).named_parameters()}
    found, expected = weights_of(model), weights_of(late)
    shells = 0
    for name, weight in found.items():
        if separate_classifiers and name.startswith("classifier."):  # the fourth is new, the others are not used
            torch.testing.assert_close(weight[3], expected[name][3], **CLOSE)
            continue
        block = tuple(map(slice, blocks[name]))
        weight[block] = expected[name][block] = 0
        torch.testing.assert_close(weight, expected[name], **CLOSE)
        shells += weight.any()
    assert shells > 20


def test_the_widest_of_a_step_moves_all_classifiers_that_the_step_has_used_and_no_other():
    model = make_model(separate_classifiers=True)
    optimizer, before = make_prefix_adamw(model), weights_of(model)
    ((pixel_values, labels),) = make_batches(1)
    for num_heads in (3, 1):
        model(pixel_values, labels=labels, num_heads_active=num_heads).loss.backward()
    optimizer.num_heads = 3
    optimizer.step()
    for weight, old in (
        (model.classifier.weight, before["classifier.weight"]),
        (model.classifier.bias, before["classifier.bias"]),
    ):
        assert [bool((one != other).any()) for one, other in zip(weight, old, strict=True)] == [True, False] * 2
    # the classifier of one head: what it uses moves as by an AdamW of its own
    alone = copy.deepcopy(model)
    alone.load_state_dict(before)
    alone(pixel_values, labels=labels, num_heads_active=1).loss.backward()
    make_adamw(alone).step()
    torch.testing.assert_close(model.classifier.weight[0, :, :4], alone.classifier.weight[0, :, :4], **CLOSE)


# State


@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_a_restored_optimizer_goes_on_as_the_one_that_was_saved(tmp_path, separate_classifiers):
    model, batches = make_model(separate_classifiers=separate_classifiers), make_batches(6)
    optimizer = make_prefix_adamw(model)
    for batch, num_heads in zip(batches[:3], (3, 1, 4), strict=True):
        step(model, optimizer, batch, num_heads)
    restored = copy.deepcopy(model)
    other = PrefixAdamW(restored)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    for batch, num_heads in zip(batches[3:], (2, 4, 3), strict=True):
        step(model, optimizer, batch, num_heads)
        step(restored, other, batch, num_heads)
    assert all(
        torch.equal(weight, other) for weight, other in zip(model.parameters(), restored.parameters(), strict=True)
    )


def test_updates_are_counted_exactly_for_half_precision_weights_also_once_restored(tmp_path):
    model = make_model(num_attention_heads=2, subnetwork_heads=[1, 2]).bfloat16()
    optimizer = PrefixAdamW(model, lr=1e-4)
    weights = [*model.hydravit.layernorm.parameters(), *model.classifier.parameters()]
    for weight in weights:  # the others have no gradient, and stay as they are
        weight.grad = torch.randn_like(weight)

    def check(first: int, second: int):
        for weight in weights:
            assert optimizer.state[weight]["step"].tolist() == [[first, second]]
            assert optimizer.state[weight]["exp_avg"].dtype == weight.dtype == torch.bfloat16
            assert weight.isfinite().all()

    for num_heads in [2] * 257 + [1] * 3:
        optimizer.num_heads = num_heads
        optimizer.step()
    check(260, 257)  # bfloat16 has no 257
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer = PrefixAdamW(model)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    check(260, 257)
    optimizer.step()
    check(261, 258)


def test_a_schedule_and_accelerate_move_the_optimizer_as_the_adamw_of_torch():
    ours = make_model()
    theirs = copy.deepcopy(ours)
    reference = make_adamw(theirs)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 5)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(ours, make_prefix_adamw(ours))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, 5)
    for pixel_values, labels in make_batches(5):
        optimizer.zero_grad()
        accelerator.backward(prepared(pixel_values, labels=labels, num_heads_active=4).loss)
        optimizer.step()
        schedule.step()
        step(theirs, reference, (pixel_values, labels), 4)
        expected.step()
    assert schedule.get_last_lr() == expected.get_last_lr() != [HYPERPARAMETERS["lr"]] * 2
    assert_close(weights_of(ours), weights_of(theirs), **CLOSE)
