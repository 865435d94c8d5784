"""The `hydravit` command: the functions of the package, from a shell.

A command imports what it needs when it runs, so that `hydravit --help` is fast.
"""

import csv
import json
import re
import sys
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool):
    if wanted:
        print(f"hydravit_hf {version('hydravit_hf')}")
        raise typer.Exit


@app.callback()
def options(
    is_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
):
    """One Vision Transformer, one checkpoint, any number of attention heads."""


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a HydraViT.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a saved HydraViT.")]
NewFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to save to, new or empty.")]
Data = Annotated[
    str, typer.Argument(metavar="DATA", help='Folder of images or parquet files, data set on the Hub, or "digits".')
]
Heads = Annotated[
    list[int] | None,
    typer.Option(
        "--heads", metavar="K", help="Head counts of the widths, such as 3,6,12.", show_default="all trained widths"
    ),
]
ConfigName = Annotated[str | None, typer.Option(metavar="NAME", help="Configuration of a data set on the Hub.")]
ImageColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of the images.", show_default="found by type and name")
]
LabelColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of the labels.", show_default="found by type and name")
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Split of the data: train or test.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Number of images in a forward pass.")]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Device, such as cpu or cuda.", show_default="cuda if there is one")
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Type to compute in, such as bfloat16.", show_default="that of the model"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FINDINGS = {"broken": "broken", "huge": "huge", "duplicates": "in both splits"}
SERVE = ("multipart", "prometheus_client", "python_multipart", "starlette", "uvicorn")  # modules of the extra `serve`
REPEATED = ("--heads", "--thresholds")  # options of several numbers
CRITERION = "Measure of uncertainty: entropy, margin or probability."


@app.command()
def profile(
    model: Model,
    heads: Heads = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = None,
    device: Device = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Number of timings of each width.")] = 30,
    max_latency_ms: Annotated[
        float | None, typer.Option(metavar="X", help="Choose the widest with at most this latency in ms.")
    ] = None,
    max_memory_mb: Annotated[
        float | None, typer.Option(metavar="X", help="Choose the widest with at most this peak memory in MB.")
    ] = None,
    max_macs: Annotated[
        float | None, typer.Option(metavar="X", help="Choose the widest with at most these MACs per image.")
    ] = None,
    max_parameters: Annotated[
        float | None, typer.Option(metavar="X", help="Choose the widest with at most these parameters.")
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="X", help="Choose the narrowest with this accuracy, a fraction, by results.json."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads of the processor.", show_default="as torch is set")
    ] = None,
    as_json: Json = False,
):
    """Measure the costs of each width on this machine, and choose a width by a budget or an accuracy.

    The accuracy is that of the model's results.json, if it has one.
    """
    import torch

    from .profiling import choose_num_heads, profile_subnetworks

    if threads is not None:
        torch.set_num_threads(threads)
    dtype = _dtype(dtype)
    rows = profile_subnetworks(_load(model, device), heads, batch_size, dtype=dtype, rounds=rounds)
    accuracies = _accuracies(model)
    rows = [row | accuracies.get(row["num_heads"], {}) for row in rows]
    budgets = {"max_latency_ms": max_latency_ms, "max_memory_mb": max_memory_mb}
    budgets |= {"max_macs": max_macs, "max_parameters": max_parameters}
    budgets = {name: value for name, value in budgets.items() if value is not None}
    if chooses := bool(budgets) or min_accuracy is not None:
        candidates = rows if min_accuracy is None else [_narrowest_accurate(rows, min_accuracy)]
        chosen = choose_num_heads(candidates, **budgets) if budgets else candidates[0]["num_heads"]
    if as_json:
        return _print_json({"rows": rows, "num_heads": chosen} if chooses else rows)
    _print_rows(rows)
    print(f"\nBatches of {batch_size}, {rows[0]['dtype']}, on {rows[0]['device']}")
    if min_accuracy is not None:
        print(f"The narrowest with an accuracy of {min_accuracy:.1%}: {chosen} heads")
    elif budgets:
        print(f"The widest that fits: {chosen} heads")


@app.command()
def evaluate(
    model: Model,
    data: Data,
    heads: Heads = None,
    split: Split = "test",
    batch_size: BatchSize = 64,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    config_name: ConfigName = None,
    skip_broken_images: Annotated[
        bool, typer.Option("--skip-broken-images", help="Leave out the images that can't be read.")
    ] = False,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the rows to this file, for `hydravit card`.")
    ] = None,
    as_json: Json = False,
):
    """Evaluate each width on labelled images: accuracy and loss."""
    from .evaluation import evaluate_subnetworks
    from .profiling import add_costs

    loaded = _load(model, device)
    columns = {"image_column": image_column, "label_column": label_column, "name": config_name}
    images, left_out = _load_images(model, loaded.config, data, split, skip_broken_images, **columns)
    rows = add_costs(loaded.config, evaluate_subnetworks(loaded, images, heads, batch_size))
    if output is not None:
        output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if as_json:
        return _print_json(rows)
    _print_rows(rows)
    print(
        f"\n{len(images)} images of {data}, split {split}"
        + (f"; {left_out} broken images left out" if left_out else "")
    )


@app.command()
def check_data(
    data: Data,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    config_name: ConfigName = None,
    num_proc: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of processes that read images.", show_default="one a core, 8 at most"
        ),
    ] = None,
    as_json: Json = False,
):
    """Read every image once, and say what is there: the images of each class, broken, huge and duplicate ones.

    The exit code is 1 if an image can't be read or is in both splits.
    """
    from .data_checks import check_images

    columns = {"image_column": image_column, "label_column": label_column, "name": config_name}
    report = check_images(_load_splits(data, **columns), num_proc)
    if as_json:
        _print_json(report)
    else:
        _print_report(report)
    if report["broken"] or report["duplicates"]:
        raise typer.Exit(1)


@app.command()
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
        str | None, typer.Option(metavar="NAME", help=CRITERION, show_default="entropy, or the saved one")
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

    from .model.pipeline_hydravit import TASK

    _check_at_most_one({"--num-heads": num_heads, "--heads": heads, "--cascade": cascade})
    _check_at_most_one({"--json": as_json, "--csv": as_csv})
    images = [image for given in images for image in _images_in(given)]
    if heads and not thresholds:
        raise ValueError("`--heads` runs a cascade, which needs `--thresholds`. `--num-heads` runs one width.")
    if (thresholds or criterion) and not (heads or cascade):
        raise ValueError("`--thresholds` and `--criterion` belong to a cascade: give `--heads` or `--cascade` too.")
    classify = pipeline(TASK, _load(model, device), image_processor=AutoImageProcessor.from_pretrained(model))
    options = {"num_heads_active": "cascade" if cascade else num_heads or heads or None, "criterion": criterion}
    options["thresholds"] = thresholds[0] if thresholds and len(thresholds) == 1 else thresholds or None
    options |= {"top_k": top_k, "batch_size": batch_size, "errors": "return"}
    outputs = classify((image for image in images), **options)
    outputs = list(tqdm(outputs, desc="Classifying", total=len(images), leave=False))
    bad = [output["error"] for output in outputs if isinstance(output, dict)]
    if as_json:
        _print_json([{"image": image, "output": output} for image, output in zip(images, outputs, strict=True)])
    elif as_csv:
        _print_csv(images, outputs)
    else:
        for image, output in zip(images, outputs, strict=True):
            if isinstance(output, list):
                spent = f" ({output[0]['num_heads']} heads)" if "num_heads" in output[0] else ""
                found = ", ".join(f"{_printable(row['label'])} {row['score']:.1%}" for row in output)
                print(f"{image}: {found}{spent}")
    for error in bad:
        print(f"error: {error}", file=sys.stderr)
    if bad:
        raise typer.Exit(1)


@app.command()
def cascade(
    model: Model,
    data: Data,
    max_macs: Annotated[
        float | None, typer.Option(metavar="X", help="Goal: the highest accuracy within these mean MACs per image.")
    ] = None,
    max_latency_ms: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Goal: the highest accuracy within this mean latency per image, in ms on this machine."
        ),
    ] = None,
    max_accuracy_loss: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Goal: the fewest MACs with an accuracy at most this far below the widest, such as 0.005."
        ),
    ] = None,
    heads: Annotated[
        list[int] | None,
        typer.Option(
            metavar="K",
            help="Head counts of the widths in increasing order, such as 3,6,12.",
            show_default="the narrowest, a middle and the widest",
        ),
    ] = None,
    criterion: Annotated[str, typer.Option(metavar="NAME", help=CRITERION)] = "entropy",
    split: Split = "test",
    batch_size: BatchSize = 64,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    config_name: ConfigName = None,
    device: Device = None,
    save: Annotated[bool, typer.Option("--save", help="Save the cascade with the model, in a local folder.")] = False,
    as_json: Json = False,
):
    """Fit a cascade, which runs wider widths only for uncertain images, to one goal.

    Use images that the model was not trained on.
    """
    from .cascade import fit_cascade, save_cascade

    if save and not Path(model).is_dir():
        raise ValueError(f"`--save` writes into a local folder, which '{model}' is not.")
    loaded = _load(model, device)
    columns = {"image_column": image_column, "label_column": label_column, "name": config_name}
    images, _ = _load_images(model, loaded.config, data, split, **columns)
    goals = {"max_macs": max_macs, "max_latency_ms": max_latency_ms, "max_accuracy_loss": max_accuracy_loss}
    fitted = fit_cascade(loaded, images, heads or None, **goals, criterion=criterion, batch_size=batch_size)
    if save:
        save_cascade(model, fitted["cascade"])
    if as_json:
        return _print_json(fitted)
    _print_fitted(fitted)
    print(f"\nFitted to {fitted['images']} images of {data}, split {split}")
    if save:
        print(f"Saved in {Path(model) / 'config.json'}")


@app.command()
def extract(
    model: Model,
    num_heads: Annotated[int, typer.Argument(metavar="NUM_HEADS", help="Number of heads to keep.")],
    folder: NewFolder,
    vit: Annotated[bool, typer.Option("--vit", help="Save a stock ViT, which needs no custom code.")] = False,
):
    """Save the leading heads of a model as a model of their own, with the image processor."""
    from transformers import AutoImageProcessor

    from .folders import check_new_or_empty
    from .model.configuration_hydravit import HydraViTConfig

    check_new_or_empty(folder)
    with _naming(model):
        HydraViTConfig.from_pretrained(model).check_num_heads(num_heads)
    small = _load(model, "cpu", num_attention_heads=num_heads)
    processor = AutoImageProcessor.from_pretrained(model)
    saved = small.to_vit() if vit else small
    saved.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = f"{saved.num_parameters() / 1e6:.2f} M parameters"
    print(f"Saved a {type(saved).__name__} of {num_heads} heads and {size} to {folder}")


@app.command()
def export(
    model: Model,
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="File to write, or a new folder for several widths, with a file for each."),
    ],
    num_heads: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Number of heads to export.", show_default="the model's default"),
    ] = None,
    heads: Annotated[
        list[int] | None,
        typer.Option(metavar="K", help="Head counts of widths to export together, such as 3,6,12, in ONNX only."),
    ] = None,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Export the cascade that is saved with the model, in ONNX only.")
    ] = False,
    format: Annotated[
        str, typer.Option(metavar="NAME", help="Format: onnx, openvino, torch_export or executorch.")
    ] = "onnx",
    transformers_js: Annotated[
        bool, typer.Option("--transformers-js", help="Export one width as a folder that transformers.js loads.")
    ] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Export a folder with a page that runs several widths in the browser.")
    ] = False,
    examples: Annotated[
        list[Path] | None,
        typer.Option("--example", metavar="IMAGE", help="Image that the page offers. Repeat it for several."),
    ] = None,
):
    """Write one width, several widths or the cascade for another runtime, as files that run without this package."""
    from transformers import AutoImageProcessor

    from .browser import export_page, export_transformers_js
    from .export import export_cascade, export_subnetwork, export_subnetworks
    from .folders import short_name

    _check_at_most_one({"--num-heads": num_heads, "--heads": heads, "--cascade": cascade})
    _check_at_most_one({"--cascade": cascade, "--page": page, "--transformers-js": transformers_js})
    _check_at_most_one({"--num-heads": num_heads, "--page": page})
    _check_at_most_one({"--heads": heads, "--transformers-js": transformers_js})
    if format != "onnx" and (heads or cascade or page or transformers_js):
        raise ValueError(f"Several widths, cascades, pages and transformers.js are for ONNX only, not for '{format}'.")
    if examples and not page:
        raise ValueError("`--example` belongs to a page: give `--page` too.")
    loaded, processor = _load(model, "cpu"), AutoImageProcessor.from_pretrained(model)
    if transformers_js:
        written = export_transformers_js(loaded, num_heads, path, processor)
    elif page:
        written = export_page(loaded, heads, path, processor, examples or (), short_name(model))
    elif cascade:
        written = export_cascade(loaded, path, processor)
    elif heads:
        written = export_subnetworks(loaded, heads, path, processor)
    else:
        written = export_subnetwork(loaded, num_heads, format, path, processor)
    print(f"Wrote {written}")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Training file of the original implementation, *.pth.tar.")
    ],
    folder: NewFolder,
    no_ema: Annotated[
        bool, typer.Option("--no-ema", help="Take the last weights instead of the averaged ones.")
    ] = False,
):
    """Convert a training file of the original implementation to a saved HydraViT."""
    from .convert_checkpoint import convert_and_save

    config = convert_and_save(source, folder, use_ema=not no_ema).config
    print(f"Saved a HydraViT of {config.num_attention_heads} heads and {config.num_labels} labels to {folder}")


@app.command()
def elastify(
    vit: Annotated[
        str, typer.Argument(metavar="VIT", help="ViT, DeiT, ViTMAE, ViTMSN or DINOv2, or vit_* or deit_* of timm.")
    ],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="Images to find the order on: as DATA elsewhere.")],
    folder: NewFolder,
    num_attention_heads: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Heads to hold. More are new ones.", show_default="the ViT's")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images to take.")] = 1024,
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images in a pass.", show_default="few, which suit a CPU")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    config_name: ConfigName = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="IMAGES is a folder without classes; nothing is evaluated.")
    ] = False,
    device: Device = None,
):
    """Make a published ViT elastic: order its parts by what they contribute. Its own logits stay.

    Where the images have the classes of the ViT, every width is evaluated on those held out, and the card is written.
    """
    from datasets import ClassLabel

    from .data import load_image_files, to_pixel_values, undecoded
    from .elastification import elastify
    from .folders import check_new_or_empty, short_name
    from .image_processing import load_image_processor
    from .model.configuration_hydravit import HydraViTConfig
    from .model.sources_hydravit import read_source

    check_new_or_empty(folder)
    with _naming(vit):
        source = read_source(vit)
    processor = load_image_processor(vit, HydraViTConfig(**source.arguments))
    if unlabelled:
        splits = {"train": load_image_files(images)}
    else:
        splits = _load_splits(images, image_column=image_column, label_column=label_column, name=config_name)
    measured = undecoded(splits["train"]).with_transform(to_pixel_values(processor))
    model = elastify(source, measured, num_attention_heads, max_images, batch_size, _device(device))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = f"{model.num_parameters() / 1e6:.2f} M parameters"
    print(f"Saved a HydraViT of {model.config.num_attention_heads} heads and {size} to {folder}")
    test = splits.get("test")
    if (
        test is None
        or "classifier.weight" not in source.tensors
        or not isinstance(test.features["label"], ClassLabel)
        or not set(test.features["label"].names) <= model.config.label2id.keys()
    ):
        return print("The images do not have the classes of the ViT: no width was evaluated, and there is no card.")
    recipe = f"`hydravit elastify` measured {min(max_images, len(measured))} images of {short_name(images)}."
    _evaluate_elastified(model, source, processor, test, folder, short_name(vit), short_name(images), recipe)


def _evaluate_elastified(model, source, processor, test, folder: Path, vit: str, images: str, recipe: str):
    """Evaluate every width beside the ViT that the model was made from, and write the card."""
    from .data import align_labels, to_pixel_values, undecoded
    from .evaluation import evaluate_classifier, evaluate_subnetworks
    from .model.modeling_hydravit import HydraViTForImageClassification
    from .model_card import save_model_card

    test = undecoded(align_labels(test, model.config.label2id)).with_transform(to_pixel_values(processor))
    original = HydraViTForImageClassification.from_vit(source, source.arguments["num_attention_heads"])
    accuracy = evaluate_classifier(original.to(model.device), test)["accuracy"]
    rows = evaluate_subnetworks(model, test)
    data = f"{len(test)} held-out images of {images}"
    save_model_card(
        folder,
        model,
        rows,
        folder.resolve().name,
        dataset_name=data,
        results_note=f"Accuracy on {data}. The original, {vit}, has {accuracy:.2%}.",
        training=f"{recipe} Nothing was trained.",
        base_model=vit if "/" in vit else None,
        ordered_from=vit,
    )
    _print_rows(rows)
    print(f"\nThe original: {accuracy:.2%}, on {data}")
    print(f"Wrote the card README.md, results.json and accuracy_over_macs.png to {folder}")


@app.command()
def card(
    folder: Folder,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows that `hydravit evaluate --output` wrote.",
            show_default="results.json in the folder",
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Name of the model.", show_default="name of the folder")
    ] = None,
    model_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Hub id that the code on the card loads.", show_default="the title"),
    ] = None,
    dataset_name: Annotated[
        str, typer.Option(metavar="TEXT", help="Name of the data that the accuracy was measured on.")
    ] = "held-out images",
    dataset_id: Annotated[str | None, typer.Option(metavar="ID", help="Hub id of these data.")] = None,
    training: Annotated[str | None, typer.Option(metavar="TEXT", help="Training data and recipe, in Markdown.")] = None,
    license: Annotated[str, typer.Option(metavar="ID", help="Licence of the weights.")] = "apache-2.0",
    measure: Annotated[bool, typer.Option(help="Whether to measure latency and memory on this machine.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the card that is there.")] = False,
):
    """Write the model card README.md and its plot into the folder of a checkpoint."""
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
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Repository, user/name.")],
    private: Annotated[
        bool | None, typer.Option(help="Whether a new repository is private.", show_default="as the account is set")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch to commit to.", show_default="main")
    ] = None,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Message of the commit.")] = "Upload HydraViT",
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Further files to upload, such as 'examples/*.jpg'. Repeat it for more."),
    ] = None,
    shard_by_heads: Annotated[
        bool,
        typer.Option("--shard-by-heads", help="Upload a file for each trained width: k heads download those up to k."),
    ] = False,
    endpoint: Annotated[
        bool, typer.Option("--endpoint", help="Add the handler.py that an Inference Endpoint of Hugging Face loads.")
    ] = False,
):
    """Publish the folder of a checkpoint on the Hub, in one commit."""
    from .hub import push_checkpoint

    options = {"private": private, "revision": revision, "commit_message": message, "include": include}
    options |= {"shard_by_heads": shard_by_heads, "endpoint": endpoint}
    print(push_checkpoint(folder, repo_id, **options).commit_url)


@app.command()
def reshard(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a saved HydraViT.")],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to save to, new or empty.")],
    heads: Heads = None,
    one_file: Annotated[bool, typer.Option("--one-file", help="Write one file instead of one for each width.")] = False,
):
    """Save the weights of a model in a file for each width, or back in one file, with all its other files.

    From files by width, a load of k heads downloads and reads those up to k only.
    """
    from .folders import check_new_or_empty
    from .resharding import is_weights, reshard_checkpoint

    _check_at_most_one({"--heads": heads, "--one-file": one_file})
    check_new_or_empty(folder)
    reshard_checkpoint(source, folder, shard_by_heads=not one_file and (heads or True))
    for file in sorted(file for file in folder.glob("*.safetensors") if is_weights(file.name)):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


@app.command()
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
        str,
        typer.Option(
            metavar="NAME",
            help="What happens to a request that no width can answer in time. answer: it runs after the others. "
            "refuse: it gets 503.",
        ),
    ] = "answer",
    runtime: Annotated[
        str,
        typer.Option(metavar="NAME", help="torch, openvino or onnx. The last two export each width at the start."),
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

    from .engine import Engine
    from .folders import short_name
    from .server import Limits, Service, bind, serve

    options = {"deadline_ms": deadline_ms, "max_batch_size": max_batch_size, "late": late, "runtime": runtime}
    options["dtype"] = _dtype(dtype)
    with bind(host, port) as bound:
        loaded, processor = _load(model, device), AutoImageProcessor.from_pretrained(model)
        print("Measuring each width on this machine", flush=True)
        with Engine(loaded, processor, heads or None, **options) as engine:
            rows = _widths(model, engine)
            limits = Limits(max_queue, max_body_mb, timeout_s, allow_urls, api_key)
            info = {"model": short_name(model), "runtime": runtime, "device": str(engine.device), "widths": rows}
            _print_rows(rows)
            print(f"\nServing {model} on http://{host}:{port}, with a deadline of {deadline_ms:g} ms", flush=True)
            serve(Service(engine, limits, info), bound)


def _images_in(source: str) -> list[str]:
    """The image files in a folder, or what is no folder."""
    from PIL import Image

    if not Path(source).is_dir():
        return [source]
    suffixes = Image.registered_extensions()
    found = sorted(str(file) for file in Path(source).rglob("*") if file.suffix.lower() in suffixes)
    if not found:
        raise FileNotFoundError(f"There are no images in '{source}'.")
    return found


def _load(model: str, device: str | None = None, **kwargs):
    from .folders import check_path
    from .model.modeling_hydravit import HydraViTForImageClassification

    check_path(model)
    with _naming(model):
        loaded = HydraViTForImageClassification.from_pretrained(model, **kwargs)
    return loaded.to(_device(device))


def _widths(model: str, engine) -> list[dict]:
    """A row for each width that is served: its costs, the latency of one image, and its accuracy if the model's
    results.json tells it."""
    from .profiling import add_costs

    accuracies = _accuracies(model)
    latencies = {row["num_heads"]: row["latency_ms"] for row in engine.rows if row["batch_size"] == 1}
    rows = [{"num_heads": k, "latency_ms": latencies[k]} | accuracies.get(k, {}) for k in engine.heads]
    return add_costs(engine.config, rows)


def _accuracies(model: str) -> dict[int, dict]:
    """The accuracy of each width that the model's results.json tells."""
    from transformers.utils import cached_file

    file = cached_file(model, "results.json", _raise_exceptions_for_missing_entries=False)
    results = json.loads(Path(file).read_text(encoding="utf-8")) if file else []
    return {row["num_heads"]: {"accuracy": row["accuracy"]} for row in results if "accuracy" in row}


def _narrowest_accurate(rows: list[dict], min_accuracy: float) -> dict:
    known = [row for row in rows if "accuracy" in row]
    if not known:
        raise ValueError("`--min-accuracy` needs a results.json: `hydravit evaluate --output` writes it.")
    accurate = [row for row in known if row["accuracy"] >= min_accuracy]
    if not accurate:
        best = max(known, key=lambda row: row["accuracy"])
        raise ValueError(
            f"No width has an accuracy of {min_accuracy:.1%}. The best, {best['num_heads']} heads, has "
            f"{best['accuracy']:.1%}."
        )
    return min(accurate, key=lambda row: row["num_heads"])


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(name: str | None):
    import torch

    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`--dtype` must be a floating-point type of torch, such as bfloat16, not '{name}'.")
    return dtype


def _load_splits(data: str, **columns: str | None):
    from .data import load_images
    from .folders import check_path

    if data != "digits":
        check_path(data)
    sources = {} if data == "digits" else {"data_dir" if Path(data).is_dir() else "dataset_name": data}
    return load_images(**sources, **{name: value for name, value in columns.items() if value is not None})


def _load_images(model: str, config, data: str, split: str, skip_broken: bool = False, **columns: str | None):
    """Load labelled images and prepare them for a model, whose classes they must have. Returns them, and the number of
    those that were left out."""
    from datasets import ClassLabel
    from transformers import AutoImageProcessor

    from .data import align_labels, check_labels, to_pixel_values, undecoded
    from .data_checks import leave_out_broken

    splits = _load_splits(data, **columns)
    if split not in splits:
        raise ValueError(f"`--split` must be one of {', '.join(splits)}, not '{split}'.")
    images = splits[split]
    if not isinstance(images.features["label"], ClassLabel):
        raise ValueError("The images have several labels or numbers as labels: `HydraViTTrainer.evaluate` takes them.")
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise ValueError(f"The model must number its labels from 0, not {sorted(config.id2label)[0]}, in `id2label`.")
    if config.id2label[0] != "LABEL_0":  # the names of classes tell more than their numbers
        images = align_labels(images, config.label2id)
    check_labels(images, config.num_labels)
    left_out = 0
    if skip_broken:
        kept, numbers = leave_out_broken({split: images})
        images, left_out = kept[split], numbers[split]
    transform = to_pixel_values(AutoImageProcessor.from_pretrained(model))
    return undecoded(images).with_transform(transform), left_out


def _check_at_most_one(options: dict):
    given = [f"`{name}`" for name, value in options.items() if value]
    if len(given) > 1:
        raise ValueError(f"Give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all of them'}.")


@contextmanager
def _naming(model: str):
    """Name the model in the error if it can't be loaded. Without a network, the errors of transformers don't."""
    try:
        yield
    except OSError as error:
        raise OSError(f"'{model}' could not be loaded: {error}") from error


def _print_fitted(fitted: dict):
    settings = fitted["cascade"]
    thresholds = [*settings["thresholds"], None]
    steps = zip(settings["num_heads"], fitted["shares"], settings["temperatures"], thresholds, strict=True)
    for num_heads, share, temperature, threshold in steps:
        goes_on = "" if threshold is None else f", goes on from {settings['criterion']} {threshold:.4g}"
        print(f"{num_heads} heads: answers {share:.1%}, temperature {temperature:.3f}{goes_on}")
    cost = f"{fitted['macs'] / 1e9:.4g} GMACs" + (f", {fitted['latency_ms']:.4g} ms" if "latency_ms" in fitted else "")
    print(f"Accuracy {fitted['accuracy']:.2%} at {cost} per image; the widest alone {fitted['widest_accuracy']:.2%}")


def _print_report(report: dict):
    def name(place: dict) -> str:
        return _printable(place.get("path") or f"row {place['row']}") + f" ({place['split']})"

    for split, number in report["images"].items():
        print(f"{split}: {number} images")
    for label, numbers in report["classes"].items():
        print(f"  {_printable(label)}: " + ", ".join(f"{number} {split}" for split, number in numbers.items()))
    for place in report["broken"]:
        print(f"broken: {place['split']}, row {place['row']}: {_printable(place['error'])}")
    for place in report["huge"]:
        print(f"huge: {name(place)}: {place['pixels'] / 1e6:.0f} megapixels")
    for same in report["duplicates"]:
        print(f"in both splits: {', '.join(map(name, same))}")
    print(", ".join(f"{len(report[kind])} {words}" for kind, words in FINDINGS.items()))


def _print_rows(rows: list[dict]):
    from .reporting import format_table

    print(format_table(rows))


def _print_csv(images: list[str], outputs: list):
    is_cascade = any("num_heads" in row for output in outputs if isinstance(output, list) for row in output)
    columns = ["image", "rank", "label", "score", *(["num_heads", "macs"] if is_cascade else [])]
    lines = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    lines.writeheader()
    for image, output in zip(images, outputs, strict=True):
        if isinstance(output, list):
            for rank, row in enumerate(output, start=1):
                lines.writerow({"image": image, "rank": rank, **row, "label": _printable(row["label"])})


def _print_json(value):
    print(json.dumps(value, indent=2))


def _printable(text: str) -> str:
    """Escape the control characters of a name that comes with a model, which could steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _repeat_options(arguments: list[str]) -> list[str]:
    """Spell `--heads 3,6` and `--heads 3 6` as click reads several values: `--heads 3 --heads 6`."""
    spelled, option = [], None
    for argument in chain.from_iterable(map(_split_option, arguments)):
        if argument in REPEATED:
            option = argument
            spelled.append(option)
        elif option and re.fullmatch(r"([\d.]+|inf)(,([\d.]+|inf)?)*", argument):
            for number in filter(None, argument.split(",")):
                spelled += [number] if spelled[-1] == option else [option, number]
        else:
            option = None
            spelled.append(argument)
    return spelled


def _split_option(argument: str) -> list[str]:
    name, _, value = argument.partition("=")
    return [name, value] if name in REPEATED and value else [argument]


def main():
    """Run the command.

    The exit code is 0 after success, 1 with one line on stderr after an error, and 2 after wrong usage.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        app(_repeat_options(sys.argv[1:]))
    except ModuleNotFoundError as error:
        extra = "serve" if error.name in SERVE else "train"
        sys.exit(f'error: {error}: pip install "hydravit_hf[{extra}]"')
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except Exception as error:  # its message alone may say little, such as that of a KeyError
        sys.exit(f"error: {type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
