# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""The pipeline: images of any kind to labels, at a width that each call may choose.

This file travels with each saved checkpoint as remote code.
"""

import types

from transformers import ImageClassificationPipeline
from transformers.utils import is_vision_available

from .images_hydravit import check_resized, load_image, naming, with_channels

if is_vision_available():
    from PIL import Image

TASK = "hydravit-image-classification"
MAX_MEMORY_MB = 300  # by default, for the image that takes most of it


class HydraViTImageClassificationPipeline(ImageClassificationPipeline):
    """Adds the number of attention heads to each call of transformers' image classification.

        pipe = pipeline("hydravit-image-classification", model="path or Hub id")
        pipe("cat.jpg", num_heads_active=3)
        pipe(["cat.jpg", "https://example.com/dog.png", image], num_heads_active=6, batch_size=8)
        pipe(images, num_heads_active=[3, 6, 12], thresholds=0.5, batch_size=8)

    It takes images of every kind that `images_hydravit.load_image` knows (paths, URLs, base64, bytes, files, PIL images
    of any mode, arrays, tensors), alone or in a list, a generator or a `Dataset`. As in training, it puts transparent
    images on white and scales 16 bits to 8. It refuses images that would take too much memory before it decodes them.
    The stock pipeline does neither.

    Each argument can be given to a call, or to `pipeline(...)` for all calls.

    Args:
        num_heads_active: Number of heads to run; None runs the model's default. A list runs a cascade: wider
            subnetworks run only for images that the narrower ones are uncertain about. Each row of the answer then
            names its `num_heads` and the `macs` that the image took. "cascade" runs the cascade of the configuration.
        thresholds: For a cascade, the uncertainty from which an image goes on: one number for all steps, or a list.
        criterion: For a cascade, "entropy" (default), "margin" or "probability", as in `cascade_hydravit.uncertainty`.
        errors: What happens to an image that can't be read. "raise" (default) raises a `ValueError` that names it.
            "return" puts `{"error": message}` in its place and classifies the others.
        timeout: Seconds for the whole download of a URL (default 10).
        allow_urls: Whether to download URLs (default True). Turn it off if strangers choose the input.
        max_memory_mb: Megabytes that decoding an image file may take (default 300, which is enough for a JPEG of 49
            megapixels and other files of 12 to 37). `PIL.Image.MAX_IMAGE_PIXELS` is a limit beside it.
        top_k, function_to_apply, batch_size: As in transformers.
    """

    def _sanitize_parameters(
        self,
        num_heads_active=None,
        thresholds=None,
        criterion=None,
        errors=None,
        allow_urls=None,
        max_memory_mb=None,
        **kwargs,
    ):
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        config = self.model.config
        if isinstance(num_heads_active, (list, tuple)) or num_heads_active == "cascade":
            heads = None if num_heads_active == "cascade" else num_heads_active
            forward_params["num_heads_active"] = config.resolve_cascade(heads, thresholds, criterion)
        elif thresholds is not None or criterion is not None:
            raise ValueError(
                "`thresholds` and `criterion` belong to a cascade: `num_heads_active` must be a list of head counts or "
                f'"cascade", not {num_heads_active!r}.'
            )
        elif num_heads_active is not None:
            forward_params["num_heads_active"] = config.check_num_heads(num_heads_active)
        if errors not in (None, "raise", "return"):
            raise ValueError(f'`errors` must be "raise" or "return", not {errors!r}.')
        given = {"errors": errors, "allow_urls": allow_urls, "max_memory_mb": max_memory_mb}
        preprocess_params |= {name: value for name, value in given.items() if value is not None}
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

    def preprocess(self, image, timeout=10.0, errors="raise", allow_urls=True, max_memory_mb=MAX_MEMORY_MB):
        number, given = image if isinstance(image, tuple) else (None, image)
        config, image, error = self.model.config, given, None
        try:
            with naming(given, "" if number is None else f"Image {number} of the inputs: "):
                if config.num_channels in (1, 3):  # else the image is an array of as many channels
                    image = with_channels(load_image(image, timeout, allow_urls, max_memory_mb), config.num_channels)
                    check_resized(image, self.image_processor.size)
                model_inputs = self.image_processor(images=image, return_tensors="pt").to(self.dtype)
        except ValueError as unreadable:
            if errors == "raise":
                raise
            error = str(unreadable)
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
