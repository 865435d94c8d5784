"""Exports give the logits of the model, at every width and batch size, and carry what is needed to use them."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from support.exports import trace_once
from support.thresholds import splitting

from hydravit_hf import HydraViTModel, export, onnx_graphs
from hydravit_hf.export import export_cascade, export_subnetwork, export_subnetworks
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model.cascade_hydravit import uncertainty
from hydravit_hf.model.configuration_hydravit import CRITERIA

HEADS = [1, 3, 6]
BATCHES = (1, 2, 5)
ATOL = 1e-4
kinds_of_models = pytest.mark.parametrize(
    "options",
    [
        pytest.param({"subnetwork_heads": HEADS}, id="plain"),
        pytest.param(
            {"subnetwork_heads": HEADS, "separate_classifiers": True},
            id="separate classifiers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"subnetwork_heads": HEADS, "token_recycling": True}, id="token recycling", marks=pytest.mark.slow
        ),
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, onnxscript, torchao and ExecuTorch


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    trace_once(monkeypatch)


@pytest.fixture
def make_model(make_model):
    """Makes models of one layer, whose weights are the same ones in each test, so that few are traced."""

    def make(**kwargs):
        torch.manual_seed(0)
        return make_model(num_hidden_layers=1, **kwargs)

    return make


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    return pytest.importorskip("onnxruntime", reason="needs the extra `export`")


@pytest.fixture
def images():
    return torch.randn(max(BATCHES), 3, 16, 16)


def installed(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def eager(model, images: torch.Tensor, num_heads: int) -> np.ndarray:
    with torch.no_grad():
        return model(images, num_heads_active=num_heads).logits.numpy()


def assert_same_logits(run, model, images, num_heads):
    for batch_size in BATCHES:
        batch = images[:batch_size]
        np.testing.assert_allclose(run(batch), eager(model, batch, num_heads), rtol=0, atol=ATOL)


def onnx_runner(session, **inputs):
    return lambda batch: session.run(["logits"], {"pixel_values": batch.numpy(), **inputs})[0]


def total_size(folder) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@kinds_of_models
def test_onnx_runtime_gives_the_logits_at_every_width(make_model, images, tmp_path, onnxruntime, options):
    model = make_model(**options)
    for num_heads in HEADS:
        path = export_subnetwork(model, num_heads, "onnx", tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(path)
        assert [(value.name, value.shape) for value in session.get_inputs()] == [("pixel_values", ["batch", 3, 16, 16])]
        assert [(value.name, value.shape) for value in session.get_outputs()] == [("logits", ["batch", 5])]
        assert_same_logits(onnx_runner(session), model, images, num_heads)
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@kinds_of_models
def test_one_onnx_file_runs_every_width(make_model, images, tmp_path, onnxruntime, options):
    model = make_model(**options)
    path = export_subnetworks(model, None, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["heads"]) == model.config.subnetwork_heads
    for num_heads in model.config.subnetwork_heads:
        run = onnx_runner(session, num_heads_active=np.array(num_heads))
        assert_same_logits(run, model, images, num_heads)


@kinds_of_models
def test_a_folder_of_onnx_graphs_shares_one_file_of_weights(make_model, images, tmp_path, onnxruntime, options):
    model = make_model(**options)
    folder = export_subnetworks(model, None, tmp_path / "onnx")
    names = {f"{num_heads}_heads.onnx" for num_heads in model.config.subnetwork_heads}
    assert {file.name for file in folder.iterdir()} == {"weights.bin", *names}
    moved = folder.rename(tmp_path / "elsewhere")
    for num_heads in model.config.subnetwork_heads:
        session = onnxruntime.InferenceSession(moved / f"{num_heads}_heads.onnx")
        assert json.loads(session.get_modelmeta().custom_metadata_map["num_heads"]) == num_heads
        assert_same_logits(onnx_runner(session), model, images, num_heads)


def test_a_file_of_several_widths_refuses_others(model, images, tmp_path, onnxruntime):
    session = onnxruntime.InferenceSession(export_subnetworks(model, [1, 6], tmp_path / "model.onnx"))
    onnxruntime.set_default_logger_severity(4)
    try:
        with pytest.raises(Exception, match="num_heads_active must be one of 1, 6"):
            onnx_runner(session, num_heads_active=np.array(3))(images)
    finally:
        onnxruntime.set_default_logger_severity(2)


def test_graphs_are_valid_onnx(model, tmp_path, onnxruntime):
    from onnx.checker import check_model

    export_subnetwork(model, 1, "onnx", tmp_path / "one.onnx")
    export_subnetworks(model, [1, 6], tmp_path / "all.onnx")
    folder = export_subnetworks(model, [1, 6], tmp_path / "all")
    paths = [tmp_path / "one.onnx", tmp_path / "all.onnx", folder / "1_heads.onnx", folder / "6_heads.onnx"]
    for criterion in CRITERIA:
        paths.append(tmp_path / f"{criterion}.onnx")
        export_cascade(model, paths[-1], cascade={"num_heads": [1, 6], "thresholds": 0.5, "criterion": criterion})
    for path in paths:
        check_model(path, full_check=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch
def test_an_export_is_no_larger_than_that_of_a_vit_of_its_shapes(make_model, tmp_path, onnxruntime):
    import onnx_ir
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = make_model(head_dim=64)
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 1}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)).eval()
    assert vit.num_parameters() == model.extract_subnetwork(3).num_parameters()
    with torch.no_grad():  # values that repeat, as zeros of new biases do, would be stored once
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter))
    batch = {"pixel_values": {0: torch.export.Dim("batch")}}
    exported = OnnxExporter().export(vit, {"pixel_values": torch.zeros(2, 3, 16, 16)}, OnnxConfig(dynamic_shapes=batch))
    onnx_ir.save(exported.program, tmp_path / "vit.onnx")
    path = export_subnetwork(model, 3, "onnx", tmp_path / "model.onnx", make_image_processor(model.config))
    assert path.stat().st_size <= (tmp_path / "vit.onnx").stat().st_size


@pytest.mark.slow
def test_several_widths_take_the_space_of_the_widest(make_model, tmp_path, onnxruntime):
    model = make_model(head_dim=64)
    widest = export_subnetwork(model, 6, "onnx", tmp_path / "widest.onnx").stat().st_size
    assert export_subnetworks(model, [1, 3, 6], tmp_path / "model.onnx").stat().st_size <= 1.05 * widest
    assert total_size(export_subnetworks(model, [1, 3, 6], tmp_path / "onnx")) <= 1.05 * widest
    model = make_model(head_dim=64, token_recycling=True, subnetwork_heads=[1, 6])
    assert export_subnetwork(model, 6, "onnx", tmp_path / "stages.onnx").stat().st_size <= 1.1 * widest
    assert total_size(export_subnetworks(model, None, tmp_path / "stages")) <= 1.15 * widest


@kinds_of_models
def test_torch_export_reloads(make_model, images, tmp_path, options):
    model = make_model(**options)
    module = torch.export.load(export_subnetwork(model, 3, "torch_export", tmp_path / "model.pt2")).module()
    assert_same_logits(lambda batch: module(pixel_values=batch).logits.detach().numpy(), model, images, 3)


@pytest.mark.slow
@installed("openvino")
def test_openvino_gives_the_logits(model, images, tmp_path):
    import openvino

    path = export_subnetwork(model, 2, "openvino", tmp_path / "model.xml")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_same_logits(lambda batch: compiled({"pixel_values": batch.numpy()})["logits"], model, images, 2)
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}


@pytest.mark.slow
@installed("executorch")
def test_executorch_gives_the_logits(model, images, tmp_path):
    from executorch.runtime import Runtime

    path = export_subnetwork(model, 2, "executorch", tmp_path / "model.pte")
    method = Runtime.get().load_program(path).load_method("forward")
    assert_same_logits(lambda batch: method.execute([batch])[0].numpy(), model, images, 2)
    assert json.loads((tmp_path / "model.pte.json").read_text())["num_heads"] == 2
    assert {file.name for file in tmp_path.iterdir()} == {"model.pte", "model.pte.json"}


def preprocess(image: Image.Image, recipe: dict) -> np.ndarray:
    """What the metadata say, with Pillow and numpy alone."""
    if recipe["do_convert_rgb"]:
        image = image.convert("RGB")
    size = recipe["size"]
    pixels = np.asarray(image.resize((size["width"], size["height"]), recipe["resample"]))
    pixels = pixels * recipe["rescale_factor"]
    pixels = (pixels - recipe["image_mean"]) / recipe["image_std"]
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def read_metadata(path, format: str) -> dict:
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
        return {name: json.loads(value) for name, value in metadata.items()}
    if format == "torch_export":
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        return json.loads(files["metadata.json"])
    import openvino

    program = openvino.Core().read_model(path)
    names = ("num_heads", "image_size", "id2label", "image_processor")
    return {name: json.loads(program.get_rt_info(["hydravit", name]).astype(str)) for name in names}


@pytest.mark.parametrize(
    ("format", "suffix"),
    [("torch_export", "pt2"), ("onnx", "onnx"), pytest.param("openvino", "xml", marks=installed("openvino"))],
)
def test_the_metadata_are_enough_to_use_the_file(make_model, tmp_path, format, suffix):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    labels = {0: "a", 1: "b", 2: "ü", 3: '"d"', 4: "e"}
    model = make_model(id2label=labels, label2id={label: number for number, label in labels.items()})
    processor = make_image_processor(model.config, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    path = export_subnetwork(model, 3, format, tmp_path / f"model.{suffix}", processor)
    metadata = read_metadata(path, format)
    assert (metadata["num_heads"], metadata["image_size"]) == (3, [16, 16])
    assert {int(number): label for number, label in metadata["id2label"].items()} == labels
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    expected = processor(image, return_tensors="np").pixel_values
    np.testing.assert_allclose(preprocess(image, metadata["image_processor"]), expected, atol=1e-6)


def test_the_default_width_is_that_of_the_model(make_model, images, tmp_path):
    model = make_model(num_heads_active=2)
    path = export_subnetwork(model, None, "torch_export", tmp_path / "model.pt2")
    files = {"metadata.json": ""}
    torch.export.load(path, extra_files=files)
    assert json.loads(files["metadata.json"])["num_heads"] == 2


def test_an_export_leaves_the_model_as_it_was(make_model, tmp_path):
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_subnetwork(model, 6, "torch_export", tmp_path / "model.pt2")
    assert model.training
    assert model.config._attn_implementation == make_model().config._attn_implementation
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("num_heads", [0, 7, -1, True, 2.0])
def test_a_width_out_of_range_is_refused(model, tmp_path, num_heads):
    with pytest.raises(ValueError, match="from 1 to 6"):
        export_subnetwork(model, num_heads, "torch_export", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_mistakes_in_an_export_are_named(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`format` must be one of onnx, torch_export, executorch, openvino"):
        export_subnetwork(model, 2, "tflite", tmp_path / "model")
    with pytest.raises(ValueError, match="is a classifier"):
        export_subnetwork(HydraViTModel(model.config), 2, "torch_export", tmp_path / "model.pt2")
    monkeypatch.setattr(export, "find_spec", lambda package: None)
    extra = r'"hydravit_hf\[export\]"'
    for format, package, named in (
        ("onnx", "onnxscript", extra),
        ("openvino", "openvino", extra),
        ("executorch", "executorch", "executorch"),
    ):
        with pytest.raises(ImportError, match=rf"needs .*{package}: pip install {named}$"):
            export_subnetwork(model, 2, format, tmp_path / "model")
    with pytest.raises(ImportError, match="onnxscript"):
        export_subnetworks(model, None, tmp_path / "model.onnx")
    monkeypatch.setattr(export, "find_spec", lambda package: package)
    for format, suffix in (("onnx", "onnx"), ("torch_export", "pt2"), ("executorch", "pte"), ("openvino", "xml")):
        with pytest.raises(ValueError, match=rf"must end with '\.{suffix}'"):
            export_subnetwork(model, 2, format, tmp_path / "model.bin")
    with pytest.raises(ValueError, match="each width once"):
        export_subnetworks(model, [2, 2], tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="from 1 to 6"):
        export_subnetworks(model, [2, 7], tmp_path / "model.onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="new or empty folder"):
        export_subnetworks(model, [2], tmp_path / "full")
    assert [entry.name for entry in tmp_path.iterdir()] == ["full"]


def test_a_failure_leaves_what_was_there(model, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"

    def fail(program, file, **kwargs):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_subnetwork(model, 2, "torch_export", path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="disk full"):
        export_subnetwork(model, 2, "torch_export", path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


def test_a_failure_leaves_no_half_of_a_folder(model, tmp_path, monkeypatch, onnxruntime):
    save, calls = onnx_graphs.save_onnx, []

    def fail_later(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        save(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(onnx_graphs, "save_onnx", fail_later)
        export_subnetworks(model, [1, 6], tmp_path / "onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "onnx").mkdir()
    assert export_subnetworks(model, [1, 6], tmp_path / "onnx").is_dir()  # an empty folder is as good as none


# Cascades


def a_cascade(model, images, heads, criterion="entropy", temperatures=None, share=0.5) -> dict:
    """Settings with thresholds halfway between the uncertainties of two images: at each, a share of all goes on."""
    temperatures = temperatures or [1.0] * len(heads)
    thresholds = splitting(model, images, heads, criterion, temperatures, share)
    return {"num_heads": heads, "thresholds": thresholds, "criterion": criterion, "temperatures": temperatures}


def assert_same_cascade(path, model, images, cascade, batch_sizes=(0, 1, 7, 40), atol=1e-5) -> list[int]:
    """That the file gives what the model gives; the widths that it took for the last batch."""
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    for batch_size in batch_sizes:
        batch = images[:batch_size]
        expected = model.cascade(batch, *cascade.values())
        logits, num_heads, macs = session.run(["logits", "num_heads", "macs"], {"pixel_values": batch.numpy()})
        np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=1e-5, atol=atol)
        for found, of_model in ((num_heads, expected.num_heads), (macs, expected.macs)):
            assert found.dtype == np.int64 and found.tolist() == of_model.tolist()
    return num_heads.tolist()


@pytest.mark.parametrize(
    ("heads", "temperatures", "separate_classifiers"),
    [
        ([1, 6], None, False),
        ([1, 3, 6], [0.2, 3.0, 1.0], False),
        pytest.param([1, 3, 6], None, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_cascade_in_onnx_runtime_gives_what_the_model_gives(
    make_model, many, tmp_path, onnxruntime, criterion, heads, temperatures, separate_classifiers
):
    model = make_model(subnetwork_heads=HEADS, separate_classifiers=separate_classifiers)
    cascade = a_cascade(model, many, heads, criterion, temperatures)
    path = export_cascade(model, tmp_path / "model.onnx", cascade=cascade)
    assert set(assert_same_cascade(path, model, many, cascade)) == set(heads)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.fixture
def certain(make_model):
    """A model whose predictions are as certain as floating point can tell."""
    model = make_model()
    model.classifier.weight.data *= 1000
    return model


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_exported_cascade_holds_to_thresholds_of_zero_and_infinity(certain, many, tmp_path, onnxruntime, criterion):
    for heads, thresholds, taken in (
        ([1, 3, 6], [0, 0], 6),
        ([1, 3, 6], [math.inf, 0], 1),
        ([1, 3, 6], [0, math.inf], 3),
        ([1, 6], [1e39], 1),  # which is infinity as a float32
        ([3], [], 3),
    ):
        cascade = {"num_heads": heads, "thresholds": thresholds, "criterion": criterion}
        path = export_cascade(certain, tmp_path / "model.onnx", cascade=cascade)
        assert set(assert_same_cascade(path, certain, many, cascade, atol=1e-3)) == {taken}


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_exported_cascade_stops_at_certainty_and_goes_on_from_what_is_no_number(
    certain, many, tmp_path, onnxruntime, criterion
):
    assert uncertainty(torch.from_numpy(eager(certain, many, 1)), criterion).max() == 0
    many[7, 0, 3, 3] = math.nan
    for threshold, taken in ((1e-9, 6), (1e30, 6), (math.inf, 1)):
        cascade = {"num_heads": [1, 6], "thresholds": [threshold], "criterion": criterion}
        path = export_cascade(certain, tmp_path / "model.onnx", cascade=cascade)
        num_heads = assert_same_cascade(path, certain, many, cascade, atol=1e-3)
        assert num_heads == [taken if number == 7 else 1 for number in range(40)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # of torch's exporter
def test_an_exported_cascade_in_half_precision_decides_in_single_precision(make_model, many, tmp_path, onnxruntime):
    model, many = make_model(), many.half()
    model.classifier.weight.data *= 5  # uncertainties that are farther apart than half precision is exact
    model = model.half()
    cascade = a_cascade(model, many, [1, 6], share=0.4)
    path = export_cascade(model, tmp_path / "model.onnx", cascade=cascade)
    assert sorted(assert_same_cascade(path, model, many, cascade, atol=1e-2)) == [1] * 24 + [6] * 16
    (logits, *_) = onnxruntime.InferenceSession(path).get_outputs()
    assert logits.type == "tensor(float16)"


@pytest.mark.slow
def test_an_exported_cascade_takes_the_space_of_its_widest(make_model, tmp_path, onnxruntime):
    model = make_model(head_dim=64)
    widest = export_subnetwork(model, 6, "onnx", tmp_path / "widest.onnx").stat().st_size
    cascade = {"num_heads": [1, 3, 6], "thresholds": 0.5}
    assert export_cascade(model, tmp_path / "model.onnx", cascade=cascade).stat().st_size <= 1.02 * widest


def what_ran(onnxruntime, path, images) -> list[tuple[int, int]]:
    """(images, heads) of each softmax of the attention, from a profile."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(path, options)
    session.run(None, {"pixel_values": images.numpy()})
    with open(session.end_profiling(), encoding="utf-8") as file:
        nodes = [event["args"] for event in json.load(file) if event["cat"] == "Node"]
    nodes = [node for node in nodes if node.get("op_name") == "Softmax"]
    shapes = [shape for node in nodes for shape in node["output_type_shape"][0].values()]
    return [tuple(shape[:2]) for shape in shapes if len(shape) == 4]


def test_onnx_runtime_skips_the_widths_that_no_image_needs(make_model, many, tmp_path, onnxruntime):
    model, path = make_model(), tmp_path / "model.onnx"
    cascade = a_cascade(model, many, [1, 3, 6], share=0.25)
    export_cascade(model, path, cascade=cascade)
    third = (model.cascade(many, *cascade.values()).num_heads == 6).sum().item()
    assert 0 < third < 10
    assert what_ran(onnxruntime, path, many) == [(40, 1), (10, 3), (third, 6)]
    export_cascade(model, path, cascade=cascade | {"thresholds": [cascade["thresholds"][0], math.inf]})
    assert what_ran(onnxruntime, path, many) == [(40, 1), (10, 3)]
    export_cascade(model, path, cascade=cascade | {"thresholds": math.inf})
    assert what_ran(onnxruntime, path, many) == [(40, 1)]
    assert what_ran(onnxruntime, path, many[:0]) == []


def test_the_saved_cascade_is_exported_with_its_settings_as_metadata(make_model, many, tmp_path, onnxruntime):
    model = make_model(cascade={"num_heads": [1, 3, 6], "thresholds": [0.7, math.inf], "criterion": "margin"})
    processor = make_image_processor(model.config)
    path = export_cascade(model, tmp_path / "model.onnx", processor)
    assert_same_cascade(path, model, many, model.config.cascade)
    metadata = read_metadata(path, "onnx")
    assert metadata.keys() == {"cascade", "image_size", "id2label", "image_processor"}
    in_config = json.loads(model.config.to_json_string())["cascade"]
    assert metadata["cascade"] == in_config and in_config["thresholds"] == [0.7, {"__float__": "Infinity"}]
    assert metadata["image_size"] == [16, 16] and metadata["image_processor"]["size"] == processor.to_dict()["size"]
    export_cascade(model, path, cascade={"num_heads": [3, 6], "thresholds": 1})
    expected = {"num_heads": [3, 6], "thresholds": [1.0], "criterion": "entropy", "temperatures": [1.0, 1.0]}
    assert read_metadata(path, "onnx")["cascade"] == expected
    assert model.config.cascade["num_heads"] == [1, 3, 6]


def test_a_cascade_that_recycles_tokens_is_refused_before_any_width_is_traced(
    make_model, tmp_path, monkeypatch, onnxruntime
):
    model = make_model(subnetwork_heads=[2, 4, 6], token_recycling=True)
    monkeypatch.setattr("transformers.exporters.AutoHfExporter.from_config", None)
    with pytest.raises(ValueError, match="cascade that recycles tokens can't be exported"):
        export_cascade(model, tmp_path / "model.onnx", cascade={"num_heads": [2, 6], "thresholds": 0.5})


def test_mistakes_in_a_cascade_to_export_are_named(make_model, tmp_path, onnxruntime):
    model, cascade = make_model(), {"num_heads": [2, 6], "thresholds": 0.5}
    with pytest.raises(ValueError, match="has no `cascade`"):
        export_cascade(model, tmp_path / "model.onnx")
    for wrong, message in (
        ({"num_heads": [6, 2]}, "integers from 1 to 6"),
        ({"thresholds": -1}, "numbers from 0 to infinity"),
        ({"criterion": "luck"}, "must be one of entropy, margin, probability"),
        ({"temperatures": [1.0]}, "must be 2 positive numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            export_cascade(model, tmp_path / "model.onnx", cascade=cascade | wrong)
    with pytest.raises(ValueError, match=r"must end with '\.onnx'"):
        export_cascade(model, tmp_path / "model", cascade=cascade)
    with pytest.raises(ValueError, match="is a classifier"):
        export_cascade(HydraViTModel(model.config), tmp_path / "model.onnx", cascade=cascade)
    for labels in ({"num_labels": 1}, {"problem_type": "multi_label_classification"}):
        with pytest.raises(ValueError, match="one of several labels"):
            export_cascade(make_model(**labels), tmp_path / "model.onnx", cascade=cascade)
    assert not list(tmp_path.iterdir())
