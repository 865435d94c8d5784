"""A converted training file gives the logits that the original implementation gives, and nothing in it is executed."""

import argparse
import os
import pickle
import re
import runpy
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.convert_checkpoint import convert_and_save, convert_original_checkpoint, main

OFFICIAL = Path(__file__).with_name("official_logits.safetensors")  # logits of the original, for the weights below
EMBED, DEPTH, PATCH, SIZE, LABELS = 256, 2, 16, 48, 1000


def original_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights for which the original's logits were recorded: noise, seeded with each parameter's name."""
    shapes = {
        "cls_token": (1, 1, EMBED),
        "pos_embed": (1, 1 + (SIZE // PATCH) ** 2, EMBED),
        "patch_embed.proj.weight": (EMBED, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (EMBED,),
        "norm.weight": (EMBED,),
        "norm.bias": (EMBED,),
        "head.weight": (LABELS, EMBED),
        "head.bias": (LABELS,),
    }
    for block in range(DEPTH):
        for name, outputs, inputs in (
            ("attn.qkv", 3 * EMBED, EMBED),
            ("attn.proj", EMBED, EMBED),
            ("mlp.fc1", 4 * EMBED, EMBED),
            ("mlp.fc2", EMBED, 4 * EMBED),
        ):
            shapes[f"blocks.{block}.{name}.weight"] = (outputs, inputs)
            shapes[f"blocks.{block}.{name}.bias"] = (outputs,)
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.{part}": (EMBED,) for part in ("weight", "bias")}
    weights = {}
    for name, shape in shapes.items():
        generator = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))
        noise = torch.from_numpy(generator.standard_normal(shape).astype(np.float32))
        weights[name] = noise * (0.02 if len(shape) == 1 else 0.05)
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    return weights


def training_file(path: Path, **entries) -> Path:
    """A file as the original's training script writes it."""
    weights = original_weights()
    checkpoint = {
        "epoch": 299,
        "arch": "hydravit",
        "state_dict": {f"module.{name}": tensor + 1 for name, tensor in weights.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]},
        "version": 2,
        "args": argparse.Namespace(model="hydravit", mean=None, std=None, img_size=SIZE, lr=5e-4),
        "state_dict_ema": weights,
        "metric": 81.1,
    }
    torch.save(checkpoint | entries, path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return training_file(tmp_path_factory.mktemp("original") / "model_best.pth.tar")


def test_converted_logits_are_those_of_the_original_at_every_width(source):
    model = convert_original_checkpoint(source)
    images = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, SIZE, SIZE)).astype(np.float32))
    with safe_open(OFFICIAL, "pt") as official, torch.no_grad():
        assert sorted(official.keys()) == [f"logits.{num_heads}" for num_heads in range(1, 5)]
        for num_heads in range(1, 5):
            expected = official.get_tensor(f"logits.{num_heads}")
            logits = model(images, num_heads_active=num_heads).logits
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
            stock = model.to_vit(num_heads)(images).logits
            torch.testing.assert_close(stock, expected, atol=1e-4, rtol=0)


def test_the_averaged_weights_are_the_default_and_the_last_ones_an_option(source):
    averaged, last = convert_original_checkpoint(source), convert_original_checkpoint(source, use_ema=False)
    for (name, expected), tensor in zip(averaged.state_dict().items(), last.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, expected + 1, msg=name)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_module_saves_a_folder_that_loads_at_any_width_with_its_processor(source, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "converted"
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint", str(source), str(folder)])
    runpy.run_module("hydravit_hf.convert_checkpoint", run_name="__main__")
    assert "4-head HydraViT with 2 layers, for 48-pixel images and 1000 labels" in capsys.readouterr().out
    model = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=2)
    processor = AutoImageProcessor.from_pretrained(folder)
    # not Inception's 0.5, which the original's script imports
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(processor.image_std) == [0.229, 0.224, 0.225]
    pixel_values = processor(Image.new("L", (100, 70)), return_tensors="pt").pixel_values
    assert model(pixel_values).logits.shape == (1, LABELS)


def test_the_hydravit_command_converts_too(hydravit, source, tmp_path):
    code, out, _ = hydravit("convert", source, tmp_path / "converted", "--no-ema")
    assert code == 0 and "4 heads" in out and str(tmp_path / "converted") in out
    loaded = HydraViTForImageClassification.from_pretrained(tmp_path / "converted")
    expected = convert_original_checkpoint(source, use_ema=False)
    assert all(map(torch.equal, loaded.parameters(), expected.parameters()))


def test_the_statistics_of_the_training_arguments_win(tmp_path):
    arguments = argparse.Namespace(mean=(0.1, 0.2, 0.3), std=[0.4, 0.5, 0.6])
    main([str(training_file(tmp_path / "source.pth.tar", args=arguments)), str(tmp_path / "converted")])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "converted")
    assert [*processor.image_mean, *processor.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("entry", ["args", "metric", "state_dict_ema"])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, entry):
    trace = tmp_path / "executed"
    file = training_file(tmp_path / "malicious.pth.tar", **{entry: Malicious(trace)})
    with pytest.raises(ValueError, match=r"refused: besides tensors it holds \w+\.mkdir"):
        convert_original_checkpoint(file)
    with pytest.raises(SystemExit, match=r"error: .*refused"):
        main([str(file), str(tmp_path / "converted")])
    assert not trace.exists() and not (tmp_path / "converted").exists()
    with open(tmp_path / "plain.pth.tar", "wb") as plain:
        pickle.dump({"state_dict_ema": Malicious(trace)}, plain, protocol=2)
    with pytest.raises((ValueError, OSError)):
        convert_original_checkpoint(tmp_path / "plain.pth.tar")
    assert not trace.exists()


def test_a_file_that_is_no_whole_training_file_is_one_clear_error(tmp_path, source):
    def converting(data: bytes):
        (tmp_path / "file.pth.tar").write_bytes(data)
        return convert_original_checkpoint(tmp_path / "file.pth.tar")

    for data in (b"", b"not a checkpoint", source.read_bytes()[:-5000], source.read_bytes()[:100]):
        with pytest.raises(OSError, match=r"file\.pth\.tar' is not a PyTorch checkpoint, or it is damaged"):
            converting(data)
    with pytest.raises(FileNotFoundError):
        convert_original_checkpoint(tmp_path / "nowhere.pth.tar")
    for entries, message in (
        ({"state_dict_ema": None}, "no 'state_dict_ema'"),
        ({"state_dict_ema": {**original_weights(), "blocks.0.ls1.gamma": torch.ones(3)}}, "blocks.0.ls1.gamma"),
        ({"state_dict_ema": {"cls_token": torch.ones(1, 1, 64)}}, "does not hold all the weights"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_original_checkpoint(training_file(tmp_path / "file.pth.tar", **entries))


def test_the_command_never_writes_into_a_folder_that_is_not_empty(source, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not an empty folder"):
        main([str(source), str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


SMALL = torch.arange(16, dtype=torch.float32)
HOSTILE = {
    "a tensor of one number": ({"head.weight": torch.zeros(1).expand(10**7, EMBED)}, "bytes of weights, and asks for"),
    "overlapping views": ({"head.weight": torch.zeros(2000).as_strided((LABELS, EMBED), (1, 1))}, "and asks for"),
    "integers": ({"head.bias": torch.zeros(LABELS, dtype=torch.int64)}, "'head.bias' as torch.int64"),
    "bytes": ({"head.bias": torch.zeros(LABELS, dtype=torch.uint8)}, "'head.bias' as torch.uint8"),
    "complex numbers": ({"norm.bias": torch.zeros(EMBED, dtype=torch.complex64)}, "'norm.bias' as torch.complex64"),
    "truth values": ({"norm.bias": torch.zeros(EMBED, dtype=torch.bool)}, "'norm.bias' as torch.bool"),
    "a sparse tensor": ({"head.weight": torch.eye(LABELS, EMBED).to_sparse()}, "'head.weight' as a sparse"),
    "an empty tensor": ({"head.weight": torch.zeros(LABELS, EMBED, device="meta")}, "'head.weight' as a sparse"),
    "a list": ({"head.weight": [1, 2]}, "holds a list, not a tensor, as 'head.weight'"),
    "nothing": ({"head.weight": None}, "holds a NoneType, not a tensor"),
    "a number as a name": ({3: SMALL}, "the name 3, which is no text"),
    "no rows": ({"blocks.0.attn.qkv.weight": torch.zeros(2, EMBED)}, "should hold three projections"),
    "a scalar": ({"head.weight": torch.tensor(1.0)}, "'classifier.weight' has the shape ()"),
    "a scalar of patches": ({"patch_embed.proj.weight": torch.tensor(1.0)}, "projection.weight' has the shape ()"),
    "a scalar of positions": ({"pos_embed": torch.tensor(1.0)}, "position_embeddings' has the shape ()"),
    "a scalar of neurons": ({"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, "fc1.weight' has the shape ()"),
    "a scalar of projections": ({"blocks.0.attn.qkv.weight": torch.tensor(1.0)}, "should hold three projections"),
    "a scalar elsewhere": ({"norm.weight": torch.tensor(1.0)}, "should have the shape"),
    "one dimension too few": ({"head.weight": torch.zeros(LABELS)}, "should have 2 dimensions"),
    "no pixels": ({"patch_embed.proj.weight": torch.zeros(EMBED, 3, 0, 0)}, "does not hold all the weights"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_weights_that_are_no_plain_real_numbers_are_refused_in_one_line(tmp_path, kind):
    weights, message = HOSTILE[kind]
    source = training_file(tmp_path / "hostile.pth.tar", state_dict_ema=original_weights() | weights)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        convert_and_save(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_converted(tmp_path, dtype):
    weights = {name: weight.to(dtype) for name, weight in original_weights().items()}
    model = convert_original_checkpoint(training_file(tmp_path / "file.pth.tar", state_dict_ema=weights))
    assert torch.equal(model.classifier.bias, weights["head.bias"].to(model.dtype))


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        ("imagenet", "`image_mean` must have 3 numbers, one for each channel, not 'imagenet'"),
        (["0.5", "0.5", "0.5"], "`image_mean` must have numbers, one for each channel, not '0.5'"),
        ([0.5, 0.5], "`image_mean` must have 3 numbers"),
        ([0.5, float("nan"), 0.5], "must have numbers, one for each channel, not nan"),
        ({"a": 1}, "`image_mean` must have 3 numbers"),
        (0.5, "`image_mean` must have 3 numbers"),
        ([True, False, True], "must have numbers, one for each channel, not True"),
    ],
)
def test_means_that_are_no_numbers_are_refused_in_one_line(tmp_path, mean, message):
    source = training_file(tmp_path / "file.pth.tar", args=argparse.Namespace(mean=mean, std=None))
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_and_save(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
