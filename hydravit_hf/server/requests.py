"""Reads the requests of the server within its limits, and checks what they ask for."""

import asyncio
import base64
import binascii
import hmac
import json
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

FIELDS = ("image", "deadline_ms", "num_heads_active", "top_k")
MAX_DEADLINE_MS = 3_600_000


@dataclass
class Limits:
    """What the server accepts.

    Args:
        max_queue: Requests that are being read, wait or run. A server with more answers 503.
        max_body_mb: Megabytes of a request. A larger one gets 413.
        timeout_s: Seconds for the head of a request, and as many for its body. A slower one gets 408.
        allow_urls: Whether an image may be an http(s) URL, which the server then downloads.
        api_key: Secret that requests must carry. None asks for none.
    """

    max_queue: int = 256
    max_body_mb: float = 20.0
    timeout_s: float = 10.0
    allow_urls: bool = False
    api_key: str | None = None


@dataclass
class Asked:
    """The fields of a request."""

    image: bytes | str
    deadline_ms: float | None = None
    num_heads: int | None = None
    top_k: int = 5


def check_key(request: Request, limits: Limits):
    """Raise a 401 if the server has a key and the request lacks it."""
    if limits.api_key is None:
        return
    given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), limits.api_key.encode()):
        header = {"WWW-Authenticate": "Bearer"}
        raise HTTPException(401, "Send the key as `Authorization: Bearer KEY` or `X-API-Key: KEY`.", header)


async def read_request(request: Request, limits: Limits, heads: list[int]) -> Asked:
    """Read the body within its limits, and check what it asks for. `heads` are those that the server runs.

    Raises:
        HTTPException: The body does not arrive whole, in time or within its size, or it asks for what is not there.
    """
    limit = limits.max_body_mb * 1e6
    too_large = HTTPException(413, f"The body must have at most {limits.max_body_mb:g} MB.")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    received = 0

    async def receive():
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise too_large
        return message

    try:
        async with asyncio.timeout(limits.timeout_s):
            fields = await _read_fields(Request(request.scope, receive))
    except TimeoutError:
        message = f"The body did not arrive within {limits.timeout_s:g} seconds."
        raise HTTPException(408, message, {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "The body did not arrive whole.") from None
    return _check(dict(request.query_params) | fields, limits, heads)


async def _read_fields(request: Request) -> dict:
    """The fields of a body of any kind that the server takes. The image is bytes or a string."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await request.body()
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"The body is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise HTTPException(400, "The body must be a JSON object.")
        return fields
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=len(FIELDS)) as form:  # it raises a 400 itself
            return {name: value if isinstance(value, str) else await value.read() for name, value in form.items()}
    if kind.startswith("image/") or kind in ("application/octet-stream", ""):
        return {"image": await request.body()}
    known = "multipart/form-data, application/json, image/* or application/octet-stream"
    raise HTTPException(415, f"Send an image as {known}, not as {_shown(kind)}.")


def _check(fields: dict, limits: Limits, heads: list[int]) -> Asked:
    if unknown := sorted(fields.keys() - set(FIELDS)):
        raise HTTPException(400, f"Unknown fields: {', '.join(unknown)}. Known: {', '.join(FIELDS)}.")
    asked = Asked(_check_image(fields.get("image"), limits))
    if (value := fields.get("deadline_ms")) is not None:
        asked.deadline_ms = _number(value, float)
        if asked.deadline_ms is None or not 0 < asked.deadline_ms <= MAX_DEADLINE_MS:
            raise HTTPException(
                400, f"`deadline_ms` must be above 0 and at most {MAX_DEADLINE_MS}, not {_shown(value)}."
            )
    if (value := fields.get("num_heads_active")) is not None:
        asked.num_heads = _number(value, int)
        if asked.num_heads not in heads:
            raise HTTPException(400, f"`num_heads_active` must be one of {heads}, not {_shown(value)}.")
    if (value := fields.get("top_k")) is not None:
        asked.top_k = _number(value, int)
        if asked.top_k is None or asked.top_k < 1:
            raise HTTPException(400, f"`top_k` must be a positive integer, not {_shown(value)}.")
    return asked


def _check_image(image, limits: Limits) -> bytes | str:
    """Turn a string into bytes, so that it is never taken for the path of a file here."""
    if image is None or image in ("", b""):
        raise HTTPException(400, "There is no image: send it as the body, as the file `image`, or in base64.")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise HTTPException(400, "`image` must be a file, or a string in base64.")
    if image.startswith(("http://", "https://")):
        if not limits.allow_urls:
            raise HTTPException(400, "This server downloads no images (`--allow-urls` would allow it).")
        return image
    try:
        return base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image, validate=True)
    except (binascii.Error, ValueError):
        raise HTTPException(400, "`image` is not valid base64.") from None


def _number(value, kind: type):
    """A number from JSON, a form or a query, or None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return None
    return number if isinstance(value, str) or number == value else None


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
