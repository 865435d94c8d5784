"""The cascade study trains and measures what it says, and its results are those that the docs show."""

import json
import re

import pytest
from PIL import Image
from support.benchmarks import DOCS

from hydravit_hf import HydraViTConfig


def test_the_tables_of_the_cascade_study_are_those_of_its_results(run_here, tmp_path):
    printed = run_here("cascade_study.py", "--report", "--plot", tmp_path / "plot.png")
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    for method in ("3, 6, 12 heads", "3, 6, 12 heads, all stages"):
        cascades = [line.split(" | ") for line in lines if line.startswith(f"| cascade {method} |")]
        assert len(cascades) >= 10 and all(float(cells[4]) > 0 for cells in cascades)
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG"
    text = (DOCS / "cascade.md").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if re.match(r"\| (cascade )?\d.* heads.* \| \d", line)]
    assert len(shown) > 60 and set(shown) <= set(lines)


def test_the_cascade_study_trains_what_it_says(load_module, monkeypatch, tmp_path):
    study = load_module("cascade_study")
    monkeypatch.setattr(study, "STEPS", {"digits": 3})
    for training, (heads, recycling) in {
        "any width": (list(range(3, 13)), False),
        "all stages": ([3, 6, 12], False),
        "recycling": ([3, 6, 12], True),
        "recycling, equal compute": ([3, 6, 12], True),
    }.items():
        folder = study.train("digits", 0, training, tmp_path)
        config = HydraViTConfig.from_pretrained(folder)
        assert (config.subnetwork_heads, config.token_recycling) == (heads, recycling)
    assert [len(part) for part in study.split("digits", 0)] == [1078, 359, 360]


@pytest.mark.slow  # its fast siblings are the test above and the tests of fit_cascade
def test_the_cascade_study_measures_each_width_and_each_cascade(load_module, monkeypatch, tmp_path):
    study = load_module("cascade_study")
    cascades = {name: study.CASCADES[name] for name in ("3, 12 heads", "3, 6, 12 heads, recycling")}
    for name, value in {"STEPS": {"digits": 3}, "ROUNDS": 1, "BUDGETS": 1, "CASCADES": cascades}.items():
        monkeypatch.setattr(study, name, value)
    folders = {name: study.train("digits", 0, name, tmp_path) for name in ("any width", "all stages", "recycling")}
    parts = [study.Tensors(*part[:40].values()) for part in study.split("digits", 0)]
    monkeypatch.setattr(study, "split", lambda data, seed: parts)
    rows = study.measure("digits", 0, folders)
    assert all(row["ms"] > 0 and (row["data"], row["seed"]) == ("digits", 0) for row in rows)
    assert {row["method"] for row in rows if "goal" in row} == set(cascades)
    assert len([row for row in rows if row["method"] == "one width, any width"]) == 10
    assert json.loads(json.dumps(rows)) == rows
