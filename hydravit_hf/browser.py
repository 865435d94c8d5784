"""Exports for JavaScript: a folder that transformers.js loads, and a page that runs several widths in the browser.

The page holds the weights once. Its file for a width has what the width adds to the next narrower one, so the page
answers as soon as its narrowest width has arrived. `browser_page/hydravit.js` puts the weights together again.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from .export import export_subnetwork
from .folders import check_new_or_empty, written_whole
from .model.configuration_hydravit import as_pair
from .model.modeling_hydravit import HydraViTForImageClassification
from .onnx_graphs import save_onnx

PAGE = Path(__file__).with_name("browser_page")
WEIGHTS = "weights"
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_HASH = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
RESIZINGS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers of the filters that the page has
README = """\
---
title: {quoted_title}
emoji: 🐍
colorFrom: indigo
colorTo: blue
sdk: static
app_file: index.html
pinned: false
short_description: A Vision Transformer of many widths, in the browser
custom_headers:
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
  cross-origin-resource-policy: cross-origin
---

# {title}

This page runs a [HydraViT](https://arxiv.org/abs/2409.17978) at {heads} heads, in the browser. It needs no server, and
images do not leave the machine. The headers above allow ONNX Runtime Web several threads.

`onnxruntime/` holds files of the npm package {runtime} (MIT licence).
"""


def export_transformers_js(
    model: HydraViTForImageClassification, num_heads: int | None, folder: str | Path, image_processor
) -> Path:
    """Write the leading `num_heads` heads as a folder that transformers.js loads as it is.

    The folder holds `config.json` (of a stock ViT), `preprocessor_config.json` and three files in `onnx/`, which
    transformers.js calls by their dtype:

    - "fp32": `model.onnx`.
    - "fp16": `model_fp16.onnx`, half of its size. Inputs and outputs stay float32.
    - "q8": `model_quantized.onnx`, about a quarter. The matrices are int8, and the activations are quantized in each
      call. Browsers load it by default.

        const classify = await pipeline("image-classification", FOLDER, {dtype: "q8"});

    Args:
        model: The classifier.
        num_heads: Number of heads to export. None means the model's default width.
        folder: Folder to write, which must be new or empty.
        image_processor: Processor of the model's images.

    Raises:
        ValueError: The folder is not empty, the model does not hold the width or has no classifier, or the width takes
            several passes (token recycling), which a ViT's configuration can't say.
        ImportError: A package that ONNX needs is not installed.
    """
    folder = Path(folder)
    with _new_folder(folder) as staging:
        config = model.to_vit(num_heads).config
        plain = export_subnetwork(_in_float32(model), num_heads, "onnx", staging / "onnx" / "model.onnx")
        _save_half(plain, plain.with_name("model_fp16.onnx"))
        _save_quantized(plain, plain.with_name("model_quantized.onnx"))
        config.save_pretrained(staging)
        image_processor.save_pretrained(staging)
    return folder


def export_page(
    model: HydraViTForImageClassification,
    heads: list[int] | None,
    folder: str | Path,
    image_processor,
    examples: list[str | Path] = (),
    title: str = "HydraViT",
) -> Path:
    """Write a static page that runs several widths in the browser, such as a static Space of Hugging Face.

    A slider sets the width. The page shows the labels, and the times that it measures. Any web server can serve the
    folder. It holds the weights once, in float32: a file for each width has what that width adds to the next narrower
    one. npm downloads ONNX Runtime Web in a fixed version, whose hash is checked, so the page needs no other address.

    Args:
        model: The classifier.
        heads: Head counts to offer. None means `model.config.subnetwork_heads`.
        folder: Folder to write, which must be new or empty.
        image_processor: Processor of the model's images. The page resizes images as Pillow does, bit for bit.
        examples: Image files that the page offers. It shows the first one at once.
        title: Title of the page.

    Raises:
        ValueError: The folder is not empty, the model does not hold a width or has no classifier, a width is given
            twice, its images are not RGB or gray, or the page lacks the processor's way of resizing.
        FileNotFoundError: npm is not installed, or there is no such example.
        RuntimeError: npm can't download ONNX Runtime Web, or the download is not the one expected.
        ImportError: A package that ONNX needs is not installed.
    """
    folder = Path(folder)
    heads = sorted(model.config.check_num_heads(num_heads) for num_heads in heads or model.config.subnetwork_heads)
    if len(set(heads)) < len(heads):
        raise ValueError(f"`heads` must have each width once, not {heads}.")
    preprocessing = describe_preprocessing(model.config, image_processor)
    examples = [Path(example) for example in examples]
    if missing := [str(example) for example in examples if not example.is_file()]:
        raise FileNotFoundError(f"There is no file {', '.join(missing)}.")
    with _new_folder(folder) as staging:
        fetch_runtime(staging / "onnxruntime")
        widths = _save_widths(_in_float32(model), heads, staging)
        for number, example in enumerate(examples):
            (staging / "examples").mkdir(exist_ok=True)
            shutil.copyfile(example, staging / "examples" / f"{number}{example.suffix}")
        manifest = {
            "title": title,
            "labels": [model.config.id2label[index] for index in range(model.config.num_labels)],
            "preprocessing": preprocessing,
            "examples": [f"examples/{number}{example.suffix}" for number, example in enumerate(examples)],
            "widths": widths,
        }
        (staging / "model.json").write_text(json.dumps(manifest), encoding="utf-8")
        for file in PAGE.iterdir():
            shutil.copyfile(file, staging / file.name)
        listed = ", ".join(map(str, heads))
        readme = README.format(title=title, quoted_title=json.dumps(title), heads=listed, runtime=RUNTIME)
        (staging / "README.md").write_text(readme, encoding="utf-8")
    return folder


def fetch_runtime(folder: Path):
    """Let npm download ONNX Runtime Web, check its hash, and put the files that the page needs into a new folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm, which downloads ONNX Runtime Web, is not installed: install Node.js.")
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        command = [npm, "pack", RUNTIME, "--silent", "--prefer-offline"]
        result = subprocess.run(command, cwd=downloads, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"npm can't download {RUNTIME}: {(result.stderr or result.stdout).strip()}")
        (archive,) = Path(downloads).iterdir()
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != RUNTIME_HASH:
            raise RuntimeError(f"npm gave another {RUNTIME} than expected: its hash is {found}, not {RUNTIME_HASH}.")
        with tarfile.open(archive) as package:
            for name in RUNTIME_FILES:
                (folder / name).write_bytes(package.extractfile(f"package/dist/{name}").read())


def _in_float32(model: HydraViTForImageClassification) -> HydraViTForImageClassification:
    """The model itself if it is in float32, else a copy of it that is."""
    return model if model.dtype == torch.float32 else deepcopy(model).float()


@contextmanager
def _new_folder(folder: Path):
    """Make a folder to write files in, which becomes `folder` at the end of the context."""
    check_new_or_empty(folder)
    with written_whole(folder) as staging:
        (staging / folder.name).mkdir()
        yield staging / folder.name


def _save_half(path: Path, half_path: Path):
    """Save an ONNX file with its weights and computations in float16, and its inputs and outputs in float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), half_path)


def _save_quantized(path: Path, quantized_path: Path):
    """Save an ONNX file with its matrices in int8. The patch embedding, a convolution, stays as it is."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary) / path.name
        quant_pre_process(path, prepared, skip_optimization=True, skip_symbolic_shape=True)
        matrices = ["Gemm", "MatMul"]
        quantize_dynamic(prepared, quantized_path, op_types_to_quantize=matrices, weight_type=QuantType.QInt8)


def describe_preprocessing(config, image_processor) -> dict:
    """What the page does to an image. Raises a `ValueError` if it can't do what the processor does."""
    if config.num_channels not in (1, 3):
        raise ValueError(f"The page reads RGB or gray images, and the model takes {config.num_channels} channels.")
    known = image_processor.to_dict()
    if known["do_resize"] and known["resample"] not in RESIZINGS:
        raise ValueError(
            f"The page resizes by {', '.join(RESIZINGS.values())} filters, not by Pillow's filter {known['resample']}."
        )
    return {
        "channels": config.num_channels,
        "size": known["size"] if known["do_resize"] else None,
        "filter": RESIZINGS.get(known["resample"]),
        "crop": known["crop_size"] if known.get("do_center_crop") else None,
        "scale": known["rescale_factor"] if known["do_rescale"] else 1,
        "mean": known["image_mean"] if known["do_normalize"] else [0] * config.num_channels,
        "deviation": known["image_std"] if known["do_normalize"] else [1] * config.num_channels,
        "shape": [config.num_channels, *as_pair(config.image_size)],
    }


def _save_widths(model: HydraViTForImageClassification, heads: list[int], folder: Path) -> list[dict]:
    """Save a graph for each width, and a file with what its weights add to those of the next narrower one.

    A graph reads its weights from one file, `WEIGHTS`, which the page makes. There, they stand one after the other.
    Each is a matrix of `rows` and `columns` whose leading `kept_rows` and `kept_columns` are the weight at place
    `kept_at` of the narrower width. The file of the width has, for each weight in turn, the new columns of the kept
    rows, and then the new rows.

    Returns:
        A row for each width: its heads, costs and files, and `layout`, a list of these five numbers for each weight.
    """
    import onnx_ir as ir

    widths, narrower = [], {}
    for num_heads in heads:
        graph_file, weights_file = f"{num_heads}_heads.onnx", f"{num_heads}_heads.bin"
        with tempfile.TemporaryDirectory() as temporary:
            program = ir.load(export_subnetwork(model, num_heads, "onnx", Path(temporary) / graph_file))
            place, layout, current = 0, [], {}
            with (folder / weights_file).open("wb") as file:
                for name, value in program.graph.initializers.items():
                    tensor = value.const_value
                    if tensor.dtype != ir.DataType.FLOAT or not tensor.shape.rank():
                        continue
                    matrix = _as_matrix(tensor.numpy())
                    kept_at, kept = narrower.get(name, (0, matrix[:0, :0]))
                    rows, columns = kept.shape
                    if not np.array_equal(matrix[:rows, :columns], kept):  # such as the classifier of one width
                        kept_at = rows = columns = 0
                    file.write(matrix[:rows, columns:].tobytes() + matrix[rows:].tobytes())
                    layout.append([*matrix.shape, rows, columns, kept_at])
                    current[name] = (place, matrix)
                    position = {"offset": 4 * place, "length": 4 * matrix.size, "dtype": tensor.dtype}
                    options = {"shape": tensor.shape, "name": name, "base_dir": folder}
                    value.const_value = ir.ExternalTensor(WEIGHTS, **position, **options)
                    place += matrix.size
            save_onnx(program, {}, folder / graph_file)
        costs = {"parameters": model.config.count_parameters(num_heads), "macs": model.config.count_macs(num_heads)}
        size = (folder / weights_file).stat().st_size
        files = {"graph": graph_file, "weights": weights_file, "bytes": size, "layout": layout}
        widths.append({"heads": num_heads} | costs | files)
        narrower = current
    return widths


def _as_matrix(weight: np.ndarray) -> np.ndarray:
    """View a weight as a matrix whose rows and columns grow with the width."""
    return weight.reshape(-1, weight.shape[-1]) if weight.shape[0] == 1 else weight.reshape(weight.shape[0], -1)
