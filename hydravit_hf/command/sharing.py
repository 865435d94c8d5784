"""The commands that publish a model: `card` and `push`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .loading import load_model
from .options import Folder


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
        str | None,
        typer.Option(
            metavar="TEXT", help="Name of the data that the accuracy was measured on.", show_default="held-out images"
        ),
    ] = None,
    dataset_id: Annotated[str | None, typer.Option(metavar="ID", help="Hub id of these data.")] = None,
    training: Annotated[str | None, typer.Option(metavar="TEXT", help="Training data and recipe, in Markdown.")] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence of the weights.", show_default="apache-2.0")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Whether to measure latency and memory on this machine.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the card that is there.")] = False,
):
    """Write the model card README.md and its plot into a folder."""
    from hydravit_hf.model_card import save_model_card
    from hydravit_hf.profiling import profile_subnetworks

    if (folder / "README.md").exists() and not overwrite:
        raise ValueError(f"'{folder / 'README.md'}' exists; give --overwrite to replace it.")
    results = results or folder / "results.json"
    if not results.is_file():
        raise FileNotFoundError(f"There is no file '{results}'; `hydravit evaluate --output {results}` writes it.")
    rows = json.loads(results.read_text(encoding="utf-8"))
    model = load_model(str(folder))
    if measure:
        costs = profile_subnetworks(model, [row["num_heads"] for row in rows])
        rows = [row | cost for row, cost in zip(rows, costs, strict=True)]
    options = {"model_id": model_id, "dataset_name": dataset_name, "dataset_id": dataset_id}
    save_model_card(folder, model, rows, title or folder.resolve().name, training=training, license=license, **options)
    print(f"Wrote README.md, results.json and accuracy_over_macs.png to {folder}")


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
    from hydravit_hf.hub import push_checkpoint

    options = {"private": private, "revision": revision, "commit_message": message, "include": include}
    options |= {"shard_by_heads": shard_by_heads, "endpoint": endpoint}
    print(push_checkpoint(folder, repo_id, **options).commit_url)
