"""The HTTP server of `hydravit serve`: images come in, labels go out, and each request has a deadline.

It is one process. The event loop reads requests, a few threads decode images, and the thread of the `Engine` runs the
model. So nothing is left behind when the process is killed.
"""

import asyncio
import base64
import binascii
import gc
import hmac
import json
import math
import socket
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .engine import Answer, Engine, LateError

PAGE = Path(__file__).with_name("server_page.html")
FIELDS = ("image", "deadline_ms", "num_heads_active", "top_k")
MAX_DEADLINE_MS = 3_600_000
DECODERS = 4  # threads
HISTORY_S = 300  # seconds that the page shows
GRACE_S = 1.0  # after SIGTERM, the time in which clients with an open connection are told to close it
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # buckets of the histograms
POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob:"


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


class Service:
    """The routes of the server. `app` is an ASGI application, which any ASGI server runs.

    Args:
        engine: The engine, which stays open when the application ends.
        limits: What the server accepts.
        info: More entries of `/info`, such as the name of the model and a row for each width with its accuracy.
    """

    def __init__(self, engine: Engine, limits: Limits | None = None, info: dict | None = None):
        self.engine, self.limits, self.info = engine, limits or Limits(), info or {}
        self.is_draining = False
        self._busy = 0
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="hydravit-decoder")
        self._history = History()
        self._make_metrics()
        routes = [
            Route("/", self.page),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/health", self.health),
            Route("/info", self.show_info),
            Route("/metrics", self.show_metrics),
            Route("/stats", self.show_stats),
        ]
        handlers = {HTTPException: _as_json, Exception: _as_json}
        self.app = Starlette(routes=routes, exception_handlers=handlers)

    async def predict(self, request: Request) -> Response:
        """Classify one image."""
        status = 500
        try:
            response = await self._predict(request)
            status = response.status_code
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self._requests.labels(status).inc()
        if self.is_draining:
            response.headers["Connection"] = "close"
        return response

    async def _predict(self, request: Request) -> Response:
        self._check_key(request)
        if self._busy >= self.limits.max_queue:
            raise HTTPException(503, f"{self._busy} requests wait already. Try again later.", {"Retry-After": "1"})
        self._busy += 1
        self._history.count("arrived")
        try:
            asked = await self._read(request)
            arrival_ms = 1e3 * time.monotonic()
            answer = await self._answer(asked, arrival_ms)
        finally:
            self._busy -= 1
        total_ms = 1e3 * time.monotonic() - arrival_ms
        self._count(answer, total_ms)
        return JSONResponse(
            {
                "predictions": self.engine.label(answer, asked.top_k),
                "num_heads": answer.num_heads,
                "batch_size": answer.batch_size,
                "waited_ms": round(answer.waited_ms, 3),
                "computed_ms": round(answer.computed_ms, 3),
                "is_on_time": answer.is_on_time,
            }
        )

    async def _answer(self, asked: Asked, arrival_ms: float) -> Answer:
        loop = asyncio.get_running_loop()
        try:
            pixel_values = await loop.run_in_executor(
                self._decoders, self.engine.prepare, asked.image, self.limits.allow_urls
            )
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        future = self.engine.submit(pixel_values, asked.deadline_ms, asked.num_heads, arrival_ms)
        try:
            return await asyncio.wrap_future(future)
        except LateError as error:
            self._history.count("missed")
            self._missed.inc()
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from error

    # --- Reading a request ---

    async def _read(self, request: Request) -> Asked:
        """Read the body within its limits, and check what it asks for."""
        limit = self.limits.max_body_mb * 1e6
        too_large = HTTPException(413, f"The body must have at most {self.limits.max_body_mb:g} MB.")
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
            async with asyncio.timeout(self.limits.timeout_s):
                fields = await _read_fields(Request(request.scope, receive))
        except TimeoutError:
            message = f"The body did not arrive within {self.limits.timeout_s:g} seconds."
            raise HTTPException(408, message, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise HTTPException(400, "The body did not arrive whole.") from None
        return self._check(dict(request.query_params) | fields)

    def _check(self, fields: dict) -> Asked:
        if unknown := sorted(fields.keys() - set(FIELDS)):
            raise HTTPException(400, f"Unknown fields: {', '.join(unknown)}. Known: {', '.join(FIELDS)}.")
        asked = Asked(self._check_image(fields.get("image")))
        if (value := fields.get("deadline_ms")) is not None:
            asked.deadline_ms = _number(value, float)
            if asked.deadline_ms is None or not 0 < asked.deadline_ms <= MAX_DEADLINE_MS:
                raise HTTPException(
                    400, f"`deadline_ms` must be above 0 and at most {MAX_DEADLINE_MS}, not {_shown(value)}."
                )
        if (value := fields.get("num_heads_active")) is not None:
            asked.num_heads = _number(value, int)
            if asked.num_heads not in self.engine.heads:
                raise HTTPException(400, f"`num_heads_active` must be one of {self.engine.heads}, not {_shown(value)}.")
        if (value := fields.get("top_k")) is not None:
            asked.top_k = _number(value, int)
            if asked.top_k is None or asked.top_k < 1:
                raise HTTPException(400, f"`top_k` must be a positive integer, not {_shown(value)}.")
        return asked

    def _check_image(self, image) -> bytes | str:
        """Turn a string into bytes, so that it is never taken for the path of a file here."""
        if image is None or image in ("", b""):
            raise HTTPException(400, "There is no image: send it as the body, as the file `image`, or in base64.")
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise HTTPException(400, "`image` must be a file, or a string in base64.")
        if image.startswith(("http://", "https://")):
            if not self.limits.allow_urls:
                raise HTTPException(400, "This server downloads no images (`--allow-urls` would allow it).")
            return image
        try:
            return base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image, validate=True)
        except (binascii.Error, ValueError):
            raise HTTPException(400, "`image` is not valid base64.") from None

    def _check_key(self, request: Request):
        if self.limits.api_key is None:
            return
        given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.limits.api_key.encode()):
            header = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "Send the key as `Authorization: Bearer KEY` or `X-API-Key: KEY`.", header)

    # --- What the server tells about itself ---

    async def page(self, request: Request) -> Response:
        """The page that shows the last minutes and takes an image."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    async def health(self, request: Request) -> Response:
        """200 while the server takes requests, 503 before it stops or if the model's thread has ended."""
        if self.is_draining or not self.engine.is_alive:
            return JSONResponse({"status": "draining" if self.is_draining else "failed"}, 503)
        return JSONResponse({"status": "ok"})

    async def show_info(self, request: Request) -> Response:
        """What the server runs, and what each width costs."""
        self._check_key(request)
        limits = {"max_queue": self.limits.max_queue, "max_body_mb": self.limits.max_body_mb}
        limits |= {"allow_urls": self.limits.allow_urls}
        latencies = [
            {name: row[name] for name in ("num_heads", "batch_size", "latency_ms")} for row in self.engine.rows
        ]
        return JSONResponse(
            {"deadline_ms": self.engine.deadline_ms, "limits": limits} | self.info | {"latencies": latencies}
        )

    async def show_metrics(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        self._check_key(request)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def show_stats(self, request: Request) -> Response:
        """The last minutes, a row for each second in which something happened, for the page."""
        self._check_key(request)
        now = {"deadline_ms": self.engine.deadline_ms, "heads": self.engine.heads, "busy": self._busy}
        return JSONResponse(now | {"now": int(time.time()), "seconds": self._history.rows()})

    def _make_metrics(self):
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("hydravit_requests", "Requests by their HTTP status.", ["status"], registry=registry)
        self._missed = Counter("hydravit_deadlines_missed", "Requests answered late or refused.", registry=registry)
        self._widths = Counter("hydravit_answers", "Answers by the heads that ran.", ["num_heads"], registry=registry)
        queue = Gauge("hydravit_queue", "Requests that wait for their batch.", registry=registry)
        queue.set_function(lambda: self.engine.waiting)
        busy = Gauge("hydravit_in_progress", "Requests that are read, wait or run.", registry=registry)
        busy.set_function(lambda: self._busy)
        histograms = {
            "wait": "From the arrival of the image to its batch.",
            "compute": "Time of the batch.",
            "latency": "From the arrival of the image to its answer.",
        }
        self._seconds = {
            name: Histogram(f"hydravit_{name}_seconds", text, buckets=SECONDS, registry=registry)
            for name, text in histograms.items()
        }

    def _count(self, answer: Answer, total_ms: float):
        self._widths.labels(answer.num_heads).inc()
        times = {"wait": answer.waited_ms, "compute": answer.computed_ms, "latency": total_ms}
        for name, milliseconds in times.items():
            self._seconds[name].observe(max(milliseconds, 0) / 1e3)
        self._history.count(str(answer.num_heads))
        if not answer.is_on_time:
            self._missed.inc()
            self._history.count("missed")


class History:
    """Counts of the last `HISTORY_S` seconds, a row for each second in which something happened."""

    def __init__(self):
        self._rows = deque()

    def count(self, name: str):
        """Add one to a count of this second."""
        second = int(time.time())
        if not self._rows or self._rows[-1]["second"] != second:
            self._rows.append({"second": second})
            while self._rows[0]["second"] < second - HISTORY_S:
                self._rows.popleft()
        self._rows[-1][name] = self._rows[-1].get(name, 0) + 1

    def rows(self) -> list[dict]:
        """The rows, the oldest first."""
        return list(self._rows)


class Server(uvicorn.Server):
    """A server that answers all that it has accepted before it stops.

    After SIGTERM or SIGINT, `/health` says so and each answer asks its client to close the connection. After `GRACE_S`,
    no connection is accepted. The process ends, with exit code 0, after the last answer. A second signal ends it at
    once.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self._stop_at = math.inf

    def handle_exit(self, sig, frame):
        """Begin to stop."""
        if self.service.is_draining:
            self.force_exit = True
        self.service.is_draining = True
        self._stop_at = time.monotonic() + GRACE_S

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop now."""
        if time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)


class TimedProtocol(AutoHTTPProtocol):
    """A connection that is closed if the head of a request does not come in time. uvicorn itself waits for ever."""

    timeout_s = 10.0

    def connection_made(self, transport):
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        self._watch = asyncio.get_running_loop().call_later(self.timeout_s, self._close_if_idle)

    def connection_lost(self, exc):
        """Stop watching."""
        self._watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self):
        """Begin to wait for the next request."""
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def _close_if_idle(self):
        is_busy = self.cycle is not None and not self.cycle.response_complete
        left = self.timeout_s - (0 if is_busy else time.monotonic() - self._idle_since)
        if left > 0:
            self._watch = asyncio.get_running_loop().call_later(left, self._close_if_idle)
            return
        if self.cycle is None:  # there was no request at all; a client that pauses after an answer gets no other one
            body = b'{"detail":"The request did not arrive in time."}'
            head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """Take an address for a server that is not ready yet: clients are refused until it listens.

    Raises:
        OSError: The address is in use, or is none of this machine.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # asyncio lets a connection send at once (TCP_NODELAY) only if its socket names the protocol. Otherwise, the body of
    # an answer waits until the client has acknowledged the head, which takes 40 ms.
    bound = socket.socket(family, proto=socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"The address {host}:{port} can't be used: {error.strerror}") from error
    return bound


def serve(service: Service, bound: socket.socket):
    """Serve until SIGTERM or SIGINT, and then until the last accepted request is answered."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection takes a file
    gc.collect()
    gc.freeze()  # else each full collection would look at all of torch again, which takes longer than many batches
    protocol = type("Protocol", (TimedProtocol,), {"timeout_s": service.limits.timeout_s})
    config = uvicorn.Config(
        service.app, http=protocol, log_level="warning", access_log=False, lifespan="off", ws="none"
    )
    Server(config, service).run(sockets=[bound])


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


async def _as_json(request: Request, error: Exception) -> Response:
    """An error as JSON with its reason."""
    if isinstance(error, HTTPException):
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
    return JSONResponse({"detail": f"{type(error).__name__}: {error}"}, 500)
