"""The studies of elastify start and train their arms as they say, and their results are those that the docs show."""

import gzip

import numpy as np
import pytest
import torch
from support.benchmarks import BENCHMARKS, DOCS
from transformers import ViTConfig, ViTForImageClassification


@pytest.fixture
def elastify_study(load_module):
    return load_module("elastify_study")


@pytest.fixture
def fashion_vit(elastify_study):
    sizes = {"hidden_size": 192, "num_attention_heads": 12, "intermediate_size": 768}
    return ViTForImageClassification(
        ViTConfig(**elastify_study.SIZES | {"num_hidden_layers": 1}, **sizes, num_labels=10)
    )


def test_idx_files_are_read_as_they_were_written(load_module, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    header = bytes([0, 0, 8, 3]) + np.array(images.shape, ">i4").tobytes()
    (tmp_path / "images.gz").write_bytes(gzip.compress(header + images.tobytes()))
    assert np.array_equal(load_module("fashion_mnist").read_idx(tmp_path / "images.gz"), images)


@pytest.mark.parametrize("kind", ["slices", "permuted", "rotated", "dynabert"])
def test_each_arm_starts_from_the_function_of_the_vit(elastify_study, fashion_vit, kind):
    images = torch.randn(16, 1, 28, 28)
    model = elastify_study.start(fashion_vit.eval(), kind, images, 0).eval()
    logits = model(images, num_heads_active=12).logits
    torch.testing.assert_close(logits, fashion_vit(images).logits, atol=1e-4, rtol=0)
    assert model(images, num_heads_active=3).logits.shape == (16, 10)


@pytest.mark.parametrize("arm", ["DynaBERT", "elastify, taught", "new weights"])
def test_an_arm_learns_and_repeats_itself(elastify_study, fashion_vit, arm):
    images, labels = torch.randn(40, 1, 28, 28), torch.arange(40) % 10
    data = {"train": (images, labels)}
    runs = [elastify_study.train(data, fashion_vit, arm, 2, 0, 1e-3).state_dict() for _ in range(2)]
    assert all(torch.equal(weight, runs[1][name]) for name, weight in runs[0].items())
    start = elastify_study.start(fashion_vit, elastify_study.ARMS[arm]["start"], images, 0).state_dict()
    assert not torch.equal(start["classifier.weight"], runs[0]["classifier.weight"])


def test_the_tables_on_elastify_are_those_of_the_results(elastify_study, load_module):
    page = (DOCS / "elastify.md").read_text(encoding="utf-8")
    rows = elastify_study.read_rows(BENCHMARKS / "results" / "elastify_study.jsonl")
    assert elastify_study.format_rows(elastify_study.summarise(rows)) in page
    backbone = load_module("elastify_backbone_study")
    rows = backbone.read_rows(BENCHMARKS / "results" / "elastify_backbone_study.jsonl")
    assert all(table in page for table in backbone.report(rows).split("\n\n")[1:])
