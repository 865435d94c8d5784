"""Every width's row is what one computes by hand from the logits of its extracted subnetwork."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.evaluation import SCORES, evaluate_subnetworks, evaluating, make_loader, score

KEYS = ["num_heads", "accuracy", "top5_accuracy", "loss"]


def make_classifier(**kwargs) -> HydraViTForImageClassification:
    sizes = {"num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    defaults = {**sizes, "num_labels": 8, "subnetwork_heads": [1, 2, 4], "initializer_range": 0.5}
    return HydraViTForImageClassification(HydraViTConfig(**defaults | kwargs)).eval()


def make_items(count: int, num_labels: int = 8) -> list[dict]:
    labels = torch.randint(num_labels, (count,)).tolist()
    return [{"pixel_values": torch.randn(3, 8, 8), "labels": label} for label in labels]


def by_hand(model: HydraViTForImageClassification, items: list[dict], num_heads: int) -> dict:
    """A row, from the extracted subnetwork, one image at a time, in numpy."""
    subnetwork = model.extract_subnetwork(num_heads).eval()
    ranks, losses = [], []
    for item in items:
        with torch.no_grad():
            logits = subnetwork(item["pixel_values"][None], num_heads_active=num_heads).logits[0].double().numpy()
        own = logits[item["labels"]]
        ranks.append(int((logits > own).sum()))
        losses.append(float(np.log(np.exp(logits).sum()) - own))
    accuracy, top5 = (sum(rank < best for rank in ranks) / len(items) for best in (1, 5))
    return dict(zip(KEYS, (num_heads, accuracy, top5, sum(losses) / len(items)), strict=True))


def check_equal(rows: list[dict], expected: list[dict]):
    for row, other in zip(rows, expected, strict=True):
        assert list(row) == KEYS
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_labels", [2, 5, 9])
def test_scores_are_a_rank_and_a_loss_for_each_image(num_labels, dtype):
    logits, labels = 2 * torch.randn(40, num_labels).to(dtype), torch.randint(num_labels, (40,))
    scores = score(logits, labels)
    assert scores.shape == (40, len(SCORES)) and scores.dtype == torch.float32
    values = logits.double().numpy()
    own = values[np.arange(40), labels][:, None]
    ranks = (values > own).sum(1) + ((values == own).cumsum(1)[np.arange(40), labels] - 1)  # equal ones in their order
    if dtype == torch.float32:  # the order of equal logits is not specified
        assert scores[:, 0].tolist() == (ranks == 0).tolist()
        assert scores[:, 1].tolist() == (ranks < 5).tolist()
    np.testing.assert_allclose(scores[:, 2], np.log(np.exp(values - own).sum(1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_a_row_is_what_one_computes_by_hand_for_its_width(separate_classifiers):
    model, items = make_classifier(separate_classifiers=separate_classifiers), make_items(53)
    rows = evaluate_subnetworks(model, items, heads=[1, 2, 3, 4])
    check_equal(rows, [by_hand(model, items, num_heads) for num_heads in (1, 2, 3, 4)])
    assert all(row["accuracy"] < row["top5_accuracy"] < 1 for row in rows)
    assert len({row["loss"] for row in rows}) == 4


def test_rows_do_not_depend_on_the_batch_size_or_on_who_makes_the_batches():
    model, items = make_classifier(), make_items(23)
    expected = evaluate_subnetworks(model, items)
    for batch_size in (1, 22):
        check_equal(evaluate_subnetworks(model, items, batch_size=batch_size), expected)
        loader = DataLoader(items, batch_size, collate_fn=default_data_collator)
        check_equal(evaluate_subnetworks(model, loader), expected)


def test_a_single_process_of_accelerate_gives_the_same_rows():
    """Two processes do in training/test_distributed.py."""
    model, items = make_classifier(), make_items(23)
    expected = evaluate_subnetworks(model, items)
    accelerator = Accelerator()
    model = model.to(accelerator.device)
    check_equal(evaluate_subnetworks(model, items, batch_size=5, accelerator=accelerator), expected)


def test_there_is_a_row_for_each_width_in_the_order_asked_for():
    model, items = make_classifier(num_heads_active=2), make_items(9)
    assert [row["num_heads"] for row in evaluate_subnetworks(model, items)] == [1, 2, 4]
    backwards = evaluate_subnetworks(model, items, heads=[4, 3, 1])
    assert [row["num_heads"] for row in backwards] == [4, 3, 1]
    check_equal(backwards, [by_hand(model, items, num_heads) for num_heads in (4, 3, 1)])
    check_equal(evaluate_subnetworks(model, items, heads=[3, 1, 3]), [backwards[1], backwards[2], backwards[1]])


@pytest.mark.parametrize("num_labels", [2, 5])
def test_every_label_is_among_the_first_five_of_at_most_five(num_labels):
    model, items = make_classifier(num_labels=num_labels), make_items(12, num_labels)
    assert [row["top5_accuracy"] for row in evaluate_subnetworks(model, items)] == [1.0] * 3


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_without_dropout_and_left_in_the_mode_that_it_had(training):
    model, items = make_classifier(hidden_dropout_prob=0.5, drop_path_rate=0.5), make_items(9)
    expected = evaluate_subnetworks(model, items)
    parameters = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    model.train(training)
    check_equal(evaluate_subnetworks(model, items), expected)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_left_in_the_mode_that_it_had_also_by_an_error():
    model, items = make_classifier().train(), [{"pixel_values": torch.randn(3, 8, 9), "labels": 0}]
    with pytest.raises(ValueError, match="pixel_values"):
        evaluate_subnetworks(model, items)
    assert model.training


def test_an_empty_dataset_is_an_error():
    for empty in ([], DataLoader([], 4)):
        with pytest.raises(ValueError, match="the dataset is empty"):
            evaluate_subnetworks(make_classifier(), empty)


@pytest.mark.parametrize("num_heads", [0, 5, True, 2.0])
def test_a_width_that_is_not_held_is_an_error(num_heads):
    with pytest.raises(ValueError, match="`num_heads_active` must be an integer from 1 to 4"):
        evaluate_subnetworks(make_classifier(), make_items(2), heads=[1, num_heads])


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_only_single_label_classifiers_are_evaluated(problem_type):
    with pytest.raises(ValueError, match=f"not problem_type='{problem_type}': `HydraViTTrainer.evaluate` does"):
        evaluate_subnetworks(make_classifier(problem_type=problem_type), make_items(2))


def test_a_loader_has_the_items_in_their_order_and_one_that_is_given_stays_as_it_is():
    items = make_items(5)
    batches = list(make_loader(items, batch_size=2))
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [item["labels"] for item in items]
    loader = DataLoader(items, 3)
    assert make_loader(loader, batch_size=2) is loader


@pytest.mark.parametrize("training", [True, False, "in part"])
def test_a_model_is_evaluating_within_the_context_only(training):
    model = make_classifier().train(bool(training))
    if training == "in part":
        model.hydravit.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model) as entered:
        assert entered is model and not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes
