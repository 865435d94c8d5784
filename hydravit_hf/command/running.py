"""The commands that answer images: `predict` and `serve`."""

import sys
from typing import Annotated, Literal

import typer

from .loading import accuracies_of, check_has_cascade, dtype_named, files_named_by, load_model
from .options import CRITERION, BatchSize, Criterion, Device, Dtype, Heads, Json, Model, check_at_most_one
from .printing import print_csv, print_json, print_rows, printable


def predict(
    model: Model,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Paths or URLs of images, or folders of them.")],
    num_heads: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Number of heads to run.", show_default="the model's default")
    ] = None,
    heads: Annotated[
        list[int] | None,
        typer.Option(metavar="K", help="Head counts of a cascade in increasing order, such as 3,12."),
    ] = None,
    thresholds: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X",
            help="Uncertainty from which an image goes on to the next width of a cascade: one for each step, or "
            "give one for all.",
        ),
    ] = None,
    criterion: Annotated[
        Criterion | None, typer.Option(help=CRITERION, show_default="entropy, or the saved one")
    ] = None,
    cascade: Annotated[bool, typer.Option("--cascade", help="Run the cascade that is saved with the model.")] = False,
    top_k: Annotated[int, typer.Option(min=1, metavar="N", help="Number of labels for each image.")] = 5,
    batch_size: BatchSize = 8,
    device: Device = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a line for each label of an image.")] = False,
):
    """Classify images.

    An image that can't be read is reported, and the exit code is 1.
    The other images are classified.
    """
    from tqdm.auto import tqdm
    from transformers import AutoImageProcessor, pipeline

    from hydravit_hf.model.pipeline_hydravit import TASK

    check_at_most_one({"--num-heads": num_heads, "--heads": heads, "--cascade": cascade})
    check_at_most_one({"--json": as_json, "--csv": as_csv})
    images = [image for given in images for image in files_named_by(given)]
    if heads and not thresholds:
        raise ValueError("`--heads` runs a cascade, which needs `--thresholds`. `--num-heads` runs one width.")
    if (thresholds or criterion) and not (heads or cascade):
        raise ValueError("`--thresholds` and `--criterion` belong to a cascade: give `--heads` or `--cascade` too.")
    loaded = load_model(model, device)
    if cascade:
        check_has_cascade(loaded.config)
    classify = pipeline(TASK, loaded, image_processor=AutoImageProcessor.from_pretrained(model))
    options = {"num_heads_active": "cascade" if cascade else num_heads or heads or None, "criterion": criterion}
    options["thresholds"] = thresholds[0] if thresholds and len(thresholds) == 1 else thresholds or None
    options |= {"top_k": top_k, "batch_size": batch_size, "errors": "return"}
    outputs = classify((image for image in images), **options)
    outputs = list(tqdm(outputs, desc="Classifying", total=len(images), leave=False))
    bad = [output["error"] for output in outputs if isinstance(output, dict)]
    if as_json:
        print_json([{"image": image, "output": output} for image, output in zip(images, outputs, strict=True)])
    elif as_csv:
        print_csv(images, outputs)
    else:
        for image, output in zip(images, outputs, strict=True):
            if isinstance(output, list):
                spent = f" ({output[0]['num_heads']} heads)" if "num_heads" in output[0] else ""
                found = ", ".join(f"{printable(row['label'])} {row['score']:.1%}" for row in output)
                print(f"{image}: {found}{spent}")
    for error in bad:
        print(f"error: {error}", file=sys.stderr)
    if bad:
        raise typer.Exit(1)


def serve(
    model: Model,
    deadline_ms: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="X",
            help="Milliseconds from the arrival of an image to its answer, if its request does not say. A good start "
            "is three times what the widest takes for one image, which the command prints.",
        ),
    ] = 100,
    heads: Heads = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port to listen on.")] = 8000,
    max_batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Most images in a batch.")] = 16,
    late: Annotated[
        Literal["answer", "refuse"],
        typer.Option(
            help="What happens to a request that no width can answer in time. answer: it runs after the others. "
            "refuse: it gets 503.",
        ),
    ] = "answer",
    runtime: Annotated[
        Literal["torch", "openvino", "onnx"],
        typer.Option(help="What runs the model. openvino and onnx export each width at the start."),
    ] = "torch",
    dtype: Dtype = None,
    device: Device = None,
    max_queue: Annotated[int, typer.Option(min=1, metavar="N", help="Most requests at a time. More get 503.")] = 256,
    max_body_mb: Annotated[
        float, typer.Option(metavar="X", help="Megabytes of a request. A larger one gets 413.")
    ] = 20,
    timeout_s: Annotated[
        float, typer.Option(metavar="X", help="Seconds for a request to arrive. A slower one gets 408.")
    ] = 10,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Download images from addresses that requests name.")
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", envvar="HYDRAVIT_API_KEY", help="Secret that requests must carry.", show_default="none"
        ),
    ] = None,
):
    """Serve a model over HTTP. Each batch runs at the widest width that the deadlines of its requests allow.

    Try it with `curl --data-binary @image.png -H "Content-Type: image/png" 127.0.0.1:8000/predict`, or open
    http://127.0.0.1:8000 in a browser. /info names the widths, /metrics is for Prometheus. Ctrl+C or SIGTERM answers
    what was accepted, and stops.
    """
    from transformers import AutoImageProcessor

    from hydravit_hf.engine import Engine
    from hydravit_hf.folders import short_name
    from hydravit_hf.server import Limits, Service, bind, serve

    options = {"deadline_ms": deadline_ms, "max_batch_size": max_batch_size, "late": late, "runtime": runtime}
    options["dtype"] = dtype_named(dtype)
    with bind(host, port) as bound:
        loaded, processor = load_model(model, device), AutoImageProcessor.from_pretrained(model)
        print("Measuring each width on this machine", flush=True)
        with Engine(loaded, processor, heads or None, **options) as engine:
            rows = _widths(model, engine)
            limits = Limits(max_queue, max_body_mb, timeout_s, allow_urls, api_key)
            info = {"model": short_name(model), "runtime": runtime, "device": str(engine.device), "widths": rows}
            print_rows(rows)
            print(f"\nServing {model} on http://{host}:{port}, with a deadline of {deadline_ms:g} ms", flush=True)
            serve(Service(engine, limits, info), bound)


def _widths(model: str, engine) -> list[dict]:
    """A row for each width that is served: its costs, the latency of one image, and its accuracy if the model's
    results.json tells it."""
    from hydravit_hf.profiling import add_costs

    accuracies = accuracies_of(model)
    latencies = {row["num_heads"]: row["latency_ms"] for row in engine.rows if row["batch_size"] == 1}
    rows = [{"num_heads": k, "latency_ms": latencies[k]} | accuracies.get(k, {}) for k in engine.heads]
    return add_costs(engine.config, rows)
