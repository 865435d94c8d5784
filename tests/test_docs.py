"""The Python blocks of each page of docs/ run in order, in one interpreter, and do what the page says.

The site builds, and its links lead somewhere.
"""

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from support.exports import trace_once
from support.pages import PAGES, ROOT, snippets
from transformers import Trainer, TrainingArguments

import hydravit_hf
from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.training.steps import backward_widths

NEEDED = {"docs/export.md": "onnxscript", "docs/lora.md": "peft"}
ELSEWHERE = {"docs/quantization.md"}  # it needs torchao: tests/model/test_quantization.py runs it
SLOW = {"docs/export.md", "docs/training.md"}  # their fast siblings are the tests of these rooms
RUN = sorted(page for page in PAGES.keys() - ELSEWHERE if page.startswith("docs/") and snippets("python", PAGES[page]))


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of exporters
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*overflow encountered")  # of PEFT and torch
@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in RUN])
def test_the_snippets_of_a_page_run_and_do_what_it_says(page, save_digits, make_model, capsys, monkeypatch):
    if page in NEEDED:
        pytest.importorskip(NEEDED[page])
    save_digits()
    trace_once(monkeypatch)
    module = ModuleType("page")  # as a script, whose classes can be pickled
    monkeypatch.setitem(sys.modules, "page", module)
    names = vars(module)
    names |= _names_before(page, make_model)
    for number, snippet in enumerate(snippets("python", PAGES[page])):
        code = "".join(line for line in snippet.splitlines(keepends=True) if _is_installed(line))
        exec(compile(code, f"{page} snippet {number + 1}", "exec"), names)
    CHECKS[page](names, capsys.readouterr().out)


def _names_before(page: str, make_model) -> dict:
    """What a page takes for granted."""
    if page != "docs/export.md":
        return {}
    import onnxruntime

    model = make_model(num_attention_heads=12, num_hidden_layers=1, subnetwork_heads=[3, 6, 12], num_labels=10)
    model.config.cascade = {"num_heads": [3, 12], "thresholds": 0.5}
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16), dtype=np.float32)
    names = {"model": model, "image_processor": make_image_processor(model.config), "images": images}
    return names | {"np": np, "onnxruntime": onnxruntime}


def _is_installed(line: str) -> bool:
    """Whether a line needs no runtime that is missing here."""
    return '"executorch"' not in line or find_spec("executorch") is not None


def check_training(names, printed):
    assert "eval_3_heads_accuracy" in printed
    loaded = HydraViTForImageClassification.from_pretrained("runs/trainer", num_attention_heads=3)
    assert loaded.config.subnetwork_heads == [3]
    assert "eval_3_heads_accuracy" in names["trainer"].state.log_history[-1]
    for folder in ("runs/trainer", "runs/stock"):
        assert len(ModelCard.load(f"{folder}/README.md").data.eval_results) == 4
        assert {"results.json", "accuracy_over_macs.png"} <= {file.name for file in Path(folder).iterdir()}
    assert names["args"].sample(names["config"], 0, 0, 4) == [4, 3] and names["heads"][0] == 6
    assert names["model"].config.stages(6) == [3, 6]


def check_elastify(names, printed):
    assert names["trainer"].state.global_step == 2


def check_loading(names, printed):
    assert (names["small"].config.hidden_size, names["middle"].config.hidden_size) == (192, 320)


def check_serving(names, printed):
    assert re.match(r"100 of 100 on time, at \{\d", printed)


def check_data(names, printed):
    assert names["left_out"] == {"train": 0, "test": 0} and names["train_dataset"][0]["pixel_values"].shape == (3, 8, 8)
    assert names["trainer"].evaluate().keys() >= {"eval_3_heads_average_precision", "eval_mean_average_precision"}


def check_lora(names, printed):
    torch.testing.assert_close(float(re.search(r"tensor\(([\d.e-]+)", printed)[1]), 0.0, atol=1e-5, rtol=0)
    assert names["merged"].config.num_attention_heads == 12


def check_export(names, printed):
    model, images = names["model"], torch.tensor(names["images"])
    cascade = model.cascade(images)
    narrow = model(images, num_heads_active=3).logits  # OpenVINO runs them in bf16
    error = torch.dist(torch.tensor(names["logits"]), narrow) / narrow.norm()
    assert error < 0.05 and names["macs"].tolist() == cascade.macs.tolist()
    for file in ("3_heads", "6_heads"):
        assert Path(f"{file}_int8.onnx").stat().st_size < Path(f"{file}.onnx").stat().st_size


CHECKS = {page: globals()[f"check_{Path(page).stem}"] for page in RUN}


class Links(HTMLParser):
    """The addresses that a page of HTML loads or links to."""

    def __init__(self, html: str):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src")]


def test_the_site_builds_and_each_address_in_it_leads_to_a_file(tmp_path):
    """`--strict` makes a link of a page, a heading or a name in a docstring that leads nowhere an error."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
    paths = ["--config-file", ROOT / "docs" / "mkdocs.yml", "--site-dir", tmp_path]
    result = subprocess.run([*command, *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    pages = {page for page in tmp_path.rglob("*.html") if page.name != "404.html"}
    assert {tmp_path / "index.html", tmp_path / "docs" / "api.html"} <= pages
    for page in pages:
        links = {urlsplit(link).path for link in Links(page.read_text(encoding="utf-8")).found if "://" not in link}
        missing = [link for link in links if link and not (page.parent / unquote(link)).exists()]
        assert len(links) > 5 and not missing, (page.name, missing)


def test_each_page_is_in_the_index_and_each_public_name_in_the_api():
    index, api = PAGES["docs/README.md"], PAGES["docs/api.md"]
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w.]+)\)", index)) == pages
    named = re.findall(r"^::: hydravit_hf\.(\w+)$", api, flags=re.MULTILINE)
    assert sorted(name for name in named if name in hydravit_hf.__all__) == sorted(hydravit_hf.__all__)


def test_each_number_of_processes_keeps_the_recipe_of_the_paper():
    """5e-4 for each 512 images of a step, in the recipe, in the table and in each command that names the recipe."""
    recipe = yaml.safe_load((ROOT / "examples" / "imagenet1k.yaml").read_text())
    rate, batch = recipe["learning_rate"], recipe["per_device_train_batch_size"]
    assert rate / 5e-4 * 512 == 2 * batch
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|$", PAGES["docs/multi_node.md"], re.MULTILINE
    )
    assert len(rows) > 3
    for processes, batch_size, accumulation, images, learning_rate in rows:
        assert int(processes) * int(batch_size) * int(accumulation) == int(images.replace(",", ""))
        assert float(learning_rate) == pytest.approx(5e-4 * int(images.replace(",", "")) / 512)
    files = [*ROOT.glob("examples/*.yaml")]
    texts = [*PAGES.values(), *(re.sub("^# ?", "", file.read_text(), flags=re.MULTILINE) for file in files)]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines() if "--config_file" in line]
    commands = [line for line in lines if "--config examples/imagenet1k.yaml" in line]
    assert len(commands) > 3
    for command in commands:
        launcher = yaml.safe_load((ROOT / re.search(r"--config_file (\S+)", command)[1]).read_text())
        given = re.search(r"--per_device_train_batch_size (\d+)", command)
        images = launcher["num_processes"] * (int(given[1]) if given else batch)
        assert rate == pytest.approx(5e-4 * images / 512), command


def load_other_labels():
    HydraViTForImageClassification.from_pretrained("runs/digits", num_labels=7)


def classify_images_of_another_size():
    HydraViTForImageClassification.from_pretrained("runs/digits")(torch.zeros(1, 3, 9, 9))


def train_without_the_images():
    model = HydraViTForImageClassification.from_pretrained("runs/digits")
    data = load_digits()["train"].with_transform(to_pixel_values(make_image_processor(model.config)))
    next(
        iter(
            Trainer(model, TrainingArguments("runs/stock", report_to="none"), train_dataset=data).get_train_dataloader()
        )
    )


def lose_the_loss():
    model = HydraViTForImageClassification.from_pretrained("runs/digits").train()
    backward_widths(model, torch.full((1, 3, 8, 8), torch.nan), torch.zeros(1, dtype=torch.long), [3], step=0)


RAISED = [load_other_labels, classify_images_of_another_size, train_without_the_images, lose_the_loss]
ELSEWHERE_RAISED = {  # by transformers where the package is missing, and by pushes: tests/hub
    "contains custom code which must be executed",
    "Nothing can be published without a token",
    "names what is on this machine only",
}


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_messages_that_the_page_quotes_are_those_of_the_errors(save_digits):
    save_digits()
    quoted = re.findall(r'^[*][*]"(.*?)"[.][*][*]', PAGES["docs/troubleshooting.md"], flags=re.MULTILINE)
    left = [message for message in quoted if message not in ELSEWHERE_RAISED]
    assert len(left) == len(RAISED) and len(quoted) - len(left) == len(ELSEWHERE_RAISED)
    for message, raise_it in zip(left, RAISED, strict=True):
        with pytest.raises((KeyError, ValueError, RuntimeError, FloatingPointError)) as error:
            raise_it()
        pattern = re.escape(message).replace(r"\.\.\.", ".*")
        assert re.search(pattern, f"{error.typename}: {error.value}"), message
