"""The routes of the server, as an ASGI application."""

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..engine import Answer, Engine, LateError
from .requests import Asked, Limits, check_key, read_request

PAGE = Path(__file__).with_name("page.html")
DECODERS = 4  # threads
HISTORY_S = 300  # seconds that the page shows
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # buckets of the histograms
POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob:"


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
        check_key(request, self.limits)
        if self._busy >= self.limits.max_queue:
            raise HTTPException(503, f"{self._busy} requests wait already. Try again later.", {"Retry-After": "1"})
        self._busy += 1
        self._history.count("arrived")
        try:
            asked = await read_request(request, self.limits, self.engine.heads)
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
        check_key(request, self.limits)
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
        check_key(request, self.limits)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def show_stats(self, request: Request) -> Response:
        """The last minutes, a row for each second in which something happened, for the page."""
        check_key(request, self.limits)
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


async def _as_json(request: Request, error: Exception) -> Response:
    """An error as JSON with its reason."""
    if isinstance(error, HTTPException):
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
    return JSONResponse({"detail": f"{type(error).__name__}: {error}"}, 500)
