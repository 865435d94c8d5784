"""The `hydravit` command: what the package does, from a shell."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

app = typer.Typer(
    help="One Vision Transformer, one checkpoint, any number of attention heads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A HydraViT: a folder or a Hub id.")]
Heads = Annotated[
    list[int] | None, typer.Option("--heads", help="A width; repeat for more. Default: the trained ones.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...  Default: cuda where there is one.")]
Data = Annotated[str, typer.Argument(help='A folder of images or parquet files, a Hub data set, or "digits".')]
Split = Annotated[str, typer.Option(help="train or test")]
Folder = Annotated[Path, typer.Argument(help="A saved HydraViT.")]


@app.command()
def profile(
    model: Model,
    heads: Heads = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a forward pass.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...  Default: that of the weights.")] = None,
    device: Device = None,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each width that are timed.")] = 30,
    max_latency_ms: Annotated[float | None, typer.Option(help="Choose the widest within this latency.")] = None,
    max_memory_mb: Annotated[float | None, typer.Option(help="Choose the widest within this memory.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="Choose the widest within these MACs per image.")] = None,
    max_parameters: Annotated[float | None, typer.Option(help="Choose the widest within this size.")] = None,
    as_json: Json = False,
):
    """What each width costs on this machine, and the widest that fits a budget."""
    import torch

    from .profiling import choose_num_heads, profile_subnetworks

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`--dtype` must be a floating-point type of torch, such as bfloat16, not '{dtype}'.")
    rows = profile_subnetworks(
        _load(model, device), heads, batch_size, dtype=dtype and getattr(torch, dtype), rounds=rounds
    )
    budgets = {"max_latency_ms": max_latency_ms, "max_memory_mb": max_memory_mb}
    budgets |= {"max_macs": max_macs, "max_parameters": max_parameters}
    budgets = {name: value for name, value in budgets.items() if value is not None}
    chosen = choose_num_heads(rows, **budgets) if budgets else None
    if as_json:
        return _print_json({"rows": rows, "num_heads": chosen} if budgets else rows)
    _print_rows(rows)
    print(f"\nBatches of {batch_size}, {rows[0]['dtype']}, on {rows[0]['device']}")
    if budgets:
        print(f"The widest that fits: {chosen} heads")


@app.command()
def evaluate(
    model: Model,
    data: Data,
    heads: Heads = None,
    split: Split = "test",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="Also write the rows to this file, for `hydravit card`.")] = None,
    as_json: Json = False,
):
    """How good each width is: accuracy and loss on labelled images."""
    from .evaluation import evaluate_subnetworks
    from .profiling import add_costs

    loaded = _load(model, device)
    images = _load_images(model, loaded.config, data, split)
    rows = add_costs(loaded.config, evaluate_subnetworks(loaded, images, heads, batch_size))
    if output is not None:
        output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if as_json:
        return _print_json(rows)
    _print_rows(rows)
    print(f"\n{len(images)} images of {data}, {split}")


@app.command()
def predict(
    model: Model,
    images: Annotated[list[str], typer.Argument(help="Paths or URLs.")],
    num_heads_active: Annotated[
        list[int] | None,
        typer.Option(help="Heads to run; repeat, with --threshold, for a cascade. Default: the model's."),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(help="At which uncertainty an image goes on to the next width; one, or one for each step."),
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="entropy, margin or probability.  Default: entropy.")] = None,
    cascade: Annotated[bool, typer.Option("--cascade", help="Run the cascade that was saved with the model.")] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Labels for each image.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    device: Device = None,
    as_json: Json = False,
):
    """Classify images. One that can't be read is reported, and the exit code is 1; the others are classified."""
    from tqdm.auto import tqdm
    from transformers import AutoImageProcessor, pipeline

    from .model.pipeline_hydravit import TASK

    classify = pipeline(TASK, _load(model, device), image_processor=AutoImageProcessor.from_pretrained(model))
    width = num_heads_active or None
    if cascade and width:
        raise ValueError("Give `--cascade` or `--num-heads-active`, not both.")
    if width and len(width) == 1 and not threshold:
        (width,) = width
    options = {"num_heads_active": "cascade" if cascade else width, "threshold": _one_or_all(threshold)}
    options |= {"criterion": criterion, "top_k": top_k, "batch_size": batch_size, "errors": "return"}
    outputs = classify((image for image in images), **options)
    outputs = list(tqdm(outputs, desc="Classifying", total=len(images), leave=False))
    bad = [output["error"] for output in outputs if isinstance(output, dict)]
    if as_json:
        _print_json([{"image": image, "output": output} for image, output in zip(images, outputs, strict=True)])
    else:
        for image, output in zip(images, outputs, strict=True):
            if isinstance(output, list):
                spent = f" ({output[0]['num_heads']} heads)" if "num_heads" in output[0] else ""
                print(f"{image}: " + ", ".join(f"{row['label']} {row['score']:.1%}" for row in output) + spent)
    for error in bad:
        print(f"error: {error}", file=sys.stderr)
    if bad:
        raise typer.Exit(1)


@app.command()
def cascade(
    model: Model,
    data: Data,
    max_macs: Annotated[float | None, typer.Option(help="Mean MACs of an image, at most.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Mean milliseconds of an image here, at most.")] = None,
    max_accuracy_loss: Annotated[
        float | None, typer.Option(help="Accuracy that may be lost against the widest, such as 0.005.")
    ] = None,
    heads: Annotated[
        list[int] | None, typer.Option(help="A width; repeat for more. Default: narrowest, middle and widest.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="entropy, margin or probability")] = "entropy",
    split: Split = "test",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Device = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write it into the configuration of the model's folder.")
    ] = False,
    as_json: Json = False,
):
    """Fit a cascade, which runs wider widths only for uncertain images, to one goal on images not trained on."""
    from .cascade import fit_cascade, save_cascade

    if save and not Path(model).is_dir():
        raise ValueError(f"`--save` writes into a local folder, which '{model}' is not.")
    loaded = _load(model, device)
    images = _load_images(model, loaded.config, data, split)
    goals = {"max_macs": max_macs, "max_latency_ms": max_latency_ms, "max_accuracy_loss": max_accuracy_loss}
    fitted = fit_cascade(loaded, images, heads or None, **goals, criterion=criterion, batch_size=batch_size)
    if save:
        save_cascade(model, fitted["cascade"])
    if as_json:
        return _print_json(fitted)
    settings = fitted["cascade"]
    thresholds = [*settings["thresholds"], None]
    steps = zip(settings["num_heads"], fitted["shares"], settings["temperatures"], thresholds, strict=True)
    for num_heads, share, temperature, threshold in steps:
        goes_on = "" if threshold is None else f", on from {criterion} {threshold:.4g}"
        print(f"{num_heads} heads: answers {share:.1%}, temperature {temperature:.3f}{goes_on}")
    cost = f"{fitted['macs'] / 1e9:.4g} GMACs" + (f", {fitted['latency_ms']:.4g} ms" if "latency_ms" in fitted else "")
    print(f"Accuracy {fitted['accuracy']:.2%} at {cost} an image; the widest alone {fitted['widest_accuracy']:.2%}")
    print(f"\nOn the {fitted['images']} images of {data}, {split}, that it was fitted to")
    if save:
        print(f"Saved in {Path(model) / 'config.json'}")


@app.command()
def extract(
    model: Model,
    num_heads: Annotated[int, typer.Argument(help="Heads to keep.")],
    folder: Annotated[Path, typer.Argument(help="The folder to save to; new or empty.")],
    vit: Annotated[bool, typer.Option("--vit", help="Save a stock ViT, which needs no custom code.")] = False,
):
    """Save the first heads of a model as a model of their own, with the image processor."""
    from transformers import AutoImageProcessor

    from .model.configuration_hydravit import HydraViTConfig

    _check_new(folder)
    with _naming(model):
        HydraViTConfig.from_pretrained(model).check_num_heads(num_heads)
    small = _load(model, "cpu", num_attention_heads=num_heads)
    processor = AutoImageProcessor.from_pretrained(model)
    saved = small.to_vit() if vit else small
    saved.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(
        f"Saved {num_heads} heads, {saved.num_parameters() / 1e6:.2f} M parameters, as {type(saved).__name__}: {folder}"
    )


@app.command()
def export(
    model: Model,
    path: Annotated[Path, typer.Argument(help="The file to write, or, for several widths of ONNX, a new folder.")],
    num_heads: Annotated[
        list[int] | None, typer.Option(help="Heads to export; repeat for several widths of ONNX in one. Default: all.")
    ] = None,
    format: Annotated[str, typer.Option(help="onnx, openvino, torch_export or executorch")] = "onnx",
    cascade: Annotated[bool, typer.Option("--cascade", help="Export the saved cascade, as one file of ONNX.")] = False,
):
    """Write a width for another runtime: a file that needs nothing of this package."""
    from transformers import AutoImageProcessor

    from .export import export_cascade, export_subnetwork, export_subnetworks

    if cascade and num_heads:
        raise ValueError("Give `--cascade` or `--num-heads`, not both.")
    if format != "onnx" and (cascade or len(num_heads or []) > 1):
        raise ValueError(f"Several widths in one are for ONNX only, not '{format}'.")
    loaded, heads = _load(model, "cpu"), num_heads or [None]
    processor = AutoImageProcessor.from_pretrained(model)
    if cascade:
        written = export_cascade(loaded, path, processor)
    elif len(heads) == 1:
        written = export_subnetwork(loaded, heads[0], format, path, processor)
    else:
        written = export_subnetworks(loaded, heads, path, processor)
    print(f"Wrote {written}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .pth.tar file of the original implementation.")],
    folder: Annotated[Path, typer.Argument(help="The folder to save to; new or empty.")],
    no_ema: Annotated[bool, typer.Option("--no-ema", help="Take the last weights, not the averaged ones.")] = False,
):
    """Turn a training file of the original implementation into a saved HydraViT."""
    from .convert_checkpoint import convert_and_save

    config = convert_and_save(source, folder, use_ema=not no_ema).config
    print(f"Saved {config.num_attention_heads} heads, {config.num_labels} labels: {folder}")


@app.command()
def card(
    folder: Folder,
    results: Annotated[
        Path | None, typer.Option(help="Rows of `hydravit evaluate`. Default: the results.json there.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Name of the model. Default: that of the folder.")] = None,
    model_id: Annotated[
        str | None, typer.Option(help="What the code of the card loads, a Hub id. Default: the title.")
    ] = None,
    dataset_name: Annotated[str, typer.Option(help="What the accuracy was measured on.")] = "held-out images",
    dataset_id: Annotated[str | None, typer.Option(help="Its Hub id.")] = None,
    training: Annotated[str | None, typer.Option(help="Training data and recipe, Markdown.")] = None,
    license: Annotated[str, typer.Option(help="Licence of the weights.")] = "apache-2.0",
    measure: Annotated[bool, typer.Option(help="Measure latency and memory on this machine.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the card that is there.")] = False,
):
    """Write the model card, README.md, and its plot into a checkpoint's folder."""
    from .model_card import save_model_card
    from .profiling import profile_subnetworks

    if (folder / "README.md").exists() and not overwrite:
        raise ValueError(f"'{folder / 'README.md'}' exists; give --overwrite to replace it.")
    results = results or folder / "results.json"
    if not results.is_file():
        raise FileNotFoundError(f"There is no file '{results}'; `hydravit evaluate --output {results}` writes it.")
    rows = json.loads(results.read_text(encoding="utf-8"))
    model = _load(str(folder))
    if measure:
        costs = profile_subnetworks(model, [row["num_heads"] for row in rows])
        rows = [row | cost for row, cost in zip(rows, costs, strict=True)]
    options = {"model_id": model_id, "dataset_name": dataset_name, "dataset_id": dataset_id}
    save_model_card(folder, model, rows, title or folder.resolve().name, training=training, license=license, **options)
    print(f"Wrote README.md, results.json and accuracy_over_macs.png to {folder}")


@app.command()
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(help="user/name")],
    private: Annotated[bool | None, typer.Option(help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch. Default: main.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload HydraViT",
):
    """Publish a checkpoint's folder on the Hub, in one commit."""
    from .hub import push_checkpoint

    commit = push_checkpoint(folder, repo_id, private=private, revision=revision, commit_message=message)
    print(commit.commit_url)


def _load(model: str, device: str | None = None, **kwargs):
    import torch

    from .model.modeling_hydravit import HydraViTForImageClassification

    with _naming(model):
        loaded = HydraViTForImageClassification.from_pretrained(model, **kwargs)
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _load_images(model: str, config, data: str, split: str):
    """Labelled images as the model takes them."""
    from transformers import AutoImageProcessor

    from .data import check_labels, load_images, to_pixel_values

    sources = {} if data == "digits" else {"data_dir" if Path(data).is_dir() else "dataset_name": data}
    splits = load_images(**sources)
    if split not in splits:
        raise ValueError(f"`--split` must be one of {', '.join(splits)}, not '{split}'.")
    images = splits[split]
    if config.id2label[0] != "LABEL_0":  # classes by their names, as two data sets may number them differently
        images = _align_labels(images, config.label2id)
    check_labels(images, config.num_labels)
    return images.with_transform(to_pixel_values(AutoImageProcessor.from_pretrained(model)))


def _one_or_all(values: list | None):
    return values[0] if values and len(values) == 1 else values or None


@contextmanager
def _naming(model: str):
    """Errors say which model could not be loaded; transformers' don't, without a network."""
    try:
        yield
    except OSError as error:
        raise OSError(f"'{model}' could not be loaded: {error}") from error


def _align_labels(images, label2id: dict):
    try:
        return images.align_labels_with_mapping(label2id, "label")
    except KeyError as error:
        raise ValueError(f"The model has no label {error}, which is a class of the data set.") from error


def _check_new(folder: Path):
    from .folders import is_new_or_empty

    if not is_new_or_empty(folder):
        raise ValueError(f"'{folder}' exists and is not an empty folder.")


def _print_rows(rows: list[dict]):
    from .reporting import format_table

    print(format_table(rows))


def _print_json(value):
    print(json.dumps(value, indent=2))


def main():
    """Run the command. It exits with 0 where it did what was asked, 1 and one line on stderr where it couldn't, 2 after
    wrong usage."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        app()
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error}: pip install "hydravit_hf[train]"')
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
