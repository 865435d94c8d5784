"""What a model card and the files beside it must say of a model."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hydravit_hf import evaluate_subnetworks

CARD = {"README.md", "results.json", "accuracy_over_macs.png"}


def card_in(folder: Path) -> tuple[list[dict], dict[int, float]]:
    """The rows beside a card, and the accuracies in its metadata."""
    rows = json.loads((folder / "results.json").read_text())
    results = ModelCard.load(folder / "README.md").data.eval_results
    return rows, {result.metric_args["num_heads_active"]: result.metric_value for result in results}


def check_card(folder: Path, model, items, heads: list[int]):
    """Check that a card has the numbers of its model in its rows, its metadata and its table."""
    rows, accuracies = card_in(folder)
    expected = evaluate_subnetworks(model, items, heads, disable_tqdm=True)
    assert [row["num_heads"] for row in rows] == heads
    for row, other in zip(rows, expected, strict=True):
        assert {name: row[name] for name in other} == pytest.approx(other, rel=1e-5)
        assert row["macs"] == model.config.count_macs(row["num_heads"])
    assert accuracies == {row["num_heads"]: round(row["accuracy"], 5) for row in expected}
    text = (folder / "README.md").read_text()
    assert all(f" {row['accuracy']:.2%} |" in text for row in expected)
