"""A damaged checkpoint is one clear error at every width, or exactly the right model: never a wrong one.

Errors are of three kinds, and name the file, the tensor or the argument. What a file lacks is newly initialised, as in
transformers, and stands in the loading info. Damage that acts before the width is known is tried at one width, and all
other damage in every way of loading.
"""

import json
import resource
import shutil
import struct
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.drawing import SAME_EACH_TIME
from transformers import AutoModelForImageClassification

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, HydraViTModel
from hydravit_hf.model.files_hydravit import read_header

CLASSIFIER = HydraViTForImageClassification
REFUSED = (OSError, ValueError, RuntimeError)
LOADS = {
    "full": {},
    "narrow": {"num_attention_heads": 2},
    "active": {"num_heads_active": 2},
    "growing": {"num_attention_heads": 6},
}
FUZZ = settings(**SAME_EACH_TIME, max_examples=40)
NOT_WHOLE = r"model\.safetensors' is not a whole safetensors file: ."
QUERY, CLASS_TOKEN = "layers.1.attention.q_proj.weight", "embeddings.cls_token"


@pytest.fixture
def model(make_model):
    return make_model(num_attention_heads=4, subnetwork_heads=[1, 2, 3, 4])


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def shards(model, tmp_path):
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    return tmp_path / "shards"


def refused(folder, message: str, load=CLASSIFIER.from_pretrained):
    for name, options in LOADS.items():
        with pytest.raises(REFUSED, match=message):
            load(folder, **options)
            pytest.fail(f"the {name} load takes it")


def check_loads(model, folder, images):
    """Check that each load is refused, gives the right logits, or reports what it initialised."""
    for name, options in LOADS.items():
        try:
            loaded, report = CLASSIFIER.from_pretrained(folder, **options, output_loading_info=True)
        except REFUSED:
            continue
        if not report["missing_keys"]:
            num_heads = min(4, options.get("num_attention_heads", 4), options.get("num_heads_active", 4))
            expected = model(images, num_heads_active=num_heads).logits
            found = loaded(images, num_heads_active=num_heads).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=name)


def find(names, ending: str) -> str:
    return next(name for name in names if name.endswith(ending))


# The file of the weights: its header, by hand


def split(data: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def join(header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def set_entry(key: str, change, ending: str = QUERY):
    def damage(header, data):
        entry = header[find(header, ending)]
        entry[key] = change(entry[key]) if callable(change) else change
        return join(header, data)

    return damage


def shift_all(header, data):
    for name in header.keys() - {"__metadata__"}:
        header[name]["data_offsets"] = [offset + 64 for offset in header[name]["data_offsets"]]
    return join(header, bytes(64) + data)


def share_data(header, data):
    header[find(header, QUERY)]["data_offsets"] = header[find(header, "1.attention.k_proj.weight")]["data_offsets"]
    return join(header, data)


def replace_text(old: str, new: str):
    return lambda header, data: join(json.dumps(header).replace(old, new).encode(), data)


HEADERS = {
    "a byte less": lambda header, data: join(header, data[:-1]),
    "bytes after the last tensor": lambda header, data: join(header, data + bytes(16)),
    "a hole before the first tensor": shift_all,
    "two tensors in one place": share_data,
    "data before the file": set_entry("data_offsets", lambda offsets: [offset - 10**6 for offset in offsets]),
    "data that ends before it begins": set_entry("data_offsets", lambda offsets: offsets[::-1]),
    "offsets of another type": set_entry("data_offsets", lambda offsets: [float(offset) for offset in offsets]),
    "three offsets": set_entry("data_offsets", lambda offsets: [*offsets, 0]),
    "no offsets": set_entry("data_offsets", None),
    "an unknown dtype": set_entry("dtype", "F33"),
    "a narrower dtype": set_entry("dtype", "F16"),
    "a list as dtype": set_entry("dtype", ["F32"]),
    "a negative shape": set_entry("shape", [-32, -32]),
    "a shape of strings": set_entry("shape", ["32", "32"]),
    "no shape": set_entry("shape", None),
    "an entry that is a list": replace_text('{"dtype"', '[{"dtype"'),
    "metadata that is no text": lambda header, data: join(header | {"__metadata__": {"format": 1}}, data),
    "a header that is a list": lambda header, data: join(b"[]", data),
    "a header without end": lambda header, data: join(b"[" * 10**5, data),
    "a header that is not text": lambda header, data: join(b"\xff" * 100, data),
    "an empty header": lambda header, data: join(b"", data),
    "no header": lambda header, data: b"",
    "half a length": lambda header, data: b"\x10\0\0",
    "a huge length": lambda header, data: struct.pack("<Q", 2**60) + data,
    "another file": lambda header, data: b"<html>Not found</html>" * 100,
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_damaged_header_is_an_error_that_names_the_file(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(HEADERS[damage](*split(file.read_bytes())))
    with open(file, "rb") as opened, pytest.raises(OSError, match=NOT_WHOLE):
        read_header(opened)
    with pytest.raises(OSError, match=NOT_WHOLE):
        CLASSIFIER.from_pretrained(folder)


def test_the_row_reader_agrees_with_safetensors(tmp_path):
    tensors = {
        str(dtype): torch.randn(6, 5, 4).mul(10).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    }
    file = str(tmp_path / "tensors.safetensors")
    save_file(tensors, file)
    with open(file, "rb") as opened:
        stored, _ = read_header(opened)
        for name, tensor in load_file(file).items():
            assert stored[name].shape == list(tensor.shape)
            assert torch.equal(stored[name][:3, :2, :1], tensor[:3, :2, :1])
            assert torch.equal(stored[name][:6, :5, :4], tensor)


def test_a_file_that_is_cut_anywhere_is_an_error_that_names_it(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", data[:8])[0]

    @FUZZ
    @given(st.integers(0, len(data) - 1))
    @example(0)
    @example(7)
    @example(8)
    @example(header_end - 1)
    @example(header_end)
    @example(len(data) - 1)
    def check(size):
        file.write_bytes(data[:size])
        refused(folder, NOT_WHOLE)

    check()


def test_a_changed_byte_of_the_header_never_gives_a_wrong_model(model, folder, images):
    file = folder / "model.safetensors"
    data = file.read_bytes()

    @FUZZ
    @given(st.integers(0, 7 + struct.unpack("<Q", data[:8])[0]), st.integers(0, 255))
    def check(position, byte):
        file.write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
        check_loads(model, folder, images)

    check()


# The weights: whole files with wrong tensors


def set_tensor(ending: str, change):
    def damage(tensors):
        name = find(tensors, ending)
        tensors[name] = change(tensors[name])

    return damage


def rename(old: str, new: str):
    def damage(tensors):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return damage


def double(tensor, dim: int):
    return torch.cat((tensor, tensor), dim)


SHAPES = {
    "a row less": set_tensor(QUERY, lambda tensor: tensor[:-1]),
    "rows of three heads": set_tensor(QUERY, lambda tensor: tensor[:24]),
    "a narrower block": set_tensor(QUERY, lambda tensor: tensor[:16, :16]),
    "twice the columns": set_tensor(QUERY, partial(double, dim=1)),
    "another order": set_tensor(QUERY, lambda tensor: tensor.view(16, 64)),
    "flat": set_tensor(QUERY, lambda tensor: tensor.flatten()),
    "nothing": set_tensor(QUERY, lambda tensor: tensor[:0]),
    "integers": set_tensor(QUERY, lambda tensor: tensor.int()),
    "a transposed matrix": set_tensor("layers.1.mlp.fc1.weight", lambda tensor: tensor.T),
    "a longer norm": set_tensor("layernorm_before.weight", partial(double, dim=0)),
    "a flat class token": set_tensor(CLASS_TOKEN, lambda tensor: tensor.flatten()),
    "two class tokens": set_tensor(CLASS_TOKEN, partial(double, dim=1)),
    "a wider class token": set_tensor(CLASS_TOKEN, partial(double, dim=2)),
    "a narrower class token": set_tensor(CLASS_TOKEN, lambda tensor: tensor[..., :16]),
    "a position less": set_tensor("position_embeddings", lambda tensor: tensor[:, :-1]),
    "other patches": set_tensor("projection.weight", partial(double, dim=3)),
    "a label less": set_tensor("classifier.weight", lambda tensor: tensor[:-1]),
    "a stack of classifiers": set_tensor("classifier.weight", lambda tensor: tensor[None]),
}


def change_tensors(file, damage):
    tensors = load_file(file)
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


@pytest.mark.parametrize("damage", SHAPES)
def test_a_wrong_shape_or_dtype_is_an_error_that_names_the_tensor(model, folder, images, damage):
    file = folder / "model.safetensors"
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(file).items()}
    change_tensors(file, SHAPES[damage])
    after = load_file(file)
    (changed,) = [name for name in before if before[name] != (after[name].shape, after[name].dtype)]
    message = f"^'{changed}' is of .* in the weights; by config.json"
    refused(folder, message)
    with pytest.raises(RuntimeError, match=message):
        AutoModelForImageClassification.from_pretrained(folder, num_attention_heads=2)
    if changed.startswith("hydravit."):
        with pytest.raises(RuntimeError, match=message):
            HydraViTModel.from_pretrained(folder)
    else:  # the encoder has no classifier that could be wrong
        states = HydraViTModel.from_pretrained(folder)(images).last_hidden_state
        torch.testing.assert_close(states, model.hydravit(images).last_hidden_state)


@pytest.mark.parametrize("damage", [rename("layers.1.", "layers.2."), rename("layers.1.", "other.")])
def test_layers_that_are_missing_or_misnamed_are_an_error(model, folder, images, damage):
    change_tensors(folder / "model.safetensors", damage)
    numbers = {name.split(".")[2] for name in load_file(folder / "model.safetensors") if ".layers." in name}
    if numbers == {"0", "2"}:  # as many as there should be, one of them under another name
        check_loads(model, folder, images)
        _, report = CLASSIFIER.from_pretrained(folder, num_attention_heads=2, output_loading_info=True)
        assert report["missing_keys"] and report["unexpected_keys"]
    else:
        refused(folder, "config.json has num_hidden_layers=2, the weights have 1")


@pytest.mark.parametrize("tensors", [{}, {"other": torch.ones(3)}])
def test_a_file_without_parameters_is_reported_as_that(folder, tensors):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for options in LOADS.values():
        loaded, report = CLASSIFIER.from_pretrained(folder, **options, output_loading_info=True)
        assert set(report["missing_keys"]) == loaded.state_dict().keys()


@pytest.mark.parametrize("name", [QUERY, "position_embeddings", "layernorm.bias", "classifier.weight"])
@pytest.mark.parametrize("new_name", [None, "other"])
def test_what_is_missing_is_initialised_and_reported_at_every_width(folder, name, new_name):
    def damage(tensors):
        missing = find(tensors, name)
        tensor = tensors.pop(missing)
        if new_name is not None:
            tensors[new_name] = tensor

    full_name = find(load_file(folder / "model.safetensors"), name)
    change_tensors(folder / "model.safetensors", damage)
    for options in LOADS.values():
        loaded, report = CLASSIFIER.from_pretrained(folder, **options, output_loading_info=True)
        assert set(report["missing_keys"]) == {full_name}
        assert set(report["unexpected_keys"]) == ({new_name} if new_name else set())
        assert loaded.state_dict()[full_name].isfinite().all()


def test_a_missing_class_token_is_reported_or_an_error(model, folder, images):
    change_tensors(folder / "model.safetensors", rename(CLASS_TOKEN, "other"))
    _, report = CLASSIFIER.from_pretrained(folder, output_loading_info=True)
    assert set(report["missing_keys"]) == {f"hydravit.{CLASS_TOKEN}"}
    for options in (LOADS["narrow"], LOADS["growing"]):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            CLASSIFIER.from_pretrained(folder, **options)


@pytest.mark.parametrize("extra", [torch.ones(()), torch.ones(2, 0, 3), torch.ones(3, dtype=torch.int64)])
@pytest.mark.parametrize("name", ["extra", "other.embeddings.cls_token"])
def test_what_is_left_over_is_reported_and_changes_nothing(model, folder, images, name, extra):
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: extra}))
    for num_heads, options in zip((4, 2, 2, 4), LOADS.values(), strict=True):
        loaded, report = CLASSIFIER.from_pretrained(folder, **options, output_loading_info=True)
        assert set(report["unexpected_keys"]) == {name} and not report["missing_keys"]
        expected = model(images, num_heads_active=num_heads).logits
        torch.testing.assert_close(loaded(images, num_heads_active=num_heads).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_tensor_of_another_precision_is_used(model, folder, images, dtype):
    change_tensors(folder / "model.safetensors", set_tensor(QUERY, lambda tensor: tensor.bfloat16().to(dtype)))
    expected = CLASSIFIER.from_pretrained(folder)
    assert expected.dtype == torch.float32
    for options in LOADS.values():
        loaded = CLASSIFIER.from_pretrained(folder, **options)
        found = loaded(images, num_heads_active=2).logits
        torch.testing.assert_close(found, expected(images, num_heads_active=2).logits, atol=1e-5, rtol=0)


# Shards and their index

INDICES = {
    "no JSON": lambda index: "{nonsense",
    "not text": lambda index: b"\xff\xfe\0",
    "brackets without end": lambda index: "[" * 10**5,
    "a list": lambda index: [1, 2],
    "null": lambda index: None,
    "no weight_map": lambda index: {"metadata": index["metadata"]},
    "no metadata": lambda index: {"weight_map": index["weight_map"]},
    "metadata that is a list": lambda index: index | {"metadata": [1]},
    "a map that is null": lambda index: index | {"weight_map": None},
    "a map that is a list": lambda index: index | {"weight_map": list(index["weight_map"])},
    "an empty map": lambda index: index | {"weight_map": {}},
    "a map to numbers": lambda index: index | {"weight_map": dict.fromkeys(index["weight_map"], 3)},
    "a map to lists": lambda index: index | {"weight_map": {name: ["a.safetensors"] for name in index["weight_map"]}},
    "a map to the folder above": lambda index: index | {"weight_map": dict.fromkeys(index["weight_map"], "..")},
}


@pytest.mark.parametrize("damage", INDICES)
def test_a_damaged_index_is_an_error_that_names_it(shards, damage):
    file = shards / "model.safetensors.index.json"
    damaged = INDICES[damage](json.loads(file.read_text()))
    if not isinstance(damaged, (bytes, str)):
        damaged = json.dumps(damaged)
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(OSError, match=r"model\.safetensors\.index\.json' is not an index of shards: ."):
        CLASSIFIER.from_pretrained(shards, num_attention_heads=2)


def point_index(shards, name: str):
    file = shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    (shard,) = shards.glob("model-00002-*")
    names = {tensor: name if found == shard.name else found for tensor, found in index["weight_map"].items()}
    file.write_text(json.dumps(index | {"weight_map": names}))
    return shard


@pytest.mark.parametrize("where", ["../other.safetensors", "{folder}/other.safetensors", "inside/other.safetensors"])
def test_an_index_that_points_outside_its_folder_is_an_error_that_names_it(shards, tmp_path, where):
    where = where.format(folder=tmp_path)
    shard = point_index(shards, where)
    (shards / "inside").mkdir()
    shutil.move(shard, shards / where)
    refused(shards, "index.json' is not an index of shards: .*other.safetensors' is not the name of")


def test_a_shard_that_is_a_link_is_read_as_in_the_cache_of_the_hub(model, shards, tmp_path, images):
    (shard,) = shards.glob("model-00002-*")
    shutil.move(shard, tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    check_loads(model, shards, images)
    (tmp_path / "blob").unlink()
    refused(shards, shard.name)


def test_a_missing_damaged_or_foreign_shard_is_an_error_that_names_it(shards, tmp_path):
    first, second, *_ = sorted(shards.glob("model-0000*"))
    data = second.read_bytes()
    second.write_bytes(data[:-1])
    refused(shards, f"{second.name}' is not a whole safetensors file")
    second.write_bytes(first.read_bytes())
    refused(shards, f"{second.name}' holds '.*', which another shard holds as well")
    second.unlink()
    refused(shards, second.name)


def test_which_shard_an_index_names_for_a_tensor_does_not_matter(model, shards, images):
    file = shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict(zip(index["weight_map"], reversed(index["weight_map"].values()), strict=True))
    file.write_text(json.dumps(index))
    for options in LOADS.values():
        _, report = CLASSIFIER.from_pretrained(shards, **options, output_loading_info=True)
        assert not report["missing_keys"]
    check_loads(model, shards, images)


# The configuration


def test_a_folder_without_a_configuration_is_no_default_model(folder):
    (folder / "config.json").write_text("{}")
    refused(folder, r"has no config\.json, or an empty one")
    (folder / "config.json").write_text("<html>Not found</html>")
    refused(folder, r"config\.json' is not a valid JSON file")
    (folder / "config.json").unlink()
    refused(folder, r"has no config\.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("separate_classifiers", True),
        ("num_attention_heads", 10**5),
        ("head_dim", 10**5),
        ("num_hidden_layers", 3 * 10**4),
        ("mlp_ratio", 10**5),
        ("num_channels", 10**5),
        ("image_size", 4 * 10**5),
        ("num_labels", 2 * 10**4),
    ],
)
def test_a_configuration_that_disagrees_with_its_weights_is_an_error_and_allocates_nothing(folder, name, value):
    file = folder / "config.json"
    values = json.loads(file.read_text())
    if name == "num_labels":
        del values["id2label"], values["label2id"]
    file.write_text(json.dumps(values | {name: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, f"{name}|in the weights; by config.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500e3  # kilobytes


def test_a_changed_byte_of_the_configuration_never_gives_a_wrong_model(model, folder, images):
    file = folder / "config.json"
    data = file.read_bytes()

    @FUZZ
    @given(st.integers(0, len(data) - 1), st.integers(0, 255))
    def check(position, byte):
        file.write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
        try:
            config = HydraViTConfig.from_pretrained(folder)
        except REFUSED:
            refused(folder, ".")
            return
        if config.layer_norm_eps == model.config.layer_norm_eps:  # another one is as good as it
            check_loads(model, folder, images)

    check()
