"""The arguments that the training scripts share give the model, the datasets and the report that they name."""

import json
import sys

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from support.training import make_model as make_tiny_model

from hydravit_hf import HydraViTForImageClassification, make_image_processor
from hydravit_hf.data import load_digits, load_images, to_pixel_values
from hydravit_hf.training.arguments import (
    AugmentationArguments,
    DataArguments,
    LoopArguments,
    ModelArguments,
    RunArguments,
    describe_card,
    find_teacher,
    make_datasets,
    make_model,
    parse_arguments,
    print_results,
)

CLASSES = (DataArguments, ModelArguments, AugmentationArguments, LoopArguments, RunArguments)
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line into the objects of all classes."""

    def parse(*arguments, **defaults):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        return parse_arguments("Train.\n\nMore.", CLASSES, **defaults)

    return parse


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny model of ten labels, and its processor."""
    model = make_tiny_model()
    model.save_pretrained(tmp_path / "saved")
    make_image_processor(model.config, (0.25,) * 3, (0.5,) * 3).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# --- The command line ---


def test_the_command_line_comes_before_the_file_and_the_file_before_the_defaults(parse, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("dataset_name: someone/images\nlearning_rate: 0.25\nseed: 3\nmax_grad_norm: 5e-4\naugment: true\n")
    data, _, augmentation, loop, _ = parse("--config", file, "--seed", 4, seed=1, num_train_epochs=7)
    assert data.dataset_name == "someone/images" and augmentation.augment
    assert (loop.learning_rate, loop.seed, loop.num_train_epochs, loop.max_grad_norm) == (0.25, 4, 7, 5e-4)
    data, *_ = parse("--config", file, "--data_dir", tmp_path)
    assert (data.dataset_name, data.data_dir) == (None, str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_ratio", 0.1], "unrecognized arguments: --learning_ratio 0.1"),
        (["--streaming"], "--streaming needs --dataset_name or --data_dir"),
        (["--from_vit", "a", "--model_name_or_path", "b"], "give --model_name_or_path or --from_vit, not both"),
        (
            ["--from_vit", "a", "--head_dim", 8],
            "--head_dim is for a new model: not with --model_name_or_path or --from_vit",
        ),
        (["--crop_scale", 0.5], "--crop_scale takes two numbers, not 1"),
        (["--checkpointing_steps", "often"], "--checkpointing_steps must be a number or 'epoch'"),
        (["--config", "recipe.yaml"], "recipe.yaml has unknown arguments: learning_rat"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_what_is_wrong(
    parse, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("learning_rat: 0.1\n")
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert (usage, error) == ("usage: train.py [options]", f"train.py: error: {message}")


def test_the_help_has_each_option_once_with_its_meaning(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert text.startswith("usage: train.py [options]\n\nTrain.\n")
    for kind in CLASSES:
        for name, field in kind.__dataclass_fields__.items():
            assert text.count(f"  --{name} ") == 1
            assert field.metadata["help"].endswith(".")
    assert "(default: None)" not in text and "(default: 25)" in text


# --- The model ---


def test_a_new_model_of_the_digits_is_small_and_draws_its_narrowest_width_more_often():
    model, processor = make_model(DataArguments(), ModelArguments(num_attention_heads=4), DIGITS)
    config = model.config
    assert (config.image_size, config.patch_size, config.num_hidden_layers) == (8, 4, 3)
    assert (config.subnetwork_heads, config.subnetwork_weights) == ([3, 4], [3.0, 1.0])
    assert config.id2label == dict(enumerate(DIGITS))
    assert list(processor.image_mean) == [0.5] * 3
    given = ModelArguments(num_attention_heads=4, head_dim=8, num_hidden_layers=1, subnetwork_weights=[1.0, 2.0])
    config = make_model(DataArguments(), given, DIGITS)[0].config
    assert (config.num_hidden_layers, config.subnetwork_weights) == (1, [1.0, 2.0])
    assert (config.head_dim, config.hidden_size) == (8, 32)


def test_a_new_model_of_other_images_has_the_sizes_that_are_given():
    given = ModelArguments(num_attention_heads=3, num_hidden_layers=1, image_size=32, crop_fraction=0.5)
    model, processor = make_model(DataArguments(data_dir="images"), given, ["cat", "dog"])
    config = model.config
    assert (config.image_size, config.patch_size, config.num_labels) == (32, 16, 2)
    assert config.subnetwork_weights is None or len(set(config.subnetwork_weights)) == 1
    assert processor.size == {"shortest_edge": 64} and dict(processor.crop_size) == {"height": 32, "width": 32}


def test_a_model_starts_from_a_checkpoint_with_its_processor(saved):
    model, processor = make_model(DataArguments(), ModelArguments(model_name_or_path=str(saved)), DIGITS)
    expected = HydraViTForImageClassification.from_pretrained(saved).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert list(processor.image_mean) == [0.25] * 3


def test_a_model_starts_from_a_checkpoint_at_another_image_size_with_other_labels(saved):
    given = ModelArguments(model_name_or_path=str(saved), image_size=16, ignore_mismatched_sizes=True)
    model, processor = make_model(DataArguments(), given, ["even", "odd"])
    assert (model.config.image_size, model.classifier.out_features) == (16, 2)
    assert dict(processor.size) == {"height": 16, "width": 16} and list(processor.image_mean) == [0.25] * 3
    given.separate_classifiers = True
    model, _ = make_model(DataArguments(), given, ["even", "odd"])
    assert model.classifier.weight.shape[:2] == (2, 2)


def test_a_model_starts_from_a_vit_with_more_heads(saved, tmp_path):
    HydraViTForImageClassification.from_pretrained(saved).to_vit(3).save_pretrained(tmp_path / "vit")
    given = ModelArguments(from_vit=str(tmp_path / "vit"), num_attention_heads=5, image_size=16)
    model, processor = make_model(DataArguments(), given, DIGITS)
    assert (model.config.num_attention_heads, model.config.image_size) == (5, 16)
    assert dict(processor.size) == {"height": 16, "width": 16}
    narrow = HydraViTForImageClassification.from_pretrained(saved, num_attention_heads=3)
    found = model.extract_subnetwork(3).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in narrow.state_dict().items() if "layers" in name)


def test_a_vit_is_elastified_with_the_heads_that_it_has_and_teaches_if_it_can(saved, tmp_path):
    vit = HydraViTForImageClassification.from_pretrained(saved).to_vit(3)
    vit.config.id2label = dict(enumerate(DIGITS))
    vit.save_pretrained(tmp_path / "vit")
    given = ModelArguments(from_vit=str(tmp_path / "vit"), elastify=True)
    images = load_digits()["test"]
    model, processor = make_model(DataArguments(), given, DIGITS, images)
    assert model.config.num_attention_heads == 3
    pixel_values = processor(images[:8]["image"], return_tensors="pt").pixel_values
    torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, atol=1e-4, rtol=0)
    assert find_teacher(None, given, DIGITS) == given.from_vit
    assert find_teacher("other", given, DIGITS) == "other"
    assert find_teacher(None, given, ["even", "odd"]) is None
    assert find_teacher(None, ModelArguments(from_vit=given.from_vit), DIGITS) is None


def test_stages_start_from_a_checkpoint_and_forget_its_odds(saved):
    model = make_tiny_model(subnetwork_weights=[3.0, 1.0])
    model.save_pretrained(saved)
    given = ModelArguments(model_name_or_path=str(saved), token_recycling=True, subnetwork_heads=[2, 4])
    config = make_model(DataArguments(), given, DIGITS)[0].config
    assert config.token_recycling and (config.subnetwork_heads, config.subnetwork_weights) == ([2, 4], None)


# --- The data ---


@pytest.fixture
def digits():
    return load_digits()


@pytest.fixture
def processor():
    return make_image_processor(make_tiny_model().config, (0.5,) * 3, (0.5,) * 3)


def test_images_without_augmentation_are_those_of_evaluation(digits, processor):
    train, test = make_datasets(digits, processor)
    expected = digits.with_transform(to_pixel_values(processor))
    assert (len(train), len(test)) == (1437, 360)
    for found, same in ((train, expected["train"]), (test, expected["test"])):
        assert torch.equal(found[5]["pixel_values"], same[5]["pixel_values"])
        assert found[5]["labels"] == same[5]["labels"]


def test_views_follow_the_augmentation_the_seed_and_the_epoch(digits, processor):
    def first(seed: int = 0, epoch: int = 0, **options) -> torch.Tensor:
        train, _ = make_datasets(digits, processor, AugmentationArguments(augment=True, **options), seed)
        train.set_epoch(epoch)
        return train[0]["pixel_values"]

    assert torch.equal(first(), first())
    assert not torch.equal(first(), first(seed=1))
    assert not torch.equal(first(), first(epoch=1))
    whole = {"crop_scale": [1.0, 1.0], "flip": 0, "rand_augment_magnitude": 0, "random_erasing": 0}
    plain, _ = make_datasets(digits, processor, AugmentationArguments(flip=1))
    assert torch.allclose(first(**whole), plain[0]["pixel_values"], atol=1e-6)


def test_a_stream_is_shared_out_among_processes(digits, processor, tmp_path):
    (tmp_path / "shards").mkdir()
    images = digits["train"].select(range(41))
    for index in range(2):
        images.shard(2, index).to_parquet(tmp_path / "shards" / f"train-{index:05d}-of-00002.parquet")
    digits["test"].select(range(3)).to_parquet(tmp_path / "shards" / "test-00000-of-00001.parquet")
    args = DataArguments(data_dir=str(tmp_path / "shards"), streaming=True)
    parts = []
    for process in range(2):
        train, test = make_datasets(args.load(), processor, seed=1, process_index=process, num_processes=2)
        parts.append([item["labels"] for item in train])
        assert [item["labels"] for item in test] == digits["test"]["label"][:3]
        assert next(iter(test))["pixel_values"].shape == (3, 8, 8)
    assert sorted(parts[0] + parts[1]) == sorted(images["label"])
    assert parts[0] != images.shard(2, 0)["label"]  # shuffled
    assert sorted(map(len, parts)) == [20, 21]
    assert describe_card(args, ModelArguments(), test)["dataset_name"].startswith("held-out images of ")


def test_the_images_of_a_folder_are_loaded(tmp_path):
    for index in range(10):
        file = tmp_path / ("cat" if index % 2 else "dog") / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(file)
    assert DataArguments(data_dir=str(tmp_path)).load()["train"].features["label"].names == ["cat", "dog"]
    assert 2 <= load_images(data_dir=tmp_path)["test"].num_rows <= 5


# --- The report ---


def test_the_card_names_the_images_and_a_start_on_the_hub_only(saved):
    start = ModelArguments(model_name_or_path="someone/hydravit")
    card = describe_card(DataArguments(dataset_name="someone/images"), start, range(50))
    assert card == {
        "dataset_name": "50 held-out images of someone/images",
        "dataset_id": "someone/images",
        "base_model": "someone/hydravit",
        "limits": "One held-out image is 2.00 points of accuracy.",
    }
    card = describe_card(DataArguments(), ModelArguments(from_vit=str(saved)), range(50))
    assert card["base_model"] is None and card["dataset_name"].endswith("the handwritten digits of scikit-learn")


def test_the_results_of_a_folder_are_printed_with_and_without_a_profile(tmp_path, capsys):
    rows = [{"num_heads": heads, "parameters": heads * 10**6, "macs": 10**9, "accuracy": heads / 8} for heads in (3, 6)]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    print_results(tmp_path, "8 images")
    text = capsys.readouterr().out
    assert "|     3 |     3.00 M | 1.00 G |   37.50% |" in text
    assert "Mean accuracy over the widths: 56.25%, on 8 images\n" in text and "Latency" not in text
    (tmp_path / "results.json").write_text(json.dumps([row | {"latency_ms": 1.5, "device": "a CPU"} for row in rows]))
    print_results(tmp_path, "8 images")
    text = capsys.readouterr().out
    assert "1.50 ms" in text and "Latency of one image on a CPU\n" in text


@pytest.mark.parametrize(
    ("feature", "labels"),
    [(List(ClassLabel(names=["a", "b"])), [[0, 1], [1]]), (Value("float32"), [0.5, 1.0])],
)
def test_the_scripts_refuse_several_labels_and_numbers_in_one_line(parse, tmp_path, feature, labels):
    columns = {"image": [Image.new("L", (8, 8), value) for value in range(10)], "label": labels * 5}
    features = Features({"image": ImageFeature(), "label": feature})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    data, *_ = parse("--data_dir", tmp_path)
    with pytest.raises(ValueError, match="this script trains single-label classifiers"):
        data.load()


def test_broken_images_are_left_out_if_asked_for_and_not_of_a_stream(parse, tmp_path):
    for index in range(10):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.new("L", (8, 8), index).save(tmp_path / "ab"[index % 2] / f"{index}.png")
    (tmp_path / "a" / "broken.png").write_text("not an image")
    for options, left_out in (([], 0), (["--skip_broken_images"], 1)):
        data_args, model_args, *_ = parse("--data_dir", tmp_path, *options)
        splits = data_args.leave_out_broken(data_args.load())
        assert sum(map(len, splits.values())) == 11 - left_out and data_args.left_out == left_out
        name = describe_card(data_args, model_args, splits["test"])["dataset_name"]
        assert ("(1 broken images left out)" in name) == bool(left_out)
    with pytest.raises(SystemExit):
        parse("--data_dir", tmp_path, "--streaming", "--skip_broken_images")
