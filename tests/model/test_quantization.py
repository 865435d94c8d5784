"""A quantized weight is cut like any other, and a quantizer that can't be cut says so before it changes anything."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from support.models import HEADS, KINDS
from torch import nn
from transformers import AutoModelForImageClassification, BitsAndBytesConfig, QuantoConfig, ViTForImageClassification

from hydravit_hf import HydraViTForImageClassification, HydraViTModel, export_subnetwork, reshard_checkpoint
from hydravit_hf.model import files_hydravit
from hydravit_hf.model.files_hydravit import read_header
from hydravit_hf.model.nesting_hydravit import leading_shapes
from hydravit_hf.model.quantization_hydravit import cut_metadata

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao, optimum-quanto and bitsandbytes
load = HydraViTForImageClassification.from_pretrained
GROUPED, BY_ROW = ("8 bits", "4 bits", "8 bits, dynamic", "4 bits, dynamic"), ("8 bits by row", "dynamic by row")


def scheme(name: str):
    """The configuration of a scheme for heads of 8 channels."""
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    group, four, eight = torchao.PerGroup(8), torch.int4, torch.int8
    configs = {
        "8 bits": lambda: torchao.Int8WeightOnlyConfig(granularity=group),
        "4 bits": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=four, granularity=group),
        "8 bits, dynamic": lambda: torchao.Int8DynamicActivationIntxWeightConfig(eight, group),
        "4 bits, dynamic": lambda: torchao.Int8DynamicActivationIntxWeightConfig(four, group),
        "8 bits by row": torchao.Int8WeightOnlyConfig,
        "dynamic by row": torchao.Int8DynamicActivationInt8WeightConfig,
        "groups of 16": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=eight, granularity=torchao.PerGroup(16)),
        "groups of 12": lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(12)),
        "rows of groups": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=eight),
    }
    return TorchAoConfig(configs[name]())


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def logits(model, images, *heads: int) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(images, num_heads_active=num_heads).logits for num_heads in heads]


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a saved checkpoint and its metadata."""
    with open(folder / "model.safetensors", "rb") as file:
        tensors, metadata = read_header(file)
        return {name: tensor[tuple(map(slice, tensor.shape))] for name, tensor in tensors.items()}, metadata


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]):
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", GROUPED)
def test_in_groups_each_width_has_the_bits_of_quantizing_it_alone(model, folder, images, tmp_path, name):
    quantized = load(folder, quantization_config=scheme(name))
    for num_heads in HEADS:
        model.extract_subnetwork(num_heads).save_pretrained(tmp_path / f"{num_heads}")
        alone = load(tmp_path / f"{num_heads}", quantization_config=scheme(name))
        assert_same(logits(alone, images, num_heads), logits(quantized, images, num_heads))
        for found, expected in zip(
            quantized.extract_subnetwork(num_heads).parameters(), alone.parameters(), strict=True
        ):
            assert type(found) is type(expected)
            if type(found) is not nn.Parameter:
                found, expected = found.dequantize(), expected.dequantize()
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", BY_ROW)
def test_by_row_each_width_has_the_scales_of_the_widest(model, folder, images, name):
    quantized = load(folder, quantization_config=scheme(name))
    weight, small = (m.hydravit.layers[0].mlp.fc1.weight for m in (quantized, quantized.extract_subnetwork(2)))
    assert torch.equal(small.qdata, weight.qdata[:64, :16]) and torch.equal(small.scale, weight.scale[:64])
    for found, expected in zip(logits(quantized, images, *HEADS), logits(model, images, *HEADS), strict=True):
        assert 0 < (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["8 bits", "4 bits", "dynamic by row"])
def test_one_checkpoint_loads_at_each_width(make_model, images, tmp_path, kind, name):
    make_model(**KINDS[kind]).save_pretrained(tmp_path / "float")
    quantized = load(tmp_path / "float", quantization_config=scheme(name))
    quantized.save_pretrained(tmp_path / "one")
    quantized.save_pretrained(tmp_path / "by-width", shard_by_heads=[2, 4])
    for folder in ("one", "by-width"):
        assert_same(logits(load(tmp_path / folder), images, 2, 4, 6), logits(quantized, images, 2, 4, 6))
        for num_heads in (2, 4):
            narrow = load(tmp_path / folder, num_attention_heads=num_heads)
            assert narrow.is_quantized and narrow.config.quantization_config.quant_method == "torchao"
            assert_same(logits(narrow, images, num_heads), logits(quantized, images, num_heads))
            narrow.save_pretrained(tmp_path / "narrow")
            assert_same(logits(load(tmp_path / "narrow"), images, 2), logits(quantized, images, 2))


def test_files_by_width_need_no_wider_file_and_become_one_file_again(folder, images, tmp_path):
    quantized = load(folder, quantization_config=scheme("8 bits"))
    quantized.save_pretrained(tmp_path / "one")
    reshard_checkpoint(tmp_path / "one", tmp_path / "by-width", [2, 4])
    reshard_checkpoint(tmp_path / "by-width", tmp_path / "again", shard_by_heads=False)
    headers = []
    for path in (tmp_path / "one", tmp_path / "again"):
        with open(path / "model.safetensors", "rb") as file:
            tensors, metadata = read_header(file)
            headers.append(
                ({name: tensor[tuple(map(slice, tensor.shape))] for name, tensor in tensors.items()}, metadata)
            )
    (one, described), (again, described_again) = headers
    assert one.keys() == again.keys() and all(torch.equal(one[name], again[name]) for name in one)
    assert described == described_again
    for file in tmp_path.glob("by-width/model-06*"):
        file.unlink()
    narrow = load(tmp_path / "by-width", num_attention_heads=3)
    assert_same(logits(narrow, images, 3), logits(quantized, images, 3))


def test_a_narrow_load_reads_the_rows_of_its_heads_only(folder, tmp_path, monkeypatch):
    load(folder, quantization_config=scheme("8 bits")).save_pretrained(tmp_path / "quantized")
    sizes, original = [], files_hydravit.StoredTensor._read
    monkeypatch.setattr(
        files_hydravit.StoredTensor, "_read", lambda self, memory: (sizes.append(len(memory)), original(self, memory))
    )
    load(tmp_path / "quantized", num_attention_heads=1)
    assert 0 < sum(sizes) < 0.3 * (tmp_path / "quantized" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["8 bits", "4 bits, dynamic", "dynamic by row"])
def test_a_stock_vit_of_it_loads_without_this_package(folder, images, tmp_path, name):
    quantized = load(folder, quantization_config=scheme(name))
    quantized.to_vit(2).save_pretrained(tmp_path / "vit")
    vit = ViTForImageClassification.from_pretrained(tmp_path / "vit")
    torch.testing.assert_close(vit(images).logits, *logits(quantized, images, 2), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_code_in_the_folder_loads_a_width_without_the_package(folder, images, tmp_path, run_without_the_package):
    quantized = load(folder, quantization_config=scheme("8 bits"))
    quantized.save_pretrained(tmp_path / "quantized")
    torch.save((images, logits(quantized, images, 2)[0]), tmp_path / "expected.pt")
    script = """
import warnings; warnings.simplefilter("ignore")
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], num_attention_heads=2, trust_remote_code=True)
images, expected = torch.load(sys.argv[2])
assert torch.equal(model(images).logits, expected)
"""
    run_without_the_package(script, tmp_path / "quantized", tmp_path / "expected.pt")


def test_an_encoder_loads_from_it_and_images_of_another_size_run(folder, tmp_path):
    quantized = load(folder, quantization_config=scheme("8 bits"))
    quantized.save_pretrained(tmp_path / "quantized")
    encoder = HydraViTModel.from_pretrained(tmp_path / "quantized", num_attention_heads=2, image_size=24)
    images = torch.randn(2, 3, 24, 24)
    expected = quantized.hydravit(images, num_heads_active=2, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(encoder(images).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_it_does_not_grow(folder, tmp_path):
    load(folder, quantization_config=scheme("8 bits")).save_pretrained(tmp_path / "quantized")
    with pytest.raises(ValueError, match="can't grow beyond its 6 heads"):
        load(tmp_path / "quantized", num_attention_heads=8)


def test_an_adapter_on_it_trains_and_works_at_each_width(folder, images, tmp_path):
    peft = pytest.importorskip("peft")
    quantized = load(folder, quantization_config=scheme("8 bits"))
    adapted = peft.get_peft_model(quantized, peft.LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False))
    adapted.train()(pixel_values=images, labels=torch.tensor([0, 1, 2]), num_heads_active=3).loss.backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    narrow = peft.PeftModel.from_pretrained(
        load(folder, num_attention_heads=2, quantization_config=scheme("8 bits")), tmp_path / "adapter"
    )
    found, expected = narrow(pixel_values=images).logits, adapted(pixel_values=images, num_heads_active=2).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["groups of 16", "groups of 12", "rows of groups"])
def test_what_cannot_be_cut_is_refused_when_it_is_loaded(folder, name):
    with pytest.raises(ValueError, match=r"q_proj.weight' can't be cut to fewer heads: .*divides head_dim=8"):
        load(folder, quantization_config=scheme(name))
    one_head = load(folder, num_attention_heads=1, quantization_config=scheme("rows of groups"))
    assert one_head.is_quantized


def test_groups_that_cross_heads_are_refused_in_a_file_too(folder, tmp_path):
    quantized = load(folder, quantization_config=scheme("8 bits"))
    quantized.save_pretrained(tmp_path / "quantized")
    tensors, metadata = read(tmp_path / "quantized")
    name = "hydravit.layers.0.mlp.fc1.weight"
    entry = json.loads(metadata[name])
    entry["_data"]["block_size"] = [1, 16]
    with pytest.raises(ValueError, match=r"fc1.weight' is quantized in groups of"):
        shapes = leading_shapes(tensors, quantized.config.resized(3))
        cut_metadata(metadata | {name: json.dumps(entry)}, shapes)


def test_weights_quantized_in_place_run_at_each_width_or_say_why_not(model, images):
    torchao = pytest.importorskip("torchao.quantization")
    expected = logits(model, images, *HEADS)
    quantized = deepcopy(model)
    torchao.quantize_(quantized, torchao.Int8DynamicActivationInt8WeightConfig())
    for found, exact in zip(logits(quantized, images, *HEADS), expected, strict=True):
        assert 0 < (found - exact).norm() < 0.05 * exact.norm()
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig())
    with pytest.raises(ValueError, match=r"can't be cut to 16 channels: .*torchao's groups"):
        logits(model, images, 2)


# --- Quantizers that can't be cut ---


@pytest.mark.parametrize(
    "config", [QuantoConfig(weights="int8"), BitsAndBytesConfig(load_in_8bit=True), {"quant_method": "gptq", "bits": 4}]
)
@pytest.mark.parametrize("auto", [False, True])
def test_other_quantizers_of_transformers_are_refused_before_anything_is_loaded(folder, config, auto):
    (folder / "model.safetensors").write_bytes(b"not read")
    method = config["quant_method"] if isinstance(config, dict) else config.quant_method.value
    loads = AutoModelForImageClassification.from_pretrained if auto else load
    with pytest.raises(ValueError, match=rf"can't be quantized by '{method}'.*torchao.*to_vit\(k\)"):
        loads(folder, quantization_config=config)


def test_a_checkpoint_of_another_quantizer_is_refused(folder):
    file = folder / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(ValueError, match="can't be quantized by 'bitsandbytes'"):
        load(folder)


@pytest.mark.parametrize("options", [{}, {"activations": "qint8"}, {"include": "classifier"}])
def test_quanto_is_refused_and_changes_nothing(model, images, options):
    quanto = pytest.importorskip("optimum.quanto")
    expected = logits(model, images, *HEADS)
    with pytest.raises(ValueError, match=r"can't be replaced by a optimum.quanto.*torchao.*to_vit\(k\)"):
        quanto.quantize(model, weights=quanto.qint8, **options)
    assert_same(logits(model, images, *HEADS), expected)
    vit = model.to_vit(2)
    quanto.quantize(vit, weights=quanto.qint8)
    assert 0 < (vit(images).logits - expected[1]).norm() < 0.05 * expected[1].norm()


def test_layers_of_bitsandbytes_are_refused(model, images):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    mlp = model.hydravit.layers[0].mlp
    with pytest.raises(ValueError, match=r"can't be replaced by a bitsandbytes.*torchao"):
        mlp.fc1 = bitsandbytes.nn.Linear8bitLt(48, 192)
    mlp.fc1 = deepcopy(mlp.fc1)  # a layer of the same kind may take its place


def test_the_vit_of_a_width_can_be_quantized_by_bitsandbytes(model, images, tmp_path):
    pytest.importorskip("bitsandbytes")
    model.to_vit(2).save_pretrained(tmp_path)
    vit = ViTForImageClassification.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    (expected,) = logits(model, images, 2)
    assert 0 < (vit(images).logits - expected).norm() < 0.05 * expected.norm()


def test_quantize_dynamic_is_refused_and_changes_nothing(model, images):
    expected = logits(model, images, *HEADS)
    for spec in ({nn.Linear}, None):
        for part in (model, model.hydravit):
            with pytest.raises(ValueError, match=r"can't be quantized by `torch.ao.quantization`.*to_vit\(k\)"):
                torch.ao.quantization.quantize_dynamic(part, spec, inplace=True)
    assert_same(logits(model, images, *HEADS), expected)
    vit = torch.ao.quantization.quantize_dynamic(model.to_vit(2))
    assert 0 < (vit(images).logits - expected[1]).norm() < 0.05 * expected[1].norm()


# --- Export ---


def test_a_quantized_width_is_exported_for_torch(folder, images, tmp_path):
    quantized = load(folder, quantization_config=scheme("8 bits"))
    export_subnetwork(quantized, 2, "torch_export", tmp_path / "2.pt2")
    program = torch.export.load(tmp_path / "2.pt2").module()
    torch.testing.assert_close(program(pixel_values=images)["logits"], *logits(quantized, images, 2), atol=1e-5, rtol=0)


def test_onnx_says_that_it_takes_no_quantized_weights(folder, tmp_path):
    pytest.importorskip("onnxscript")
    quantized = load(folder, quantization_config=scheme("8 bits"))
    with pytest.raises(ValueError, match="can't be exported as 'onnx'"):
        export_subnetwork(quantized, 2, "onnx", tmp_path / "2.onnx")
    assert not any(Path(tmp_path).glob("*.onnx"))


# --- The page ---


def test_the_snippets_of_the_page_run(tmp_path, monkeypatch, capsys, make_model):
    pytest.importorskip("torchao")
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    recipe, counters = re.findall("```python\n(.*?)```", page, flags=re.DOTALL)
    make_model(num_attention_heads=12, head_dim=64, subnetwork_heads=None).save_pretrained(tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(recipe, "docs/quantization.md", "exec"), names)
    assert capsys.readouterr().out.splitlines() == ["True", "True"]
    for package in ("thop", "ptflops"):
        pytest.importorskip(package)
    names["model"] = load("runs/digits")
    exec(compile(counters, "docs/quantization.md", "exec"), names)
    assert names["macs"] == pytest.approx(names["model"].config.count_macs(12), rel=0.01)
