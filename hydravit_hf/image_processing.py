"""From images to pixels: the image processor that goes with a model, and images of any mode for it."""

import numpy as np
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .configuration_hydravit import HydraViTConfig, as_pair


def make_image_processor(
    config: HydraViTConfig,
    image_mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN),
    image_std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD),
    crop_fraction: float = 1.0,
) -> ViTImageProcessorPil:
    """A processor that turns images of any size into `pixel_values` for a model of `config`.

    It works on PIL and numpy, so that it needs no torchvision, and is saved as the portable `ViTImageProcessor`.

    Args:
        config: The model's configuration; its image size and channels count.
        image_mean, image_std: One number for each channel, for pixels from 0 to 1. The defaults are ImageNet's, with
            which the original was trained (its script imports Inception's, but its logs show ImageNet's).
        crop_fraction: From above 0 to 1. Below 1, the shorter side is resized to the image size divided by this and
            the centre cropped (the original evaluates at 0.9); at 1 the whole image is resized.
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"`crop_fraction` must be from above 0 to 1, not {crop_fraction!r}.")
    height, width = as_pair(config.image_size)
    size = {"height": height, "width": width}
    crop = {}
    if crop_fraction < 1:
        crop = {"do_center_crop": True, "crop_size": size}
        size = {"shortest_edge": int(max(height, width) / crop_fraction)}
    if config.num_channels != len(image_mean):
        image_mean, image_std = [0.5] * config.num_channels, [0.5] * config.num_channels
    return ViTImageProcessorPil(
        size=size,
        resample=PILImageResampling.BICUBIC,
        do_convert_rgb=config.num_channels == 3,
        image_mean=list(image_mean),
        image_std=list(image_std),
        **crop,
    )


def with_channels(image: Image.Image, num_channels: int) -> Image.Image:
    """An image of any mode as RGB (3 channels) or gray (1): what is transparent becomes white, as under the processor,
    and 16 bits are scaled to 8, where PIL would cut them off."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if num_channels == 1 else "RGB")
