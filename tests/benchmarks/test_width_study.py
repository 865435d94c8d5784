"""The width study trains what it says, resumes, and its results are those that the docs show."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from support.benchmarks import BENCHMARKS, DOCS


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
