"""Runs a model behind the scheduler of `serving`: images in, logits out, each batch at the width that the load allows.

All widths run on one copy of the weights, and a batch may follow one of another width at once. One thread runs the
batches. Any number of threads may prepare images and submit them.
"""

import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from .export import export_subnetwork
from .model.configuration_hydravit import HydraViTConfig, as_pair
from .model.modeling_hydravit import HydraViTForImageClassification
from .model.pipeline_hydravit import MAX_MEMORY_MB, HydraViTImageClassificationPipeline
from .profiling import time_interleaved
from .serving import Batch, Latencies, Request, Scheduler

RUNTIMES = ("torch", "openvino", "onnx")
ROUNDS, WARMUP = 7, 2  # of the measurement at the start
RESERVED = 0.05  # part of the deadline that is kept for what an answer takes beside its batch, such as its way back


class Answer(NamedTuple):
    """What an image got: `logits` (labels,), the heads that ran, the size of its batch, and what it took in ms."""

    logits: torch.Tensor
    num_heads: int
    batch_size: int
    waited_ms: float
    computed_ms: float
    is_on_time: bool


class LateError(Exception):
    """No width could answer a request before its deadline, so it was refused."""


class Engine:
    """A model that answers each image by a deadline.

    Making one measures each width on this machine with the timer of `profile_subnetworks`, which also warms it up.

    Args:
        model: The classifier, on the device that it shall run on.
        image_processor: Its image processor.
        heads: Head counts to choose from. None means `model.config.subnetwork_heads`.
        deadline_ms: Milliseconds that a request has if it does not say. Batches that take longer are not measured and
            not run.
        max_batch_size: Most images in a batch.
        late: "answer" runs requests that can't be on time after all others. "refuse" fails them with a `LateError`.
        runtime: "torch" runs the model itself. "openvino" and "onnx" run an export of each width, which has its own
            copy of its weights.
        dtype: Type to compute in, such as `torch.bfloat16`. None means that of the weights. "onnx" takes no other.
        rows: Latencies of an earlier engine on the same machine, its `rows`. None measures them.

    Raises:
        ValueError: An argument is out of its range, or not even one image of the narrowest width takes less than
            `deadline_ms`.
        ImportError: A package that the runtime needs is not installed.

    Examples:
        >>> from PIL import Image
        >>> from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, make_image_processor
        >>> from hydravit_hf.engine import Engine
        >>> config = HydraViTConfig(num_hidden_layers=1, image_size=16, num_labels=10)
        >>> model = HydraViTForImageClassification(config)
        >>> with Engine(model, make_image_processor(config), heads=[3, 12], deadline_ms=1000) as engine:
        ...     answer = engine.submit(engine.prepare(Image.new("RGB", (20, 20)))).result()
        >>> answer.num_heads, answer.logits.shape
        (12, torch.Size([10]))
    """

    def __init__(
        self,
        model: HydraViTForImageClassification,
        image_processor,
        heads: list[int] | None = None,
        deadline_ms: float = 100.0,
        max_batch_size: int = 16,
        late: str = "answer",
        runtime: str = "torch",
        dtype: torch.dtype | None = None,
        rows: list[dict] | None = None,
    ):
        if type(max_batch_size) is not int or max_batch_size < 1:
            raise ValueError(f"`max_batch_size` must be a positive integer, not {max_batch_size!r}.")
        if not 0 < deadline_ms < float("inf"):
            raise ValueError(f"`deadline_ms` must be a positive number, not {deadline_ms!r}.")
        self.config = model.config
        self.heads = sorted(
            {self.config.check_num_heads(num_heads) for num_heads in heads or self.config.subnetwork_heads}
        )
        self._shape = (1, self.config.num_channels, *as_pair(self.config.image_size))
        self.deadline_ms = deadline_ms
        self.device = model.device
        self._forward = _runner(model.eval(), self.heads, runtime, dtype or model.dtype)
        self._pipeline = HydraViTImageClassificationPipeline(model, image_processor=image_processor)
        if rows is None:
            rows = _measure(self.config, self._forward, self.heads, deadline_ms, max_batch_size)
        self.rows = rows
        fastest = min(self.rows, key=lambda row: row["latency_ms"])
        if fastest["latency_ms"] > deadline_ms:
            raise ValueError(
                f"No width answers within {deadline_ms:g} ms: on this machine, an image takes "
                f"{fastest['latency_ms']:.3g} ms at {fastest['num_heads']} heads. Choose a longer deadline or a "
                "narrower width."
            )
        self._scheduler = Scheduler(Latencies(self.rows), late=late, reserve_ms=RESERVED * deadline_ms)
        self._wake = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="hydravit-engine", daemon=True)
        self._thread.start()
        self._warm_up()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def prepare(self, image, allow_urls: bool = False, timeout: float = 10.0) -> torch.Tensor:
        """Decode an image and make the model's input of it, (1, C, H, W).

        Args:
            image: An image of any kind that the pipeline takes. Strings are paths, URLs, `data:` URIs or base64, so
                decode those of strangers first.
            allow_urls: Whether to download URLs.
            timeout: Seconds for the whole download.

        Raises:
            ValueError: It can't be read, or would take more than 300 MB. The message names the reason.
        """
        return self._pipeline.preprocess(image, timeout, "raise", allow_urls, MAX_MEMORY_MB)["pixel_values"]

    def submit(
        self,
        pixel_values: torch.Tensor,
        deadline_ms: float | None = None,
        num_heads: int | None = None,
        arrival_ms: float | None = None,
    ) -> Future:
        """Queue an image.

        Args:
            pixel_values: What `prepare` made, (1, C, H, W).
            deadline_ms: Milliseconds from its arrival to its answer. None means those of the engine.
            num_heads: Number of heads to run, one of `heads`. None leaves it to the load.
            arrival_ms: When it arrived, 1000 times `time.monotonic()`. None means now.

        Returns:
            A future of its `Answer`. It may raise `LateError`, or what the model raised.

        Raises:
            ValueError: The width is none of `heads`, or the image has another shape.
            RuntimeError: The engine is closed.
        """
        if pixel_values.shape != self._shape:
            raise ValueError(f"`pixel_values` must have the shape {self._shape}, not {tuple(pixel_values.shape)}.")
        arrival = _now() if arrival_ms is None else arrival_ms
        deadline = arrival + (self.deadline_ms if deadline_ms is None else deadline_ms)
        future = Future()
        with self._wake:
            if self._is_closing:
                raise RuntimeError("The engine is closed.")
            self._scheduler.add(Request(arrival, deadline, num_heads, (pixel_values, future)))
            self._wake.notify()
        return future

    def label(self, answer: Answer, top_k: int = 5) -> list[dict]:
        """The most likely labels of an answer with their scores, as the pipeline gives them."""
        return self._pipeline.postprocess({"logits": answer.logits[None], "error": None}, top_k=top_k)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for their batch."""
        return len(self._scheduler)

    @property
    def is_alive(self) -> bool:
        """Whether the engine still runs batches."""
        return self._thread.is_alive()

    def close(self):
        """Answer all requests that wait, and stop."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join()

    def _warm_up(self):
        """Run each width in the thread, from a file: the first image takes longer than all others."""
        file, (height, width) = BytesIO(), as_pair(self.config.image_size)
        Image.new("RGB", (width, height)).save(file, "PNG")
        for num_heads in self.heads:
            self.submit(self.prepare(file.getvalue()), float("inf"), num_heads).result()

    def _run(self):
        with torch.inference_mode():
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: len(self._scheduler) or self._is_closing)
                    if not len(self._scheduler):
                        return
                    batch = self._scheduler.next_batch(_now())
                for request in batch.refused:
                    request.payload[1].set_exception(LateError("No width can answer before the deadline now."))
                if batch.requests:
                    self._answer(batch)

    def _answer(self, batch: Batch):
        start, futures = _now(), [request.payload[1] for request in batch.requests]
        try:
            images = torch.cat([request.payload[0] for request in batch.requests])
            logits = self._forward(images, batch.num_heads)
        except Exception as error:  # such as too little memory; the next batch may work
            for future in futures:
                future.set_exception(error)
            return
        end = _now()
        with self._wake:
            self._scheduler.done(batch, end - start, end)
        size = len(futures)
        for request, future, row in zip(batch.requests, futures, logits, strict=True):
            is_on_time = end <= request.deadline
            future.set_result(Answer(row, batch.num_heads, size, start - request.arrival, end - start, is_on_time))


def _now() -> float:
    return 1e3 * time.monotonic()


def _runner(model: HydraViTForImageClassification, heads: list[int], runtime: str, dtype: torch.dtype):
    """A function of images (B, C, H, W) and a number of heads that returns logits (B, labels) on the CPU."""
    if runtime == "torch":
        return partial(_run_torch, model.to(dtype))
    if runtime not in RUNTIMES:
        raise ValueError(f"`runtime` must be one of {', '.join(RUNTIMES)}, not {runtime!r}.")
    if runtime == "onnx" and dtype != model.dtype:
        raise ValueError(f"`dtype` must be {model.dtype}, that of the weights, for the runtime 'onnx', not {dtype}.")
    suffix, load = {"onnx": (".onnx", _load_onnx), "openvino": (".xml", _load_openvino)}[runtime]
    with tempfile.TemporaryDirectory(prefix="hydravit-") as folder:
        paths = {num_heads: Path(folder) / f"{num_heads}_heads{suffix}" for num_heads in heads}
        runs = {k: load(export_subnetwork(model, k, runtime, path), dtype) for k, path in paths.items()}
    return lambda images, num_heads: runs[num_heads](images)


def _run_torch(model: HydraViTForImageClassification, images: torch.Tensor, num_heads: int) -> torch.Tensor:
    images = images.to(model.device, model.dtype)
    return model(images, num_heads_active=num_heads).logits.float().cpu()


def _load_onnx(path: Path, dtype: torch.dtype):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])


def _load_openvino(path: Path, dtype: torch.dtype):
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    options |= {"PERFORMANCE_HINT": "LATENCY"}
    # A compiled model replaces the signal stack of the thread that compiles it. Where several end in another order than
    # that of their creation, they leave a freed one, and the next signal kills the process. So each has a thread.
    with ThreadPoolExecutor(1) as thread:
        model = thread.submit(openvino.Core().compile_model, path, "CPU", options).result()
    return lambda images: torch.from_numpy(model(images.numpy())["logits"])


def _measure(config: HydraViTConfig, forward, heads: list[int], deadline_ms: float, max_batch_size: int) -> list[dict]:
    """Rows of all widths at batches of 1, 2, 4, ... images, up to those that take longer than the deadline."""
    rows, size = [], 1
    with torch.inference_mode():
        while heads and size <= max_batch_size:
            images = torch.randn(size, config.num_channels, *as_pair(config.image_size))
            passes = {num_heads: partial(forward, images, num_heads) for num_heads in heads}
            times = time_interleaved(passes, ROUNDS, WARMUP, disable_tqdm=True)
            # The least, because the scheduler adds what disturbs the machine later
            least = {num_heads: min(milliseconds) for num_heads, milliseconds in times.items()}
            heads = [num_heads for num_heads in heads if least[num_heads] <= deadline_ms]
            rows += [
                {"num_heads": num_heads, "batch_size": size, "latency_ms": latency}
                for num_heads, latency in least.items()
                if size == 1 or num_heads in heads
            ]
            size = max_batch_size if size < max_batch_size < 2 * size else 2 * size
    return rows
