"""The Ray Serve example on a local cluster of two replicas. Ray is in no extra: it is tested where it is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.scripts import EXAMPLES
from support.serving import free_port
from transformers import pipeline

from hydravit_hf import make_image_processor
from hydravit_hf.model.pipeline_hydravit import TASK

# Arguments: the checkpoint, a picture, a port
CLUSTER = """
import json, sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import ray
import serve_ray
from ray import serve

ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
serve.start(http_options={"port": int(sys.argv[3])})
two = serve_ray.HydraViT.options(num_replicas=2, autoscaling_config=None, ray_actor_options={"num_cpus": 0.5})
serve_ray.HydraViT = two
serve.run(serve_ray.app({"model": sys.argv[1], "deadline_ms": 5000}))

def ask(query="", body=open(sys.argv[2], "rb").read()):
    request = Request(f"http://127.0.0.1:{sys.argv[3]}/predict" + query, body, {"Content-Type": "image/png"})
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)

def answered():
    # The answers that a replica has counted; Ray chooses which
    with urlopen(f"http://127.0.0.1:{sys.argv[3]}/metrics", timeout=60) as response:
        text = response.read().decode()
    return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith("hydravit_answers_total"))

answers = {num_heads: ask(f"?num_heads_active={num_heads}")[1] for num_heads in (1, 6) for _ in range(20)}
status, error = ask(body=b"no image")
counts = sorted({answered() for _ in range(40)})
deployment = serve.status().applications["default"].deployments["HydraViT"]
printed = {"answers": answers, "error": [status, error], "replicas": deployment.replica_states, "counts": counts}
print(json.dumps(printed))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[serve]")
def test_two_replicas_answer_as_the_model_does(model, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    processor = make_image_processor(model.config)
    processor.save_pretrained(tmp_path / "tiny")
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(picture)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-c", CLUSTER, str(tmp_path / "tiny"), str(picture), str(free_port())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = (line for line in result.stdout.splitlines() if line.startswith('{"answers"'))  # among those of Ray
    printed = json.loads(line)
    assert printed["replicas"] == {"RUNNING": 2} and printed["error"][0] == 400
    assert sum(printed["counts"]) == 40 or printed["counts"] == [20]  # both replicas have answered
    classify = pipeline(TASK, model, image_processor=processor)
    for num_heads, answer in printed["answers"].items():
        assert answer["num_heads"] == int(num_heads)
        expected = classify(str(picture), num_heads_active=int(num_heads))
        assert [row["label"] for row in answer["predictions"]] == [row["label"] for row in expected]
        scores = [row["score"] for row in expected]
        assert [row["score"] for row in answer["predictions"]] == pytest.approx(scores, abs=1e-5)


def test_the_configuration_names_the_application_and_its_deployment():
    yaml = pytest.importorskip("yaml")
    (application,) = yaml.safe_load((EXAMPLES / "serve_ray.yaml").read_text())["applications"]
    module, _, name = application["import_path"].partition(":")
    source = (EXAMPLES / f"{module}.py").read_text()
    assert f"def {name}(" in source and f"class {application['deployments'][0]['name']}:" in source
    assert set(application["args"]) <= {"model", "deadline_ms", "heads"}
