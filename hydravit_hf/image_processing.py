"""The image processor that goes with a model."""

from transformers import ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .model.configuration_hydravit import HydraViTConfig, as_pair


def make_image_processor(
    config: HydraViTConfig,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    crop_fraction: float = 1.0,
) -> ViTImageProcessorPil:
    """A processor that turns images of any size into `pixel_values` for a model of `config`.

    It works on PIL and numpy, so that it needs no torchvision, and is saved as the portable `ViTImageProcessor`.

    Args:
        config: The model's configuration; its image size and channels count.
        image_mean, image_std: One number for each channel, for pixels from 0 to 1. None: ImageNet's, with which the
            original was trained (its script imports Inception's, but its logs show ImageNet's), or 0.5 where there
            are not 3 channels.
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
    half = [0.5] * config.num_channels
    if image_mean is None:
        image_mean = IMAGENET_DEFAULT_MEAN if config.num_channels == 3 else half
    if image_std is None:
        image_std = IMAGENET_DEFAULT_STD if config.num_channels == 3 else half
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if len(values) != config.num_channels:
            raise ValueError(f"`{name}` must have {config.num_channels} numbers, one for each channel, not {values}.")
    return ViTImageProcessorPil(
        size=size,
        resample=PILImageResampling.BICUBIC,
        do_convert_rgb=config.num_channels == 3,
        image_mean=list(image_mean),
        image_std=list(image_std),
        **crop,
    )
