"""The options that several commands share."""

import re
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import typer

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
REPEATED = ("--heads", "--thresholds")  # options of several numbers
CRITERION = "Measure of uncertainty."
Criterion = Literal["entropy", "margin", "probability"]


def repeat_options(arguments: list[str]) -> list[str]:
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


def check_at_most_one(options: dict):
    given = [f"`{name}`" for name, value in options.items() if value]
    if len(given) > 1:
        raise ValueError(f"Give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all of them'}.")
