"""JavaScript computes what Python does: the page in a real browser, and transformers.js under node."""

import functools
import json
import shutil
import subprocess
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from huggingface_hub import RepoCard
from PIL import Image
from support.models import make_config, make_model
from support.scripts import finish
from transformers import AutoImageProcessor

import hydravit_command
from hydravit_hf import HydraViTForImageClassification, browser
from hydravit_hf.browser import describe_preprocessing, export_page, export_transformers_js, fetch_runtime
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model.images_hydravit import load_image, with_channels

ROOT = Path(__file__).parents[1]
HEADS = [1, 3, 6]
ATOL = 1e-4
HEADLESS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's exporter
RUN_IN_PAGE = """
async ([images, processors]) => {
  const {HydraViT} = await import("./hydravit.js");
  const model = await HydraViT.open();
  while (await model.grow());
  const found = {logits: {}, pixels: []};
  for (const [index, source] of images.entries()) {
    const blob = await (await fetch(source)).blob();
    const bitmap = await createImageBitmap(blob, {colorSpaceConversion: "none"});
    for (const preprocessing of processors) {
      found.pixels.push(Array.from(new HydraViT({preprocessing}).preprocess(bitmap)));
    }
    if (index) continue;
    const pixels = model.preprocess(bitmap);
    for (const heads of model.heads) found.logits[heads] = Array.from((await model.run(pixels, heads)).logits);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    torch.manual_seed(0)
    labels = {"id2label": {index: f"label {index}" for index in range(5)}, "label2id": {}}
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_model(num_hidden_layers=1, subnetwork_heads=HEADS, **labels)
    model.save_pretrained(folder)
    make_image_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(checkpoint):
    return HydraViTForImageClassification.from_pretrained(checkpoint), AutoImageProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of several shapes and modes. The first has the size of the model's images."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, (height, width, channels) in enumerate([(16, 16, 3), (50, 41, 3), (9, 70, 3), (23, 20, 4)]):
        array = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
        array[..., 3:] = array[..., 3:] // 128 * 255  # a pixel is opaque or transparent
        Image.fromarray(array).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def page(checkpoint, pictures, tmp_path_factory):
    """A page without ONNX Runtime Web."""
    folder = tmp_path_factory.mktemp("pages") / "page"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser, "fetch_runtime", lambda folder: None)
        examples = [part for picture in pictures for part in ("--example", str(picture))]
        hydravit_command.app(["export", str(checkpoint), str(folder), "--page", *examples], standalone_mode=False)
    return folder


@pytest.fixture(scope="module")
def whole_page(page):
    """The page with ONNX Runtime Web of npm."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    try:
        fetch_runtime(page / "onnxruntime")
    except RuntimeError as error:
        pytest.skip(str(error))
    return page


@contextmanager
def served(folder: Path):
    """The address of the folder, served with the headers that a Space sends for it."""
    headers, asked = RepoCard.load(folder / "README.md").data["custom_headers"], []

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self):
            for name, value in headers.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *args):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()


def read(picture: Path, config) -> Image.Image:
    return with_channels(load_image(picture), config.num_channels)


def logits_of(model, processor, picture: Path, num_heads: int) -> np.ndarray:
    inputs = processor(read(picture, model.config), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, num_heads_active=num_heads).logits[0].numpy()


def put_together(layout: list, narrower: np.ndarray | None, added: np.ndarray) -> np.ndarray:
    """The weights of a width, as the page puts them together."""
    weights, at = [], 0
    for rows, columns, kept_rows, kept_columns, kept_at in layout:
        matrix = np.empty((rows, columns), np.float32)
        blocks = [matrix[:kept_rows, kept_columns:], matrix[kept_rows:]]
        for block in blocks:
            block[:] = added[at : at + block.size].reshape(block.shape)
            at += block.size
        if kept_rows:
            kept = narrower[kept_at : kept_at + kept_rows * kept_columns]
            matrix[:kept_rows, :kept_columns] = kept.reshape(kept_rows, kept_columns)
        weights.append(matrix.ravel())
    assert at == added.size
    return np.concatenate(weights)


def run_widths(folder: Path, pixel_values: np.ndarray) -> dict[int, np.ndarray]:
    """The logits of each graph of a page, whose weights are put together in a file beside it."""
    import onnxruntime

    weights, logits = None, {}
    for width in json.loads((folder / "model.json").read_text())["widths"]:
        assert width["bytes"] == (folder / width["weights"]).stat().st_size
        weights = put_together(width["layout"], weights, np.fromfile(folder / width["weights"], np.float32))
        weights.tofile(folder / browser.WEIGHTS)
        session = onnxruntime.InferenceSession(folder / width["graph"])
        (logits[width["heads"]],) = session.run(None, {"pixel_values": pixel_values})
        (folder / browser.WEIGHTS).unlink()
    return logits


def test_files_by_width_hold_the_weights_once_and_give_each_width(page, saved, images):
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    model, _ = saved
    for num_heads, logits in run_widths(page, images.numpy()).items():
        with torch.no_grad():
            expected = model(images, num_heads_active=num_heads).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL)
    widths = json.loads((page / "model.json").read_text())["widths"]
    assert [width["heads"] for width in widths] == HEADS
    sizes = np.cumsum([width["bytes"] for width in widths])
    assert sizes.tolist() == [4 * model.config.count_parameters(num_heads) for num_heads in HEADS]
    assert [width["macs"] for width in widths] == [model.config.count_macs(num_heads) for num_heads in HEADS]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"separate_classifiers": True, "dtype": "bfloat16"}, {"token_recycling": True}])
def test_weights_that_do_not_nest_are_stored_whole(options, images, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    monkeypatch.setattr(browser, "fetch_runtime", lambda folder: None)
    model = make_model(num_hidden_layers=1, subnetwork_heads=[2, 6], **options).to(make_config(**options).dtype)
    folder = export_page(model, None, tmp_path / "page", make_image_processor(model.config))
    for num_heads, logits in run_widths(folder, images.numpy()).items():
        with torch.no_grad():
            expected = model.float()(images, num_heads_active=num_heads).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL)


def test_the_page_gives_the_logits_of_the_model_at_each_width_in_a_browser(
    whole_page, saved, pictures, browser, tmp_path
):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    model, processor = saved
    processors = []
    for channels, resample, crop in ((3, 3, 1), (3, 2, 0.9), (3, 1, 0.7), (1, 3, 1)):
        config = make_config(num_channels=channels)
        processors.append((config, make_image_processor(config, crop_fraction=crop)))
        processors[-1][1].resample = resample
    (tmp_path / "text.png").write_text("not an image")
    errors, hosts = [], set()
    with served(whole_page) as (address, asked), playwright.sync_playwright() as starter:
        chromium = starter.chromium.launch(executable_path=browser, args=HEADLESS)
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        page.goto(address)
        page.wait_for_selector("body[data-state=loaded]")
        assert page.inner_text("h1") == "checkpoint0" and page.evaluate("crossOriginIsolated")
        assert sorted(path for path in asked if path.endswith(".bin")) == [f"/{k}_heads.bin" for k in HEADS]

        # The slider switches the width, on the first example and on a file
        for picture in pictures[:2]:
            if picture != pictures[0]:
                page.set_input_files("#file", picture)
            for index, num_heads in reversed(list(enumerate(HEADS))):
                page.locator("#width").fill(str(index))
                word = "head" if num_heads == 1 else "heads"
                playwright.expect(page.locator("#heads")).to_have_text(f"{num_heads} {word}")
                playwright.expect(page.locator("#answer:not(.old) meter")).to_have_count(5)
                scores = torch.from_numpy(logits_of(model, processor, picture, num_heads)).softmax(-1)
                meters = page.locator("#answer meter").all()
                shown = {meter.get_attribute("aria-label"): float(meter.get_attribute("value")) for meter in meters}
                expected = {f"label {place}": scores[place].item() for place in scores.argsort(descending=True)}
                assert list(shown) == list(expected) and shown == pytest.approx(expected, abs=ATOL)

        # It measures every width, and says what is no image
        page.click("#measure")
        playwright.expect(page.locator("#measure")).to_be_enabled()
        rows = page.locator("#times tr").all_inner_texts()[1:]
        assert [int(row.split("\t")[0]) for row in rows] == HEADS
        assert all(float(row.split("\t")[3]) > 0 and int(row.split("\t")[4]) >= 10 for row in rows)
        page.set_input_files("#file", tmp_path / "text.png")
        playwright.expect(page.locator("#status.error")).to_contain_text("can't be read as an image")

        # The logits, and the pixels of each processor and picture
        sources = json.loads((whole_page / "model.json").read_text())["examples"]
        found = page.evaluate(RUN_IN_PAGE, [sources, [describe_preprocessing(*both) for both in processors]])
        chromium.close()
    assert not errors and hosts <= {"127.0.0.1", None}
    for num_heads in HEADS:
        expected = logits_of(model, processor, pictures[0], num_heads)
        np.testing.assert_allclose(found["logits"][str(num_heads)], expected, rtol=0, atol=ATOL)
    pixels = iter(found["pixels"])
    for picture in pictures:
        for config, to_pixels in processors:
            expected = to_pixels(read(picture, config), return_tensors="np")["pixel_values"]
            np.testing.assert_allclose(next(pixels), expected.ravel(), rtol=0, atol=1e-5, err_msg=picture.name)


def test_the_narrower_widths_answer_without_the_file_of_the_widest(whole_page, browser):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with served(whole_page) as (address, _), playwright.sync_playwright() as starter:
        page = starter.chromium.launch(executable_path=browser, args=HEADLESS).new_page()
        page.route("**/6_heads.bin", lambda route: route.fulfill(status=404))
        page.goto(address)
        playwright.expect(page.locator("#status.error")).to_contain_text("6 heads can't be loaded: 6_heads.bin: 404")
        page.locator("#width").fill("2")
        playwright.expect(page.locator("#costs")).to_have_text("not loaded yet")
        page.locator("#width").fill("1")
        playwright.expect(page.locator("#answer:not(.old) meter")).to_have_count(5)
        playwright.expect(page.locator("#heads")).to_have_text("3 heads")


def test_the_benchmark_prints_the_times_of_the_page(whole_page, browser):
    pytest.importorskip("playwright.sync_api", reason="needs playwright")
    printed = finish("benchmarks/benchmark_browser.py", whole_page, "--browser", browser, "--rounds", 1)
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in rows] == ["heads", "---:", "1", "3", "6"]
    assert all(float(row[4]) > 0 for row in rows[2:]) and "First answer after" in printed


def test_transformers_js_gives_the_logits_of_the_model(hydravit, checkpoint, saved, pictures, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    model, processor = saved
    folder = tmp_path / "for-js"
    assert hydravit("export", checkpoint, folder, "--transformers-js", "--num-heads", 3)[:2] == (0, f"Wrote {folder}\n")
    names = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*.*")}
    dtypes = {"fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx", "q8": "onnx/model_quantized.onnx"}
    assert names.keys() == {"config.json", "preprocessor_config.json", *dtypes.values()}
    assert names[dtypes["fp32"]] > max(names[dtypes["fp16"]], names[dtypes["q8"]])
    assert json.loads((folder / "config.json").read_text())["model_type"] == "vit"
    if shutil.which("node") is None:
        pytest.skip("needs node")
    script = ROOT / "tests" / "support" / "transformers_js.mjs"
    command = ["node", script, folder, pictures[0], *dtypes]
    result = subprocess.run(command, capture_output=True, text=True)
    if "Cannot find package '@huggingface/transformers'" in result.stderr:
        pytest.skip("needs transformers.js: npm install --no-save @huggingface/transformers")
    assert result.returncode == 0, result.stderr
    answers, expected = json.loads(result.stdout), logits_of(model, processor, pictures[0], 3)
    for dtype, atol in (("fp32", ATOL), ("fp16", 1e-2), ("q8", 0.1)):
        np.testing.assert_allclose(answers[dtype]["logits"], expected, rtol=0, atol=atol, err_msg=dtype)
        assert answers[dtype]["labels"][0]["label"] == f"label {expected.argmax()}"
    assert not np.allclose(answers["q8"]["logits"], expected, rtol=0, atol=ATOL)  # it is quantised


def test_mistakes_are_named_and_leave_no_folder(saved, tmp_path, monkeypatch):
    model, processor = saved

    def refuses(error, message, heads=None, model=model, processor=processor, **options):
        with pytest.raises(error, match=message):
            export_page(model, heads, tmp_path / "page", processor, **options)

    refuses(ValueError, "each width once", heads=[2, 2])
    refuses(ValueError, "from 1 to 6", heads=[7])
    refuses(FileNotFoundError, "no file nowhere.png", examples=["nowhere.png"])
    two_channels = make_model(num_channels=2)
    refuses(ValueError, "takes 2 channels", model=two_channels, processor=make_image_processor(two_channels.config))
    nearest = make_image_processor(model.config)
    nearest.resample = 0
    refuses(ValueError, "not by Pillow's filter 0", processor=nearest)
    recycling = make_model(token_recycling=True, subnetwork_heads=[2, 4, 6])
    with pytest.raises(ValueError, match="recycles tokens"):
        export_transformers_js(recycling, 4, tmp_path / "folder", processor)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        refuses(FileNotFoundError, "install Node.js")
    assert not list(tmp_path.iterdir())
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "file").touch()
    refuses(ValueError, "not an empty folder")


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_a_download_that_fails_or_is_another_one_is_refused(whole_page, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"another onnxruntime-web@.* than expected"):
        patch.setattr(browser, "RUNTIME_HASH", "sha512-nonsense")
        fetch_runtime(tmp_path / "one")
    monkeypatch.setenv("npm_config_offline", "true")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="npm can't download"):
        fetch_runtime(tmp_path / "two")
