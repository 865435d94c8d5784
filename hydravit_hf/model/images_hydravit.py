# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Images from anywhere as PIL images, with the channels that a model takes.

This file travels with each saved checkpoint as remote code.
"""

import base64
import os
from io import BytesIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from transformers.utils import is_vision_available

if is_vision_available():  # the model itself needs no Pillow
    from PIL import Image, ImageOps


def load_image(image, timeout: float | None = None) -> "Image.Image":
    """Decode an image and turn it upright, as its camera was held.

    Args:
        image: A path, an http(s) URL, a `data:` URI or a PIL image.
        timeout: Seconds to wait for a URL. None waits for ever.

    Raises:
        OSError: The file or URL does not exist, or is not a whole image.
        ValueError: The image has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels. Nothing of it is decoded.
        TypeError: The object is nothing that can hold an image.
    """
    if isinstance(image, Image.Image):
        return _decode(image)
    if not isinstance(image, (str, os.PathLike)):
        raise TypeError("images are paths, URLs, PIL images, numpy arrays or tensors")
    source = os.fspath(image)
    if source.startswith(("http://", "https://")):
        source = BytesIO(_fetch(source, timeout))
    elif source.startswith("data:image/"):
        source = BytesIO(base64.b64decode(source.partition(",")[2]))
    with Image.open(source) as opened:
        return _decode(opened)


def with_channels(image: "Image.Image", num_channels: int) -> "Image.Image":
    """Convert an image of any mode to RGB (3 channels) or gray (1 channel).

    Transparent pixels become white. 16 bits are scaled to 8, where PIL would clip them.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if num_channels == 1 else "RGB")


def _fetch(url: str, timeout: float | None) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "hydravit_hf"}), timeout=timeout) as response:
            return response.read()
    except HTTPError as error:
        error.close()
        raise


def _decode(image: "Image.Image") -> "Image.Image":
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, and more than {Image.MAX_IMAGE_PIXELS} "
            "(PIL.Image.MAX_IMAGE_PIXELS) are not decoded"
        )
    return ImageOps.exif_transpose(image)
