"""Exports subnetworks to ONNX, torch.export, ExecuTorch and OpenVINO, with transformers' own exporters.

A subnetwork is exported as the stock ViT that it is, so no runtime has to know what a HydraViT is. `onnx_graphs` joins
several widths into one ONNX export. A width that recycles tokens becomes one graph with all its stages.
"""

import json
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from copy import copy
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch

from .folders import is_new_or_empty, written_whole
from .model.cascade_hydravit import check_chooses_one_label
from .model.configuration_hydravit import as_pair
from .model.modeling_hydravit import HydraViTForImageClassification
from .model.quantization_hydravit import is_quantized
from .onnx_graphs import as_cascade, save_onnx, save_with_shared_weights, tidy, with_width_as_input

EXECUTORCH_BATCH = 8  # default of `max_batch_size`, because ExecuTorch reserves the memory for it


def export_subnetwork(
    model: HydraViTForImageClassification,
    num_heads: int | None,
    format: str,
    path: str | Path,
    image_processor=None,
    max_batch_size: int | None = None,
) -> Path:
    """Write the leading `num_heads` heads as a file that runs without this package.

    Its input is `pixel_values`, (B, C, H, W), for any B and the model's image size. Its output is `logits`,
    (B, labels). It carries metadata, each value as JSON: `num_heads`, `image_size` (height, width), `id2label` and,
    with an image processor, `image_processor`. The latter holds the whole preprocessing: size, `resample` as Pillow
    numbers it, rescaling, mean, standard deviation and cropping.

    Args:
        model: The classifier that holds the subnetwork. The export runs on the CPU and keeps the model's precision.
        num_heads: Number of heads to export. None means the model's default width.
        format: Format to write:

            - "onnx": One file, `*.onnx`, with the metadata in its `metadata_props`.
            - "torch_export": A file for `torch.export.load`, `*.pt2`, with the metadata in its extra file
              `metadata.json`.
            - "executorch": A file for CPUs (XNNPACK), `*.pte`. It can't hold metadata, so `<path>.json` does.
            - "openvino": A file, `*.xml`, with its weights beside it, `*.bin`, and the metadata in its `rt_info` under
              `hydravit`.
        path: File to write. The export replaces an existing file only after it has succeeded.
        image_processor: Processor of the model's images. None leaves the preprocessing out of the metadata.
        max_batch_size: Largest B. None means any, or 8 for ExecuTorch, which reserves the memory for it.

    Raises:
        ValueError: The format is unknown, `path` does not end as its files do, the model does not hold the width, or it
            has no classifier.
        ImportError: A package that the format needs is not installed.

    Examples:
        >>> from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, export_subnetwork
        >>> model = HydraViTForImageClassification(HydraViTConfig(num_hidden_layers=1, image_size=16))
        >>> path = export_subnetwork(model, 3, "onnx", "3_heads.onnx")
        >>> import onnxruntime
        >>> session = onnxruntime.InferenceSession(path)
        >>> [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]
        (['pixel_values'], ['logits'])
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
    with written_whole(path) as staging:
        _FORMATS[format][2](program, _metadata(model, image_processor, num_heads=num_heads), staging / path.name)
    return path


def export_subnetworks(
    model: HydraViTForImageClassification, heads: list[int] | None, path: str | Path, image_processor=None
) -> Path:
    """Write several widths as one ONNX export that holds their weights once.

    `path` decides its form:

    - A file, `*.onnx`, is one graph with a second input, `num_heads_active`: an int64 scalar that says how many heads
      to run in this call. A session holds a copy of the weights for each width.
    - A folder holds `weights.bin` and, for each width k, `{k}_heads.onnx`, a graph of about 50 KB that reads its
      weights from there. A session holds only its width.

    Inputs, outputs and metadata are those of `export_subnetwork`, but the file of all widths lists them as `heads` in
    place of `num_heads`. docs/export.md compares the costs of both forms.

        path = export_subnetworks(model, [3, 6, 12], "hydravit.onnx")
        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(None, {"pixel_values": images, "num_heads_active": np.array(6)})

    Args:
        model: The classifier.
        heads: Head counts to export. None means `model.config.subnetwork_heads`.
        path: File to write, which is replaced, or a folder, which must be new or empty.
        image_processor: As in `export_subnetwork`.

    Raises:
        ValueError: The model does not hold a width or has no classifier, a width is given twice, or the folder is not
            empty.
        ImportError: A package that ONNX needs is not installed.
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
    with written_whole(path) as staging:
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
    """Write a cascade as one ONNX file that holds the weights once.

    Each width runs only on the images that reach it, and not at all if none does. The input is `pixel_values`,
    (B, C, H, W), for any B (0 included) and the model's image size. The outputs are those of
    `HydraViTForImageClassification.cascade`: `logits`, (B, labels), `num_heads`, (B,), and `macs`, (B,), both int64.
    The metadata are those of `export_subnetwork`, with `cascade`, its settings, in place of `num_heads`. They write
    infinity as `config.json` does.

        path = export_cascade(model, "cascade.onnx", cascade={"num_heads": [3, 12], "thresholds": 0.5})
        session = onnxruntime.InferenceSession(path)
        logits, num_heads, macs = session.run(None, {"pixel_values": images})

    Args:
        model: The classifier.
        path: File to write, `*.onnx`. It is replaced.
        image_processor: As in `export_subnetwork`.
        cascade: Settings, as in `HydraViTConfig`. None means `model.config.cascade`.

    Raises:
        ValueError: There are no settings or one is out of its range, the model does not choose one of several labels,
            it recycles tokens or has no classifier, or `path` does not end with '.onnx'.
        ImportError: A package that ONNX needs is not installed.
    """
    path, config = Path(path), copy(model.config)
    _check(model, "onnx")
    _check_suffix(path, "onnx")
    config.cascade = config.resolve_cascade(**cascade or {})
    check_chooses_one_label(config)
    heads = config.cascade["num_heads"]
    if config.token_recycling and len(heads) > 1:
        raise ValueError("A cascade that recycles tokens can't be exported: the graph of a width runs all its stages.")
    programs = {num_heads: _export(model, num_heads, "onnx") for num_heads in heads}
    program = as_cascade(programs, config.cascade, config.count_cascade_macs(heads))
    as_json = json.loads(config.to_json_string())["cascade"]  # infinity as transformers writes it
    with written_whole(path) as staging:
        save_onnx(program, _metadata(model, image_processor, cascade=as_json), staging / path.name)
    return path


def _check(model: HydraViTForImageClassification, format: str):
    if format not in _FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(_FORMATS)}, not {format!r}.")
    if model.base_model is model:
        raise ValueError("`model` must be a HydraViTForImageClassification: an exported model is a classifier.")
    if is_quantized(model) and format in ("onnx", "openvino"):
        raise ValueError(
            f"Quantized weights can't be exported as '{format}': export the weights from before, and quantize the file "
            "with the tools of its runtime."
        )
    if missing := [package for package in _FORMATS[format][1] if find_spec(package) is None]:
        package = format if format == "executorch" else '"hydravit_hf[export]"'
        raise ImportError(f"The format '{format}' needs {', '.join(missing)}: pip install {package}")


def _check_suffix(path: Path, format: str):
    if path.suffix != _FORMATS[format][3]:
        raise ValueError(f"`path` must end with '{_FORMATS[format][3]}' for the format '{format}', not be '{path}'.")


def _metadata(model: HydraViTForImageClassification, image_processor, **width) -> dict:
    metadata = {**width, "image_size": as_pair(model.config.image_size), "id2label": model.config.id2label}
    if image_processor is not None:
        metadata["image_processor"] = image_processor.to_dict()
    return metadata


def _export(model: HydraViTForImageClassification, num_heads: int, format: str, max_batch_size: int | None = None):
    """Trace the subnetwork into a program of the format's own kind."""
    from transformers.exporters import AutoExportConfig, AutoHfExporter

    small = model.extract_subnetwork(num_heads) if model.config.token_recycling else model.to_vit(num_heads)
    small, config = small.cpu().eval(), small.config
    if format == "onnx":  # eager attention gives a smaller and faster graph than torch's kernel, decomposed
        small.set_attn_implementation("eager")
    images = torch.zeros(2, config.num_channels, *as_pair(config.image_size), dtype=small.dtype)
    dynamic_shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=max_batch_size)}}
    options = AutoExportConfig.from_dict({"export_format": _FORMATS[format][0], "dynamic_shapes": dynamic_shapes})
    with _quiet():
        program = AutoHfExporter.from_config(options).export(small, {"pixel_values": images}, options).program
    return tidy(program) if format == "onnx" else program


@contextmanager
def _quiet():
    """Hide what torch says of itself as it exports: its progress, the operators that it lacks, its own deprecations."""
    operators = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = operators.level
    operators.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        operators.setLevel(level)


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


# Format -> name in transformers, packages that it needs, function that saves, suffix of the file
_FORMATS = {
    "onnx": ("onnx", ("onnx", "onnxscript"), save_onnx, ".onnx"),
    "torch_export": ("dynamo", (), _save_torch_export, ".pt2"),
    "executorch": ("executorch", ("executorch",), _save_executorch, ".pte"),
    "openvino": ("openvino", ("openvino",), _save_openvino, ".xml"),
}
