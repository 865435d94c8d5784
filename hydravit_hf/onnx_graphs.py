"""Joins the ONNX graphs of several widths into one that holds their weights once, and builds those of cascades.

Each weight of a narrow width is the leading block of the widest one's. It becomes a `Slice` of constants, which ONNX
Runtime computes once, when it loads the file. A program is an `onnx_ir.Model`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

WEIGHTS_FILE = "weights.bin"


def tidy(program):
    """Remove the exporter's call stacks from a program, and name its first dimension batch."""
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
    """Make a named value that holds `numbers`."""
    import onnx_ir as ir

    tensor = ir.tensor(np.asarray(numbers), name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _borrow(graph, lend: Callable) -> list:
    """Replace a narrow graph's weights by slices of a wider one's, and return the wider values.

    `lend(name, shape)` gives the wider value of a weight, or None. A weight that is no leading block of it stays, such
    as a classifier that only this width uses. A matrix becomes a slice even if it has the same size: ONNX Runtime
    prepares matrices for its kernels if they are made inside a branch, but not if they are made around it.
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
    """Make the values of a program around branches: `pixel_values`, and by name the weights that branches borrow."""
    import onnx_ir as ir

    (images,) = widest.graph.inputs
    weights = {
        name: ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        for name, value in widest.graph.initializers.items()
        if value.dtype.is_floating_point() and value.shape.rank()
    }
    return ir.Value(name=images.name, shape=images.shape, type=images.type), weights


def _as_branch(program, images, weights: dict):
    """Turn a program into a branch of another one, which runs on the `images` and the weights of that one."""
    branch = program.graph
    _borrow(branch, lambda name, shape: weights.get(name))
    branch.inputs[0].replace_all_uses_with(images)
    branch.inputs.clear()
    return branch


def _around(widest, inputs: list, outputs: list, nodes, initializers: list):
    """Make the program around the branches."""
    import onnx_ir as ir
    from onnx_ir.passes.common import NameFixPass

    opsets = widest.graph.opset_imports
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name="main")
    program = ir.Model(graph, ir_version=widest.ir_version)
    NameFixPass()(program)  # because the branches use the same names
    return program


def with_width_as_input(programs: dict):
    """Join programs, by width, into one with a branch for each width and the width as an input.

    ONNX has no node that raises an error. Any other width reaches a node that always fails, and whose name is the error
    message.
    """
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


def as_cascade(programs: dict, settings: dict, macs: list[int]):
    """Join programs, by width, into one that computes `cascade_hydravit.run_cascade`.

    Each width is a branch that runs only if images reach it. The few nodes between the branches always run. Without
    images they cost almost nothing.
    """
    import onnx_ir as ir

    widest = programs[max(programs)]
    (logits,) = widest.graph.outputs
    images, weights = _inputs_and_weights(widest)
    tape = ir.tape.Tape()
    op = tape.op
    given, places, answers = images, None, None  # images that go on, their places in the batch (n, 1), answers so far
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
        value.name = f"cascade_{number}"  # no branch uses this name
    integers = ir.TensorType(ir.DataType.INT64), ir.Shape(["batch"])
    kinds = {logits.name: (logits.type, logits.shape), "num_heads": integers, "macs": integers}
    for value, (name, (kind, shape)) in zip(answers, kinds.items(), strict=True):
        value.name, value.type, value.shape = name, kind, shape
    return _around(widest, [images], answers, tape.nodes, list(weights.values()))


def _or_nothing(branch, logits) -> dict:
    """Make the branches of an `If` that runs a width or gives no logits, (0, labels)."""
    import onnx_ir as ir

    nothing = ir.tensor(np.empty((0, logits.shape[1]), logits.dtype.numpy()))
    skipped = ir.node("Constant", [], {"value": nothing})
    skipped.outputs[0].type = logits.type
    return {"then_branch": branch, "else_branch": ir.Graph([], skipped.outputs, nodes=[skipped], name="skipped")}


def _uncertainty(tape, logits, criterion: str, temperature: float):
    """Add the nodes that compute `cascade_hydravit.uncertainty`."""
    import onnx_ir as ir

    def constant(value: float | list[float]):
        return op("Constant", [], {"value_floats" if isinstance(value, list) else "value_float": value})

    op, limits = tape.op, torch.finfo(torch.float32)
    last = op("Constant", [], {"value_ints": [-1]})
    scaled = op("Div", [op("Cast", [logits], {"to": ir.DataType.FLOAT}), constant(temperature)])
    probabilities = op("Softmax", [scaled])
    if criterion == "entropy":  # `tiny` keeps the logarithm of a probability of 0 finite, so its term is 0
        terms = op("Mul", [probabilities, op("Log", [op("Max", [probabilities, constant(limits.tiny)])])])
        uncertain = op("Neg", [op("ReduceSum", [terms, last], {"keepdims": 0})])
    else:
        two = op("Constant", [], {"value_ints": [2]})
        largest, _ = tape.op_multi_out("TopK", [probabilities, two], num_outputs=2)
        terms = op("Mul", [largest, constant([1.0, -1.0 if criterion == "margin" else 0.0])])
        uncertain = op("Sub", [constant(1.0), op("ReduceSum", [terms, last], {"keepdims": 0})])
    number = op("Where", [op("IsNaN", [uncertain]), constant(limits.max), uncertain])
    return op("Max", [number, constant(0.0)])


def save_onnx(program, metadata: dict, path: Path, **options):
    """Save a program with metadata, each value as JSON. The options are those of `onnx_ir.save`."""
    import onnx_ir as ir

    program.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    ir.save(program, path, **options)


def save_with_shared_weights(programs: dict, metadata: dict[int, dict], folder: Path):
    """Save a graph for each width into a folder, and the weights of all into one file.

    A narrow graph reads the leading rows of a weight and slices their leading columns.
    """
    import onnx_ir as ir

    widest = max(programs)
    save_onnx(programs[widest], metadata[widest], folder / f"{widest}_heads.onnx", external_data=WEIGHTS_FILE)
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
        save_onnx(programs[num_heads], metadata[num_heads], folder / f"{num_heads}_heads.onnx")
