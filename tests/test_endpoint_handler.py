"""The handler, loaded as Inference Endpoints load it, gives what the pipeline gives."""

import base64
import io
import json
import shutil

import numpy as np
from PIL import Image
from transformers import pipeline

from hydravit_hf import make_image_processor
from hydravit_hf.hub import HANDLER
from hydravit_hf.model.pipeline_hydravit import TASK

# What huggingface-inference-toolkit does: it loads the file under the name `handler`, and calls it with decoded JSON or
# with the PIL image of a request whose body is one
AS_AN_ENDPOINT = """
import importlib.util, io, json, sys
from PIL import Image

spec = importlib.util.spec_from_file_location("handler", sys.argv[1] + "/handler.py")
module = importlib.util.module_from_spec(spec)
sys.modules["handler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(sys.argv[1])
expected = json.load(open(sys.argv[2]))

def check(answer, right):
    assert [row["label"] for row in answer] == [row["label"] for row in right], answer
    assert all(abs(a["score"] - b["score"]) < 1e-6 for a, b in zip(answer, right)), answer

encoded = expected["image"]
for num_heads, right in expected["answers"].items():
    parameters = {"num_heads_active": int(num_heads), "top_k": 3}
    check(handler({"inputs": encoded, "parameters": parameters}), right)
    many = handler({"inputs": [encoded, "data:image/png;base64," + encoded], "parameters": parameters})
    assert len(many) == 2
    check(many[1], right)
image = Image.open(sys.argv[3])
assert len(handler({"inputs": image})) == 5
bad = ("/etc/hostname", "http://127.0.0.1/a.png", "aGVsbG8gd29ybGQsIGhlbGxv", None)
for data in ({"inputs": value} for value in bad):
    try:
        handler(data)
    except ValueError as error:
        assert "base64" in str(error) or "can't be read" in str(error), error
    else:
        raise AssertionError(data)
try:
    handler({"inputs": encoded, "parameters": {"num_heads_active": 9}})
except ValueError as error:
    assert "9" in str(error)
else:
    raise AssertionError("9 heads")
"""


def test_an_endpoint_answers_as_the_pipeline_does(model, run_without_the_package, tmp_path):
    folder, picture = tmp_path / "checkpoint", tmp_path / "picture.png"
    model.save_pretrained(folder)
    make_image_processor(model.config).save_pretrained(folder)
    shutil.copy(HANDLER, folder / "handler.py")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(picture)
    classify = pipeline(TASK, model, image_processor=make_image_processor(model.config))
    image = Image.open(io.BytesIO(picture.read_bytes()))
    answers = {num_heads: classify(image, num_heads_active=num_heads, top_k=3) for num_heads in (1, 4, 6)}
    expected = {"image": base64.b64encode(picture.read_bytes()).decode(), "answers": answers}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    run_without_the_package(AS_AN_ENDPOINT, folder, tmp_path / "expected.json", picture)
