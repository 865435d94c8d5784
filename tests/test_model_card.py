"""A card is valid metadata, shows the numbers that it was given, and every line of its code runs."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from support.cards import CARD, check_card
from support.training import QUIET
from support.training import make_model as make_digits_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

from hydravit_hf import HydraViTConfig, create_model_card
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model_card import ModelCardCallback, save_model_card
from hydravit_hf.reporting import format_table

CARDS = Path(__file__).parents[1] / "model_cards"
RELEASED = sorted(path.parent.name for path in CARDS.glob("*/README.md"))
ROWS = [{"num_heads": heads, "accuracy": 0.9 + heads / 100, "top5_accuracy": 0.99} for heads in range(1, 7)]


def code_blocks(card: ModelCard, language: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(card.text)
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def table_rows(text: str) -> list[list[str]]:
    lines = re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def counted_rows(config: HydraViTConfig) -> list[list[str]]:
    """The first three columns of a card's table."""
    rows = [
        {"num_heads": heads, "parameters": config.count_parameters(heads), "macs": config.count_macs(heads)}
        for heads in config.subnetwork_heads
    ]
    return table_rows(format_table(rows))[2:]


def test_the_metadata_has_the_accuracy_of_each_width(model):
    card = create_model_card(model, ROWS, "tiny", dataset_name="Made-up images", dataset_id="user/images")
    card = ModelCard(str(card))  # as the client reads it
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    assert card.data.datasets == "user/images" and card.data.model_name == "tiny"
    found = {result.metric_args["num_heads_active"]: result for result in card.data.eval_results}
    assert found.keys() == {row["num_heads"] for row in ROWS}
    for row in ROWS:
        result = found[row["num_heads"]]
        assert (result.metric_type, result.metric_value) == ("accuracy", pytest.approx(row["accuracy"]))
        assert (result.dataset_type, result.dataset_name) == ("user/images", "Made-up images")
        assert f"{row['num_heads']} heads" in result.metric_name


def test_the_table_has_the_costs_of_each_width_and_the_machine_where_it_was_measured(model):
    plain = create_model_card(model, ROWS, "tiny")
    costs = [
        {"num_heads": heads, "latency_ms": 2.5 * heads, "peak_memory_mb": 40.0, "throughput": 400.0}
        | {"batch_size": 2, "device": "Abacus 3000", "dtype": "bfloat16"}
        for heads in range(1, 7)
    ]
    card = create_model_card(model, [row | cost for row, cost in zip(ROWS, costs, strict=True)], "tiny")
    assert table_rows(plain.text)[0] == ["heads", "parameters", "MACs", "accuracy", "top-5"]
    assert table_rows(card.text)[0] == ["heads", "parameters", "MACs", "latency", "peak memory", "accuracy", "top-5"]
    assert [row[:3] for row in table_rows(card.text)[2:]] == counted_rows(model.config)
    assert "2 images, measured on Abacus 3000, bfloat16" in card.text and "measured on" not in plain.text


def test_a_card_has_the_sections_that_it_was_given_words_for(make_model):
    model = make_model(subnetwork_heads=[1, 2, 5], image_size=(16, 8))
    card = create_model_card(model.config, ROWS[:2], "tiny", plot="plot.png", limits="Few images.", license="mit")
    assert "](plot.png)" in card.text and "1, 2 and 5 heads" in card.text and "16 x 8" in card.text
    assert "close to chance. Few images." in card.text and "## Training" not in card.text
    assert card.data.license == "mit" and "{{" not in card.text and "{%" not in card.text and "\n\n\n" not in card.text
    assert "## Training\n\nOn a whim.\n" in create_model_card(model, ROWS, "tiny", training="On a whim.").text


def test_a_cascade_that_is_saved_with_the_model_is_shown(make_model):
    model = make_model(cascade={"num_heads": [1, 3, 6], "thresholds": 0.5})
    card = create_model_card(model, ROWS, "tiny", plot="plot.png")
    assert "a cascade of 1, 3 and 6 heads" in card.text and 'num_heads_active="cascade"' in card.text
    assert "\n\n\n" not in card.text and "cascade" not in create_model_card(make_model(), ROWS, "tiny").text


@pytest.mark.parametrize("results", [[], [{"num_heads": 1}], [{"accuracy": 1.0}]])
def test_results_without_widths_or_accuracies_are_refused(model, results):
    with pytest.raises(ValueError, match="a row for each width"):
        create_model_card(model, results, "tiny")


def test_results_of_widths_that_the_model_does_not_hold_are_refused(model):
    with pytest.raises(ValueError, match="from 1 to 6"):
        create_model_card(model, [{"num_heads": 7, "accuracy": 1.0}], "tiny")


@pytest.mark.parametrize("card", ["made here", *RELEASED])
def test_every_block_of_code_runs(make_model, tmp_path, monkeypatch, card):
    """On a small stand-in of the checkpoint, at the path that the card names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    if card == "made here":
        card = create_model_card(make_model(), ROWS, "tiny", model_id="user/tiny")
    else:
        card = ModelCard.load(CARDS / card / "README.md")
    model = make_model(num_attention_heads=12, subnetwork_heads=None)
    folder = Path(re.search('path = "(.*)"', card.text)[1])
    model.save_pretrained(folder)
    make_image_processor(model.config).save_pretrained(folder)
    Image.radial_gradient("L").save("image.png")
    names = {}
    blocks = code_blocks(card, "python")
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number + 1} of the card", "exec"), names)
    narrow = card.data.eval_results[0].metric_args["num_heads_active"]
    assert names["small"].config.num_attention_heads == narrow
    assert type(names["vit"]).__name__ == "ViTForImageClassification"
    assert len(names["features"][0]) == 8 * narrow
    for block in code_blocks(card, "yaml"):
        assert yaml.safe_load(block)
    assert {token.info for token in MarkdownIt().parse(card.text) if token.type == "fence"} <= {
        *("python", "yaml", "bash", "bibtex")
    }


def test_the_released_cards_are_as_they_are_made(tmp_path):
    assert RELEASED == ["hydravit-base-patch16-224", "hydravit-digits"]
    shutil.copy(CARDS / "make_cards.py", tmp_path)
    sys.path.insert(0, str(tmp_path))
    try:
        import make_cards

        make_cards.make_base_card(tmp_path / "base")
    finally:
        sys.path.remove(str(tmp_path))
    made, released = (folder / "README.md" for folder in (tmp_path / "base", CARDS / "hydravit-base-patch16-224"))
    assert made.read_text() == released.read_text()
    for name in RELEASED:
        card = ModelCard.load(CARDS / name / "README.md")
        rows = json.loads((CARDS / name / "results.json").read_text())
        metrics = [(result.metric_args["num_heads_active"], result.metric_value) for result in card.data.eval_results]
        assert metrics == [(row["num_heads"], round(row["accuracy"], 5)) for row in rows]
        assert (CARDS / name / "accuracy_over_macs.png").exists()


def test_the_base_card_labels_its_numbers_as_the_authors():
    card = ModelCard.load(CARDS / "hydravit-base-patch16-224" / "README.md")
    assert "not measurements of ours" in card.text
    assert {result.source_url for result in card.data.eval_results} == {"https://github.com/ds-kiel/HydraViT"}
    assert [row[:3] for row in table_rows(card.text)[2:]] == counted_rows(HydraViTConfig(num_labels=1000))


@pytest.mark.parametrize("name", RELEASED)
def test_a_card_renders_with_its_table_and_plot(browser, tmp_path, name):
    playwright = pytest.importorskip("playwright.sync_api")
    card = ModelCard.load(CARDS / name / "README.md")
    style = "body { font: 16px sans-serif; max-width: 900px; margin: auto } td, th { padding: 4px 12px }"
    html = f"<meta charset=utf-8><style>{style}</style>" + MarkdownIt("gfm-like", {"linkify": False}).render(card.text)
    shutil.copy(CARDS / name / "accuracy_over_macs.png", tmp_path)
    (tmp_path / "card.html").write_text(html, encoding="utf-8")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        page = driver.chromium.launch(executable_path=browser, args=arguments).new_page()
        page.goto((tmp_path / "card.html").as_uri())
        assert page.locator("h1").inner_text() == name
        assert page.locator("tbody tr").count() == 10
        assert page.locator("img").evaluate("image => image.naturalWidth") > 500
        assert not re.search(r"\{\{|\*\*|```|\| *\|", page.locator("body").inner_text())
        page.screenshot(path=tmp_path / "card.png", full_page=True)
    with Image.open(tmp_path / "card.png") as shot:
        assert shot.height > 1000


def test_a_saved_card_lies_beside_its_plot_and_results(model, tmp_path):
    save_model_card(tmp_path, model, ROWS, "tiny", dataset_name="Made-up images")
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "accuracy_over_macs.png", "results.json"}
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["macs"] for row in rows] == [model.config.count_macs(heads) for heads in range(1, 7)]
    assert "](accuracy_over_macs.png)" in ModelCard.load(tmp_path / "README.md").text


OWN = """---
language: en
license: mit
base_model: user/vit
datasets:
- user/images
- user/more
tags:
- hydravit
- birds
thumbnail: https://example.org/bird.png
model-index:
- name: tiny
  results:
  - task: {type: image-classification}
    dataset: {name: Sketches, type: user/sketches, split: test}
    metrics:
    - {type: accuracy, value: 0.5, args: {num_heads_active: 3}}
---
"""


@pytest.fixture
def written(model, tmp_path):
    """A card to which its owner has added words, fields and the result of another data set."""
    options = {"dataset_name": "Made-up images", "dataset_id": "user/images", "model_id": "user/tiny"}
    notes = {"training": "For a week.", "limits": "Few images.", "results_note": "Measured twice."}
    save_model_card(tmp_path, model, ROWS, "tiny", **options, **notes)
    card, own = ModelCard.load(tmp_path / "README.md"), ModelCard(OWN).data
    own.eval_results = [*card.data.eval_results, *own.eval_results]
    card.data = own
    card.text = card.text.replace("## Citation", "## Intended use\n\n```bash\n## birds only\n```\n\n## Citation")
    card.save(tmp_path / "README.md")
    return card


def test_a_card_that_is_made_again_keeps_what_can_not_be_computed(model, tmp_path, written):
    costs = {"latency_ms": 2.5, "batch_size": 1, "device": "Abacus 3000", "dtype": "float32"}
    save_model_card(tmp_path, model, [row | costs for row in ROWS], "tiny", training=None, license=None)
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit" and card.data.base_model == "user/vit" and card.data.language == "en"
    assert card.data.thumbnail == written.data.thumbnail and card.data.datasets == ["user/images", "user/more"]
    assert {"birds", "nested-models"} <= set(card.data.tags)
    assert card.data.eval_results == written.data.eval_results
    assert "Measured twice.\n\n| heads" in text and "| latency |" in text and "Abacus 3000" in text
    assert 'path = "user/tiny"' in text and "## Training\n\nFor a week.\n" in text
    assert text.count("close to chance. Few images.\n") == 1
    assert text.count("## Intended use\n\n```bash\n## birds only\n```\n\n## Citation\n") == 1
    save_model_card(tmp_path, model, [row | costs for row in ROWS], "tiny")
    assert (tmp_path / "README.md").read_text() == text


def test_an_argument_that_is_given_replaces_what_the_card_says_even_where_it_is_the_default(model, tmp_path, written):
    save_model_card(tmp_path, model, ROWS, "tiny", license="apache-2.0", dataset_name="held-out images")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.eval_results[0].dataset_name == "held-out images"


def test_a_card_of_other_weights_keeps_the_words_of_its_owner_and_no_old_result(model, tmp_path, written):
    better = [row | {"accuracy": 0.99} for row in ROWS]
    save_model_card(tmp_path, model, better, "tiny", dataset_name="Made-up images", dataset_id="user/images")
    card = ModelCard.load(tmp_path / "README.md")
    assert {result.metric_value for result in card.data.eval_results} == {0.99}
    assert "## Intended use" in card.text and card.data.license == "mit" and "birds" in card.data.tags
    assert card.data.base_model is None and card.data.datasets == "user/images"
    assert not any(words in card.text for words in ("For a week", "Few images", "Measured twice"))


def test_results_of_another_data_set_come_beside_those_that_are_there(model, tmp_path, written):
    other = [row | {"accuracy": 0.7} for row in ROWS[:2]]
    save_model_card(tmp_path, model, other, "tiny", dataset_name="Photographs", limits="Many images.")
    card = ModelCard.load(tmp_path / "README.md")
    names = [result.dataset_name for result in card.data.eval_results]
    assert names == ["Photographs"] * 2 + ["Made-up images"] * len(ROWS) + ["Sketches"]
    assert "Accuracy on Photographs." in card.text and "For a week." in card.text
    assert "Many images." in card.text and "Few images." not in card.text


@pytest.mark.parametrize("metadata", ["license: mit\ntags: [generated_from_trainer]", "license: [mit", "- hydravit"])
def test_a_card_that_others_made_or_that_is_damaged_is_replaced(model, tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n## Usage\n")
    card = save_model_card(tmp_path, model, ROWS, "tiny")
    assert card.data.license == "apache-2.0" and "## Usage" not in card.text


def test_an_elastic_model_stays_one_that_was_not_trained(model, tmp_path):
    for options in ({"ordered_from": "user/vit"}, {}):
        text = save_model_card(tmp_path, model, ROWS, "tiny", **options).text
        assert "It is user/vit with its directions" in text and "was trained to run" not in text


# The callback of a Trainer, which HydraViTTrainer adds by itself; see training/test_trainer.py


@pytest.fixture
def held_out():
    return [{"pixel_values": torch.randn(3, 8, 8), "labels": number % 10} for number in range(30)]


@pytest.fixture
def train(tmp_path, held_out):
    """Train a model with the stock Trainer and a callback."""

    def run(callback: ModelCardCallback, **kwargs):
        arguments = {"max_steps": 2, "learning_rate": 0.01, "save_strategy": "no", "remove_unused_columns": False}
        arguments = TrainingArguments(str(tmp_path / "digits"), **QUIET | arguments | kwargs)
        model = make_digits_model(subnetwork_heads=[1, 2, 4])
        trainer = Trainer(model, arguments, train_dataset=held_out, callbacks=[callback])
        assert trainer.train().global_step == 2
        return trainer

    return run


@pytest.mark.parametrize("kind", ["items", "a loader", "a function"])
def test_the_stock_trainer_leaves_a_card_of_the_trained_weights(train, tmp_path, held_out, kind):
    loader = DataLoader(held_out, 7, collate_fn=default_data_collator)
    given = {"items": held_out, "a loader": loader, "a function": lambda: held_out}[kind]
    model = train(ModelCardCallback(given, dataset_name="Made-up digits", training="Two steps.")).model
    folder = tmp_path / "digits"
    assert {file.name for file in folder.iterdir()} == CARD
    check_card(folder, model, held_out, [1, 2, 4])
    with Image.open(folder / "accuracy_over_macs.png") as plot:
        assert plot.format == "PNG"
    text = (folder / "README.md").read_text()
    assert all(part in text for part in ("# digits", "Made-up digits", "Two steps.", "| latency |"))
    assert model.training  # the mode that the Trainer left it in


def test_a_card_measures_nothing_if_it_should_not_and_has_the_id_of_the_hub(train, tmp_path, held_out):
    train(ModelCardCallback(held_out, measure=False), hub_model_id="user/small-digits")
    text = (tmp_path / "digits" / "README.md").read_text()
    assert "| latency |" not in text and "\n# small-digits\n" in text and 'path = "user/small-digits"' in text


@pytest.mark.parametrize("dataset", [[], lambda: 1 / 0])
def test_a_card_that_fails_is_a_warning_and_costs_no_training(train, tmp_path, caplog, dataset):
    trainer = train(ModelCardCallback(dataset))
    reason = "ZeroDivisionError" if callable(dataset) else "ValueError: There is nothing to evaluate on"
    assert f"The model card was not written: {reason}" in caplog.text
    trainer.save_model()
    assert not CARD & {file.name for file in (tmp_path / "digits").iterdir()}
