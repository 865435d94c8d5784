"""Each benchmark measures what it says, and its results are those that the docs show."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest
from PIL import Image
from support.benchmarks import BENCHMARKS, DOCS, TINY, table_of
from support.scripts import finish
from support.training import make_model

from hydravit_hf import make_image_processor


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


@pytest.mark.parametrize(
    ("name", "page"), [("download", "loading"), ("gradients", "multi_node"), ("loading", "loading")]
)
def test_the_tables_of_benchmarks_are_those_of_the_results(load_module, name, page):
    timing, benchmark = load_module("timing"), load_module(f"benchmark_{name}")
    rows = timing.read_rows(BENCHMARKS / "results" / f"{name}.jsonl")
    assert timing.format_rows(rows, benchmark.COLUMNS) in (DOCS / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.slow  # its fast sibling is test_a_width_downloads_its_files_only_and_a_wider_one_the_difference
def test_the_benchmark_of_downloads_counts_the_bytes_of_each_width(run_here, tmp_path):
    options = ["--rate", 1000, "--checkpoints", "by-width", *TINY, "--json", tmp_path / "rows.jsonl"]
    printed = run_here("benchmark_download.py", *options)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(table_of(printed)) == 1 + len(rows) == 6
    assert all(row["mb"] >= row["weights_mb"] > 0.9 * row["expected_mb"] for row in rows)
    by_width = {row["heads"]: row["weights_mb"] for row in rows}
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


def test_the_time_and_the_memory_of_elastify_are_printed(run_here):
    config = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 1}
    printed = run_here("benchmark_elastify.py", "--images", 4, "--config", json.dumps(config | {"image_size": 32}))
    row = json.loads(printed)
    assert row["seconds"] > 0 and row["images"] == 4


@pytest.mark.filterwarnings("ignore")  # of torchao
def test_the_files_of_the_schemes_are_smaller(run_here):
    pytest.importorskip("torchao")
    config = '{"num_hidden_layers": 1, "image_size": 32}'
    table = table_of(run_here("benchmark_quantization.py", "--rounds", 0, "--config", config, "--heads", 3))
    shares = {scheme: float(share) for scheme, share, _ in table[1:]}
    assert len(shares) == 7 and shares.pop("float32") == 1 and max(shares.values()) < 0.5


def test_calls_at_mixed_widths_are_right_and_leave_no_memory_behind():
    printed = finish("benchmarks/soak.py", "--calls", 2000)
    assert "\n    2,000 calls" in printed
    assert "\n0 wrong answers" in printed


def test_memory_that_grows_is_a_failure(load_module):
    with pytest.raises(SystemExit, match=r"the memory may grow by -1000\.0 MB"):
        load_module("soak").main(["--calls", "40", "--max_growth_mb", "-1000"])
