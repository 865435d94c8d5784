"""The commands that write a model leave what loads by itself, or nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.exports import trace_once
from support.thresholds import splitting
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

from hydravit_hf import HydraViTForImageClassification, evaluate_subnetworks
from hydravit_hf.cascade import save_cascade
from hydravit_hf.data import load_digits, to_pixel_values


def test_extract_leaves_a_folder_that_loads_by_itself(hydravit, folder, tmp_path):
    images = torch.randn(2, 3, 8, 8)
    expected = HydraViTForImageClassification.from_pretrained(folder)(images, num_heads_active=3).logits
    for name, options, kind in (("hydravit", [], HydraViTForImageClassification), ("vit", ["--vit"], None)):
        code, out, _ = hydravit("extract", folder, 3, tmp_path / name, *options)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        assert code == 0 and isinstance(loaded, kind or ViTForImageClassification) and str(tmp_path / name) in out
        torch.testing.assert_close(loaded(images).logits, expected)
        assert AutoImageProcessor.from_pretrained(tmp_path / name)
    code, _, err = hydravit("extract", folder, 3, tmp_path / "vit")
    assert code == 1 and "not an empty folder" in err
    code, _, err = hydravit("extract", folder, 7, tmp_path / "wide")
    assert code == 1 and "from 1 to 6" in err and not (tmp_path / "wide").exists()


@pytest.mark.filterwarnings("ignore")  # of torchao
def test_quantize_saves_int8_of_which_any_width_loads(hydravit, folder, tmp_path):
    pytest.importorskip("torchao")
    images = torch.randn(2, 3, 8, 8)
    expected = HydraViTForImageClassification.from_pretrained(folder)(images, num_heads_active=3).logits
    for options in ([], ["--dynamic"], ["--shard-by-heads"]):
        target = tmp_path / "".join(["int8", *options])
        code, out, err = hydravit("quantize", folder, target, *options)
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        assert code == 0 and err == ""
        assert out == f"Saved a HydraViT of 6 heads in int8 and {size / 1e6:.2f} MB to {target}\n"
        assert len(list(target.glob("*.safetensors"))) == (6 if options == ["--shard-by-heads"] else 1)
        small = HydraViTForImageClassification.from_pretrained(target, num_attention_heads=3)
        assert type(small.hydravit.layers[0].attention.q_proj.weight).__module__.startswith("torchao")
        logits = small(images).logits
        torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.1)
        assert not torch.equal(logits, expected)
        assert AutoImageProcessor.from_pretrained(target)
    code, _, err = hydravit("quantize", folder, target)
    assert code == 1 and "not an empty folder" in err


def test_export_writes_one_width(hydravit, folder, tmp_path):
    images, path = torch.randn(6, 3, 8, 8), tmp_path / "one.pt2"
    code, out, err = hydravit("export", folder, path, "--num-heads", 3, "--format", "torch_export")
    assert (code, out, err) == (0, f"Wrote {path}\n", "")
    expected = HydraViTForImageClassification.from_pretrained(folder)(images, num_heads_active=3).logits
    torch.testing.assert_close(torch.export.load(path).module()(pixel_values=images).logits, expected)


@pytest.mark.slow
def test_the_installed_command_exports_without_other_messages(folder, tmp_path):
    pytest.importorskip("onnxscript")
    command = [sys.executable, "-m", "hydravit_hf.cli", "export", folder, tmp_path / "3.onnx", "--num-heads", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"Wrote {tmp_path / '3.onnx'}\n", "")


@pytest.mark.slow
def test_export_writes_several_widths_or_the_saved_cascade(hydravit, folder, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    trace_once(monkeypatch)
    images = torch.randn(6, 3, 8, 8)
    model = HydraViTForImageClassification.from_pretrained(folder)
    expected = model(images, num_heads_active=3).logits

    def run(path, **inputs):
        return onnxruntime.InferenceSession(tmp_path / path).run(None, {"pixel_values": images.numpy(), **inputs})

    code, _, err = hydravit("export", folder, tmp_path / "several.onnx", "--heads", 2, "--heads", 3)
    (logits,) = run("several.onnx", num_heads_active=np.array(3))
    assert code == 0, err
    torch.testing.assert_close(torch.from_numpy(logits), expected)
    code, _, err = hydravit("export", folder, tmp_path / "cascade.onnx", "--cascade")
    assert code == 1 and "has no cascade" in err and err.startswith("error: ") and err.count("\n") == 1
    save_cascade(folder, {"num_heads": [2, 3], "thresholds": splitting(model, images, [2, 3])})
    code, _, err = hydravit("export", folder, tmp_path / "cascade.onnx", "--cascade")
    outputs = HydraViTForImageClassification.from_pretrained(folder).cascade(images)
    assert code == 0 and set(outputs.num_heads.tolist()) == {2, 3}, err
    for found, value in zip(run("cascade.onnx"), outputs.to_tuple(), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), value)


def test_export_says_what_is_wrong_and_writes_nothing(hydravit, folder, tmp_path):
    for options, message in (
        (["--num-heads", 7], "from 1 to 6"),
        (["--heads", 2, "--heads", 7], "from 1 to 6"),
        (["--cascade", "--num-heads", 2], "--cascade"),
        (["--heads", 2, "--num-heads", 2], "--heads"),
        (["--cascade", "--format", "openvino"], "for ONNX only"),
        (["--page", "--format", "openvino"], "for ONNX only"),
        (["--page", "--num-heads", 2], "--page"),
        (["--page", "--transformers-js"], "--transformers-js"),
        (["--heads", 2, "--transformers-js"], "--transformers-js"),
        (["--example", "cat.png"], "--page"),
        (["--page", "--example", "cat.png"], "no file cat.png"),
        (["--heads", 2, "--format", "openvino"], "for ONNX only"),
    ):
        code, out, err = hydravit("export", folder, tmp_path / "x.onnx", *options)
        assert code == 1 and out == "" and message in err and not (tmp_path / "x.onnx").exists()


def test_reshard_writes_files_by_width_and_one_file_again(hydravit, folder, tmp_path):
    code, out, _ = hydravit("reshard", folder, tmp_path / "by-width", "--heads", 2, "--heads", 4)
    assert code == 0 and [line.partition(":")[0] for line in out.splitlines()] == [
        str(tmp_path / "by-width" / f"model-0{heads}-heads.safetensors") for heads in (2, 4, 6)
    ]
    code, out, _ = hydravit("reshard", tmp_path / "by-width", tmp_path / "back", "--one-file")
    assert code == 0
    original, back = (Path(path, "model.safetensors").read_bytes() for path in (folder, tmp_path / "back"))
    assert original == back
    for arguments, message in (
        ((folder, tmp_path / "back"), "exists and is not an empty folder"),
        ((folder, tmp_path / "new", "--heads", 7), "`--heads` must list some of"),
        ((folder, tmp_path / "new", "--heads", 2, "--one-file"), "Give `--heads` or `--one-file`"),
        ((tmp_path / "nowhere", tmp_path / "new"), "nowhere"),
    ):
        code, out, err = hydravit("reshard", *arguments)
        assert code == 1 and out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_commands_run_on_files_by_width(hydravit, folder, tmp_path):
    assert hydravit("reshard", folder, tmp_path / "by-width")[0] == 0
    paths = (folder, tmp_path / "by-width")
    one, many = (hydravit("evaluate", path, "digits", "--heads", 3, "--json") for path in paths)
    assert many[0] == 0 and json.loads(one[1]) == json.loads(many[1])
    assert hydravit("extract", tmp_path / "by-width", 3, tmp_path / "small", "--vit")[0] == 0
    code, out, _ = hydravit("profile", tmp_path / "by-width", "--rounds", 1, "--heads", 2, "--json")
    assert code == 0 and json.loads(out)[0]["num_heads"] == 2


def test_elastify_saves_a_model_with_the_logits_of_the_vit_and_its_card(hydravit, folder, tmp_path):
    assert hydravit("extract", folder, 6, tmp_path / "vit", "--vit")[0] == 0
    vit = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    code, out, _ = hydravit("elastify", tmp_path / "vit", "digits", tmp_path / "elastic", "--max-images", 50)
    assert code == 0 and "6 heads" in out
    model = HydraViTForImageClassification.from_pretrained(tmp_path / "elastic")
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(images).logits, vit(images).logits, atol=1e-4, rtol=0)
    card = (tmp_path / "elastic" / "README.md").read_text()
    digits = load_digits()["test"].with_transform(to_pixel_values(AutoImageProcessor.from_pretrained(folder)))
    (row,) = evaluate_subnetworks(model, digits, [6])
    assert f"The original, vit, has {row['accuracy']:.2%}" in card and f"The original: {row['accuracy']:.2%}" in out
    assert "It is vit with its directions" in card and "measured 50 images" in card and "was trained to run" not in card
    # Images without classes, or with others, are enough for the order
    for split in ("one", "two"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (9, 9), (80 * index, 9, 9)).save(tmp_path / "images" / split / f"{index}.png")
    for options in (["--unlabelled"], []):
        target = tmp_path / f"plain{len(options)}"
        code, out, _ = hydravit("elastify", tmp_path / "vit", tmp_path / "images", target, *options)
        assert code == 0 and "no width was evaluated" in out and not (target / "README.md").exists()
    code, _, err = hydravit("elastify", folder, "digits", tmp_path / "again")
    assert code == 1 and "it is a HydraViT already" in err
    code, _, err = hydravit("elastify", tmp_path / "vit", tmp_path / "vit", tmp_path / "again", "--unlabelled")
    assert code == 1 and "no images in" in err and not (tmp_path / "again").exists()
