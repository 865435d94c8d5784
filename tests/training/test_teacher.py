"""A frozen teacher teaches every width of a step by one pass, in both loops."""

import copy

import pytest
import torch
from support.training import make_config, make_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.training.steps import SubnetworkTrainingArguments, backward_widths
from hydravit_hf.training.teacher import Teacher

VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
VIT |= {"image_size": 8, "patch_size": 4, "num_labels": 10}


@pytest.fixture
def vit():
    return ViTForImageClassification(ViTConfig(**VIT)).train()


@pytest.fixture
def batch():
    return torch.randn(6, 3, 8, 8), torch.arange(6)


def gradients(model) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_learns_from_the_teacher_and_the_labels_by_weight(vit, batch, smoothing):
    images, labels = batch
    model, expected = make_model(), make_model()
    loss = backward_widths(
        model, images, labels, [4, 3], 0, label_smoothing=smoothing, teacher=Teacher(vit, model.config, weight=0.7)
    )
    targets = vit(images).logits.softmax(-1).detach()
    losses = []
    for num_heads in (4, 3):
        logits = expected(images, num_heads_active=num_heads).logits
        by_labels = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        by_teacher = -(targets * logits.log_softmax(-1)).sum(-1).mean()
        losses.append(0.3 * by_labels + 0.7 * by_teacher)
    mean = sum(losses) / 2
    mean.backward()
    torch.testing.assert_close(loss, mean.detach())
    for found, wanted in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_teacher_is_frozen_and_runs_once_a_step_in_eval_mode(vit, batch):
    calls = []
    vit.register_forward_hook(lambda module, inputs, output: calls.append((module.training, torch.is_grad_enabled())))
    model = make_model()
    backward_widths(model, *batch, [4, 3], 0, teacher=Teacher(vit, model.config))
    assert calls == [(False, False)]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in vit.parameters())


def test_an_own_copy_teaches_nothing_new_at_full_width_and_its_states_the_narrow_ones(batch):
    model = make_model()
    teacher = Teacher(copy.deepcopy(model), model.config, weight=1.0, hidden_state_weight=0.5)
    backward_widths(model, *batch, [4], 0, teacher=teacher)
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(model))
    model.zero_grad()
    without = backward_widths(model, *batch, [3], 0, teacher=Teacher(copy.deepcopy(model), model.config, weight=1.0))
    loss = backward_widths(model, *batch, [3], 0, teacher=teacher)
    own = model(batch[0], num_heads_active=3, output_hidden_states=True).hidden_states
    states = model(batch[0], num_heads_active=4, output_hidden_states=True).hidden_states
    distances = [
        (mine - full[..., :24]).square().mean() / full[..., :24].var() for mine, full in zip(own, states, strict=True)
    ]
    torch.testing.assert_close(loss - without, 0.5 * (sum(distances) / len(distances)).detach())


def test_a_teacher_teaches_all_stages_of_token_recycling(vit, batch):
    model = make_model(token_recycling=True, subnetwork_heads=[2, 4])
    loss = backward_widths(model, *batch, [4], 0, teacher=Teacher(vit, model.config, weight=1.0))
    stages = model.train()(batch[0], num_heads_active=4).stage_logits
    targets = vit(batch[0]).logits.softmax(-1)
    expected = torch.stack([-(targets * logits.log_softmax(-1)).sum(-1).mean() for logits in stages]).mean()
    torch.testing.assert_close(loss, expected.detach())


def test_a_path_names_a_teacher_of_any_kind(tmp_path, vit, batch):
    vit.save_pretrained(tmp_path / "vit")
    make_model().save_pretrained(tmp_path / "hydravit")
    for name in ("vit", "hydravit"):
        lesson = Teacher(str(tmp_path / name), make_config())(batch[0])
        assert lesson.logits.shape == (6, 10)
    assert isinstance(Teacher(str(tmp_path / "hydravit"), make_config()).model, HydraViTForImageClassification)


def test_the_arguments_name_the_teacher(tmp_path, vit):
    vit.save_pretrained(tmp_path)
    assert Teacher.of_arguments(SubnetworkTrainingArguments(), make_config()) is None
    given = SubnetworkTrainingArguments(teacher=str(tmp_path), teacher_weight=0.4)
    assert Teacher.of_arguments(given, make_config()).weight == 0.4
    assert Teacher.of_arguments(given, make_config(), vit).model is vit
    with pytest.raises(ValueError, match="`hidden_state_weight` needs a `teacher`"):
        Teacher.of_arguments(SubnetworkTrainingArguments(hidden_state_weight=1.0), make_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 9}, "10, from LABEL_0 to LABEL_9, and not 9"),
        ({"image_size": 16}, "of image_size 8, not 16"),
        ({"num_channels": 1}, "of num_channels 3, not 1"),
    ],
)
def test_a_teacher_of_other_labels_or_images_is_refused(changes, message):
    vit = ViTForImageClassification(ViTConfig(**VIT | changes))
    with pytest.raises(ValueError, match=message):
        Teacher(vit, make_config())


def test_labels_are_matched_by_name_and_others_are_refused(vit, batch):
    names = [f"class {index}" for index in range(10)]
    config = make_config(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})
    Teacher(vit, config)  # whose labels have no names
    vit.config.id2label = dict(enumerate(reversed(names)))
    lesson = Teacher(vit, config)(batch[0])
    assert torch.equal(lesson.logits.flip(-1), vit(batch[0]).logits)
    vit.config.id2label = dict(enumerate(["another", *names[1:]]))
    with pytest.raises(ValueError, match="from class 0 to class 9, and not 10, from another to class 9"):
        Teacher(vit, config)


def test_hidden_states_need_channels_that_mean_the_same(vit):
    with pytest.raises(ValueError, match="such as a copy of the student"):
        Teacher(vit, make_config(), hidden_state_weight=1.0)


@pytest.mark.parametrize("config", [{"problem_type": "regression"}, {"num_labels": 1}], ids=str)
def test_a_teacher_of_other_problems_is_refused(vit, config):
    with pytest.raises(ValueError, match="not regression"):
        Teacher(vit, make_config(**config))
