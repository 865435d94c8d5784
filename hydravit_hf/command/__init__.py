"""The `hydravit` command: the functions of `hydravit_hf`, from a shell.

It is installed as the package `hydravit_command`, because importing `hydravit_hf` imports torch and transformers. A
command imports them when it runs, so that `hydravit --help` and the completion of a shell are fast.
"""

import logging
import re
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperCommand

from .measuring import cascade, check_data, evaluate, profile
from .options import repeat_options
from .running import predict, serve
from .saving import convert, elastify, export, extract, quantize, reshard
from .sharing import card, push

# Extra of the package -> modules that it brings
EXTRAS = {
    "export": ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino"),
    "lora": ("peft",),
    "quantize": ("torchao",),
    "serve": ("httptools", "multipart", "prometheus_client", "python_multipart", "starlette", "uvicorn"),
    "train": ("accelerate", "datasets", "evaluate", "matplotlib", "sklearn"),
}
# Name in an error of the package -> parameters of a command that may have given it
GIVEN_BY = {
    "num_heads": ("heads",),  # of a cascade
    "num_heads_active": ("num_heads", "heads"),
    "shard_by_heads": ("heads",),
}


class Command(TyperCommand):
    """A command that hides the messages of other packages, and whose errors name its options."""

    def invoke(self, ctx):
        for name in ("torchao", "torch.utils._pytree"):  # torchao logs at its import what does not fit it
            logging.getLogger(name).setLevel(logging.ERROR)
        from transformers.utils import logging as messages

        messages.set_verbosity_error()
        messages.disable_progress_bar()
        try:
            return super().invoke(ctx)
        except ValueError as error:
            raise ValueError(re.sub(r"`(\w+)`", lambda name: self._as_typed(name, ctx.params), str(error))) from error

    def _as_typed(self, name: re.Match, given: dict) -> str:
        """What a user types for a parameter that an error names, such as `--max-macs` for `max_macs`."""
        own = {parameter.name: parameter for parameter in self.params if not getattr(parameter, "is_flag", False)}
        candidates = [own[parameter] for parameter in GIVEN_BY.get(name[1], (name[1],)) if parameter in own]
        if not candidates:
            return name[0]
        typed = next((parameter for parameter in candidates if given.get(parameter.name)), candidates[0])
        return f"`{typed.opts[0]}`" if typed.param_type_name == "option" else typed.metavar


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for command in (
    *(profile, evaluate, cascade, check_data, predict, serve),
    *(extract, quantize, export, reshard, convert, elastify, card, push),
):
    app.command(cls=Command)(command)


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


def main():
    """Run the command.

    The exit code is 0 after success, 1 with one line on stderr after an error, and 2 after wrong usage.
    """
    try:
        app(repeat_options(sys.argv[1:]), prog_name="hydravit")
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
        hint = "" if extra is None else f': pip install "hydravit_hf[{extra}]"'
        sys.exit(f"error: {error}{hint}")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except Exception as error:  # its message alone may say little, such as that of a KeyError
        sys.exit(f"error: {type(error).__name__}: {' '.join(str(error).split())}")
