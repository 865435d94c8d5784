"""The engine: many threads get the answers of the model alone, whatever batches and widths ran."""

import ctypes
import gc
import io
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hydravit_hf import make_image_processor
from hydravit_hf.engine import Engine, LateError
from hydravit_hf.model.pipeline_hydravit import TASK

HEADS = [1, 3, 6]
ROWS = [
    {"num_heads": num_heads, "batch_size": size, "latency_ms": float(size)} for num_heads in HEADS for size in (1, 4)
]


def make_engine(model, **kwargs) -> Engine:
    options = {"heads": HEADS, "deadline_ms": 10_000, "rows": ROWS} | kwargs
    return Engine(model, make_image_processor(model.config), **options)


@pytest.fixture
def pictures() -> list[bytes]:
    files = []
    for pixels in np.random.default_rng(0).integers(0, 256, (30, 20, 24, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files


def test_every_answer_is_that_of_the_model_alone_at_the_width_that_it_names(model, pictures):
    answers = {}
    with make_engine(model) as engine:
        inputs = [engine.prepare(picture) for picture in pictures]

        def ask(first: int):
            for index in range(first, len(inputs), 5):
                asked = [None, *HEADS][index % 4]
                answers[index] = asked, engine.submit(inputs[index], num_heads=asked).result()

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == list(range(30))
    for index, (asked, answer) in answers.items():
        assert asked in (None, answer.num_heads) and answer.is_on_time and 1 <= answer.batch_size <= 4
        with torch.inference_mode():
            logits = model(inputs[index], num_heads_active=answer.num_heads).logits[0]
        torch.testing.assert_close(answer.logits, logits, atol=1e-5, rtol=0)
        assert answer.waited_ms >= 0 and answer.computed_ms > 0


def test_labels_and_inputs_are_those_of_the_pipeline(model, pictures):
    classify = pipeline(TASK, model, image_processor=make_image_processor(model.config))
    expected = classify(Image.open(io.BytesIO(pictures[0])), num_heads_active=3, top_k=2)
    with make_engine(model) as engine:
        answer = engine.submit(engine.prepare(pictures[0]), num_heads=3).result()
        labels = engine.label(answer, top_k=2)
    assert [row["label"] for row in labels] == [row["label"] for row in expected]
    assert [row["score"] for row in labels] == pytest.approx([row["score"] for row in expected], abs=1e-6)
    with pytest.raises(ValueError, match="can't be read"):
        engine.prepare(pictures[0][:100])


@pytest.mark.parametrize("runtime", [pytest.param("onnx", marks=pytest.mark.slow), "openvino"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch and onnxscript
def test_an_export_answers_as_the_model_does(make_model, pictures, runtime):
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime", reason="needs the extra `export`")
    model = make_model(num_hidden_layers=1)
    with make_engine(model, runtime=runtime, rows=None, max_batch_size=2) as engine:
        assert {(row["num_heads"], row["batch_size"]) for row in engine.rows} == {(k, b) for k in HEADS for b in (1, 2)}
        images = [engine.prepare(picture) for picture in pictures[:6]]
        futures = [engine.submit(image, num_heads=HEADS[i % 3]) for i, image in enumerate(images)]
        for image, future in zip(images, futures, strict=True):
            answer = future.result()
            expected = model(image, num_heads_active=answer.num_heads).logits[0]
            torch.testing.assert_close(answer.logits, expected, atol=1e-4, rtol=0)


def test_a_narrower_type_answers_nearly_as_the_model_does(make_model, pictures):
    model = make_model()
    image = make_image_processor(model.config)(Image.open(io.BytesIO(pictures[0])), return_tensors="pt").pixel_values
    expected = model(image, num_heads_active=3).logits[0]
    with make_engine(model, dtype=torch.bfloat16) as engine:
        answer = engine.submit(engine.prepare(pictures[0]), num_heads=3).result()
    assert answer.logits.dtype == torch.float32
    torch.testing.assert_close(answer.logits, expected, atol=0.1, rtol=0.1)
    assert not torch.equal(answer.logits, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the signal stack of Linux")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")  # of torch and onnxscript
def test_an_engine_of_openvino_leaves_the_signal_stack_as_it_was(make_model):
    pytest.importorskip("openvino", reason="needs openvino")

    def signal_stack() -> bytes:
        stack = ctypes.create_string_buffer(24)  # struct stack_t
        assert ctypes.CDLL(None).sigaltstack(None, stack) == 0
        return stack.raw

    before = signal_stack()
    engine = make_engine(make_model(), runtime="openvino")
    during = signal_stack()
    engine.close()
    del engine
    gc.collect()
    assert during == before == signal_stack()


def test_close_answers_what_waits_and_takes_nothing_more(model, pictures):
    engine = make_engine(model)
    image = engine.prepare(pictures[0])
    futures = [engine.submit(image, deadline_ms=0.001 if index % 2 else None) for index in range(50)]
    engine.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert not engine.is_alive and engine.waiting == 0
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(image)


def test_a_batch_that_fails_fails_its_requests_only(model, pictures, monkeypatch):
    with make_engine(model) as engine:
        image, forward = engine.prepare(pictures[0]), engine._forward
        monkeypatch.setattr(engine, "_forward", lambda images, num_heads: forward(images, 1 / 0))
        with pytest.raises(ZeroDivisionError):
            engine.submit(image, num_heads=3).result()
        monkeypatch.setattr(engine, "_forward", forward)
        assert engine.submit(image).result().num_heads in HEADS


def test_late_requests_are_refused_or_answered_late(model, pictures):
    for late in ("refuse", "answer"):
        with make_engine(model, late=late) as engine:
            future = engine.submit(engine.prepare(pictures[0]), deadline_ms=0.5)
            if late == "refuse":
                with pytest.raises(LateError):
                    future.result()
            else:
                assert not future.result().is_on_time


def test_the_measurement_leaves_out_batches_longer_than_the_deadline(model):
    with make_engine(model, rows=None, max_batch_size=6) as engine:
        assert {(row["num_heads"], row["batch_size"]) for row in engine.rows} == {
            (num_heads, size) for num_heads in HEADS for size in (1, 2, 4, 6)
        }
    with pytest.raises(ValueError, match=r"No width answers within 0\.001 ms.* takes .* ms at \d heads"):
        make_engine(model, rows=None, deadline_ms=0.001)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": [7]}, "heads"),
        ({"runtime": "tensorrt"}, "runtime"),
        ({"runtime": "onnx", "dtype": torch.bfloat16}, "dtype"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"late": "never"}, "late"),
        ({"deadline_ms": float("nan")}, "deadline_ms"),
    ],
)
def test_errors_name_the_argument(model, options, named):
    with pytest.raises(ValueError, match=named):
        make_engine(model, **options)
    with make_engine(model) as engine:
        with pytest.raises(ValueError, match="num_heads"):
            engine.submit(torch.zeros(1, 3, 16, 16), num_heads=2)
        with pytest.raises(ValueError, match=r"pixel_values.*\(1, 3, 16, 16\)"):  # else its whole batch would fail
            engine.submit(torch.zeros(1, 2, 16, 16))
