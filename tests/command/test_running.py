"""The commands that answer images print labels, and say what they can't read."""

import csv
import json
from pathlib import Path

from PIL import Image

from hydravit_hf.data import load_digits


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
        (["predict", folder, "missing.png", "--cascade"], "has no cascade"),
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


def test_a_label_of_a_model_cannot_steer_the_terminal(hydravit, folder, tmp_path):
    config = json.loads(Path(folder, "config.json").read_text())
    config["id2label"] = {number: f"\x1b[2J\r{number} é" for number in config["id2label"]}
    Path(folder, "config.json").write_text(json.dumps(config))
    image = tmp_path / "digit.png"
    Image.new("RGB", (8, 8)).save(image)
    code, out, _ = hydravit("predict", folder, image)
    assert code == 0 and "\\x1b[2J\\r" in out and " é " in out
    assert all(character.isprintable() for character in out.rstrip("\n"))


def test_a_folder_of_images_is_classified_and_printed_as_csv(hydravit, folder, digit_files):
    files = sorted(str(file) for file in (digit_files / "test").rglob("*.png"))
    for name in ("notes.pdf", "._digit.png", "__MACOSX/digit.png"):  # not images, or of the archive that they came in
        (digit_files / "test" / name).parent.mkdir(exist_ok=True)
        (digit_files / "test" / name).write_bytes(b"no image")
    code, out, _ = hydravit("predict", folder, digit_files / "test", "--csv", "--top-k", 2)
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and [row["image"] for row in rows[::2]] == files and {row["rank"] for row in rows} == {"1", "2"}
    _, out, _ = hydravit("predict", folder, *files, "--json", "--top-k", 2)
    expected = [row for output in json.loads(out) for row in output["output"]]
    assert [(row["label"], float(row["score"])) for row in rows] == [(row["label"], row["score"]) for row in expected]
    _, out, _ = hydravit("predict", folder, files[0], "--csv", "--heads", "1,3", "--thresholds", 0)
    assert next(csv.DictReader(out.splitlines()))["num_heads"] == "3"
    (digit_files / "empty").mkdir()
    code, _, err = hydravit("predict", folder, digit_files / "empty")
    assert code == 1 and "There are no images in" in err
