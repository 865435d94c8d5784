"""Makes the image processor of a model."""

import math
from numbers import Real

from transformers import AutoImageProcessor, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from .model.configuration_hydravit import HydraViTConfig, as_pair
from .model.sources_hydravit import read_timm_config


def make_image_processor(
    config: HydraViTConfig,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    crop_fraction: float = 1.0,
) -> ViTImageProcessorPil:
    """Make the processor that turns images of any size into a model's `pixel_values`.

    It uses PIL and numpy, so it needs no torchvision. It is saved as the portable `ViTImageProcessor`.

    Args:
        config: Configuration of the model. Its image size and channels decide the output.
        image_mean, image_std: Mean and standard deviation of each channel, for pixels from 0 to 1. None means those of
            ImageNet, or 0.5 if there are not 3 channels. The original was trained with ImageNet's: its script imports
            Inception's, but its logs show ImageNet's.
        crop_fraction: Part of the image that stays, above 0 and up to 1. At 1, the whole image is resized. Below 1, the
            shorter side is resized to the image size divided by this, and the centre is cropped. The original evaluates
            at 0.9.

    Raises:
        ValueError: `crop_fraction` is out of its range, or there is not one number for each channel, above 0 for a
            standard deviation.

    Examples:
        >>> from PIL import Image
        >>> from hydravit_hf import HydraViTConfig, make_image_processor
        >>> processor = make_image_processor(HydraViTConfig(image_size=32))
        >>> processor(Image.new("RGB", (640, 480)), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 32, 32])
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"`crop_fraction` must be above 0 and at most 1, not {crop_fraction!r}.")
    height, width = as_pair(config.image_size)
    size = {"height": height, "width": width}
    crop = {}
    if crop_fraction < 1:
        crop = {"do_center_crop": True, "crop_size": size}
        size = {"shortest_edge": int(max(height, width) / crop_fraction)}
    half = [0.5] * config.num_channels
    if image_mean is None:
        image_mean = IMAGENET_DEFAULT_MEAN if config.num_channels == 3 else half
    if image_std is None:
        image_std = IMAGENET_DEFAULT_STD if config.num_channels == 3 else half
    image_mean, image_std = check_statistics(image_mean, image_std, config.num_channels)
    return ViTImageProcessorPil(
        size=size,
        resample=PILImageResampling.BICUBIC,
        do_convert_rgb=config.num_channels == 3,
        image_mean=image_mean,
        image_std=image_std,
        **crop,
    )


def check_statistics(image_mean, image_std, num_channels: int) -> tuple[list[float], list[float]]:
    """Give a mean and a standard deviation as lists, or raise a `ValueError` if one is no number for each channel."""
    checked = []
    for name, values, least in (("image_mean", image_mean, -math.inf), ("image_std", image_std, 0)):
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or len(values) != num_channels:
            raise ValueError(f"`{name}` must have {num_channels} numbers, one for each channel, not {values!r}.")
        for value in values:
            if not isinstance(value, Real) or isinstance(value, bool) or not least < value < math.inf:
                kind = "numbers above 0" if least == 0 else "numbers"
                raise ValueError(f"`{name}` must have {kind}, one for each channel, not {value!r}.")
        checked.append(list(values))
    return tuple(checked)


def load_image_processor(source: str, config: HydraViTConfig, crop_fraction: float = 1.0):
    """Load the image processor of a saved ViT, or make that of a timm model, for the images of `config`.

    Args:
        source: Folder or Hub id of the model. If it has no image processor, one is made with `crop_fraction`.
        config: Configuration of the model to make of it. Its image size may differ.
    """
    if cached_file(source, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False):
        processor = AutoImageProcessor.from_pretrained(source)
        if processor.do_normalize:
            check_statistics(processor.image_mean, processor.image_std, config.num_channels)
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        if (size.get("height"), size.get("width")) == as_pair(config.image_size):
            return processor
        return make_image_processor(config, processor.image_mean, processor.image_std)
    timm = (read_timm_config(source) or {}).get("pretrained_cfg", {})
    return make_image_processor(config, timm.get("mean"), timm.get("std"), timm.get("crop_pct", crop_fraction))
