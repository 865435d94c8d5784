"""The `hydravit` command says what the functions give, as tables or JSON, and fails with one line."""

import csv
import json
import os
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

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, __version__, cli, evaluate_subnetworks
from hydravit_hf.cascade import save_cascade
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.image_processing import make_image_processor

LABELS = [str(digit) for digit in range(10)]


@pytest.fixture
def folder(make_model, tmp_path):
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    model = make_model(image_size=8, num_labels=10, num_hidden_layers=1, **labels)
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


@pytest.fixture
def images(tmp_path):
    """A folder of digits in two splits."""
    for split, items in load_digits().items():
        for number, item in enumerate(items.select(range(20))):
            (tmp_path / "images" / split / str(item["label"])).mkdir(parents=True, exist_ok=True)
            item["image"].save(tmp_path / "images" / split / str(item["label"]) / f"{number}.png")
    return tmp_path / "images"


def test_evaluate_names_a_broken_image_in_one_line_or_leaves_it_out(hydravit, folder, images):
    broken = next(images.glob("test/*/7.png"))
    expected = json.loads(hydravit("evaluate", folder, images, "--heads", 3, "--json")[1])
    broken.write_bytes(broken.read_bytes()[:-60])
    code, out, err = hydravit("evaluate", folder, images, "--heads", 3)
    assert code == 1 and out == "" and err.splitlines()[-1].startswith(f"error: '{broken}' can't be read: ")
    code, out, err = hydravit("evaluate", folder, images, "--heads", 3, "--skip-broken-images")
    assert code == 0 and out.endswith(f"19 images of {images}, split test; 1 broken images left out\n")
    broken.unlink()
    code, again, _ = hydravit("evaluate", folder, images, "--heads", 3)
    assert again.splitlines()[:3] == out.splitlines()[:3] and again.endswith("split test\n") and len(expected) == 1


def test_check_data_says_what_is_there_and_its_exit_code_whether_it_is_good(hydravit, images):
    code, out, _ = hydravit("check-data", images, "--num-proc", 1)
    assert code == 0 and out.startswith("train: 20 images\ntest: 20 images\n  0: ")
    assert out.endswith("\n0 broken, 0 huge, 0 in both splits\n")
    copied = images / "test" / "3" / "copy.png"
    copied.write_bytes(next(images.glob("train/5/*.png")).read_bytes())
    code, out, _ = hydravit("check-data", images, "--num-proc", 1)
    assert code == 1 and f", {copied} (test)\n0 broken, 0 huge, 1 in both splits\n" in out
    copied.write_text("not an image")
    code, out, _ = hydravit("check-data", images, "--num-proc", 1)
    assert code == 1 and "broken: test, row " in out and str(copied) in out
    code, out, _ = hydravit("check-data", images, "--json")
    report = json.loads(out)
    assert code == 1 and [place["path"] for place in report["broken"]] == [str(copied)]
    assert sum(numbers["train"] for numbers in report["classes"].values()) == 20
    assert hydravit("check-data", "digits")[0] == 0
    code, out, err = hydravit("check-data", images / "nowhere")
    assert code == 1 and out == "" and err.startswith("error: ")


def test_predict_gives_labels_and_reports_what_it_cannot_read(hydravit, folder, tmp_path):
    load_digits()["test"][0]["image"].save(tmp_path / "digit.png")
    (tmp_path / "text.png").write_text("not an image")
    good, bad = tmp_path / "digit.png", tmp_path / "text.png"
    code, out, _ = hydravit("predict", folder, good, good, "--num-heads", 3, "--top-k", 2)
    assert code == 0 and out.count(f"{good}: ") == 2 and out.count("%") == 4
    code, out, err = hydravit("predict", folder, good, bad, good, "--json")
    first, second, third = json.loads(out)
    assert code == 1 and first["image"] == third["image"] == str(good)
    assert [row["label"] for row in first["output"]] == [row["label"] for row in third["output"]]
    assert second["output"]["error"] in err and str(bad) in err and err.count("error: ") == 1
    code, out, err = hydravit("predict", folder, good, "--num-heads", 7)
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
def test_export_writes_one_width(hydravit, folder, tmp_path):
    images, path = torch.randn(6, 3, 8, 8), tmp_path / "one.pt2"
    code, out, err = hydravit("export", folder, path, "--num-heads", 3, "--format", "torch_export")
    assert code == 0 and str(path) in out, err
    expected = HydraViTForImageClassification.from_pretrained(folder)(images, num_heads_active=3).logits
    torch.testing.assert_close(torch.export.load(path).module()(pixel_values=images).logits, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")
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
    assert code == 1 and "has no `cascade`" in err and err.startswith("error: ") and err.count("\n") == 1
    save_cascade(folder, {"num_heads": [2, 3], "thresholds": splitting(model, images, [2, 3])})
    code, _, err = hydravit("export", folder, tmp_path / "cascade.onnx", "--cascade")
    outputs = HydraViTForImageClassification.from_pretrained(folder).cascade(images)
    assert code == 0 and set(outputs.num_heads.tolist()) == {2, 3}, err
    for found, value in zip(run("cascade.onnx"), outputs.to_tuple(), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), value)


def test_export_says_what_is_wrong_and_writes_nothing(hydravit, folder, tmp_path):
    for options, message in (
        (["--format", "nonsense"], "nonsense"),
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


def test_cascade_fits_saves_and_predict_runs_one(hydravit, folder, tmp_path):
    image = tmp_path / "digit.png"
    load_digits()["test"][0]["image"].save(image)
    before = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    budget = 2 * HydraViTConfig.from_pretrained(folder).count_macs(3)
    goal = ["--heads", 1, "--heads", 3, "--heads", 6, "--max-macs", budget]
    code, out, _ = hydravit("cascade", folder, "digits", *goal, "--json")
    fitted = json.loads(out)
    assert code == 0 and fitted["cascade"]["num_heads"] == [1, 3, 6] and fitted["macs"] <= budget
    assert before == {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    code, out, _ = hydravit("cascade", folder, "digits", *goal, "--save")
    assert code == 0 and "3 heads: answers " in out and f"Accuracy {fitted['accuracy']:.2%} at " in out and "360" in out
    loaded = HydraViTForImageClassification.from_pretrained(folder)
    assert loaded.config.cascade == fitted["cascade"]
    after = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    values = json.loads(after.pop("config.json"))
    assert values == json.loads(before.pop("config.json")) | {"cascade": fitted["cascade"]} and before == after
    code, out, _ = hydravit("predict", folder, image, "--cascade", "--json")
    (answer,) = json.loads(out)
    assert code == 0 and answer["output"][0]["num_heads"] in [1, 3, 6]


def test_predict_runs_a_cascade_of_the_widths_that_it_is_given(hydravit, folder, tmp_path):
    image = tmp_path / "digit.png"
    load_digits()["test"][0]["image"].save(image)
    widths = ["--heads", 3, "--heads", 6]
    for threshold, num_heads in ((0, 6), (1e9, 3)):
        code, out, _ = hydravit("predict", folder, image, *widths, "--thresholds", threshold, "--json")
        assert code == 0 and {row["num_heads"] for row in json.loads(out)[0]["output"]} == {num_heads}
        code, out, _ = hydravit("predict", folder, image, *widths, "--thresholds", threshold, "--criterion", "margin")
        assert code == 0 and out.endswith(f"({num_heads} heads)\n")
    three = ["--heads", 1, *widths, "--thresholds", 0, "--thresholds", 1e9]
    assert json.loads(hydravit("predict", folder, image, *three, "--json")[1])[0]["output"][0]["num_heads"] == 3


def test_commands_of_cascades_say_what_is_wrong_in_one_line(hydravit, folder):
    wrong = [
        (["cascade", folder, "digits"], "exactly one goal"),
        (["cascade", folder, "digits", "--max-macs", 1], "the cheapest, 1 heads"),
        (["cascade", "user/model", "digits", "--max-macs", 1, "--save"], "local folder, which 'user/model' is not"),
        (["predict", folder, "missing.png", "--cascade"], "has no `cascade`"),
        (["predict", folder, "missing.png", "--cascade", "--num-heads", 3], "--cascade"),
        (["predict", folder, "missing.png", "--heads", 1, "--num-heads", 3], "--heads"),
        (["predict", folder, "missing.png", "--heads", 1, "--heads", 3], "needs `--thresholds`"),
        (["predict", folder, "missing.png", "--heads", 1, "--heads", 3, "--thresholds", -1], "from 0"),
        (["predict", folder, "missing.png", "--thresholds", 1], "belong to a cascade"),
    ]
    for arguments, message in wrong:
        code, out, err = hydravit(*arguments)
        *_, line = err.splitlines()
        assert code == 1 and line.startswith("error: ") and message in line and out == ""


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
def test_a_path_that_does_not_exist_is_named_in_one_line(hydravit, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = hydravit(*arguments)
    assert code == 1 and out == "" and not list(tmp_path.iterdir())
    assert err.startswith("error: ") and err.count("\n") == 1 and arguments[1] in err


def test_a_label_of_a_model_cannot_steer_the_terminal(hydravit, folder, tmp_path):
    config = json.loads(Path(folder, "config.json").read_text())
    config["id2label"] = {number: f"\x1b[2J\r{number} é" for number in config["id2label"]}
    Path(folder, "config.json").write_text(json.dumps(config))
    image = tmp_path / "digit.png"
    Image.new("RGB", (8, 8)).save(image)
    code, out, _ = hydravit("predict", folder, image)
    assert code == 0 and "\\x1b[2J\\r" in out and " é " in out
    assert all(character.isprintable() for character in out.rstrip("\n"))


def test_an_error_of_any_kind_is_one_line(hydravit, folder, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("cat")

    monkeypatch.setattr("hydravit_hf.profiling.profile_subnetworks", fail)
    code, out, err = hydravit("profile", folder)
    assert (code, out, err) == (1, "", "error: KeyError: 'cat'\n")


def test_labels_that_are_not_numbered_from_zero_are_an_error(hydravit, folder):
    config = json.loads(Path(folder, "config.json").read_text())
    config["id2label"] = {int(number) + 1: name for number, name in config["id2label"].items()}
    config["label2id"] = {name: number for number, name in config["id2label"].items()}
    Path(folder, "config.json").write_text(json.dumps(config))
    code, _, err = hydravit("evaluate", folder, "digits")
    assert code == 1 and "must number its labels from 0, not 1, in `id2label`" in err


def test_wrong_usage_exits_with_2(hydravit):
    for arguments in (["profile"], ["predict", "model"], ["nonsense"], ["profile", "model", "--batch-size", "0"]):
        assert hydravit(*arguments)[0] == 2
    code, out, _ = hydravit("--help")
    commands = (
        "profile",
        "evaluate",
        "check-data",
        "predict",
        "cascade",
        "extract",
        "export",
        "convert",
        "card",
        "push",
    )
    assert code == 0 and all(command in out for command in commands)


def test_the_installed_command_keeps_json_apart_from_messages(folder, tmp_path):
    load_digits()["test"][0]["image"].save(tmp_path / "digit.png")
    command = [sys.executable, "-W", "error", "-m", "hydravit_hf.cli"]
    command += ["predict", folder, tmp_path / "digit.png", "--json"]
    # where torchao is installed, transformers imports it, and it logs what torch says of it
    env = os.environ | {"TORCH_LOGS": "-torch", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0 and len(json.loads(result.stdout)) == 1
    assert "error" not in result.stderr.lower() and "warning" not in result.stderr.lower()


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
        ((folder, tmp_path / "new", "--heads", 7), "`shard_by_heads` must be True, False or a list of some of"),
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


def test_the_version_is_that_of_the_package(hydravit):
    assert hydravit("--version") == (0, f"hydravit_hf {__version__}\n", "")


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("m --heads 3,6 --json", "m --heads 3 --heads 6 --json"),
        ("--heads 3 6 12 m d", "--heads 3 --heads 6 --heads 12 m d"),
        ("m --heads=3,6", "m --heads 3 --heads 6"),
        ("m --heads 3 --heads 6", "m --heads 3 --heads 6"),
        ("m --heads 3, 6", "m --heads 3 --heads 6"),
        ("m i --heads 3,12 --thresholds 0.5,inf", "m i --heads 3 --heads 12 --thresholds 0.5 --thresholds inf"),
        ("m --heads x 3", "m --heads x 3"),
        ("m 12 --num-heads 3", "m 12 --num-heads 3"),
    ],
)
def test_an_option_takes_several_numbers(given, spelled):
    assert cli._repeat_options(given.split()) == spelled.split()


def test_several_widths_are_profiled_by_one_option(hydravit, folder):
    for heads in (["1,3"], ["1", "3"]):
        code, out, _ = hydravit("profile", folder, "--heads", *heads, "--rounds", 1, "--json")
        assert code == 0 and [row["num_heads"] for row in json.loads(out)] == [1, 3]
    code, _, err = hydravit("profile", folder, "--heads", "three")
    assert code == 2 and "--heads" in err


def test_a_folder_of_images_is_classified_and_printed_as_csv(hydravit, folder, images):
    files = sorted(str(file) for file in (images / "test").rglob("*.png"))
    code, out, _ = hydravit("predict", folder, images / "test", "--csv", "--top-k", 2)
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and [row["image"] for row in rows[::2]] == files and {row["rank"] for row in rows} == {"1", "2"}
    _, out, _ = hydravit("predict", folder, *files, "--json", "--top-k", 2)
    expected = [row for output in json.loads(out) for row in output["output"]]
    assert [(row["label"], float(row["score"])) for row in rows] == [(row["label"], row["score"]) for row in expected]
    _, out, _ = hydravit("predict", folder, files[0], "--csv", "--heads", "1,3", "--thresholds", 0)
    assert next(csv.DictReader(out.splitlines()))["num_heads"] == "3"
    (images / "empty").mkdir()
    code, _, err = hydravit("predict", folder, images / "empty")
    assert code == 1 and "There are no images in" in err


def test_a_profile_shows_the_accuracy_and_chooses_by_it(hydravit, folder):
    code, _, err = hydravit("profile", folder, "--rounds", 1, "--min-accuracy", 0.5)
    assert code == 1 and "`--min-accuracy` needs a results.json" in err
    results = [{"num_heads": num_heads, "accuracy": num_heads / 10} for num_heads in (1, 3, 5)]
    Path(folder, "results.json").write_text(json.dumps(results))
    threads = torch.get_num_threads()
    code, out, _ = hydravit("profile", folder, "--heads", "1,3,5", "--rounds", 1, "--min-accuracy", 0.2, "--threads", 3)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert code == 0 and "accuracy" in out and "The narrowest with an accuracy of 20.0%: 3 heads" in out
    code, _, err = hydravit("profile", folder, "--rounds", 1, "--min-accuracy", 0.9)
    assert code == 1 and "The best, 5 heads, has 50.0%" in err
    code, _, err = hydravit("profile", folder, "--rounds", 1, "--min-accuracy", 0.4, "--max-macs", 1)
    assert code == 1 and "No width fits. The narrowest, 5 heads" in err


@pytest.mark.parametrize("typed", ["./missing", "/missing", "a/b/c", "{folder}s"])
def test_a_mistyped_path_is_not_sought_on_the_hub(hydravit, folder, typed):
    typed = typed.replace("{folder}", str(folder))
    for arguments in (("profile", typed), ("evaluate", typed, "digits"), ("evaluate", folder, typed)):
        code, out, err = hydravit(*arguments)
        assert code == 1 and not out and f"There is no folder '{typed}'." in err
    assert (f"Do you mean '{folder}'" in err) == typed.endswith("tinys")
