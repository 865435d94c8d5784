# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""From images of any kind to labels, at a width that each call may choose.

This file travels with each saved checkpoint as remote code, beside the model's.
"""

import base64
import os
import types
from io import BytesIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from transformers import ImageClassificationPipeline
from transformers.utils import is_vision_available

if is_vision_available():  # the model itself needs no Pillow
    from PIL import Image, ImageOps

TASK = "hydravit-image-classification"


class HydraViTImageClassificationPipeline(ImageClassificationPipeline):
    """transformers' image classification with the number of attention heads as an argument of each call.

        pipe = pipeline("hydravit-image-classification", model="path or Hub id")
        pipe("cat.jpg", num_heads_active=3)
        pipe(["cat.jpg", "https://example.com/dog.png", image], num_heads_active=6, batch_size=8)
        pipe(images, num_heads_active=[3, 6, 12], threshold=0.5, batch_size=8)

    Images are paths, URLs, `data:` URIs, PIL images of any mode, numpy arrays or tensors; one, a list, a generator or
    a `Dataset`. Unlike the stock pipeline, it puts transparent images on white and scales 16 bits to 8, as in training,
    and refuses images of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels before it decodes them.

    Args (of a call, or of the construction for all calls):
        num_heads_active: Heads to run; None: the model's default. A list: a cascade, which runs the wider ones only for
            the images of a batch that the narrower ones are not certain about, and each row of the answer says the
            `num_heads` that it is from and the `macs` that the image took. "cascade": that of the configuration.
        threshold: Of a cascade: at which uncertainty an image goes on; one number for all steps, or a list.
        criterion: Of a cascade: "entropy" (default), "margin" or "probability", as in `cascade_hydravit.uncertainty`.
        errors: "raise" a `ValueError` that names the image that can't be read, or "return" `{"error": message}` in
            its place and classify the others.
        timeout: Seconds to wait for a URL (default 10).
        top_k, function_to_apply, batch_size: As in transformers.
    """

    def _sanitize_parameters(self, num_heads_active=None, threshold=None, criterion=None, errors=None, **kwargs):
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        config = self.model.config
        if isinstance(num_heads_active, (list, tuple)) or num_heads_active == "cascade":
            heads = None if num_heads_active == "cascade" else num_heads_active
            forward_params["num_heads_active"] = config.resolve_cascade(heads, threshold, criterion)
        elif threshold is not None or criterion is not None:
            raise ValueError(
                "`threshold` and `criterion` are of a cascade: `num_heads_active` must be a list of head counts or "
                f'"cascade", not {num_heads_active!r}.'
            )
        elif num_heads_active is not None:
            forward_params["num_heads_active"] = config.check_num_heads(num_heads_active)
        if errors not in (None, "raise", "return"):
            raise ValueError(f'`errors` must be "raise" or "return", not {errors!r}.')
        if errors is not None:
            preprocess_params["errors"] = errors
        return preprocess_params, forward_params, postprocess_params

    def __call__(self, inputs=None, **kwargs):
        inputs = kwargs.pop("images", inputs)
        if isinstance(inputs, (list, tuple)):
            if not inputs:
                return []
            inputs = list(enumerate(inputs))
        elif isinstance(inputs, types.GeneratorType):
            inputs = (numbered for numbered in enumerate(inputs))  # the base class knows generators only
        return super().__call__(inputs, **kwargs)

    def preprocess(self, image, timeout=10.0, errors="raise"):
        number, given = image if isinstance(image, tuple) else (None, image)
        config, image, error = self.model.config, given, None
        try:
            if not isinstance(image, (np.ndarray, torch.Tensor)):
                image = with_channels(load_image(image, timeout), config.num_channels)
            model_inputs = self.image_processor(images=image, return_tensors="pt").to(self.dtype)
        except Exception as cause:
            where = "" if number is None else f"Image {number} of the inputs: "
            reason = getattr(cause, "strerror", None) or cause
            error = f"{where}{_describe(given)} can't be read: {reason}"
            if errors == "raise":
                raise ValueError(error) from cause
            blank = Image.new("L" if config.num_channels == 1 else "RGB", (16, 16))  # holds the place in the batch
            model_inputs = self.image_processor(images=blank, return_tensors="pt").to(self.dtype)
        return {"pixel_values": model_inputs["pixel_values"], "error": error}

    def _forward(self, model_inputs, num_heads_active=None):
        pixel_values, error = model_inputs["pixel_values"], model_inputs["error"]
        if isinstance(num_heads_active, dict):  # the settings of a cascade
            return {**self.model.cascade(pixel_values, **num_heads_active), "error": error}
        return {"logits": self.model(pixel_values, num_heads_active=num_heads_active).logits, "error": error}

    def postprocess(self, model_outputs, **kwargs):
        if model_outputs["error"] is not None:
            return {"error": model_outputs["error"]}
        rows = super().postprocess(model_outputs, **kwargs)
        spent = {name: model_outputs[name].item() for name in ("num_heads", "macs") if name in model_outputs}
        return [row | spent for row in rows]


def load_image(image, timeout: float | None = None) -> "Image.Image":
    """A decoded PIL image, turned as its camera was held.

    Args:
        image: A path, an http(s) URL, a `data:` URI or a PIL image.
        timeout: Seconds to wait for a URL; None: for ever.

    Raises:
        OSError: No such file or URL, or one that isn't a whole image.
        ValueError: More than `PIL.Image.MAX_IMAGE_PIXELS` pixels; nothing of it is decoded.
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


def with_channels(image: "Image.Image", num_channels: int) -> "Image.Image":
    """An image of any mode as RGB (3 channels) or gray (1): what is transparent becomes white, as under the processor,
    and 16 bits are scaled to 8, where PIL would cut them off."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if num_channels == 1 else "RGB")


def _describe(image) -> str:
    """What an error calls an image."""
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        return f"'{name}'" if len(name) <= 200 else f"'{name[:200]}...'"
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return f"an array of shape {tuple(image.shape)}"
    if isinstance(image, Image.Image):
        return f"a {image.mode} image of {image.width} x {image.height} pixels"
    return f"an object of type {type(image).__name__}"
