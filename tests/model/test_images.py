"""An image is the same one, however it comes; and what is no image is one error, before it costs anything."""

import base64
import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydravit_hf.model import images_hydravit
from hydravit_hf.model.images_hydravit import check_resized, describe, load_image, naming, with_channels
from hydravit_hf.model.pipeline_hydravit import MAX_MEMORY_MB


def noise(size: tuple[int, int] = (20, 24), channels: int = 3) -> Image.Image:
    """An image of (height, width) pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


IMAGE = noise()
PIXELS = np.asarray(IMAGE)


def encoded(image: Image.Image = IMAGE, kind: str = "PNG") -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def same(image, expected=PIXELS) -> bool:
    return np.array_equal(np.asarray(image), expected)


# Sources


def test_every_source_gives_the_same_image(tmp_path):
    path, data = tmp_path / "image.png", encoded()
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = [path, str(path), IMAGE, data, bytearray(data), memoryview(data), BytesIO(data)]
    sources += [text, text[:70] + "\n" + text[70:], f"data:image/png;base64,{text}"]
    sources += [{"bytes": data, "path": "missing.png"}, {"bytes": None, "path": str(path)}]
    sources += [PIXELS, torch.tensor(PIXELS), torch.tensor(PIXELS).permute(2, 0, 1), PIXELS.transpose(2, 0, 1)]
    for source in sources:
        assert same(load_image(source)), describe(source)
    with open(path, "rb") as file:
        assert same(load_image(file))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_common_format_is_read(kind):
    image = IMAGE.quantize(64) if kind == "GIF" else IMAGE
    options = {"lossless": True} if kind == "WEBP" else {}
    file = BytesIO()
    image.save(file, kind, **options)
    assert same(load_image(file.getvalue()).convert("RGB"), np.asarray(image.convert("RGB")))


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    IMAGE.save(tmp_path / "image.png", exif=exif)
    turned = np.asarray(IMAGE.transpose(Image.Transpose.ROTATE_270))
    assert same(load_image(tmp_path / "image.png"), turned)
    with Image.open(tmp_path / "image.png") as opened:
        assert same(load_image(opened), turned)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS / 255, PIXELS),
        (PIXELS.astype(np.float32), PIXELS),
        (torch.tensor(PIXELS / 255, dtype=torch.bfloat16), None),
        (PIXELS.astype(np.uint16) * 257, PIXELS),
        (PIXELS.astype(np.int64), PIXELS),
        (PIXELS.astype(np.int32) * 257, PIXELS),
        (PIXELS > 127, np.where(PIXELS > 127, 255, 0)),
        (PIXELS[..., 0], PIXELS[..., 0]),
        (PIXELS[..., :1], PIXELS[..., 0]),
        (PIXELS[None, ..., 0], PIXELS[..., 0]),
        (noise((3, 24)), np.asarray(noise((3, 24)))),
        (np.asarray(noise((3, 24))), np.asarray(noise((3, 24)))),  # both sides could be channels: the last ones are
        (
            torch.tensor(np.asarray(noise((24, 3)))).permute(2, 0, 1),
            np.asarray(noise((24, 3))),
        ),  # a tensor's: the first
        (np.asarray(noise(channels=4)), np.asarray(noise(channels=4))),
    ],
)
def test_an_array_of_any_depth_and_order_is_the_same_image(array, expected):
    found = np.asarray(load_image(array)).astype(int)
    if expected is None:  # half precision
        assert np.abs(found - PIXELS).max() <= 1
    else:
        assert same(found, expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 5, 2)), r"must have the shape \(H, W\), \(H, W, C\) or \(C, H, W\)"),
        (np.zeros((1, 4, 4, 3)), "must have the shape"),
        (np.zeros(4), "must have the shape"),
        (np.zeros((0, 4)), "must have the shape"),
        (np.full((4, 4), -1), "not from -1 to -1"),
        (np.full((4, 4), 65536), "not from 65536 to 65536"),
        (np.full((4, 4), 255.5), "not from 255.5 to 255.5"),
        (np.full((4, 4), np.nan), "not from nan to nan"),
        (np.full((4, 4), 1j), "must be from 0 to 1"),
    ],
)
def test_an_array_that_is_no_image_is_an_error_that_says_why(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_every_other_thing_is_an_error_that_says_why(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text.png").write_text("not an image")
    for source, error, message in (
        (tmp_path / "missing.png", FileNotFoundError, "No such file"),
        ("a word", FileNotFoundError, "No such file"),
        ("\0", FileNotFoundError, "not the name of a file"),
        (tmp_path / "fifo", OSError, "not a regular file"),
        (tmp_path, OSError, "not a regular file"),
        (tmp_path / "text.png", OSError, "cannot identify"),
        (encoded()[:-500], OSError, "truncated"),
        (b"", OSError, "cannot identify"),
        ("data:image/png;base64,?", OSError, "not valid base64"),
        ("data:image/png;base64,AAAA", OSError, "not an image in base64"),
        (encoded(kind="EPS"), OSError, "cannot identify"),  # its decoder starts a program
        (3, TypeError, "images are paths, URLs"),
        (None, TypeError, "images are paths, URLs"),
    ):
        with pytest.raises(error, match=message):
            load_image(source)
    with pytest.raises(ValueError, match="URLs are turned off"):
        load_image("https://example.com/image.png", allow_urls=False)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "wide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("The image was decoded."))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match=r"300 x 300 pixels, and more than 60000 .* are not decoded"),
    ):
        load_image(tmp_path / "wide.png")


def test_an_image_that_is_too_long_to_be_resized_is_refused():
    check_resized(Image.new("L", (10_000, 100)), {"height": 224, "width": 224})
    check_resized(Image.new("L", (200, 100)), {"shortest_edge": 224})
    with pytest.raises(ValueError, match="with a shorter side of 224 it would have more than"):
        check_resized(Image.new("L", (10_000, 1)), {"shortest_edge": 224})


MODES = {"PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], "JPEG": ["L", "RGB", "CMYK"], "TIFF": ["CMYK", "I", "F"]}
MODES |= {"WEBP": ["RGB", "RGBA"], "GIF": ["P"], "PPM": ["RGB"], "BMP": ["1", "RGB"]}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_huge_image_is_the_same_one_at_a_smaller_size(monkeypatch, kind, mode, orientation):
    """A gradient of 300 x 200 pixels, under limits that are a thousandth of the real ones."""
    monkeypatch.setattr(images_hydravit, "HUGE_PIXELS", 16_000)
    monkeypatch.setattr(images_hydravit, "SMALLER_PIXELS", 4_000)
    ramp = np.linspace(0, 255, 300 * 200).reshape(200, 300)
    gray = Image.fromarray(ramp.astype(np.uint8))
    image = Image.fromarray((ramp * 257).astype(np.uint16)) if mode == "I;16" else gray.convert(mode)
    if mode == "I":
        image = Image.fromarray((ramp * 257).astype(np.int32))
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    found = with_channels(load_image(file.getvalue()), 1)
    if orientation == 6 and kind in ("PNG", "JPEG", "WEBP"):
        found = found.transpose(Image.Transpose.ROTATE_90)
    factor = 300 / found.width
    assert factor == 4 and found.size == (75, 50)
    if mode != "1":
        assert np.abs(np.asarray(found).astype(int) - np.asarray(gray.reduce(4))).max() <= 3


def test_an_image_is_made_smaller_in_tiles_as_it_would_be_at_once(monkeypatch):
    image = noise((1500, 1100))
    monkeypatch.setattr(images_hydravit, "HUGE_PIXELS", 500_000)
    monkeypatch.setattr(images_hydravit, "SMALLER_PIXELS", 500_000)
    assert same(load_image(image), np.asarray(image.reduce(2)))  # three times three tiles
    image.info["transparency"] = tuple(PIXELS[0, 0])
    assert load_image(image).mode == "RGBA" and image.size == (1100, 1500)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "JPEG2000"])
def test_a_file_that_takes_too_much_memory_is_refused_before_it_is_decoded(monkeypatch, kind):
    data = encoded(kind=kind)
    assert load_image(data, max_memory_mb=1).size == IMAGE.size
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("The image was decoded."))
    with pytest.raises(ValueError, match=rf"20 x 24|24 x 20 pixels.* MB as {kind}, and more than 0.001 MB"):
        load_image(data, max_memory_mb=0.001)


def memory(of: str) -> float:
    """Megabytes that this process has now (VmRSS), or had at most since its peak was forgotten (VmHWM)."""
    return int(re.search(rf"{of}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system tells no peak of memory")
@pytest.mark.parametrize(
    ("kind", "mode", "megapixels", "options"),
    [
        ("PNG", "RGBA", 37, {}),
        ("PNG", "P", 37, {"transparency": 0}),
        ("JPEG", "RGB", 49, {"progressive": True, "subsampling": 0}),
        ("JPEG", "CMYK", 32, {"progressive": True}),
        ("WEBP", "RGBA", 17.5, {}),
        ("JPEG2000", "RGBA", 11.9, {}),
        ("TIFF", "RGBA", 37, {"compression": "tiff_lzw", "tiffinfo": {278: 100_000}}),
    ],
)
def test_the_largest_file_that_the_pipeline_takes_needs_at_most_300_megabytes(
    tmp_path, kind, mode, megapixels, options
):
    side = int((megapixels * 1e6) ** 0.5)
    Image.new(mode, (side, side)).save(tmp_path / "large", kind, **options)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = memory("VmRSS")
    with_channels(load_image(tmp_path / "large", max_memory_mb=MAX_MEMORY_MB), 3)
    assert 10 < memory("VmHWM") - before <= 300


# Channels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_an_image_of_any_mode_gets_the_channels_of_the_model(mode, num_channels):
    gray = noise(channels=1)
    image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    found = with_channels(image, num_channels)
    assert found.mode == ("L" if num_channels == 1 else "RGB") and found.size == gray.size
    if mode != "1":
        difference = np.asarray(found.convert("L")).astype(int) - np.asarray(gray)
        assert np.abs(difference).max() <= 1


def test_an_image_that_has_the_channels_of_the_model_is_not_copied():
    assert with_channels(IMAGE, 3) is IMAGE
    assert same(with_channels(IMAGE, 1), np.asarray(IMAGE.convert("L")))


def test_transparent_pixels_become_white():
    image = noise(channels=4)
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image)
    assert same(with_channels(image, 3), np.asarray(opaque.convert("RGB")))
    palette = IMAGE.quantize(16)
    palette.info["transparency"] = 3
    assert (np.asarray(with_channels(palette, 3))[np.asarray(palette) == 3] == 255).all()


# Names


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("cat.jpg", "'cat.jpg'"),
        (Path("cat.jpg"), "'cat.jpg'"),
        ("https://user:secret@example.com/cat.jpg?token=secret#part", "'https://example.com/cat.jpg'"),
        ("A" * 1000, f"'{'A' * 200}...'"),
        (PIXELS, "an array of shape (20, 24, 3)"),
        (b"abc", "an image of 3 bytes"),
        (IMAGE, "a RGB image of 24 x 20 pixels"),
        ({"bytes": b"abc", "path": "cat.jpg"}, "'cat.jpg'"),
        ({"bytes": b"abc", "path": None}, "an image of 3 bytes"),
        ({"bytes": None, "path": None}, "an object of type NoneType"),
        (3, "an object of type int"),
    ],
)
def test_an_image_is_named_without_its_secrets(image, name):
    assert describe(image) == name
    with pytest.raises(ValueError) as raised, naming(image, "Here: "):
        raise KeyError("why")
    assert str(raised.value) == f"Here: {name} can't be read: 'why'"
