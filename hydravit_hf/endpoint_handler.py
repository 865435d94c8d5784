"""The handler that an Inference Endpoint of Hugging Face loads: images to labels, at a width that each request chooses.

`hydravit push --endpoint` uploads this file as `handler.py`. It runs where `hydravit_hf` is not installed.
"""

import base64
import binascii

from transformers import pipeline


class EndpointHandler:
    """Answers the requests of an endpoint.

    Args:
        path: Folder of the checkpoint.

    Example of a request, with any argument of the pipeline in `parameters`:

        {"inputs": "iVBORw0KGgo...", "parameters": {"num_heads_active": 3, "top_k": 1}}
    """

    def __init__(self, path: str = ""):
        self._classify = pipeline("hydravit-image-classification", path, trust_remote_code=True)

    def __call__(self, data: dict) -> list:
        """Classify.

        Args:
            data: `inputs`, an image or a list of images in base64 or as the endpoint has decoded them, and optionally
                `parameters`. Addresses and paths are not read.

        Returns:
            The labels with their scores, or a list of these for each image.

        Raises:
            ValueError: An image can't be read, or a parameter is wrong.
        """
        inputs = data.get("inputs")
        images = [_decode(image) for image in (inputs if isinstance(inputs, list) else [inputs])]
        answers = self._classify(images, **(data.get("parameters") or {}) | {"allow_urls": False})
        return answers if isinstance(inputs, list) else answers[0]


def _decode(image):
    """Turn a string into bytes, so that it is never taken for a path or an address."""
    if not isinstance(image, str):
        return image
    try:
        return base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("`inputs` must be an image in base64.") from None
