"""The average is that of torch; a `Trainer` evaluates, saves and leaves it, and goes on from the trained weights."""

import pytest
import torch
from safetensors.torch import load_file
from support.training import (
    Record,
    assert_close,
    assert_equal,
    make_config,
    make_model,
    metrics_of,
    own,
    weights_of,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.training.averaging import AveragedWeights

# The average


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
    memory = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    average.swap()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, mean[name]) and torch.equal(average.average[name], trained[name])
        assert weight.data_ptr() == memory[name]  # as sharded weights need it
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


# A trainer that averages


def test_the_average_is_what_is_evaluated_and_saved_and_left_in_the_model(make_trainer, digits, tmp_path):
    record = Record()
    model = make_model()
    start = weights_of(model)
    trainer = make_trainer(
        model,
        trainer={"callbacks": [record]},
        ema_decay=0.7,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    mean = start
    for step, weights in enumerate(record.weights, start=1):
        mean = {name: 0.7 * mean[name] + 0.3 * weight for name, weight in weights.items()}
        if step % 4 == 0:
            folder = tmp_path / "run" / f"checkpoint-{step}"
            assert_close(load_file(folder / "model.safetensors"), mean, rtol=1e-4, atol=1e-6)
            assert_equal(load_file(folder / "trained_weights.safetensors"), weights)
            saved = HydraViTForImageClassification.from_pretrained(folder)
            (logged,) = (e for e in trainer.state.log_history if e["step"] == step and "eval_loss" in e)
            assert own(logged) == pytest.approx(metrics_of(saved, digits["test"]), rel=1e-5)
    assert_close(weights_of(model), mean, rtol=1e-4, atol=1e-6)
    assert_equal(weights_of(model), load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors"))
    assert own(trainer.evaluate()) == own(logged)
    trainer.save_model()
    assert_equal(weights_of(model), load_file(tmp_path / "run" / "model.safetensors"))


def test_training_goes_on_where_it_ended_also_with_averaged_weights(make_trainer):
    trainer = make_trainer(ema_decay=0.7, max_steps=4)
    trainer.train()
    start, record = weights_of(trainer.model), Record()
    trainer.add_callback(record)
    trainer.train()
    mean = start
    for weights in record.weights:
        mean = {name: 0.7 * mean[name] + 0.3 * weight for name, weight in weights.items()}
    assert len(record.weights) == 4
    assert_close(weights_of(trainer.model), mean, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_is_resumed_with_averaged_weights_if_and_only_if_it_has_them(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    for folder, saved, resumed in (("with", 0.9, 0.0), ("without", 0.0, 0.9)):
        make_trainer(folder=folder, ema_decay=saved, **options).train()
        with pytest.raises(ValueError, match="`ema_decay` must be"):
            make_trainer(folder=folder, ema_decay=resumed, **options).train(str(tmp_path / folder / "checkpoint-2"))
