"""The commands that measure a model or its data: `profile`, `evaluate`, `cascade` and `check-data`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .loading import accuracies_of, dtype_named, load_images, load_model, load_splits
from .options import (
    CRITERION,
    BatchSize,
    ConfigName,
    Criterion,
    Data,
    Device,
    Dtype,
    Heads,
    ImageColumn,
    Json,
    LabelColumn,
    Model,
    Split,
)
from .printing import print_fitted, print_json, print_report, print_rows


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
    """Measure the costs of each width, and choose a width by them.

    The latency is that of this machine. The accuracy is that of the model's results.json, if it has one.
    """
    import torch

    from hydravit_hf.profiling import choose_num_heads, profile_subnetworks

    if threads is not None:
        torch.set_num_threads(threads)
    dtype = dtype_named(dtype)
    rows = profile_subnetworks(load_model(model, device), heads, batch_size, dtype=dtype, rounds=rounds)
    accuracies = accuracies_of(model)
    rows = [row | accuracies.get(row["num_heads"], {}) for row in rows]
    budgets = {"max_latency_ms": max_latency_ms, "max_memory_mb": max_memory_mb}
    budgets |= {"max_macs": max_macs, "max_parameters": max_parameters}
    budgets = {name: value for name, value in budgets.items() if value is not None}
    if chooses := bool(budgets) or min_accuracy is not None:
        candidates = rows if min_accuracy is None else [_narrowest_accurate(rows, min_accuracy)]
        chosen = choose_num_heads(candidates, **budgets) if budgets else candidates[0]["num_heads"]
    if as_json:
        return print_json({"rows": rows, "num_heads": chosen} if chooses else rows)
    print_rows(rows)
    print(f"\nBatches of {batch_size}, {rows[0]['dtype']}, on {rows[0]['device']}")
    if min_accuracy is not None:
        print(f"The narrowest with an accuracy of {min_accuracy:.1%}: {chosen} heads")
    elif budgets:
        print(f"The widest that fits: {chosen} heads")


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
    from hydravit_hf.evaluation import evaluate_subnetworks
    from hydravit_hf.profiling import add_costs

    loaded = load_model(model, device)
    columns = {"image_column": image_column, "label_column": label_column, "name": config_name}
    images, left_out = load_images(model, loaded.config, data, split, skip_broken_images, **columns)
    rows = add_costs(loaded.config, evaluate_subnetworks(loaded, images, heads, batch_size))
    if output is not None:
        output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if as_json:
        return print_json(rows)
    print_rows(rows)
    print(
        f"\n{len(images)} images of {data}, split {split}"
        + (f"; {left_out} broken images left out" if left_out else "")
    )


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
    criterion: Annotated[Criterion, typer.Option(help=CRITERION)] = "entropy",
    split: Split = "test",
    batch_size: BatchSize = 64,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    config_name: ConfigName = None,
    device: Device = None,
    save: Annotated[bool, typer.Option("--save", help="Save the cascade with the model, in a local folder.")] = False,
    as_json: Json = False,
):
    """Fit a cascade: wider widths run only for uncertain images.

    Give one goal, and images that the model was not trained on.
    """
    from hydravit_hf.cascade import fit_cascade, save_cascade

    if save and not Path(model).is_dir():
        raise ValueError(f"`--save` writes into a local folder, which '{model}' is not.")
    loaded = load_model(model, device)
    columns = {"image_column": image_column, "label_column": label_column, "name": config_name}
    images, _ = load_images(model, loaded.config, data, split, **columns)
    goals = {"max_macs": max_macs, "max_latency_ms": max_latency_ms, "max_accuracy_loss": max_accuracy_loss}
    fitted = fit_cascade(loaded, images, heads or None, **goals, criterion=criterion, batch_size=batch_size)
    if save:
        save_cascade(model, fitted["cascade"])
    if as_json:
        return print_json(fitted)
    print_fitted(fitted)
    print(f"\nFitted to {fitted['images']} images of {data}, split {split}")
    if save:
        print(f"Saved in {Path(model) / 'config.json'}")


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
    """Read every image once, and say what is there.

    It counts the images of each class, and names those that are broken, huge or in both splits. The exit code is 1 if
    an image can't be read or is in both splits.
    """
    from hydravit_hf.data_checks import check_images

    columns = {"image_column": image_column, "label_column": label_column, "name": config_name}
    report = check_images(load_splits(data, **columns), num_proc)
    if as_json:
        print_json(report)
    else:
        print_report(report)
    if report["broken"] or report["duplicates"]:
        raise typer.Exit(1)
