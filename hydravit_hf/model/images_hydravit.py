# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of any kind as PIL images, with the channels that a model takes.

This file travels with each saved checkpoint as remote code.
"""

import base64
import binascii
import math
import os
import re
import stat
from contextlib import contextmanager
from io import BytesIO
from urllib.parse import urlsplit

import numpy as np
import torch
from transformers.utils import is_vision_available

from .fetching_hydravit import fetch

if is_vision_available():  # the model itself needs no Pillow
    from PIL import ExifTags, Image, ImageOps

# The decoders that an image may use. Others are obsolete, start an external program (EPS), or decode an image of any
# size before it is known (ICO).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
HUGE_PIXELS, SMALLER_PIXELS = 2**24, 2**22  # an image of more than the first is made smaller, to at most the second
# Bytes that a pixel takes at most while a file is decoded, measured with Pillow 12.3; CMYK takes half as many more
BYTES_PER_PIXEL = {"AVIF": 16, "JPEG": 6.1, "JPEG2000": 25, "MPO": 6.1, "WEBP": 17}
OTHER_BYTES_PER_PIXEL = 8
MAX_RESIZED_PIXELS = 2**24  # of an image after its shorter side is resized; only extremely long ones have more


def load_image(
    image, timeout: float | None = None, allow_urls: bool = True, max_memory_mb: float | None = None
) -> "Image.Image":
    """Decode an image and turn it upright, as its camera was held.

    An image of more than `HUGE_PIXELS` pixels becomes smaller by a whole factor, to at most `SMALLER_PIXELS`.

    Args:
        image: A path, an http(s) URL, a `data:` URI, base64, bytes, a binary file object, a PIL image, an item
            `{"bytes", "path"}` of a data set that does not decode its images, or a numpy array or tensor of shape
            (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels. If both sides could be the channels, they are the
            last dimension of an array and the first one of a tensor. Arrays hold booleans, 8 bits, 16 bits, or floats
            from 0 to 1 or from 0 to 255.
        timeout: Seconds for the whole download of a URL. None waits for ever.
        allow_urls: Whether to download URLs. Turn it off if strangers choose the input.
        max_memory_mb: Megabytes that decoding a file may take. None sets no limit.

    Raises:
        OSError: The file or URL does not exist, is not a regular file, or is not a whole image of one of `FORMATS`.
        ValueError: The image has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels or would take more memory (nothing of it
            is decoded), an array has another shape or range, or URLs are turned off.
        TypeError: The object is nothing that can hold an image.
    """
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_array(image)
    if isinstance(image, Image.Image):
        _check_size(image, max_memory_mb)
        return _decode(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        source = BytesIO(image)
    elif isinstance(image, (str, os.PathLike)):
        source = _open(os.fspath(image), timeout, allow_urls)
    elif hasattr(image, "read") and hasattr(image, "seek"):
        source = image
    else:
        raise TypeError("images are paths, URLs, base64, bytes, files, PIL images, numpy arrays or tensors")
    Image.init()  # registers all decoders
    with Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
        _check_size(opened, max_memory_mb)
        if (factor := _factor(opened)) > 1:  # only the decoder of JPEG can do it
            opened.draft(None, (opened.width // factor, opened.height // factor))
        return _decode(opened)


def with_channels(image: "Image.Image", num_channels: int) -> "Image.Image":
    """Convert an image of any mode to RGB (3 channels) or gray (1 channel).

    Transparent pixels become white. 16 bits and floats are scaled to 8 bits, where PIL would clip them.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_eight_bits(np.asarray(image), sixteen_bits=image.mode.startswith("I;16")))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if num_channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def check_resized(image: "Image.Image", size: dict):
    """Raise a `ValueError` if an image is so long that a processor would make gigabytes of it.

    Args:
        image: The image.
        size: The size of a processor. Only `shortest_edge` lets the longer side grow.
    """
    shortest = size.get("shortest_edge")
    if shortest and shortest**2 * max(image.size) > MAX_RESIZED_PIXELS * max(1, min(image.size)):
        raise ValueError(
            f"it is {image.width} x {image.height} pixels: with a shorter side of {shortest} it would have more than "
            f"{MAX_RESIZED_PIXELS} pixels"
        )


@contextmanager
def naming(image, where: str = ""):
    """Turn any error within this context into a `ValueError` that names the image.

    Args:
        image: The image, as `load_image` takes it.
        where: Beginning of the message, such as the place of the image in a list.
    """
    try:
        yield
    except Exception as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise ValueError(f"{where}{describe(image)} can't be read: {reason}") from cause


def describe(image) -> str:
    """Name an image in an error message, without the password and the query of a URL."""
    if isinstance(image, dict):
        image = image.get("path") or image.get("bytes")
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        if re.match(r"https?://", name):
            address = urlsplit(name)
            name = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"
        return f"'{name}'" if len(name) <= 200 else f"'{name[:200]}...'"
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return f"an array of shape {tuple(image.shape)}"
    if isinstance(image, (bytes, bytearray, memoryview)):
        return f"an image of {len(image)} bytes"
    if is_vision_available() and isinstance(image, Image.Image):
        return f"a {image.mode} image of {image.width} x {image.height} pixels"
    return f"an object of type {type(image).__name__}"


def _open(source: str, timeout: float | None, allow_urls: bool):
    """A path, or the bytes behind a URL, a `data:` URI or base64."""
    if re.match(r"https?://", source):
        if not allow_urls:
            raise ValueError("URLs are turned off (`allow_urls=False`)")
        return BytesIO(fetch(source, timeout))
    if source.startswith("data:image/"):
        return BytesIO(_decode_base64(source.partition(",")[2]))
    try:
        status = os.stat(source)
    except (OSError, ValueError) as error:  # no such file, or no name of a file at all
        try:
            return BytesIO(_decode_base64(source))
        except OSError:
            message = error.strerror if isinstance(error, OSError) else "it is not the name of a file"
            raise FileNotFoundError(getattr(error, "errno", None), message) from error
    if not stat.S_ISREG(status.st_mode):  # a FIFO or a device may never end
        raise OSError("it is not a regular file")
    return source


def _decode_base64(text: str) -> bytes:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise OSError("it is not valid base64") from error
    if len(data) < 16:  # shorter than any image, as a word may be valid base64
        raise OSError("it is not an image in base64")
    return data


def _check_size(image: "Image.Image", max_memory_mb: float | None):
    """Raise a `ValueError` if the header of a file announces too large an image."""
    pixels = image.width * image.height
    if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, and more than {Image.MAX_IMAGE_PIXELS} "
            "(PIL.Image.MAX_IMAGE_PIXELS) are not decoded"
        )
    each = BYTES_PER_PIXEL.get(image.format, OTHER_BYTES_PER_PIXEL) * (1.5 if image.mode == "CMYK" else 1)
    if image.format and max_memory_mb is not None and pixels * each > max_memory_mb * 1e6:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, which take up to {pixels * each / 1e6:.0f} MB as "
            f"{image.format}, and more than {max_memory_mb:g} MB (`max_memory_mb`) are not used"
        )


def _factor(image: "Image.Image") -> int:
    """The whole factor by which an image is made smaller: 1, unless it is huge."""
    pixels = image.width * image.height
    return 1 if pixels <= HUGE_PIXELS else math.ceil(math.sqrt(pixels / SMALLER_PIXELS))


def _decode(image: "Image.Image") -> "Image.Image":
    """Load an image, make it smaller if it is huge, and turn it upright. Its header has been checked."""
    image.load()
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if (factor := _factor(image)) > 1:
        image = _shrink(image, factor)
    return ImageOps.exif_transpose(image) if is_turned else image


def _shrink(image: "Image.Image", factor: int) -> "Image.Image":
    """Make an image smaller. It goes tile by tile, as a conversion of the whole image would take as much memory."""
    small, side = None, factor * 256
    for top in range(0, image.height, side):
        for left in range(0, image.width, side):
            box = (left, top, min(left + side, image.width), min(top + side, image.height))
            tile = _averageable(image.crop(box)).reduce(factor)
            if small is None:
                small = Image.new(tile.mode, (-(-image.width // factor), -(-image.height // factor)))
            small.paste(tile, (left // factor, top // factor))
    small.info |= {name: value for name, value in image.info.items() if name != "transparency"}
    return small


def _averageable(image: "Image.Image") -> "Image.Image":
    """Convert an image to a mode in which neighbouring pixels have a mean."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(_to_eight_bits(np.asarray(image), sixteen_bits=True))
    if image.mode not in ("LA", "RGBA") and image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert({"1": "L", "P": "RGB"}.get(image.mode, image.mode))


def _from_array(array) -> "Image.Image":
    channels_first = isinstance(array, torch.Tensor)
    array = array.detach().cpu().float().numpy() if channels_first and array.is_floating_point() else np.asarray(array)
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            array = array[None]  # refused below
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError("an array must have the shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels")
    return Image.fromarray(np.ascontiguousarray(_to_eight_bits(array)))


def _to_eight_bits(array: np.ndarray, sixteen_bits: bool = False) -> np.ndarray:
    """Scale booleans, 16 bits and floats (0 to 1, or 0 to 255) to 8 bits. Wider integers count as 16 bits if one of
    them is above 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    least, most = array.min(), array.max()
    if array.dtype.kind in "iu":
        sixteen_bits = sixteen_bits or array.dtype == np.uint16 or most > 255
        if least < 0 or most > 65535:
            raise ValueError(f"its values must be from 0 to 255, or 16 bits, not from {least} to {most}")
        return (array >> 8 if sixteen_bits else array).astype(np.uint8)
    if array.dtype.kind != "f" or not (least >= 0 and most <= 255):  # false for numbers that are none
        raise ValueError(f"its values must be from 0 to 1, or from 0 to 255, not from {least} to {most}")
    return np.rint(array * 255 if most <= 1 else array).astype(np.uint8)
