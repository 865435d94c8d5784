"""Files by width: the first ones are a narrow model, all of them the whole, bit by bit, and no mixture passes."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.disks import contents
from support.drawing import configs_and_widths, costly, make
from support.models import KINDS, make_config
from transformers import AutoModelForImageClassification, pipeline

from hydravit_hf import HydraViTBackbone, HydraViTForImageClassification, HydraViTModel
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model.shards_hydravit import PART, read_index, resolve_shard_heads, split_by_heads

CLASSIFIER = HydraViTForImageClassification
INDEX = "model.safetensors.index.json"
WIDTHS = (1, 2, 3, 4, 5, 6)


@pytest.fixture(params=KINDS)
def any_kind(request, make_model):
    return make_model(**KINDS[request.param])


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", shard_by_heads=[2, 4])
    return tmp_path / "saved"


def name_of(heads: int) -> str:
    return f"model-{heads:02d}-heads.safetensors"


def same(loaded, expected) -> bool:
    found, wanted = loaded.state_dict(), expected.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# What the files hold


def test_the_first_file_is_the_ordinary_checkpoint_of_the_narrowest_width(any_kind, tmp_path):
    any_kind.save_pretrained(tmp_path / "saved", shard_by_heads=True)
    any_kind.extract_subnetwork(any_kind.config.subnetwork_heads[0]).save_pretrained(tmp_path / "narrow")
    first = tmp_path / "saved" / name_of(any_kind.config.subnetwork_heads[0])
    found, expected = load_file(first), load_file(tmp_path / "narrow" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    assert {index["weight_map"][name] for name in expected} == {first.name}


def test_the_parts_concatenate_to_the_parameters_as_the_module_says(any_kind, tmp_path):
    any_kind.save_pretrained(tmp_path, shard_by_heads=True)
    index = json.loads((tmp_path / INDEX).read_text())
    assert list(index["metadata"]["heads"]) == [str(heads) for heads in any_kind.config.subnetwork_heads]
    tensors, numbers = {}, 0
    for last, files in index["metadata"]["heads"].items():
        (file,) = files
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata()["heads"].endswith(f"-{last}")
        parts = load_file(tmp_path / file)
        numbers += sum(part.numel() for part in parts.values())
        for name in sorted(parts, reverse=True):  # dim_1 before dim_0
            if match := PART.fullmatch(name):
                tensors[match["name"]] = torch.cat((tensors[match["name"]], parts[name]), int(match["dim"]))
            else:
                tensors[name] = parts[name]
    assert numbers == any_kind.num_parameters()  # each is stored once
    assert same(any_kind, type("Joined", (), {"state_dict": lambda self: tensors})())


def test_equal_weights_give_equal_files_and_others_another_name(model, make_model, tmp_path):
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name, shard_by_heads=True)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    model.classifier.bias.data[0] += 1
    model.save_pretrained(tmp_path / "second", shard_by_heads=True)
    names = {shard.checkpoint for name in ("first", "second") for shard in read_index(tmp_path / name / INDEX)}
    assert len(names) == 2


def test_each_width_splits_what_the_narrower_ones_left(any_kind):
    tensors, config = any_kind.state_dict(), any_kind.config
    split = list(split_by_heads(tensors, config, [2, 4, 6]))
    assert [(first, last) for first, last, _ in split] == [(1, 2), (3, 4), (5, 6)]
    sizes = [sum(part.numel() for part in parts.values()) for _, _, parts in split]
    narrow = any_kind.extract_subnetwork(2).num_parameters(), any_kind.extract_subnetwork(4).num_parameters()
    assert sizes == [narrow[0], narrow[1] - narrow[0], any_kind.num_parameters() - narrow[1]]


# Loading


@costly
@given(
    configs_and_widths(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["50GB", "4KB"]),
    st.randoms(use_true_random=False),
)
def test_a_width_from_files_by_width_is_the_extracted_model_bit_by_bit(pair, dtype, max_shard_size, draw):
    config, num_heads = pair
    model = make(config)[0].to(dtype)
    widths = draw.choice([True, [draw.choice(config.subnetwork_heads)]])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, shard_by_heads=widths, max_shard_size=max_shard_size)
        narrow = CLASSIFIER.from_pretrained(folder, num_attention_heads=num_heads)
        whole = CLASSIFIER.from_pretrained(folder)
    assert narrow.dtype == whole.dtype == dtype
    assert narrow.config.subnetwork_heads == config.resized(num_heads).subnetwork_heads
    assert same(narrow, model.extract_subnetwork(num_heads)) and same(whole, model)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8])
def test_both_formats_give_the_same_model_in_every_way_of_loading(any_kind, images, tmp_path, num_heads):
    any_kind.save_pretrained(tmp_path / "one")
    any_kind.save_pretrained(tmp_path / "many", shard_by_heads=True, max_shard_size="30KB")
    options = {"num_attention_heads": num_heads}
    for load in (CLASSIFIER, HydraViTModel, HydraViTBackbone, AutoModelForImageClassification):
        for more in ({}, {"image_size": 32}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}):
            pair = []
            for name in ("one", "many"):
                torch.manual_seed(0)  # heads beyond the checkpoint's are drawn
                pair.append(load.from_pretrained(tmp_path / name, **options | more))
            assert same(*pair), (load, more)
            assert pair[1].name_or_path == str(tmp_path / "many")
    loaded, report = CLASSIFIER.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert same(loaded, any_kind) and not report["missing_keys"] and not report["unexpected_keys"]
    active = min(num_heads, 6)
    expected = any_kind(images, num_heads_active=active).logits
    torch.testing.assert_close(loaded(images, num_heads_active=active).logits, expected, atol=1e-5, rtol=0)


def test_quantized_offloaded_and_other_loads_work_on_files_by_width(model, images, folder, tmp_path):
    expected = model(images).logits
    parts = ("hydravit.embeddings", "hydravit.layers.0", "hydravit.layers.1", "hydravit.layernorm", "classifier")
    places = {part: "disk" if part.endswith("1") else "cpu" for part in parts}
    offloaded = CLASSIFIER.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offloaded")
    torch.testing.assert_close(offloaded(images).logits, expected, atol=1e-5, rtol=0)
    other = CLASSIFIER.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert other(images).logits.shape == (3, 7)
    make_image_processor(model.config).save_pretrained(folder)
    classify = pipeline("image-classification", str(folder), model_kwargs={"num_attention_heads": 2})
    assert classify.model.config.hidden_size == 16
    assert CLASSIFIER.from_pretrained(folder, num_heads_active=2).config.num_attention_heads == 6


@pytest.mark.filterwarnings("ignore")  # of torchao
def test_a_load_that_quantizes_gives_the_same_weights_from_both_formats(model, images, folder, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model.save_pretrained(tmp_path / "one")
    for num_heads in (4, 6):
        options = {"quantization_config": TorchAoConfig(quantization.Int8WeightOnlyConfig())}
        options["num_attention_heads"] = num_heads
        one, many = (CLASSIFIER.from_pretrained(path, **options)(images).logits for path in (tmp_path / "one", folder))
        assert torch.equal(one, many)
        assert not torch.equal(one, model(images, num_heads_active=num_heads).logits)


def test_a_width_needs_the_files_up_to_it_only(model, folder):
    for missing, widest in ((6, 4), (4, 2)):
        (folder / name_of(missing)).unlink()
        for num_heads in range(1, 7):
            if num_heads <= widest:
                loaded = CLASSIFIER.from_pretrained(folder, num_attention_heads=num_heads)
                assert same(loaded, model.extract_subnetwork(num_heads))
            else:
                with pytest.raises(OSError, match=name_of(4 if num_heads <= 4 and missing == 4 else missing)):
                    CLASSIFIER.from_pretrained(folder, num_attention_heads=num_heads)


def test_a_load_reads_each_byte_of_the_files_that_it_needs_once(folder, monkeypatch):
    from hydravit_hf.model.files_hydravit import StoredTensor

    read, sizes = StoredTensor._read, []
    monkeypatch.setattr(StoredTensor, "_read", lambda self, memory: sizes.append(len(memory)) or read(self, memory))
    CLASSIFIER.from_pretrained(folder, num_attention_heads=4)
    held = [load_file(folder / name_of(heads)) for heads in (2, 4)]
    assert sum(sizes) == sum(tensor.nbytes for tensors in held for tensor in tensors.values())


# Saving


@pytest.mark.parametrize(
    ("shard_by_heads", "widths"),
    [(True, [1, 2, 3, 4, 5, 6]), ([3], [3, 6]), ((6,), [6]), ([4, 2, 4], [2, 4, 6])],
)
def test_the_widths_that_get_a_file_always_end_with_all_heads(shard_by_heads, widths):
    assert resolve_shard_heads(shard_by_heads, make_config()) == widths


@pytest.mark.parametrize("value", [[], [7], [0], ["3"], [True], [2.0], 3, "yes", None, {3: 6}])
def test_other_widths_are_refused_before_anything_is_written(model, tmp_path, value):
    with pytest.raises(
        ValueError, match=r"`shard_by_heads` must list some of \[1, 2, 3, 4, 5, 6\], or be True or False, not"
    ):
        model.save_pretrained(tmp_path / "saved", shard_by_heads=value)
    assert not (tmp_path / "saved").exists()


def test_untrained_widths_get_no_file(make_model, tmp_path):
    model = make_model(subnetwork_heads=[2, 4])
    with pytest.raises(ValueError, match=r"must list some of \[2, 4, 6\], or be True or False, not \[3\]"):
        model.save_pretrained(tmp_path, shard_by_heads=[3])
    model.save_pretrained(tmp_path, shard_by_heads=True)
    assert [shard.path for shard in read_index(tmp_path / INDEX)] == [name_of(heads) for heads in (2, 4, 6)]
    assert same(CLASSIFIER.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("option", [{"variant": "fp16"}, {"push_to_hub": True}, {"distributed_checkpoint": True}])
def test_what_files_by_width_can_not_be_combined_with_is_refused(model, tmp_path, option):
    with pytest.raises(ValueError, match=f"can't be combined with `{next(iter(option))}`"):
        model.save_pretrained(tmp_path / "saved", shard_by_heads=True, **option)
    assert not (tmp_path / "saved").exists()


def test_saves_of_all_formats_replace_each_other_and_leave_no_file_behind(make_model, tmp_path):
    for options in (
        {"shard_by_heads": True},
        {},
        {"shard_by_heads": [3]},
        {"shard_by_heads": [3], "max_shard_size": "40KB"},
        {"max_shard_size": "40KB"},
        {"shard_by_heads": True},
        {"shard_by_heads": True},
    ):
        model = make_model()
        model.save_pretrained(tmp_path, **options)
        found = {file.name for file in tmp_path.glob("*.safetensors")}
        one_file = not options
        assert found == ({"model.safetensors"} if one_file else {shard.path for shard in read_index(tmp_path / INDEX)})
        assert (tmp_path / INDEX).exists() != one_file
        assert not list(tmp_path.glob("_saving*"))
        assert same(CLASSIFIER.from_pretrained(tmp_path), model)
        assert same(CLASSIFIER.from_pretrained(tmp_path, num_attention_heads=2), model.extract_subnetwork(2))


def test_a_narrow_model_that_was_loaded_is_saved_as_an_ordinary_one(model, folder, tmp_path):
    loaded = CLASSIFIER.from_pretrained(folder, num_attention_heads=4)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").exists()
    loaded.save_pretrained(folder, shard_by_heads=True)  # over the files that it came from
    assert same(CLASSIFIER.from_pretrained(folder), model.extract_subnetwork(4))


# Damage


def refused(folder, message: str, widths=WIDTHS):
    for num_heads in widths:
        with pytest.raises((OSError, RuntimeError), match=message):
            CLASSIFIER.from_pretrained(folder, num_attention_heads=num_heads)
            pytest.fail(f"{num_heads} heads are taken")


def swap(folder):
    first, second = (folder / name_of(heads) for heads in (2, 4))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def copy_over(folder):
    shutil.copy(folder / name_of(2), folder / name_of(4))


def foreign(folder):
    other = make(make_config())[0]
    other.classifier.bias.data += 1
    other.save_pretrained(folder / "other", shard_by_heads=[2, 4])
    shutil.copy(folder / "other" / name_of(4), folder)


def change(width: int, damage, **metadata):
    def apply(folder):
        file = folder / name_of(width)
        with safe_open(file, "pt") as opened:
            metadata_before = opened.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        damage(tensors)
        save_file(tensors, file, metadata_before | metadata)

    return apply


def lose_norm(tensors):
    del tensors["hydravit.layernorm.bias.heads_3_to_4.dim_0"]


def add_overlap(tensors):
    tensors["hydravit.layernorm.bias"] = torch.ones(8)


def shorten(tensors):
    name = "hydravit.layers.1.mlp.fc1.weight.heads_3_to_4.dim_1"
    tensors[name] = tensors[name][1:].clone()


def retype(tensors):
    name = "hydravit.layers.1.mlp.fc1.weight.heads_3_to_4.dim_0"
    tensors[name] = tensors[name].to(torch.bfloat16)


def truncate(folder):
    file = folder / name_of(4)
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {  # what is done, the message, and the widths that see it
    "swapped files": (swap, rf"{name_of(2)}' holds the heads 3-4; its index says 1-2", WIDTHS),
    "a file in place of another": (copy_over, rf"{name_of(4)}' holds the heads 1-2; its index says 3-4", WIDTHS[2:]),
    "a file of another checkpoint": (foreign, rf"{name_of(4)}' belongs to another checkpoint", WIDTHS[2:]),
    "an ordinary file": (
        lambda folder: save_file(load_file(folder / name_of(2)), folder / name_of(2)),
        rf"{name_of(2)}' holds the heads None; its index says 1-2",
        WIDTHS,
    ),
    "a cut file": (truncate, rf"{name_of(4)}' is not a whole safetensors file", WIDTHS[2:]),
    "a missing file": (lambda folder: (folder / name_of(2)).unlink(), name_of(2), WIDTHS),
    "a missing tensor": (change(4, lose_norm), rf"{name_of(4)}' has other tensors .*only in the index", WIDTHS[2:]),
    "an overlapping tensor": (change(4, add_overlap), rf"{name_of(4)}' has other tensors .*not in", WIDTHS[2:]),
    "a part of another shape": (change(4, shorten), rf"{name_of(4)}' fits on no narrower part: it is", WIDTHS[2:]),
    "a part of another type": (change(4, retype), rf"{name_of(4)}' fits on no narrower part: it is", WIDTHS[2:]),
    "other heads in the metadata": (
        change(4, lambda tensors: None, heads="3-5"),
        rf"{name_of(4)}' holds the heads 3-5",
        WIDTHS[2:],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name_by_each_width_that_needs_it(model, folder, damage):
    spoil, message, widths = DAMAGES[damage]
    spoil(folder)
    refused(folder, message, widths)
    for num_heads in set(WIDTHS) - set(widths):
        assert same(
            CLASSIFIER.from_pretrained(folder, num_attention_heads=num_heads), model.extract_subnetwork(num_heads)
        )
    with pytest.raises((OSError, RuntimeError), match=message):
        CLASSIFIER.from_pretrained(folder, num_attention_heads=8)


def map_everything(value: str):
    return lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], value))


def set_heads(value):
    return lambda index: index["metadata"].update(heads=value(index["metadata"]["heads"]))


INDICES = {
    "points above": map_everything("../model.safetensors"),
    "points to a folder": map_everything("inside/model.safetensors"),
    "points to another drive": map_everything("C:\\model.safetensors"),
    "lists a file above": set_heads(lambda heads: heads | {"4": ["../other.safetensors"]}),
    "lists a file twice": set_heads(lambda heads: heads | {"4": heads["2"]}),
    "lists a file less": set_heads(lambda heads: {"2": heads["2"], "6": heads["6"]}),
    "swaps two widths": set_heads(lambda heads: heads | {"2": heads["4"], "4": heads["2"]}),
    "overlaps": set_heads(lambda heads: {"2": heads["2"], "3": heads["4"], "6": heads["6"]}),
    "names a width twice": set_heads(lambda heads: heads | {"04": heads["4"]}),
    "has no widths": set_heads(lambda heads: {}),
    "has a list of widths": set_heads(lambda heads: [2, 4, 6]),
    "has a word for a width": set_heads(lambda heads: {"two": heads["2"]} | heads),
    "has a width of zero": set_heads(lambda heads: {"0": heads["2"], "4": heads["4"], "6": heads["6"]}),
    "has files that are numbers": set_heads(lambda heads: heads | {"2": [2]}),
    "has no name": lambda index: index["metadata"].pop("checkpoint"),
}


@pytest.mark.parametrize("damage", INDICES)
def test_a_damaged_index_is_refused_by_every_width(folder, damage):
    index = json.loads((folder / INDEX).read_text())
    INDICES[damage](index)
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, r"model\.safetensors\.index\.json' is not an index of shards: .")


def test_an_index_of_other_heads_than_the_configuration_is_refused(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != name_of(6)}
    del index["metadata"]["heads"]["6"]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "in the weights; by config.json")


def test_a_mixture_of_two_saves_is_refused(make_model, folder, tmp_path):
    make_model().save_pretrained(tmp_path / "other", shard_by_heads=[2, 4])
    for name in (INDEX, name_of(2), name_of(4), name_of(6)):
        mixed = shutil.copytree(folder, tmp_path / f"mixed-{name}")
        shutil.copy(tmp_path / "other" / name, mixed)
        with pytest.raises(OSError, match="belongs to another checkpoint than its index"):
            CLASSIFIER.from_pretrained(mixed)


def test_widths_that_need_no_damaged_file_load_from_a_folder_that_has_only_theirs(model, folder, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    for name in ("config.json", INDEX, name_of(2)):
        shutil.copy(Path(folder) / name, part)
    assert same(CLASSIFIER.from_pretrained(part, num_attention_heads=2), model.extract_subnetwork(2))
