"""The study of LoRA trains each arm once, and times steps in processes of their own."""

import argparse

import pytest
import torch
from support.benchmarks import DOCS
from transformers import Dinov2Config, Dinov2Model

from hydravit_hf import HydraViTConfig

SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 1, "patch_size": 14, "image_size": 56}


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_the_study_of_lora_trains_each_arm_once_and_reports_its_distance(load_module, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    study = load_module("lora_study")
    images, labels = torch.randn(50, 1, 28, 28), torch.arange(50) % 5
    monkeypatch.setattr(study, "part", lambda *_: (images, labels))
    monkeypatch.setattr(study, "read_backbone", lambda _: Dinov2Model(Dinov2Config(**SIZES)))
    monkeypatch.setattr(study, "LEARNING_RATES", {"full": (1e-5,), "LoRA": (1e-5, 1e-2)})
    for name, value in {"BASE_STEPS": 1, "STEPS": 1, "BATCH": 4}.items():
        monkeypatch.setattr(study, name, value)
    args = {"onnx": None, "data": tmp_path, "folder": tmp_path, "results": tmp_path / "rows.jsonl"}
    args = argparse.Namespace(**args, arms=["full", "LoRA"], seeds=1, base_only=False)
    for _ in range(2):
        study.measure_all(args)
    *tuning, full, lora = study.read_rows(args.results)
    assert [row["run"] for row in tuning] == ["tuning/full/1e-05", "tuning/LoRA/1e-05", "tuning/LoRA/0.01"]
    assert lora["learning_rate"] == max(tuning[1:], key=lambda row: sum(row["validation"]))["learning_rate"]
    assert (full["run"], full["trained"], lora["run"]) == ("full/0", 1, "LoRA/0") and 0 < lora["trained"] < 0.5
    gap = 100 * (lora["test"][0] - full["test"][0])
    assert f"| {100 * lora['test'][0]:.1f} ({gap:+.1f}) |" in study.report([full, lora])


def test_the_table_on_adapters_is_that_of_the_results(load_module):
    pytest.importorskip("peft")
    study = load_module("lora_study")
    page = (DOCS / "lora.md").read_text(encoding="utf-8").splitlines()
    lines = study.report(study.read_rows(study.RESULTS / "lora_study.jsonl")).splitlines()
    assert len(lines) > 3 and set(lines) <= set(page)


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_the_steps_of_the_study_are_measured_in_their_own_process(load_module, monkeypatch):
    pytest.importorskip("peft")
    study = load_module("lora_study")
    config = HydraViTConfig(num_hidden_layers=1, num_labels=5, head_dim=8)
    monkeypatch.setattr(study, "HydraViTConfig", lambda **_: config)
    row = study.time_step("LoRA", 3, 1, 1)
    assert row["step_ms"] > 0 and row["trained"] < 50
