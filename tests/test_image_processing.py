"""The processor does what PIL and three lines of numpy do, for images of any size and mode."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
from hydravit_hf.image_processing import make_image_processor

SIZES = [(13, 9), (7, 31), (1, 1), (16, 8)]  # width, height


def make_config(**kwargs) -> HydraViTConfig:
    sizes = {"num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 2, "image_size": (8, 16), "patch_size": 4}
    return HydraViTConfig(**sizes | kwargs)


def noise(size: tuple[int, int], channels: int = 3) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


def normalized(image: Image.Image, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD) -> torch.Tensor:
    """(1, C, H, W) of an image of the final size."""
    pixels = np.atleast_3d(np.asarray(image)) / 255
    return torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]


MODES = {
    "gray": lambda size: noise(size, 1),
    "gray with alpha": lambda size: noise(size, 2),
    "RGB": noise,
    "RGBA": lambda size: noise(size, 4),
    "palette": lambda size: noise(size).quantize(16),
    "black and white": lambda size: noise(size, 1).convert("1"),
    "CMYK": lambda size: noise(size).convert("CMYK"),
    "16 bit": lambda size: Image.fromarray(np.asarray(noise(size, 1)).astype(np.uint16) * 257),
    "32 bit": lambda size: noise(size, 1).convert("I"),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make_image", MODES.values(), ids=MODES)
def test_images_of_any_size_and_mode_fit_the_model(size, make_image):
    config = make_config()
    pixel_values = make_image_processor(config)(make_image(size), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 8, 16) and pixel_values.dtype == torch.float32
    low, high = (torch.tensor((bound - np.array(IMAGENET_DEFAULT_MEAN)) / IMAGENET_DEFAULT_STD) for bound in (0, 1))
    assert (pixel_values.amin((0, 2, 3)) > low - 1e-5).all() and (pixel_values.amax((0, 2, 3)) < high + 1e-5).all()
    assert HydraViTForImageClassification(config)(pixel_values).logits.shape == (1, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["gray", "RGB", "palette", "black and white", "CMYK"])
def test_pixel_values_are_those_of_pil_and_numpy(size, mode):
    image = MODES[mode](size)
    pixel_values = make_image_processor(make_config())(image, return_tensors="pt")["pixel_values"]
    expected = normalized(image.convert("RGB").resize((16, 8), Image.Resampling.BICUBIC))
    torch.testing.assert_close(pixel_values, expected, atol=1e-5, rtol=0)


def test_transparent_pixels_are_white():
    image = noise((16, 8), 4)
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image)
    pixel_values = make_image_processor(make_config())(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, normalized(opaque.convert("RGB")), atol=0.05, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_a_model_of_one_channel_gets_one_channel(size):
    processor = make_image_processor(make_config(num_channels=1))
    image = noise(size, 1)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 1, 8, 16)
    expected = normalized(image.resize((16, 8), Image.Resampling.BICUBIC), [0.5], [0.5])
    torch.testing.assert_close(pixel_values, expected, atol=1e-5, rtol=0)


def test_a_mean_and_a_deviation_of_ones_own_are_used():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    image = noise((16, 8))
    processor = make_image_processor(make_config(), mean, std)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, normalized(image, mean, std), atol=1e-5, rtol=0)


@pytest.mark.parametrize("crop_fraction", [0.5, 0.9])
@pytest.mark.parametrize("size", [(31, 23), (23, 31), (40, 40), (9, 90)])
@pytest.mark.parametrize("image_size", [16, (8, 16), (16, 12)])
def test_a_crop_fraction_is_a_resize_and_a_centre_crop(crop_fraction, size, image_size):
    config, image = make_config(image_size=image_size), noise(size)
    processor = make_image_processor(config, crop_fraction=crop_fraction)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    shorter = int(max(height, width) / crop_fraction)
    resized_width, resized_height = (int(shorter * side / min(size)) for side in size)
    resized = image.resize((resized_width, resized_height), Image.Resampling.BICUBIC)
    left, top = (resized_width - width) // 2, (resized_height - height) // 2
    expected = normalized(resized.crop((left, top, left + width, top + height)))
    assert pixel_values.shape == (1, 3, height, width)
    torch.testing.assert_close(pixel_values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("crop_fraction", [0, -1, 1.1, float("nan")])
def test_a_wrong_crop_fraction_is_an_error_that_names_it(crop_fraction):
    with pytest.raises(ValueError, match="`crop_fraction` must be"):
        make_image_processor(make_config(), crop_fraction=crop_fraction)


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_a_mean_and_a_deviation_have_one_number_for_each_channel(name):
    with pytest.raises(ValueError, match=f"`{name}` must have 1 numbers, one for each channel"):
        make_image_processor(make_config(num_channels=1), **{name: (0.5,) * 3})


def test_a_batch_is_its_images_one_by_one():
    processor = make_image_processor(make_config(), crop_fraction=0.9)
    images = [noise(size) for size in SIZES]
    batch = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images]))


@pytest.mark.parametrize(
    ("config_kwargs", "kwargs"),
    [({}, {}), ({}, {"crop_fraction": 0.9}), ({"num_channels": 1}, {}), ({}, {"image_mean": [0.1] * 3})],
)
def test_a_saved_processor_gives_the_same_pixel_values(tmp_path, config_kwargs, kwargs):
    processor = make_image_processor(make_config(**config_kwargs), **kwargs)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    for size in SIZES:
        image = noise(size, config_kwargs.get("num_channels", 3))
        one, other = (make(image, return_tensors="pt")["pixel_values"] for make in (processor, loaded))
        assert torch.equal(one, other)
