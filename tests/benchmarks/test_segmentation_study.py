"""The segmentation study trains every width."""

import torch
from support.benchmarks import DOCS


def test_the_segmentation_study_trains_every_width_of_one_head(load_module, monkeypatch, tmp_path):
    study = load_module("segmentation_study")
    images, labels = torch.rand(20, 1, 28, 28), torch.arange(20) % 10
    canvases, classes = study.make_canvases(images, labels, 4, torch.Generator().manual_seed(0))
    assert canvases.shape == (4, 1, 56, 56) and torch.equal(classes == 0, canvases[:, 0] == -1)
    assert set(classes.unique().tolist()) <= set(range(11))
    monkeypatch.setattr(study, "BATCH", 2)
    data, scores = {"train": (images, labels)}, []
    model = study.train(data, None, 0, steps=2)
    for num_heads in (3, 12):
        study.set_width(model, data, num_heads)
        scores.append(study.score(model, canvases, classes))
    assert scores[0] != scores[1] and all(0 <= value <= 1 for row in scores for value in row.values())
    rows = [{"run": "elastic/0", "scores": {str(k): {"mean_iou": 0.5, "pixel_accuracy": 0.9} for k in (3, 6, 12)}}]
    assert "| elastic | 1 | 50.0 | 50.0 | 50.0 | 90.0 | 90.0 | 90.0 |" in study.report(rows)


def test_the_table_on_training_is_that_of_the_results(load_module):
    study = load_module("segmentation_study")
    table = study.report(study.read_rows(study.RESULTS / "segmentation_study.jsonl"))
    assert table in (DOCS / "training.md").read_text(encoding="utf-8") and table.count("\n") > 3
