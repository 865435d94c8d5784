"""The commands that measure say what the functions give, as tables or JSON."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, evaluate_subnetworks
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.image_processing import make_image_processor


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


def test_several_widths_are_profiled_by_one_option(hydravit, folder):
    for heads in (["1,3"], ["1", "3"]):
        code, out, _ = hydravit("profile", folder, "--heads", *heads, "--rounds", 1, "--json")
        assert code == 0 and [row["num_heads"] for row in json.loads(out)] == [1, 3]
    code, _, err = hydravit("profile", folder, "--heads", "three")
    assert code == 2 and "--heads" in err


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


@pytest.mark.parametrize("heads", ["5,3", "3,5", "5,1,3"])
def test_the_narrowest_accurate_width_is_chosen_whatever_the_order(hydravit, folder, heads):
    results = [{"num_heads": num_heads, "accuracy": num_heads / 10} for num_heads in (5, 1, 3)]
    Path(folder, "results.json").write_text(json.dumps(results))
    code, out, _ = hydravit("profile", folder, "--heads", heads, "--rounds", 1, "--min-accuracy", 0.3, "--json")
    assert code == 0 and json.loads(out)["num_heads"] == 3


def test_evaluate_gives_the_accuracy_of_each_width_and_keeps_it(hydravit, folder, tmp_path):
    model = HydraViTForImageClassification.from_pretrained(folder)
    digits = load_digits()["test"].with_transform(to_pixel_values(AutoImageProcessor.from_pretrained(folder)))
    expected = evaluate_subnetworks(model, digits, [3, 6])
    output = tmp_path / "tiny" / "results.json"
    code, out, _ = hydravit("evaluate", folder, "digits", "--heads", 3, "--heads", 6, "--output", output, "--json")
    rows = json.loads(out)
    assert code == 0 and rows == json.loads(output.read_text())
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected])


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


def test_labels_that_are_not_numbered_from_zero_are_an_error(hydravit, folder):
    config = json.loads(Path(folder, "config.json").read_text())
    config["id2label"] = {int(number) + 1: name for number, name in config["id2label"].items()}
    config["label2id"] = {name: number for number, name in config["id2label"].items()}
    Path(folder, "config.json").write_text(json.dumps(config))
    code, _, err = hydravit("evaluate", folder, "digits")
    assert code == 1 and "must number its labels from 0, not 1, in `id2label`" in err


def test_evaluate_names_a_broken_image_in_one_line_or_leaves_it_out(hydravit, folder, digit_files):
    broken = next(digit_files.glob("test/*/7.png"))
    expected = json.loads(hydravit("evaluate", folder, digit_files, "--heads", 3, "--json")[1])
    broken.write_bytes(broken.read_bytes()[:-60])
    code, out, err = hydravit("evaluate", folder, digit_files, "--heads", 3)
    assert code == 1 and out == "" and err.splitlines()[-1].startswith(f"error: '{broken}' can't be read: ")
    code, out, err = hydravit("evaluate", folder, digit_files, "--heads", 3, "--skip-broken-images")
    assert code == 0 and out.endswith(f"19 images of {digit_files}, split test; 1 broken images left out\n")
    broken.unlink()
    code, again, _ = hydravit("evaluate", folder, digit_files, "--heads", 3)
    assert again.splitlines()[:3] == out.splitlines()[:3] and again.endswith("split test\n") and len(expected) == 1


def test_check_data_says_what_is_there_and_its_exit_code_whether_it_is_good(hydravit, digit_files):
    code, out, _ = hydravit("check-data", digit_files, "--num-proc", 1)
    assert code == 0 and out.startswith("train: 20 images\ntest: 20 images\n  0: ")
    assert out.endswith("\n0 broken, 0 huge, 0 in both splits\n")
    copied = digit_files / "test" / "3" / "copy.png"
    copied.write_bytes(next(digit_files.glob("train/5/*.png")).read_bytes())
    code, out, _ = hydravit("check-data", digit_files, "--num-proc", 1)
    assert code == 1 and f", {copied} (test)\n0 broken, 0 huge, 1 in both splits\n" in out
    copied.write_text("not an image")
    code, out, _ = hydravit("check-data", digit_files, "--num-proc", 1)
    assert code == 1 and "broken: test, row " in out and str(copied) in out
    code, out, _ = hydravit("check-data", digit_files, "--json")
    report = json.loads(out)
    assert code == 1 and [place["path"] for place in report["broken"]] == [str(copied)]
    assert sum(numbers["train"] for numbers in report["classes"].values()) == 20
    assert hydravit("check-data", "digits")[0] == 0
    code, out, err = hydravit("check-data", digit_files / "nowhere")
    assert code == 1 and out == "" and err.startswith("error: ")


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
