"""Pipelines give what the model gives, at the width of the construction or of the call, for images of any kind."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import HEADS
from transformers import AutoImageProcessor, pipeline

from hydravit_hf import HydraViTForImageClassification, HydraViTImageClassificationPipeline
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model.images_hydravit import with_channels
from hydravit_hf.model.pipeline_hydravit import TASK


def noise(number: int, size: tuple[int, int] = (20, 24), channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


IMAGES = [noise(number) for number in range(40)]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    make_image_processor(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pipe(folder):
    return pipeline(TASK, str(folder))


def model_scores(folder, images, num_heads) -> torch.Tensor:
    """(B, labels), from the model and its processor alone."""
    model = HydraViTForImageClassification.from_pretrained(folder)
    pixel_values = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        return model(pixel_values, num_heads_active=num_heads).logits.softmax(-1)


def scores(outputs) -> torch.Tensor:
    """(B, labels), in the order of the labels."""
    by_label = [sorted(output, key=lambda row: row["label"]) for output in outputs]
    return torch.tensor([[row["score"] for row in output] for output in by_label])


@pytest.mark.parametrize("kwargs", [{}, {"num_heads_active": 3}, {"num_attention_heads": 2}])
def test_the_stock_pipeline_runs_the_width_of_its_construction(folder, kwargs):
    pipe = pipeline("image-classification", str(folder), model_kwargs=dict(kwargs))
    assert type(pipe).__name__ == "ImageClassificationPipeline"
    (num_heads,) = kwargs.values() or [6]
    torch.testing.assert_close(scores(pipe(IMAGES[:9])), model_scores(folder, IMAGES[:9], num_heads))


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_each_call_runs_its_own_width_whatever_the_batch_size(pipe, folder, batch_size):
    assert isinstance(pipe, HydraViTImageClassificationPipeline)
    for num_heads in HEADS:
        outputs = pipe(IMAGES, num_heads_active=num_heads, batch_size=batch_size)
        torch.testing.assert_close(scores(outputs), model_scores(folder, IMAGES, num_heads))


def test_a_width_given_at_construction_is_the_default_of_calls(folder):
    pipe = pipeline(TASK, str(folder), num_heads_active=2)
    torch.testing.assert_close(scores([pipe(IMAGES[0])]), model_scores(folder, IMAGES[:1], 2))
    torch.testing.assert_close(scores([pipe(IMAGES[0], num_heads_active=5)]), model_scores(folder, IMAGES[:1], 5))
    torch.testing.assert_close(scores([pipe(IMAGES[0])]), model_scores(folder, IMAGES[:1], 2))


def test_threads_that_alternate_widths_never_mix(pipe, folder):
    expected = {num_heads: model_scores(folder, IMAGES[:1], num_heads) for num_heads in HEADS}

    def call(number: int):
        num_heads = HEADS[number % len(HEADS)]
        return num_heads, scores([pipe(IMAGES[0], num_heads_active=num_heads)])

    with ThreadPoolExecutor(4) as threads:
        for num_heads, answer in threads.map(call, range(200)):
            torch.testing.assert_close(answer, expected[num_heads])


def test_a_list_a_tuple_a_generator_and_a_data_set_give_the_same(pipe):
    expected = scores(pipe(IMAGES[:5], num_heads_active=3))
    for inputs in (tuple(IMAGES[:5]), (image for image in IMAGES[:5]), [np.asarray(image) for image in IMAGES[:5]]):
        torch.testing.assert_close(scores(pipe(inputs, num_heads_active=3, batch_size=2)), expected)
    torch.testing.assert_close(scores(pipe(images=IMAGES[:5], num_heads_active=3)), expected)
    assert pipe([]) == [] and list(pipe(image for image in [])) == []


def test_a_path_a_url_and_a_data_uri_give_the_same_as_the_image(pipe, tmp_path):
    IMAGES[0].save(tmp_path / "image.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/image.png"
    data = "data:image/png;base64," + base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    try:
        expected = pipe(IMAGES[0], num_heads_active=3)
        for source in (tmp_path / "image.png", str(tmp_path / "image.png"), url, data):
            assert pipe(source, num_heads_active=3) == expected
        with pytest.raises(ValueError, match=rf"'{url}s' can't be read: .*404"):
            pipe(url + "s")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match=rf"'{url}' can't be read: .*refused"):
        pipe(url)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_images_of_any_mode_are_read_as_in_training(make_model, tmp_path, mode, num_channels):
    model = make_model(num_channels=num_channels)
    processor = make_image_processor(model.config)
    image = noise(0, channels=1)
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256) if mode == "I;16" else image.convert(mode)
    suffix = "tif" if mode == "CMYK" else "png"
    image.save(tmp_path / f"image.{suffix}")
    pixel_values = processor(with_channels(image, num_channels), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(pixel_values, num_heads_active=3).logits.softmax(-1)
    pipe = pipeline(TASK, model, image_processor=processor)
    for source in (image, tmp_path / f"image.{suffix}"):
        torch.testing.assert_close(scores([pipe(source, num_heads_active=3)]), expected)


def bad_images(folder: Path) -> dict:
    whole = BytesIO()
    noise(0, size=(60, 60)).save(whole, "PNG")
    (folder / "truncated.png").write_bytes(whole.getvalue()[:-2000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    Image.new("1", (300, 300)).save(folder / "bomb.png")
    Image.new("1", (300, 50)).save(folder / "wide.png")
    paths = {name: folder / f"{name}.png" for name in ("truncated", "empty", "text", "bomb", "wide", "missing")}
    return paths | {"folder": folder, "number": 3, "url": "http://127.0.0.1:1/image.png"}


# Pillow warns of an image that is above its limit, but less than twice
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_image_is_named_and_the_others_are_classified_if_that_is_asked_for(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    (tmp_path / "bad").mkdir()
    bad = bad_images(tmp_path / "bad")
    for name, image in bad.items():
        called = str(image) if isinstance(image, (str, Path)) else type(image).__name__
        with pytest.raises(ValueError, match=rf"^'?.*{called}'? can't be read: .+") as error:
            pipe(image)
        assert str(error.value).count("\n") == 0, name
        with pytest.raises(ValueError, match=rf"^Image 2 of the inputs: .*{called}'? can't be read: .+"):
            pipe([*IMAGES[:2], image, IMAGES[2]], batch_size=4)
    expected = scores(pipe(IMAGES[: len(bad)], num_heads_active=3))
    mixed = [image for pair in zip(IMAGES, bad.values(), strict=False) for image in pair]
    for batch_size in (1, 3, 100):
        outputs = pipe(mixed, num_heads_active=3, batch_size=batch_size, errors="return")
        torch.testing.assert_close(scores(outputs[::2]), expected)
        assert all(output.keys() == {"error"} for output in outputs[1::2])
        assert outputs[1]["error"].startswith(f"Image 1 of the inputs: '{bad['truncated']}' can't be read: ")
    with pytest.raises(ValueError, match=r"RGB image of 300 x 50 pixels can't be read: .* 10000 .* not decoded"):
        pipe(Image.new("RGB", (300, 50)))


def test_wrong_arguments_are_refused_before_any_image_is_read(pipe):
    for num_heads in (0, 7, True, 2.0, "3"):
        with pytest.raises(ValueError, match="from 1 to 6"):
            pipe(["missing.png"], num_heads_active=num_heads)
    with pytest.raises(ValueError, match='"raise" or "return", not \'skip\''):
        pipe(["missing.png"], errors="skip")
    with pytest.raises(TypeError, match="nonsense"):
        pipe(["missing.png"], nonsense=1)


@pytest.mark.parametrize("num_heads", [2, 6])
def test_features_are_those_of_the_heads_that_run(folder, num_heads):
    extract = pipeline("image-feature-extraction", str(folder), model_kwargs={"num_heads_active": num_heads})
    model = HydraViTForImageClassification.from_pretrained(folder).hydravit
    pixel_values = AutoImageProcessor.from_pretrained(folder)(IMAGES[0], return_tensors="pt").pixel_values
    with torch.no_grad():
        outputs = model(pixel_values, num_heads_active=num_heads)
    torch.testing.assert_close(extract(IMAGES[0], return_tensors=True), outputs.last_hidden_state)
    torch.testing.assert_close(torch.tensor(extract(IMAGES[0], pool=True)), outputs.pooler_output)
    assert outputs.pooler_output.shape == (1, num_heads * 8)


def test_a_saved_pipeline_is_the_checkpoint(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert names == {file.name for file in folder.iterdir()}
    assert (tmp_path / "saved" / "config.json").read_text() == (folder / "config.json").read_text()
    assert pipeline(TASK, str(tmp_path / "saved"))(IMAGES[0]) == pipe(IMAGES[0])
