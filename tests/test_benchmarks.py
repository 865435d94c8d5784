"""Benchmarks and studies measure what they say, in turns, and their results are those that the docs show."""

import argparse
import gzip
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripts import EXAMPLES, finish
from support.training import make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from hydravit_hf import HydraViTConfig, make_image_processor

BENCHMARKS = EXAMPLES / "benchmarks"
DOCS = EXAMPLES.parent / "docs"
TINY = ["--config", '{"num_hidden_layers": 1, "image_size": 32}']


@pytest.fixture
def load_module(monkeypatch):
    """Imports a file of the benchmarks, as its neighbours do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture
def run_here(load_module, monkeypatch, capsys):
    """Runs a script of the benchmarks in this process, which saves the imports. Returns what it printed."""

    def run_here(script: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def table_of(printed: str) -> list[list[str]]:
    """The cells of the tables that a script has printed, without their rulers."""
    lines = [line for line in printed.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- What they share ---


@pytest.mark.parametrize("shuffle", [True, False])
def test_calls_take_turns_and_the_rounds_that_warm_up_do_not_count(load_module, shuffle):
    timing, called, ticks = load_module("timing"), [], iter(range(100))
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    times = timing.time_rounds(calls, 4, warmup=2, clock=lambda: next(ticks) / 1e3, shuffle=shuffle, desc=None)
    rounds = ["".join(called[start : start + 3]) for start in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1
    assert shuffle or set(rounds) == {"abc", "cba"}
    assert times == {name: pytest.approx([1.0] * 4) for name in "abc"}


def test_a_ratio_is_the_median_of_the_ratios_within_the_rounds(load_module):
    assert load_module("timing").median_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0


def test_a_table_is_aligned_and_leaves_missing_cells_empty(load_module):
    rows = [{"way": "a", "ms": 1.234}, {"way": "longer", "more": 1}]
    text = load_module("timing").format_rows(rows, {"way": ("way", ""), "ms": ("time, ms", ".1f")})
    assert text.splitlines() == [
        "|    way | time, ms |",
        "| -----: | -------: |",
        "|      a |      1.2 |",
        "| longer |          |",
    ]


def test_rows_are_added_to_a_file_one_a_line(load_module, tmp_path):
    timing, file = load_module("timing"), tmp_path / "new" / "rows.jsonl"
    assert timing.read_rows(file) == []
    timing.append_rows(file, [{"a": 0.1}])
    timing.append_rows(file, [{"a": 1e-9}, {"b": [1, None]}])
    assert timing.read_rows(file) == [{"a": 0.1}, {"a": 1e-9}, {"b": [1, None]}]
    assert len(file.read_text().splitlines()) == 3
    timing.write_rows(file, [{"c": 1}])
    assert timing.read_rows(file) == [{"c": 1}]


# --- Benchmarks ---


def test_the_benchmark_of_forward_prints_a_row_for_each_width(run_here, tmp_path):
    options = ["--batch_size", 1, "--heads", 3, 4, "--rounds", 1, "--device", "cpu", *TINY]
    printed = run_here("benchmark_forward.py", *options, "--json", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["num_heads"] for row in rows] == [3, 4]
    assert all(row["elastic_ms"] > 0 and row["stock_ms"] > 0 for row in rows)
    assert [cells[2] for cells in table_of(printed)] == ["heads", "3", "4"]


def test_the_benchmark_of_a_step_prints_a_row_for_each_optimizer(run_here):
    printed = run_here("benchmark_step.py", "--heads", 3, "--batch_size", 1, "--rounds", 1, *TINY)
    rows = table_of(printed)[1:]
    assert [row[1] for row in rows] == ["stock ViT, AdamW", "HydraViT, AdamW", "HydraViT, PrefixAdamW"]


@pytest.mark.parametrize("option", [None, "--token_recycling"])
def test_the_benchmark_of_cascades_prints_a_row_for_each_share(run_here, option):
    options = ["--heads", 3, 4, "--batch_size", 4, "--rounds", 1, *TINY, *([option] if option else [])]
    printed = run_here("benchmark_cascade.py", *options)
    assert [row[0] for row in table_of(printed)] == ["stop early", "50%", "80%"]


@pytest.mark.slow  # its fast sibling is the test above
def test_the_benchmark_of_cascades_runs_exported_files_too():
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    options = ["--heads", 3, 4, "--batch_size", 4, "--rounds", 1, "--shares", 0.5, "--onnx", *TINY]
    printed = finish("benchmarks/benchmark_cascade.py", *options)
    assert [row[0] for row in table_of(printed)] == ["stop early", "50%"]


def test_the_benchmark_of_profiles_compares_two_and_measures_a_choice_again(run_here):
    printed = run_here("benchmark_profile.py", "--heads", 3, 4, "--rounds", 1, "--budgets_ms", 1e9, *TINY)
    assert "3 heads: second median" in printed and "budget 1e+09 ms: 4 heads, measured again" in printed


@pytest.mark.slow  # its fast sibling is test_a_narrow_load_reads_the_leading_rows_only
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the benchmark is for Linux")
def test_the_benchmark_of_loading_prints_a_row_for_each_way():
    ways = ["files by width, 3 heads", "one file, 3 heads, get_slice"]
    options = ["--rounds", 1, "--cache", "cold", "--ways", *ways]
    rows = table_of(finish("benchmarks/benchmark_loading.py", *options, *TINY))
    assert [row[0] for row in rows] == ["cache", "cold", "cold", "cold"] and [row[1] for row in rows[2:]] == ways
    assert rows[1][1] == "ordinary 3-head ViT" and rows[1][3] == "1.00"


@pytest.mark.parametrize(("name", "page"), [("download", "loading"), ("gradients", "training"), ("loading", "loading")])
def test_the_tables_of_benchmarks_are_those_of_the_results(load_module, name, page):
    timing, benchmark = load_module("timing"), load_module(f"benchmark_{name}")
    rows = timing.read_rows(BENCHMARKS / "results" / f"{name}.jsonl")
    assert timing.format_rows(rows, benchmark.COLUMNS) in (DOCS / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.slow  # its fast sibling is test_a_width_downloads_its_files_only_and_a_wider_one_the_difference
def test_the_benchmark_of_downloads_counts_the_bytes_of_each_width(run_here, tmp_path):
    printed = run_here("benchmark_download.py", "--rate", 1000, *TINY, "--json", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(table_of(printed)) == 1 + len(rows) == 9
    assert all(row["mb"] >= row["weights_mb"] > 0.9 * row["expected_mb"] for row in rows)
    by_width = {row["heads"]: row["weights_mb"] for row in rows if row["checkpoint"] == "by-width"}
    assert by_width["3"] + by_width["6 after 3"] == pytest.approx(by_width["6"])


@pytest.mark.slow  # it needs two processes; their hook has a test in test_distributed.py
def test_the_benchmark_of_gradients_prints_a_row_for_each_way(tmp_path):
    script, config = BENCHMARKS / "benchmark_gradients.py", {"num_hidden_layers": 1, "image_size": 32}
    options = ["--heads", "3", "--rounds", "1", "--config", json.dumps(config), "--json", str(tmp_path / "rows.jsonl")]
    subprocess.run([sys.executable, script, *options], check=True, capture_output=True)
    rows = {row["way"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert list(rows) == ["stock ViT", "all gradients", "leading gradients", "leading gradients and updates"]
    assert all(row["sent_mb"] > 0 and row["ms"] > 0 for row in rows.values())  # other tests send on loopback, too


@pytest.mark.slow  # its fast siblings are the tests of the exports
def test_the_benchmark_of_exports_compares_three_ways_to_keep_the_widths(tmp_path):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    options = ["--heads", 3, 4, "--batch_size", 1, "--rounds", 1, "--loads", 1, "--clock", "cpu", *TINY]
    printed = finish("benchmarks/benchmark_export.py", *options, "--json", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sum("bytes" in row for row in rows) == 4
    ways = ("own file", "width as input", "shared weights")
    for key in ("load_ms", "difference"):
        found = [(row["num_heads"], row["way"]) for row in rows if key in row]
        assert sorted(found) == sorted(product((3, 4), ways))
    assert all(row["difference"] < 1e-4 for row in rows if "difference" in row)
    assert len(table_of(printed)) == 3 + len(rows)


@pytest.mark.slow  # it is the whole of its kind: each way has fast tests of its own
def test_the_benchmark_of_runtimes_prints_a_row_for_each_way(tmp_path):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    make_model().save_pretrained(tmp_path)
    make_image_processor(make_model().config).save_pretrained(tmp_path)
    options = ["--checkpoint", tmp_path, "--heads", 3, "--batch_size", 1, "--rounds", 1]
    options += ["--ways", "elastic", "extracted", "ONNX Runtime", "--json", tmp_path / "rows.jsonl"]
    finish("benchmarks/benchmark_runtimes.py", *options, "--plot", tmp_path / "plot.png")
    *rows, switch = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert [row["way"] for row in rows] == ["stock ViT", "elastic", "extracted", "ONNX Runtime"]
    assert all(row["agreement"] == 1 and row["latency_ms"] > 0 for row in rows)
    assert switch["switch_ratio"] > 0
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG"


def test_the_results_of_the_runtimes_have_a_row_for_each_way_and_width():
    rows = [json.loads(line) for line in (BENCHMARKS / "results" / "runtimes.jsonl").read_text().splitlines()]
    keys = [(row["num_heads"], row["way"], row["batch_size"]) for row in rows if "num_heads" in row]
    assert sorted(keys) == sorted(product(*map(set, zip(*keys, strict=True))))
    assert all(row["ratio"] == 1 for row in rows if row["way"] == "stock ViT")


# --- Studies ---


def test_the_tables_of_the_width_study_are_those_of_its_results(run_here, tmp_path):
    printed = run_here("width_study.py", "--report", "--plot", tmp_path / "plot.png")
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    assert len(lines) > 30
    assert all(line in text for line in lines)
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG"


def test_the_width_study_trains_what_it_says(load_module, monkeypatch):
    study = load_module("width_study")
    monkeypatch.setattr(study, "HEADS", [3, 12])
    monkeypatch.setitem(study.DATA, "digits", (*study.DATA["digits"][:3], 1, 1e-3))
    alone = [study.train("digits", seed=0, heads=[num_heads]) for num_heads in study.HEADS]
    total = sum(run["macs"] for run in alone)
    for name in ("MatFormer", "open sandwich, distilled"):
        options = {"seed": 0, "heads": study.HEADS, **study.STRATEGIES[name]}
        quarter = study.train("digits", share=0.25, **options)
        assert 0.9 * total / 4 < quarter["macs"] <= total / 4
        assert len(quarter["accuracy"]) == len(study.HEADS)
        assert study.train("digits", **options)["steps"] == alone[0]["steps"] == 22


def test_the_width_study_goes_on_where_its_file_of_results_ends(load_module, monkeypatch, tmp_path):
    study, file = load_module("width_study"), tmp_path / "results.jsonl"
    shutil.copy(BENCHMARKS / "results" / "width_study.jsonl", file)
    first, *others = file.read_text().splitlines(keepends=True)
    file.write_text("".join(others))
    jobs = study.make_jobs(seeds=3)
    name = json.loads(first)["run"]
    assert jobs.keys() - study.load_results(file).keys() == {name}
    monkeypatch.setattr(study, "make_jobs", lambda seeds: {name: {"data": "digits", "seed": 0, "heads": [3]}})
    monkeypatch.setattr(study, "ProcessPoolExecutor", OneProcess)
    monkeypatch.setattr(study, "train", lambda **job: {"accuracy": [0.5], "steps": 1, "macs": 2})
    assert study.measure(3, 1, file)[name] == {"accuracy": [0.5], "steps": 1, "macs": 2}
    assert study.load_results(file).keys() == jobs.keys()
    assert file.read_text().startswith("".join(others))


class OneProcess:
    """Stands for a pool of processes."""

    def __init__(self, *args, **kwargs):
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self):
        return self.pool

    def __exit__(self, *args):
        self.pool.shutdown()


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


# --- The soak test ---


def test_calls_at_mixed_widths_are_right_and_leave_no_memory_behind():
    printed = finish("benchmarks/soak.py", "--calls", 2000)
    assert "\n    2,000 calls" in printed
    assert "\n0 wrong answers" in printed


def test_memory_that_grows_is_a_failure(load_module):
    with pytest.raises(SystemExit, match=r"the memory may grow by -1000\.0 MB"):
        load_module("soak").main(["--calls", "40", "--max_growth_mb", "-1000"])


# --- elastify_study.py ---


@pytest.fixture
def elastify_study(load_module):
    return load_module("elastify_study")


@pytest.fixture
def fashion_vit(elastify_study):
    sizes = {"hidden_size": 192, "num_attention_heads": 12, "intermediate_size": 768}
    return ViTForImageClassification(
        ViTConfig(**elastify_study.SIZES | {"num_hidden_layers": 1}, **sizes, num_labels=10)
    )


def test_idx_files_are_read_as_they_were_written(elastify_study, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    header = bytes([0, 0, 8, 3]) + np.array(images.shape, ">i4").tobytes()
    (tmp_path / "images.gz").write_bytes(gzip.compress(header + images.tobytes()))
    assert np.array_equal(elastify_study.read_idx(tmp_path / "images.gz"), images)


@pytest.mark.parametrize("kind", ["slices", "permuted", "rotated", "dynabert"])
def test_each_arm_starts_from_the_function_of_the_vit(elastify_study, fashion_vit, kind):
    images = torch.randn(16, 1, 28, 28)
    model = elastify_study.start(fashion_vit.eval(), kind, images, 0).eval()
    logits = model(images, num_heads_active=12).logits
    torch.testing.assert_close(logits, fashion_vit(images).logits, atol=1e-4, rtol=0)
    assert model(images, num_heads_active=3).logits.shape == (16, 10)


@pytest.mark.parametrize("arm", ["DynaBERT", "elastify"])
@pytest.mark.parametrize("num_heads", [3, 12])
def test_the_costs_of_an_arm_are_those_that_torch_counts(elastify_study, fashion_vit, arm, num_heads):
    kind = "dynabert" if arm == "DynaBERT" else "slices"
    model = elastify_study.start(fashion_vit, kind, torch.randn(4, 1, 28, 28), 0).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one that it counts
        model(torch.randn(1, 1, 28, 28), num_heads_active=num_heads)
    assert elastify_study.count_macs(model.config, num_heads, arm) == pytest.approx(
        counter.get_total_flops() / 2, rel=0.02
    )


@pytest.mark.parametrize("arm", ["DynaBERT", "elastify, taught", "new weights"])
def test_an_arm_learns_and_repeats_itself(elastify_study, fashion_vit, arm):
    images, labels = torch.randn(40, 1, 28, 28), torch.arange(40) % 10
    data = {"train": (images, labels)}
    runs = [elastify_study.train(data, fashion_vit, arm, 2, 0, 1e-3).state_dict() for _ in range(2)]
    assert all(torch.equal(weight, runs[1][name]) for name, weight in runs[0].items())
    start = elastify_study.start(fashion_vit, elastify_study.ARMS[arm]["start"], images, 0).state_dict()
    assert not torch.equal(start["classifier.weight"], runs[0]["classifier.weight"])


def test_the_time_and_the_memory_of_elastify_are_printed(run_here):
    config = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 1}
    printed = run_here("benchmark_elastify.py", "--images", 4, "--config", json.dumps(config | {"image_size": 32}))
    row = json.loads(printed)
    assert row["seconds"] > 0 and row["images"] == 4


def test_the_tables_on_elastify_are_those_of_the_results(elastify_study, load_module):
    page = (DOCS / "elastify.md").read_text(encoding="utf-8")
    rows = elastify_study.read_rows(BENCHMARKS / "results" / "elastify_study.jsonl")
    assert elastify_study.format_rows(elastify_study.summarise(rows)) in page
    backbone = load_module("elastify_backbone_study")
    rows = backbone.read_rows(BENCHMARKS / "results" / "elastify_backbone_study.jsonl")
    assert all(table in page for table in backbone.report(rows).split("\n\n")[1:])


# --- lora_study.py and benchmark_quantization.py ---


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_the_study_of_lora_trains_each_arm_once_and_reports_its_distance(load_module, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    study = load_module("lora_study")
    images, labels = torch.randn(500, 1, 28, 28), torch.arange(500) % 5
    monkeypatch.setattr(study, "part", lambda *_: (images, labels))
    for name, value in {"BASE_STEPS": 1, "STEPS": 1, "BATCH": 4}.items():
        monkeypatch.setattr(study, name, value)
    args = {"data": tmp_path, "folder": tmp_path, "results": tmp_path / "rows.jsonl"}
    args = argparse.Namespace(**args, arms=["full", "LoRA"], seeds=1, base_only=False)
    for _ in range(2):
        study.measure_all(args)
    full, lora = study.read_rows(args.results)
    assert (full["run"], full["trained"], lora["run"]) == ("full/0", 1, "LoRA/0") and 0 < lora["trained"] < 0.02
    gap = 100 * (lora["test"][0] - full["test"][0])
    assert f"| {100 * lora['test'][0]:.1f} ({gap:+.1f}) |" in study.report([full, lora])


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_the_steps_of_the_study_are_measured_in_their_own_process(load_module, monkeypatch):
    pytest.importorskip("peft")
    study = load_module("lora_study")
    config = HydraViTConfig(num_hidden_layers=1, num_labels=5, head_dim=8)
    monkeypatch.setattr(study, "HydraViTConfig", lambda **_: config)
    row = study.time_step("LoRA", 3, 1, 1)
    assert row["step_ms"] > 0 and row["trained"] < 50


@pytest.mark.filterwarnings("ignore")  # of torchao
def test_the_files_of_the_schemes_are_smaller(run_here):
    pytest.importorskip("torchao")
    config = '{"num_hidden_layers": 1, "image_size": 32}'
    table = table_of(run_here("benchmark_quantization.py", "--rounds", 0, "--config", config, "--heads", 3))
    shares = {scheme: float(share) for scheme, share, _ in table[1:]}
    assert len(shares) == 7 and shares.pop("float32") == 1 and max(shares.values()) < 0.5


def test_the_segmentation_study_trains_every_width_of_one_head(load_module, monkeypatch, tmp_path):
    study = load_module("segmentation_study")
    images, labels = torch.rand(20, 1, 28, 28), torch.arange(20) % 10
    canvases, classes = study.make_canvases(images, labels, 4, torch.Generator().manual_seed(0))
    assert canvases.shape == (4, 1, 56, 56) and torch.equal(classes == 0, canvases[:, 0] == -1)
    assert set(classes.unique().tolist()) <= set(range(11))
    monkeypatch.setattr(study, "BATCH", 2)
    model = study.train({"train": (images, labels)}, None, 0, steps=2)
    scores = [study.score(model, canvases, classes, num_heads) for num_heads in (3, 12)]
    assert scores[0] != scores[1] and all(0 <= value <= 1 for row in scores for value in row.values())
    rows = [{"run": "elastic/0", "scores": {str(k): {"mean_iou": 0.5, "pixel_accuracy": 0.9} for k in (3, 6, 12)}}]
    assert "| elastic | 1 | 50.0 | 50.0 | 50.0 | 90.0 | 90.0 | 90.0 |" in study.report(rows)


# --- Serving ---


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
    model.save_pretrained(tmp_path / "model")
    make_image_processor(model.config).save_pretrained(tmp_path / "model")
    images = torch.rand(20, 1, 28, 28) * 2 - 1
    labels = model(images, num_heads_active=12).logits.argmax(-1)
    monkeypatch.setattr(serving, "HEADS", [2, 12])
    monkeypatch.setattr(serving, "SECONDS", 2)
    monkeypatch.setattr(serving, "NEIGHBOUR", (0.5, 1.0))
    monkeypatch.setattr(serving, "TRACES", {"neighbour": lambda second: 1.0})
    files = [serving.to_png(image) for image in images]
    serving.evaluate(tmp_path / "model", files, labels)
    command = ["--folder", str(tmp_path / "model"), "--results", str(tmp_path / "rows.jsonl"), "--rounds", "1"]
    args = serving.make_parser().parse_args([*command, "--capacity", "20", "--traces", "neighbour"])
    affinity = os.sched_getaffinity(0)
    try:
        serving.run_rounds(args, files, labels.tolist())
    finally:
        os.sched_setaffinity(0, affinity)
    rows = serving.read_rows(tmp_path / "rows.jsonl")
    assert {row["server"] for row in rows} == {"2", "12", serving.SCHEDULER} and len({r["requests"] for r in rows}) == 1
    (widest,) = (row for row in rows if row["server"] == "12")
    assert (
        widest["accuracy"] == 1 and sum(step["12"] for step in widest["course"] if "12" in step) == rows[0]["requests"]
    )
