"""The `hydravit` command says what the functions give, as tables or JSON, and fails with one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

from hydravit_hf import HydraViTForImageClassification, evaluate_subnetworks
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.image_processing import make_image_processor

LABELS = [str(digit) for digit in range(10)]


@pytest.fixture
def folder(make_model, tmp_path):
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    model = make_model(image_size=8, num_labels=10, **labels)
    model.save_pretrained(tmp_path / "tiny")
    make_image_processor(model.config).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_profile_prints_a_row_for_each_width_and_the_widest_that_fits(hydravit, folder, model):
    config = HydraViTForImageClassification.from_pretrained(folder).config
    code, out, _ = hydravit("profile", folder, "--rounds", 2, "--heads", 2, "--heads", 5, "--json")
    rows = json.loads(out)
    assert code == 0 and [row["num_heads"] for row in rows] == [2, 5]
    assert [row["macs"] for row in rows] == [config.count_macs(2), config.count_macs(5)]
    code, out, _ = hydravit("profile", folder, "--rounds", 2, "--max-parameters", config.count_parameters(4))
    assert code == 0 and out.count("\n| ") == 7 and out.endswith("The widest that fits: 4 heads\n")
    code, out, _ = hydravit("profile", folder, "--rounds", 2, "--max-macs", config.count_macs(3), "--json")
    assert json.loads(out)["num_heads"] == 3 and len(json.loads(out)["rows"]) == 6
    code, out, err = hydravit("profile", folder, "--rounds", 2, "--max-macs", 1)
    assert code == 1 and out == "" and "error: No width fits" in err and "allowed" in err
    code, out, _ = hydravit("profile", folder, "--rounds", 2, "--dtype", "bfloat16", "--batch-size", 2)
    assert code == 0 and "Batches of 2, bfloat16, on " in out


def test_evaluate_gives_the_accuracy_of_each_width_and_keeps_it_for_the_card(hydravit, folder, tmp_path):
    model = HydraViTForImageClassification.from_pretrained(folder)
    digits = load_digits()["test"].with_transform(to_pixel_values(AutoImageProcessor.from_pretrained(folder)))
    expected = evaluate_subnetworks(model, digits, [3, 6])
    output = tmp_path / "tiny" / "results.json"
    code, out, _ = hydravit("evaluate", folder, "digits", "--heads", 3, "--heads", 6, "--output", output, "--json")
    rows = json.loads(out)
    assert code == 0 and rows == json.loads(output.read_text())
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected])
    card = tmp_path / "tiny" / "README.md"
    assert hydravit("card", folder, "--no-measure")[0] == 0
    assert "| latency |" not in card.read_text() and 'path = "tiny"' in card.read_text()
    code, _, err = hydravit("card", folder)
    assert code == 1 and "--overwrite" in err
    code, *_ = hydravit("card", folder, "--dataset-name", "the digits", "--model-id", "user/tiny", "--overwrite")
    assert code == 0 and 'path = "user/tiny"' in card.read_text() and "| latency |" in card.read_text()
    assert f"{rows[0]['accuracy']:.2%}" in card.read_text() and "the digits" in card.read_text()


def test_classes_are_matched_by_their_names(hydravit, make_model, tmp_path):
    """A folder of images numbers its classes in the order of their names; the model may have another one."""
    data, labels = tmp_path / "data", ["one", "zero"]
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 8)):
        for label in labels:
            (data / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / label / f"{number}.png")
    accuracies = []
    for order in (labels, labels[::-1]):
        torch.manual_seed(0)
        names = {"id2label": dict(enumerate(order)), "label2id": {label: i for i, label in enumerate(order)}}
        model = make_model(image_size=8, num_labels=2, **names)
        if order != labels:  # the same model under the other numbers
            model.classifier.weight.data, model.classifier.bias.data = (
                parameter.data.flip(0) for parameter in model.classifier.parameters()
            )
        model.save_pretrained(tmp_path / order[0])
        make_image_processor(model.config).save_pretrained(tmp_path / order[0])
        code, out, _ = hydravit("evaluate", tmp_path / order[0], data, "--heads", 6, "--json")
        accuracies.append(json.loads(out)[0]["loss"])
        assert code == 0
    assert accuracies[0] == pytest.approx(accuracies[1])
    code, _, err = hydravit("evaluate", tmp_path / "one", "digits")
    assert code == 1 and "no label '" in err


def test_predict_gives_labels_and_reports_what_it_cannot_read(hydravit, folder, tmp_path):
    load_digits()["test"][0]["image"].save(tmp_path / "digit.png")
    (tmp_path / "text.png").write_text("not an image")
    good, bad = tmp_path / "digit.png", tmp_path / "text.png"
    code, out, _ = hydravit("predict", folder, good, good, "--num-heads-active", 3, "--top-k", 2)
    assert code == 0 and out.count(f"{good}: ") == 2 and out.count("%") == 4
    code, out, err = hydravit("predict", folder, good, bad, good, "--json")
    first, second, third = json.loads(out)
    assert code == 1 and first["image"] == third["image"] == str(good)
    assert [row["label"] for row in first["output"]] == [row["label"] for row in third["output"]]
    assert second["output"]["error"] in err and str(bad) in err and err.count("error: ") == 1
    code, out, err = hydravit("predict", folder, good, "--num-heads-active", 7)
    assert code == 1 and "from 1 to 6" in err and out == ""


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


# torch warns of itself as it exports
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")
def test_export_writes_one_width_or_several(hydravit, folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    images = torch.randn(2, 3, 8, 8)
    model = HydraViTForImageClassification.from_pretrained(folder)
    for path, heads in (("small.onnx", [3]), ("several.onnx", [2, 3])):
        options = [option for num_heads in heads for option in ("--num-heads", num_heads)]
        code, out, err = hydravit("export", folder, tmp_path / path, *options)
        assert code == 0 and str(tmp_path / path) in out, err
        session = onnxruntime.InferenceSession(tmp_path / path)
        inputs = {"pixel_values": images.numpy()}
        if len(heads) > 1:
            inputs["num_heads_active"] = np.array(3)
        (logits,) = session.run(None, inputs)
        torch.testing.assert_close(torch.from_numpy(logits), model(images, num_heads_active=3).logits)
    code, _, err = hydravit("export", folder, tmp_path / "x", "--format", "nonsense")
    assert code == 1 and "nonsense" in err and not (tmp_path / "x").exists()
    code, _, err = hydravit("export", folder, tmp_path / "x.onnx", "--num-heads", 7)
    assert code == 1 and "from 1 to 6" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["profile", "no/such-model"],
        ["evaluate", "no/such-model", "digits"],
        ["predict", "no/such-model", "image.png"],
        ["extract", "no/such-model", "3", "new"],
        ["convert", "no-such-file.pth.tar", "new"],
        ["card", "no-such-folder"],
        ["push", "no-such-folder", "user/name"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_does_not_exist_is_named_in_one_line(hydravit, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = hydravit(*arguments)
    assert code == 1 and out == "" and not list(tmp_path.iterdir())
    assert err.startswith("error: ") and err.count("\n") == 1 and arguments[1] in err


def test_wrong_usage_exits_with_2(hydravit):
    for arguments in (["profile"], ["predict", "model"], ["nonsense"], ["profile", "model", "--batch-size", "0"]):
        assert hydravit(*arguments)[0] == 2
    code, out, _ = hydravit("--help")
    commands = ("profile", "evaluate", "predict", "extract", "convert", "card", "push")
    assert code == 0 and all(command in out for command in commands)


def test_the_installed_command_keeps_json_apart_from_messages(folder, tmp_path):
    load_digits()["test"][0]["image"].save(tmp_path / "digit.png")
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "hydravit_hf.cli",
        "predict",
        folder,
        tmp_path / "digit.png",
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and len(json.loads(result.stdout)) == 1
    assert "error" not in result.stderr.lower() and "warning" not in result.stderr.lower()
