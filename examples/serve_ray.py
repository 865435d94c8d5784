"""Serve a HydraViT with Ray Serve: replicas on one machine or several, each with the scheduler of `hydravit serve`.

    pip install -c constraints.txt -e ".[serve]" "ray[serve]"
    hydravit profile runs/digits                                     # 1. what deadline to choose: see docs/serving.md
    cd examples && serve run serve_ray:app model=../runs/digits deadline_ms=100     # 2. one machine
    cd examples && serve run serve_ray.yaml                          # 3. with replicas and autoscaling as the file says

For several machines, `ray start --head` on the first and `ray start --address=HOST:6379` on the others, with the
package and the model on each. Then run the third line on the first machine. Ray sends a request to a replica that has
few, and the replica chooses the width. Requests and answers are those of `hydravit serve`.
"""

from pathlib import Path

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import Response
from transformers import AutoImageProcessor

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.engine import Engine
from hydravit_hf.server import Limits, Service


# A replica takes more requests than a batch holds, because the scheduler chooses by the queue that it sees
@serve.deployment(
    max_ongoing_requests=64,
    ray_actor_options={"num_cpus": 1},
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8},
)
class HydraViT:
    """A replica: one copy of the weights, and a scheduler with the latencies of its own machine."""

    def __init__(self, model: str, deadline_ms: float, heads: list[int] | None):
        loaded = HydraViTForImageClassification.from_pretrained(model)
        self.engine = Engine(loaded, AutoImageProcessor.from_pretrained(model), heads, deadline_ms)
        self.service = Service(self.engine, Limits(max_queue=64), {"model": model})

    async def __call__(self, request: Request) -> Response:
        """Let the routes of `hydravit serve` answer."""
        messages = []

        async def send(message: dict):
            messages.append(message)

        await self.service.app(request.scope, request.receive, send)
        body = b"".join(message.get("body", b"") for message in messages[1:])
        headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        return Response(body, messages[0]["status"], headers)

    def check_health(self):
        """Let Ray replace a replica whose model has stopped."""
        if not self.engine.is_alive:
            raise RuntimeError("The engine has stopped.")


def app(arguments: dict) -> Application:
    """Build the application.

    Args:
        arguments: `model`, a folder or Hub id; optionally `deadline_ms` and `heads`.
    """
    model = arguments["model"]
    model = str(Path(model).resolve()) if Path(model).is_dir() else model  # a replica runs in another folder
    return HydraViT.bind(model, float(arguments.get("deadline_ms", 100)), arguments.get("heads"))
