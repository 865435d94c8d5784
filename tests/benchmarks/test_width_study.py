"""The width study trains what it says, resumes, and its results are those that the docs show."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from support.benchmarks import BENCHMARKS, DOCS


def test_the_figures_of_the_width_study_are_those_of_its_results(load_module, run_here, tmp_path):
    printed = run_here("width_study.py", "--report", "--plot", tmp_path / "plot.png")
    assert len([line for line in printed.splitlines() if line.startswith("|")]) > 30
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG"
    study, found = load_module("width_study"), []
    results = study.load_results(study.RESULTS / "width_study.jsonl")
    for alone, *rows in (study.summarise(results, data) for data in study.DATA):
        reached = {(row["method"], row["budget"]): row for row in rows}
        frozen = reached["uniform, unused weights frozen", "compute"]
        distilled, matformer = reached["sandwich, distilled", "epochs"], reached["MatFormer", "compute"]
        gain = distilled["accuracy"].mean() - alone["accuracy"].mean()
        means = [f"{row['accuracy'].mean():.2f}%" for row in (frozen, alone, matformer)]
        found.append((*means, f"{gain:.2f}", f"{-distilled['worst']:.2f}", f"{-frozen['worst']:.2f}"))
    (best, ten, nested, gain, lost, frozen_lost), (best2, ten2, nested2, gain2, lost2, frozen_lost2) = found
    text = " ".join((DOCS / "training.md").read_text(encoding="utf-8").split())
    readme = " ".join((DOCS.parent / "README.md").read_text(encoding="utf-8").split())
    for page in (text, readme):
        assert f"{best} against {ten}" in page and f"{best2} against {ten2}" in page
        assert f"{max(frozen_lost, frozen_lost2)} points below" in page
    assert f"{nested} and {nested2} at a quarter" in text
    assert f"They are {gain} and {gain2} points above" in text and f"{lost} and {lost2} points below" in text


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
