"""Subnetworks for other runtimes: ONNX, torch.export, ExecuTorch and OpenVINO, by transformers' own exporters.

The one idea: what is exported is the stock ViT that a subnetwork is, so that no runtime has to know what a HydraViT is.
Several of them become one ONNX export in `onnx_graphs`. A width that recycles tokens is one graph with all its stages.
"""

import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout
from copy import copy
from importlib.util import find_spec
from pathlib import Path

import torch

from .folders import is_new_or_empty
from .model.cascade_hydravit import check_chooses_one_label
from .model.configuration_hydravit import as_pair
from .model.modeling_hydravit import HydraViTForImageClassification
from .onnx_graphs import as_cascade, save_onnx, save_with_shared_weights, tidy, with_width_as_input

EXECUTORCH_BATCH = 8


def export_subnetwork(
    model: HydraViTForImageClassification,
    num_heads: int | None,
    format: str,
    path: str | Path,
    image_processor=None,
    max_batch_size: int | None = None,
) -> Path:
    """Write the subnetwork with the leading `num_heads` heads as a file that needs nothing of this package.

    Its input is `pixel_values`, (B, C, H, W) for any B and the model's image size; its output `logits`, (B, labels).
    It carries metadata, each value as JSON: `num_heads`, `image_size` (height, width), `id2label` and, with an image
    processor, `image_processor`: all that the preprocessing consists of (size, `resample` as Pillow numbers it,
    rescaling, mean, standard deviation, cropping).

    Args:
        model: The classifier to cut the subnetwork from. It is exported on the CPU, in the precision that it has.
        num_heads: Heads to keep; None: the model's default width.
        format: What to write:

            - "onnx", `*.onnx`: one file; metadata in its `metadata_props`.
            - "torch_export", `*.pt2`: for `torch.export.load`; metadata in its extra file `metadata.json`.
            - "executorch", `*.pte`: for CPUs (XNNPACK). It holds no metadata: they go beside it, to `<path>.json`.
            - "openvino", `*.xml`: with its weights beside it in a `.bin`; metadata in its `rt_info`, at `hydravit`.
        path: The file to write. One that is there is replaced when all is written; after an error it is as it was.
        image_processor: The processor of the model's images; None: the file says nothing about preprocessing.
        max_batch_size: The largest B. None: any; for ExecuTorch, which reserves the memory for it, 8.

    Raises:
        ValueError: An unknown format, a path that doesn't end as the format's do, a width that the model doesn't hold,
            a model without a classifier.
        ImportError: The packages that the format needs are not installed.
    """
    path = Path(path)
    _check(model, format)
    _check_suffix(path, format)
    if num_heads is None:
        num_heads = model.config.num_heads_active or model.config.num_attention_heads
    model.config.check_num_heads(num_heads)
    if format == "executorch" and max_batch_size is None:
        max_batch_size = EXECUTORCH_BATCH
    program = _export(model, num_heads, format, max_batch_size)
    with _staging(path) as staging:
        _FORMATS[format][2](program, _metadata(model, image_processor, num_heads=num_heads), staging / path.name)
    return path


def export_subnetworks(
    model: HydraViTForImageClassification, heads: list[int] | None, path: str | Path, image_processor=None
) -> Path:
    """Write several widths as one ONNX export that holds their weights once.

    What it becomes goes by `path`:

    - A file, `*.onnx`: one graph with a second input, `num_heads_active`, an int64 scalar: the heads to run in this
      call. A session holds a copy of the weights for each width.
    - A folder, new or empty: `weights.bin` and, for each width k, `{k}_heads.onnx`, a graph of some 50 KB that takes
      its weights from there. A session holds its width only.

    Inputs, outputs and metadata are those of `export_subnetwork`; the file for all widths has `heads`, their list, in
    place of `num_heads`. docs/export.md has the cost of both, and what else was tried.

    Args:
        model: The classifier.
        heads: The head counts; None: `model.config.subnetwork_heads`.
        path: The file, which is replaced, or the folder.
        image_processor: As for `export_subnetwork`.

    Raises:
        ValueError: A width that the model doesn't hold or that is given twice, a folder that is not empty, a model
            without a classifier.
        ImportError: The packages that ONNX needs are not installed.
    """
    path = Path(path)
    _check(model, "onnx")
    heads = sorted(model.config.check_num_heads(num_heads) for num_heads in heads or model.config.subnetwork_heads)
    if len(set(heads)) < len(heads):
        raise ValueError(f"`heads` must have each width once, not {heads}.")
    one_file = path.suffix == ".onnx"
    if not one_file and not is_new_or_empty(path):
        raise ValueError(f"`path` must be a new or empty folder, or end with '.onnx': '{path}' exists.")
    programs = {num_heads: _export(model, num_heads, "onnx") for num_heads in heads}
    with _staging(path) as staging:
        if one_file:
            metadata = _metadata(model, image_processor, heads=heads)
            save_onnx(with_width_as_input(programs), metadata, staging / path.name)
        else:
            metadata = {num_heads: _metadata(model, image_processor, num_heads=num_heads) for num_heads in heads}
            (staging / path.name).mkdir()
            save_with_shared_weights(programs, metadata, staging / path.name)
    return path


def export_cascade(
    model: HydraViTForImageClassification, path: str | Path, image_processor=None, cascade: dict | None = None
) -> Path:
    """Write a cascade as one ONNX file that holds the weights once: each width is given only the images that have come
    so far, and doesn't run where none has.

    Its input is `pixel_values`, (B, C, H, W) for any B, 0 included, and the model's image size. Its outputs are those
    of `HydraViTForImageClassification.cascade`: `logits`, (B, labels); `num_heads` and `macs`, (B,), int64. Metadata
    are those of `export_subnetwork`, with `cascade`, its settings, in place of `num_heads`; infinity stands there as in
    a `config.json`.

    Args:
        model: The classifier.
        path: The file, `*.onnx`, which is replaced.
        image_processor: As for `export_subnetwork`.
        cascade: The settings, as in `HydraViTConfig`; None: `model.config.cascade`.

    Raises:
        ValueError: No such settings, or some out of their range; a model that doesn't choose one of several labels,
            one that recycles tokens, or one without a classifier; a path that doesn't end with '.onnx'.
        ImportError: The packages that ONNX needs are not installed.
    """
    path, config = Path(path), copy(model.config)
    _check(model, "onnx")
    _check_suffix(path, "onnx")
    config.cascade = config.resolve_cascade(**cascade or {})
    check_chooses_one_label(config)
    heads = config.cascade["num_heads"]
    if config.token_recycling and len(heads) > 1:
        raise ValueError("A cascade that recycles tokens can't be exported: a width leaves with all its stages.")
    programs = {num_heads: _export(model, num_heads, "onnx") for num_heads in heads}
    program = as_cascade(programs, config.cascade, config.count_cascade_macs(heads))
    as_json = json.loads(config.to_json_string())["cascade"]  # infinity as transformers writes it
    with _staging(path) as staging:
        save_onnx(program, _metadata(model, image_processor, cascade=as_json), staging / path.name)
    return path


def _check(model: HydraViTForImageClassification, format: str):
    if format not in _FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(_FORMATS)}, not {format!r}.")
    if model.base_model is model:
        raise ValueError("`model` must be a HydraViTForImageClassification: what is exported is a classifier.")
    if missing := [package for package in _FORMATS[format][1] if find_spec(package) is None]:
        raise ImportError(f"The format '{format}' needs {', '.join(missing)}: pip install \"hydravit_hf[export]\"")


def _check_suffix(path: Path, format: str):
    if path.suffix != _FORMATS[format][3]:
        raise ValueError(f"`path` must end with '{_FORMATS[format][3]}' for the format '{format}', not be '{path}'.")


def _metadata(model: HydraViTForImageClassification, image_processor, **width) -> dict:
    metadata = {**width, "image_size": as_pair(model.config.image_size), "id2label": model.config.id2label}
    if image_processor is not None:
        metadata["image_processor"] = image_processor.to_dict()
    return metadata


def _export(model: HydraViTForImageClassification, num_heads: int, format: str, max_batch_size: int | None = None):
    """The subnetwork as a program of the format's own kind."""
    from transformers.exporters import AutoExportConfig, AutoHfExporter

    small = model.extract_subnetwork(num_heads) if model.config.token_recycling else model.to_vit(num_heads)
    small, config = small.cpu().eval(), small.config
    if format == "onnx":  # written out, attention is a smaller and faster graph than torch's kernel taken apart
        small.set_attn_implementation("eager")
    images = torch.zeros(2, config.num_channels, *as_pair(config.image_size), dtype=small.dtype)
    dynamic_shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=max_batch_size)}}
    options = AutoExportConfig.from_dict({"export_format": _FORMATS[format][0], "dynamic_shapes": dynamic_shapes})
    with redirect_stdout(sys.stderr):  # where the progress that torch prints belongs
        program = AutoHfExporter.from_config(options).export(small, {"pixel_values": images}, options).program
    return tidy(program) if format == "onnx" else program


@contextmanager
def _staging(path: Path):
    """A folder to write `path` and what goes beside it in; all of it is then moved into place, `path` last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".exporting-", dir=path.parent))
    try:
        yield staging
        if path.is_dir():
            path.rmdir()  # an empty one: nothing replaces a folder that holds something
        for written in sorted(staging.iterdir(), key=lambda entry: entry.name == path.name):
            os.replace(written, path.with_name(written.name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_torch_export(program, metadata: dict, path: Path):
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})


def _save_executorch(program, metadata: dict, path: Path):
    path.with_name(f"{path.name}.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    with path.open("wb") as file:
        program.write_to_file(file)


def _save_openvino(program, metadata: dict, path: Path):
    import openvino

    channels = program.input("pixel_values").partial_shape[1]
    program.reshape({"pixel_values": openvino.PartialShape([-1, channels, *metadata["image_size"]])})
    for name, value in metadata.items():
        program.set_rt_info(json.dumps(value), ["hydravit", name])
    openvino.save_model(program, path, compress_to_fp16=False)


# The name in transformers, packages beside torch and transformers, how to save, how the file's name ends
_FORMATS = {
    "onnx": ("onnx", ("onnx", "onnxscript"), save_onnx, ".onnx"),
    "torch_export": ("dynamo", (), _save_torch_export, ".pt2"),
    "executorch": ("executorch", ("executorch",), _save_executorch, ".pte"),
    "openvino": ("openvino", ("openvino",), _save_openvino, ".xml"),
}
