"""A client of the Hub in a process of its own, with an empty cache, with or without the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from support.hub_server import HubServer

SERVED = {".gitattributes"}  # what every repository starts with

WITH_THE_PACKAGE = """
import torch
from transformers import AutoImageProcessor
from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.hub import push_checkpoint

load = HydraViTForImageClassification.from_pretrained
"""


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hydravit_hf"] = None  # importing it fails
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

def load(name, **kwargs):
    return AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True, **kwargs)
"""


SERVE = """
import json, sys

def logits(name, images, **kwargs):
    return load(name, **kwargs)(torch.tensor(images)).logits.tolist()

answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    code, values = json.loads(line)
    try:
        names = globals() | values
        exec(code, names)
        answer = {"result": names.get("result")}
    except Exception as error:
        answer = {"error": f"{' '.join(kind.__name__ for kind in type(error).__mro__)}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
"""


class ClientError(Exception):
    """An error in a client: the names of its class and their bases, and its message."""


class Client:
    """A process with an empty cache that runs code and gives what it leaves in `result`."""

    def __init__(self, hub: HubServer, home: Path, setup: str, token: str | None = None, **settings: str):
        self.home, self.errors = home, home / "stderr.txt"
        warnings = ["-W", "error", "-W", "default::DeprecationWarning"]  # the client sends files in a deprecated way
        command = [sys.executable, *warnings, "-P", "-c", setup + SERVE]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = client_environment(hub, home, token) | settings
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(command, env=environment, cwd=home, stderr=errors, **streams)

    def __call__(self, code: str, **values):
        try:
            self.process.stdin.write(json.dumps([code, values]) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except ValueError as error:
            raise RuntimeError(f"The client is gone: {self.errors.read_text()[-3000:]}") from error
        if "error" in answer:
            raise ClientError(answer["error"])
        return answer["result"]

    def logits(self, name: str, images: torch.Tensor, **kwargs) -> torch.Tensor:
        code = "result = logits(name, images, **kwargs)"
        return torch.tensor(self(code, name=name, images=images.tolist(), kwargs=kwargs))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def client_environment(hub: HubServer, home: Path, token: str | None) -> dict[str, str]:
    left_out = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return environment | settings | ({"HF_TOKEN": token} if token else {})


def push(client: Client, folder: Path, repo_id: str, **kwargs) -> str:
    """The commit's id."""
    code = "result = push_checkpoint(folder, repo_id, **kwargs).oid"
    return client(code, folder=str(folder), repo_id=repo_id, kwargs=kwargs)


def check(found: torch.Tensor, model, images, num_heads: int | None = None):
    expected = model(images, num_heads_active=num_heads).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
