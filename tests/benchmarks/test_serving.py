"""The benchmark of serving plays the traces that it describes, and its results are those that the docs show."""

import os

import numpy as np
import pytest
import torch
from support.benchmarks import DOCS, table_of
from support.training import make_model

from hydravit_hf import make_image_processor


@pytest.fixture
def serving(load_module):
    pytest.importorskip("aiohttp", reason="needs the extra `train`")
    return load_module("serving")


def test_a_trace_is_the_same_each_time_and_has_the_load_that_it_says(serving):
    means = {"steady": 0.5, "ramp": 0.25 + 3.75 / 2, "bursts": serving.BURST_MEAN, "neighbour": 0.5}
    for trace, rate in serving.TRACES.items():
        times = serving.arrivals(rate, 200, seed=1)
        assert times == serving.arrivals(rate, 200, seed=1) != serving.arrivals(rate, 200, seed=2)
        assert len(times) == pytest.approx(means[trace] * 200 * serving.SECONDS, rel=0.1)
    assert max(map(serving.TRACES["bursts"], np.linspace(0, 15, 1000))) == pytest.approx(10 * serving.BURST_MEAN)
    assert serving.TRACES["ramp"](serving.SECONDS) == pytest.approx(4)


def test_the_figures_of_a_trace_are_those_of_its_requests(serving):
    requests = [
        {"second": 0.1, "ms": 40, "num_heads": 12, "is_right": True},
        {"second": 0.2, "ms": 200, "num_heads": 12, "is_right": True},
        {"second": 0.7, "ms": 90, "num_heads": 2, "is_right": False},
        {"second": 0.8, "ms": 100, "num_heads": 2, "is_right": True},
    ]
    row = serving.summarise(requests)
    assert (row["met"], row["effective_accuracy"], row["accuracy"], row["p50_ms"]) == (0.75, 0.5, 0.75, 95)
    assert row["course"][:2] == [{"requests": 2, "missed": 1, "12": 2}, {"requests": 2, "missed": 0, "2": 2}]


def test_the_tables_on_serving_are_those_of_the_results(serving):
    rows = serving.read_rows(serving.RESULTS / "serving.jsonl")
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    expected = table_of(serving.format_rows(serving.gather(rows), serving.COLUMNS))
    expected += table_of(serving.format_rows(serving.gather_overheads(rows), serving.OVERHEAD_COLUMNS))
    assert len(expected) > 16 and all(row in cells for row in expected)


@pytest.mark.slow
def test_the_benchmark_of_serving_plays_its_traces_against_servers(serving, monkeypatch, tmp_path):
    model = make_model(num_channels=1, image_size=28, patch_size=7, num_attention_heads=12, num_hidden_layers=1)
    model.config.id2label = dict(enumerate(serving.CLASSES))
    model.save_pretrained(tmp_path / "model")
    make_image_processor(model.config).save_pretrained(tmp_path / "model")
    images = torch.rand(20, 1, 28, 28) * 2 - 1
    labels = model(images, num_heads_active=12).logits.argmax(-1)
    monkeypatch.setattr(serving, "HEADS", [2, 12])
    monkeypatch.setattr(serving, "SECONDS", 2)
    monkeypatch.setattr(serving, "NEIGHBOUR", (0.5, 1.0))
    monkeypatch.setattr(serving, "TRACES", {"neighbour": lambda second: 1.0})
    serving.evaluate(tmp_path / "model", images, labels)
    command = ["--folder", str(tmp_path / "model"), "--results", str(tmp_path / "rows.jsonl"), "--rounds", "1"]
    args = serving.make_parser().parse_args([*command, "--capacity", "20", "--traces", "neighbour"])
    affinity = os.sched_getaffinity(0)
    try:
        serving.run_rounds(args, [serving.to_png(image) for image in images], labels.tolist())
    finally:
        os.sched_setaffinity(0, affinity)
    rows = serving.read_rows(tmp_path / "rows.jsonl")
    assert {row["server"] for row in rows} == {"2", "12", serving.SCHEDULER} and len({r["requests"] for r in rows}) == 1
    (widest,) = (row for row in rows if row["server"] == "12")
    assert (
        widest["accuracy"] == 1 and sum(step["12"] for step in widest["course"] if "12" in step) == rows[0]["requests"]
    )
