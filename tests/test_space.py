"""The Space: what it shows is what the model computes, in a real browser and without one."""

import asyncio
import importlib
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import pipeline

from hydravit_hf.data import load_digits
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model.pipeline_hydravit import TASK
from hydravit_hf.reporting import COLUMNS

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "examples" / "space"
FILES = ("app", "digits", "drawing")
HEADLESS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
UNREADABLE = "This file can't be read as an image. Try a PNG, JPEG or WebP."


@pytest.fixture
def model(make_model):
    return make_model(head_dim=32)


@pytest.fixture
def checkpoint(model, tmp_path):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    make_image_processor(model.config).save_pretrained(folder)
    heads = model.config.subnetwork_heads
    rows = [{"num_heads": k, "accuracy": 0.5 + 0.05 * k, "macs": model.config.count_macs(k)} for k in heads]
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture
def space(monkeypatch):
    """Imports files of the Space by their names."""
    pytest.importorskip("gradio", reason="needs the extra `space`")
    monkeypatch.syspath_prepend(str(SPACE))
    yield importlib.import_module
    for name in FILES:
        sys.modules.pop(name, None)


def best_labels(model, picture, num_heads: int) -> dict[str, float]:
    """The first three labels and their scores, of the model itself."""
    with Image.open(picture) as image:
        inputs = make_image_processor(model.config)(image, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs, num_heads_active=num_heads).logits[0].softmax(-1)
    return {model.config.id2label[index]: scores[index].item() for index in scores.topk(3).indices.tolist()}


def costs_of(config, num_heads: int) -> list[str]:
    """Parameters and MACs as they read in the table."""
    counted = {"parameters": config.count_parameters(num_heads), "macs": config.count_macs(num_heads)}
    return [COLUMNS[name][1](value) for name, value in counted.items()]


@contextmanager
def served(checkpoint: Path, folder: Path):
    """The address of the page, run as its users run it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "HYDRAVIT_CHECKPOINT": str(checkpoint),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    log, address = folder / "log.txt", f"http://127.0.0.1:{port}/"
    with log.open("w") as output:
        command = [sys.executable, str(SPACE / "app.py")]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def wait_for(address: str, process: subprocess.Popen, log: Path):
    deadline = time.monotonic() + 120
    while True:
        try:
            urlopen(address, timeout=10).close()
            return
        except (URLError, TimeoutError):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def read_scores(box) -> dict[str, float]:
    """Labels and scores that a box of predictions shows."""
    bars = box.locator(".confidence-set meter").all()
    return {bar.get_attribute("aria-label"): float(bar.get_attribute("value")) for bar in bars}


@pytest.mark.slow
def test_the_slider_shows_each_width_of_the_uploaded_image_in_a_browser(model, checkpoint, picture, browser, tmp_path):
    pytest.importorskip("gradio", reason="needs the extra `space`")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    errors, hosts = [], set()
    with served(checkpoint, tmp_path) as address, playwright.sync_playwright() as starter:
        chromium = starter.chromium.launch(executable_path=browser, args=HEADLESS)
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        page.goto(address)

        # What is no image gives one line, and leaves an empty page
        page.set_input_files("input[type=file]", text)
        playwright.expect(page.get_by_test_id("toast-text")).to_have_text([UNREADABLE])
        playwright.expect(page.get_by_text("Click to Upload")).to_be_visible()
        page.get_by_test_id("toast-close").click()

        page.set_input_files("input[type=file]", picture)
        for num_heads in (1, 2, 3):
            if num_heads > 1:
                page.locator("input[type=range]").press("ArrowRight")
            name = f"{num_heads} head{'s' * (num_heads > 1)}"
            playwright.expect(page.locator("table.costs th")).to_have_text(["", name, "6 heads", "ratio"])
            boxes = page.locator(".block", has=page.locator(".confidence-set"))
            playwright.expect(boxes).to_have_count(2)
            assert boxes.first.get_by_test_id("block-label").inner_text() == name
            for box, width in zip(boxes.all(), (num_heads, 6), strict=True):
                assert read_scores(box) == pytest.approx(best_labels(model, picture, width), abs=1e-6)
            for column, width in ((2, num_heads), (3, 6)):
                cells = page.locator(f"table.costs td:nth-child({column})").all_inner_texts()
                assert cells[:2] == costs_of(model.config, width)
                assert re.fullmatch(r"[\d.]+ ms", cells[2])
            assert page.locator(".results .now text").inner_html() == str(num_heads)
            assert page.locator(".heads .on").count() == num_heads
        page.screenshot(path=tmp_path / "page.png")
        page.set_viewport_size({"width": 420, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        chromium.close()
    assert errors == []
    assert hosts - {None, ""} == {"127.0.0.1"}
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_the_page_compares_a_width_with_the_widest(space, model, checkpoint, picture, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(picture.parent))

    async def build():  # with a loop that runs, Gradio leaves none of its own open
        return space("app").build(checkpoint)

    page = asyncio.run(build())
    compare = next(event for event in page.fns.values() if event.name == "compare").fn
    for num_heads in (1, 4, 6):
        strip, narrow, full, table, plot = compare({"path": str(picture)}, num_heads)
        assert strip.count('"on"') == num_heads
        shown = {row["label"]: row["confidence"] for row in narrow.value["confidences"]}
        for found, width in ((full, 6), (shown, num_heads)):
            assert found == pytest.approx(best_labels(model, picture, width))
        cells = re.findall("<td>(.*?)</td>", table)
        assert [cells[1], cells[5]] == costs_of(model.config, num_heads)
        assert [cells[2], cells[6]] == costs_of(model.config, 6)
        assert re.search('class="dot now">.*?>([0-9]+)</text>', plot)[1] == str(num_heads)
    assert compare(None, 3)[2] == {}


def test_only_uploads_that_are_images_are_read(space, model, picture, monkeypatch):
    app = space("app")
    uploads = picture.parent / "uploads"
    uploads.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    for path in (str(picture), str(uploads / ".." / picture.name), "http://127.0.0.1:9/picture.png", None):
        with pytest.raises(app.gr.Error, match="can't be read"):
            app.find_upload({"path": path})
    text = uploads / "text.png"
    text.write_text("not an image")
    assert app.find_upload({"path": str(text)}) == text.resolve()
    classify = pipeline(TASK, model=model, image_processor=make_image_processor(model.config))
    with pytest.raises(app.gr.Error, match="can't be read"):
        app.predict(classify, text, 3)


def test_a_checkpoint_without_results_has_no_plot_and_uneven_widths_have_buttons(space, checkpoint):
    app = space("app")
    (checkpoint / "results.json").unlink()
    assert app.read_results(checkpoint) == []
    assert app.draw_results([], 3) == ""
    assert isinstance(app.pick_width([3, 6, 12]), app.gr.Radio)
    assert isinstance(app.pick_width([4]), app.gr.Radio)
    slider = app.pick_width([2, 4, 6])
    assert (slider.minimum, slider.maximum, slider.step, slider.value) == (2, 6, 2, 2)


def test_the_plot_holds_no_markup_of_a_results_file(space):
    rows = [{"num_heads": "<script>", "accuracy": 0.5, "macs": 1e6}, {"num_heads": 3, "accuracy": 0.6, "macs": 2e6}]
    plot = space("drawing").draw_results(rows, 3)
    assert "<script>" not in plot and "&lt;script&gt;" in plot


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_digits_are_trained_once_and_come_with_results_and_examples(space, tmp_path, monkeypatch):
    digits = space("digits")
    train, trained = digits.train, []

    def train_briefly(folder):
        trained.append(folder)
        train(folder, epochs=2)

    monkeypatch.setattr(digits, "train", train_briefly)
    monkeypatch.setenv("HYDRAVIT_SPACE_CACHE", str(tmp_path / "cache"))
    folder = digits.find_or_train()
    assert digits.find_or_train() == folder
    assert len(trained) == 1 and list(folder.parent.iterdir()) == [folder]
    rows = json.loads((folder / "results.json").read_text())
    assert [row["num_heads"] for row in rows] == list(range(3, 13))
    assert rows[-1]["accuracy"] > 0.3  # chance is 0.1
    test = load_digits()["test"]
    classify = pipeline(TASK, model=str(folder), image_processor=str(folder))
    files = sorted((folder / "examples").iterdir())
    assert len(files) == digits.EASY + digits.HARD
    for digit, file in enumerate(files[: digits.EASY]):
        held_out = test[test["label"].index(digit)]["image"]
        assert classify(str(file), num_heads_active=3) == classify(held_out, num_heads_active=3)


def test_the_metadata_is_what_a_space_needs():
    _, metadata, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).exists()
    assert metadata["license"] == project["license"].lower()
    assert metadata["python_version"] == project["requires-python"].removeprefix(">=")
    assert len(metadata["short_description"]) <= 60  # the Hub refuses longer ones
    assert {metadata["colorFrom"], metadata["colorTo"]} < {"red", "yellow", "green", "blue", "indigo", "purple", "pink"}
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (SPACE / path).exists(), path
    assert "hydravit_hf[train]" in (SPACE / "requirements.txt").read_text().splitlines()
    assert {"hydravit_hf[train]", "gradio"} == set(project["optional-dependencies"]["space"])
    pytest.importorskip("gradio", reason="needs the extra `space`")
    assert metadata["sdk_version"] == importlib.metadata.version("gradio")
