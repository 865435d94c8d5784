"""Subnetworks for other runtimes: ONNX, torch.export, ExecuTorch and OpenVINO, by transformers' own exporters.

The one idea: what is exported is the stock ViT that a subnetwork is, so that no runtime has to know what a HydraViT is.
Several widths share one copy of the weights, as each weight of a narrow width is the leading block of the widest
one's: a `Slice` of constants, which ONNX Runtime computes when it loads the file and never again.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from copy import copy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from .cascade_hydravit import check_chooses_one_label
from .configuration_hydravit import as_pair
from .modeling_hydravit import HydraViTForImageClassification

WEIGHTS_FILE = "weights.bin"
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
    if not one_file and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"`path` must be a new or empty folder, or end with '.onnx': '{path}' exists.")
    programs = {num_heads: _export(model, num_heads, "onnx") for num_heads in heads}
    with _staging(path) as staging:
        if one_file:
            metadata = _metadata(model, image_processor, heads=heads)
            _save_onnx(_with_width_as_input(programs), metadata, staging / path.name)
        else:
            metadata = {num_heads: _metadata(model, image_processor, num_heads=num_heads) for num_heads in heads}
            (staging / path.name).mkdir()
            _save_with_shared_weights(programs, metadata, staging / path.name)
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
    # The widest first, as it is the one that can't be exported where tokens are recycled
    programs = {num_heads: _export(model, num_heads, "onnx") for num_heads in reversed(heads)}
    program = _as_cascade(programs, config.cascade, config.count_cascade_macs(heads))
    as_json = json.loads(config.to_json_string())["cascade"]  # infinity as transformers writes it
    with _staging(path) as staging:
        _save_onnx(program, _metadata(model, image_processor, cascade=as_json), staging / path.name)
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

    vit = model.to_vit(num_heads).cpu().eval()
    if format == "onnx":  # written out, attention is a smaller and faster graph than torch's kernel taken apart
        vit.set_attn_implementation("eager")
    config = vit.config
    images = torch.zeros(2, config.num_channels, *as_pair(config.image_size), dtype=vit.dtype)
    dynamic_shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=max_batch_size)}}
    options = AutoExportConfig.from_dict({"export_format": _FORMATS[format][0], "dynamic_shapes": dynamic_shapes})
    with redirect_stdout(sys.stderr):  # where the progress that torch prints belongs
        program = AutoHfExporter.from_config(options).export(vit, {"pixel_values": images}, options).program
    return _tidy(program) if format == "onnx" else program


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


def _save_onnx(program, metadata: dict, path: Path, **options):
    import onnx_ir as ir

    program.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    ir.save(program, path, **options)


# The name in transformers, packages beside torch and transformers, how to save, how the file's name ends
_FORMATS = {
    "onnx": ("onnx", ("onnx", "onnxscript"), _save_onnx, ".onnx"),
    "torch_export": ("dynamo", (), _save_torch_export, ".pt2"),
    "executorch": ("executorch", ("executorch",), _save_executorch, ".pte"),
    "openvino": ("openvino", ("openvino",), _save_openvino, ".xml"),
}


# ---------------------------------------------------------------------------------------------------------------------
# ONNX graphs
# ---------------------------------------------------------------------------------------------------------------------


def _tidy(program):
    """The graph without the call stacks of the export, and with a first dimension that is called batch."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program)
    (images,), (logits,) = program.graph.inputs, program.graph.outputs
    for value in (output for node in program.graph for output in node.outputs if output is not logits):
        value.shape = value.type = None  # ONNX Runtime infers them
    for value in (images, logits):
        value.shape = ir.Shape(["batch", *value.shape[1:]])
        value.metadata_props.clear()
    return program


def _constant(name: str, numbers):
    import onnx_ir as ir

    tensor = ir.tensor(np.asarray(numbers), name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _borrow(graph, lend: Callable) -> list:
    """Replace what a narrow graph holds by slices of what `lend(name, shape)` gives, a wider value or None; return the
    values that were taken.

    What is no leading block of it stays, such as a classifier that the width has to itself. A matrix is sliced even
    where it is as wide: ONNX Runtime prepares the matrices of a branch for its kernels, but not those around it.
    """
    import onnx_ir as ir

    first, sizes, taken = graph[0], {}, []
    for name, value in list(graph.initializers.items()):
        own = value.const_value.numpy()
        lent = lend(name, own.shape)
        if lent is None or lent.dtype != value.dtype or len(lent.shape) != own.ndim:
            continue
        block = lent.const_value.numpy()[tuple(slice(size) for size in own.shape)]
        if block.shape != own.shape or (block != own).any():
            continue
        del graph.initializers[name]
        taken.append(lent)
        replacement = lent
        if own.ndim > 1 or own.shape != tuple(lent.shape):
            for numbers in ((0,) * own.ndim, own.shape):
                if numbers not in sizes:
                    sizes[numbers] = _constant(f"sizes_{'_'.join(map(str, numbers))}", numbers)
                    graph.register_initializer(sizes[numbers])
            node = ir.node("Slice", [lent, sizes[(0,) * own.ndim], sizes[own.shape]], name=f"{name}/slice")
            replacement = node.outputs[0]
            replacement.name = f"{name}/leading"
            graph.insert_before(first, node)
        value.replace_all_uses_with(replacement)
    return taken


def _inputs_and_weights(widest) -> tuple:
    """Of a program around branches: its `pixel_values`, and the weights that the branches borrow, by name."""
    import onnx_ir as ir

    (images,) = widest.graph.inputs
    weights = {
        name: ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        for name, value in widest.graph.initializers.items()
        if value.dtype.is_floating_point() and value.shape.rank()
    }
    return ir.Value(name=images.name, shape=images.shape, type=images.type), weights


def _as_branch(program, images, weights: dict):
    """The graph of a program, to run inside another on its `images` and with its weights."""
    branch = program.graph
    _borrow(branch, lambda name, shape: weights.get(name))
    branch.inputs[0].replace_all_uses_with(images)
    branch.inputs.clear()
    return branch


def _around(widest, inputs: list, outputs: list, nodes, initializers: list):
    """A program of such branches."""
    import onnx_ir as ir
    from onnx_ir.passes.common import NameFixPass

    opsets = widest.graph.opset_imports
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name="main")
    program = ir.Model(graph, ir_version=widest.ir_version)
    NameFixPass()(program)  # the branches have the same names
    return program


def _with_width_as_input(programs: dict):
    """One program with a branch for each width; any other width ends in a node that fails, and whose name says why."""
    import onnx_ir as ir

    widest = programs[max(programs)]
    (logits,) = widest.graph.outputs
    images, weights = _inputs_and_weights(widest)
    width = ir.Value(name="num_heads_active", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    nothing = _constant("nothing", np.empty((0, 1, logits.shape[1]), logits.dtype.numpy()))
    message = f"num_heads_active must be one of {', '.join(map(str, programs))}"
    nodes, constants = [ir.node("Gather", [nothing, width], name=message)], [nothing]
    for num_heads, program in programs.items():
        branch = _as_branch(program, images, weights)
        nodes[-1].outputs[0].type = logits.type
        otherwise = ir.Graph([], nodes[-1].outputs, nodes=nodes, initializers=constants, name=f"not_{num_heads}_heads")
        constants = [_constant("heads", num_heads)]
        asked_for = ir.node("Equal", [width, *constants])
        branches = {"then_branch": branch, "else_branch": otherwise}
        nodes = [asked_for, ir.node("If", asked_for.outputs, attributes=branches)]
    output = nodes[-1].outputs[0]
    output.name, output.type, output.shape = logits.name, logits.type, logits.shape
    return _around(widest, [images, width], [output], nodes, [*constants, *weights.values()])


def _as_cascade(programs: dict, settings: dict, macs: list[int]):
    """One program that does what `cascade_hydravit.run_cascade` does: a width is a branch, which runs where images have
    come so far. The few nodes between the branches always run; on no images they cost next to nothing."""
    import onnx_ir as ir

    widest = programs[max(programs)]
    (logits,) = widest.graph.outputs
    images, weights = _inputs_and_weights(widest)
    tape = ir.tape.Tape()
    op = tape.op
    given, places, answers = images, None, None  # the images that go on, and where in the batch they are, (n, 1)
    steps = zip(settings["num_heads"], macs, [*settings["thresholds"], None], settings["temperatures"], strict=True)
    for num_heads, cost, threshold, temperature in steps:
        count = op("Shape", [given], {"start": 0, "end": 1})
        branches = _or_nothing(_as_branch(programs[num_heads], given, weights), logits)
        found = [op("If", [op("Cast", [count], {"to": ir.DataType.BOOL})], branches)]
        found += [op("Expand", [op("Constant", [], {"value_int": number}), count]) for number in (num_heads, cost)]
        if answers is None:
            answers = found
        else:
            answers = [op("ScatterND", [whole, places, part]) for whole, part in zip(answers, found, strict=True)]
        if threshold is not None:
            uncertain = _uncertainty(tape, found[0], settings["criterion"], temperature)
            going = op("GreaterOrEqual", [uncertain, op("Constant", [], {"value_float": threshold})])
            chosen = op("Transpose", [op("NonZero", [going])])
            given = op("GatherND", [given, chosen])
            places = chosen if places is None else op("GatherND", [places, chosen])
    for number, value in enumerate(output for node in tape.nodes for output in node.outputs):
        value.name = f"cascade_{number}"  # which no branch has
    integers = ir.TensorType(ir.DataType.INT64), ir.Shape(["batch"])
    kinds = {logits.name: (logits.type, logits.shape), "num_heads": integers, "macs": integers}
    for value, (name, (kind, shape)) in zip(answers, kinds.items(), strict=True):
        value.name, value.type, value.shape = name, kind, shape
    return _around(widest, [images], answers, tape.nodes, list(weights.values()))


def _or_nothing(branch, logits) -> dict:
    """The branches of an `If` that runs a width or gives (0, labels)."""
    import onnx_ir as ir

    nothing = ir.tensor(np.empty((0, logits.shape[1]), logits.dtype.numpy()))
    skipped = ir.node("Constant", [], {"value": nothing})
    skipped.outputs[0].type = logits.type
    return {"then_branch": branch, "else_branch": ir.Graph([], skipped.outputs, nodes=[skipped], name="skipped")}


def _uncertainty(tape, logits, criterion: str, temperature: float):
    """The nodes of `cascade_hydravit.uncertainty`."""
    import onnx_ir as ir

    def constant(value: float | list[float]):
        return op("Constant", [], {"value_floats" if isinstance(value, list) else "value_float": value})

    op, limits = tape.op, torch.finfo(torch.float32)
    last = op("Constant", [], {"value_ints": [-1]})
    scaled = op("Div", [op("Cast", [logits], {"to": ir.DataType.FLOAT}), constant(temperature)])
    probabilities = op("Softmax", [scaled])
    if criterion == "entropy":  # 0 where a probability is 0
        terms = op("Mul", [probabilities, op("Log", [op("Max", [probabilities, constant(limits.tiny)])])])
        uncertain = op("Neg", [op("ReduceSum", [terms, last], {"keepdims": 0})])
    else:
        two = op("Constant", [], {"value_ints": [2]})
        largest, _ = tape.op_multi_out("TopK", [probabilities, two], num_outputs=2)
        terms = op("Mul", [largest, constant([1.0, -1.0 if criterion == "margin" else 0.0])])
        uncertain = op("Sub", [constant(1.0), op("ReduceSum", [terms, last], {"keepdims": 0})])
    number = op("Where", [op("IsNaN", [uncertain]), constant(limits.max), uncertain])
    return op("Max", [number, constant(0.0)])


def _save_with_shared_weights(programs: dict, metadata: dict[int, dict], folder: Path):
    """One graph for each width in `folder`, all with their weights in one file: the leading rows, sliced to columns."""
    import onnx_ir as ir

    widest = max(programs)
    _save_onnx(programs[widest], metadata[widest], folder / f"{widest}_heads.onnx", external_data=WEIGHTS_FILE)
    weights = ir.load(folder / f"{widest}_heads.onnx").graph.initializers

    def leading_rows(name: str, shape: tuple[int, ...]):
        stored = weights[name].const_value if name in weights else None
        if not isinstance(stored, ir.ExternalTensor) or not shape or shape[0] > stored.shape[0]:
            return None
        length = stored.length // stored.shape[0] * shape[0]
        rows = ir.Shape([shape[0], *stored.shape[1:]])
        options = {"shape": rows, "name": name, "base_dir": folder}
        tensor = ir.ExternalTensor(WEIGHTS_FILE, stored.offset, length, stored.dtype, **options)
        return ir.Value(name=name, shape=rows, type=ir.TensorType(stored.dtype), const_value=tensor)

    for num_heads in programs.keys() - {widest}:
        graph = programs[num_heads].graph
        for value in _borrow(graph, leading_rows):
            graph.register_initializer(value)
        _save_onnx(programs[num_heads], metadata[num_heads], folder / f"{num_heads}_heads.onnx")
