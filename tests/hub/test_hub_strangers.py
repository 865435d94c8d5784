"""A stranger's path: the code on a published card, in a process without the package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from support.disks import contents
from support.hub_client import SERVED, WITHOUT_THE_PACKAGE, Client, client_environment, push
from transformers import ViTConfig, ViTForImageClassification

from hydravit_hf import elastify, evaluate_subnetworks
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model_card import save_model_card

STRANGER = """
import json, sys
sys.modules["hydravit_hf"] = None  # importing it fails
import numpy as np, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from PIL import Image

pixels, labels = (np.load(file) for file in sys.argv[1:])
images = [Image.fromarray(image) for image in pixels]
repo, trust = "user/digits", {"trust_remote_code": True}
small = AutoModelForImageClassification.from_pretrained(repo, num_attention_heads=3, **trust)
pixel_values = AutoImageProcessor.from_pretrained(repo)(images, return_tensors="pt").pixel_values
found = {"model": small(pixel_values).logits.argmax(-1).numpy()}

def ask(pipe, **kwargs):
    return np.array([int(rows[0]["label"]) for rows in pipe(images, batch_size=90, **kwargs)])

found["per call"] = ask(pipeline("hydravit-image-classification", repo, **trust), num_heads_active=3)
found["no task"] = ask(pipeline(model=repo, **trust), num_heads_active=3)
options = {"model_kwargs": {"num_attention_heads": 3}, **trust}
found["stock"] = ask(pipeline("image-classification", repo, **options))
print(json.dumps({name: float((answers == labels).mean()) for name, answers in found.items()}))
"""


def test_the_code_on_a_pushed_card_loads_the_repository_as_it_stands(hub, user, reader, save, tmp_path):
    folder, model = save()
    rows = [{"num_heads": num_heads, "accuracy": 0.5} for num_heads in (3, 6)]
    save_model_card(folder, model, rows, "saved", model_id="runs/saved")
    before = contents(folder)
    push(user, folder, "carded")  # the user's name is that of the token
    card = hub.repos["user/carded"].files()["README.md"].decode()
    assert 'path = "user/carded"' in card and "runs/saved" not in card
    assert contents(folder) == before
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    image = f"image = {str(tmp_path / 'image.png')!r}"
    blocks = re.findall("```python\n(.*?)```", card, flags=re.DOTALL)
    with_package = "\n".join(blocks[:2]).replace('image = "image.png"', image)
    assert user(f"{with_package}\nresult = vit.num_parameters()") == model.config.count_parameters(3)
    without = "\n".join(blocks[2:]).replace('image = "image.png"', image)
    assert reader(f"{without}\nresult = len(features), len(features[0])") == [1, 3 * model.config.head_dim]


def test_a_stranger_runs_the_card_of_an_elastic_vit_as_it_stands(hub, user, tmp_path):
    """elastify, a card, a push in files by width; then a process without the package and with an empty cache."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 192, "num_hidden_layers": 1}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=10)).eval()
    processor, digits = make_image_processor(vit.config), load_digits()
    images = {name: digits[name].with_transform(to_pixel_values(processor)) for name in digits}
    model = elastify(vit, images["train"], max_images=64)
    folder = tmp_path / "elastic"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    rows = evaluate_subnetworks(model, images["test"].select(range(64)), disable_tqdm=True)
    save_model_card(folder, model, rows, "elastic", dataset_name="64 digits", ordered_from="a new ViT")
    push(user, folder, "user/elastic", shard_by_heads=[3])

    repo = hub.repos["user/elastic"].files()
    card = ModelCard(repo["README.md"].decode())
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    assert html.count("<tr>") == 1 + len(rows) and "It is a new ViT with its directions" in html
    (plot,) = re.findall('<img src="(.*?)"', html)
    assert repo[plot].startswith(b"\x89PNG")
    assert [result.metric_value for result in card.data.eval_results] == [round(row["accuracy"], 5) for row in rows]

    home = tmp_path / "stranger"
    home.mkdir()
    digit = digits["test"][0]["image"]
    digit.save(home / "image.png")
    blocks = re.findall("```python\n(.*?)```", card.text, flags=re.DOTALL)
    (block,) = (block for block in blocks if "AutoModelForImageClassification" in block)
    start = len(hub.log)
    with Client(hub, home, WITHOUT_THE_PACKAGE) as stranger:
        found = stranger(f"{block}\nresult = small.num_parameters(), classify(image, num_heads_active=3)[0]['score']")
    scores = model(processor(digit, return_tensors="pt").pixel_values, num_heads_active=3).logits.softmax(-1)
    assert found == [model.config.count_parameters(3), pytest.approx(scores.max().item(), abs=1e-4)]
    loaded = [path for method, path in hub.log[start:] if method == "GET" and path.startswith("/storage/")]
    assert len(loaded) == 2  # the narrow model downloads the first file, and the pipeline the other one


@pytest.mark.slow  # its fast siblings are the tests of publishing and of loading without the package
def test_a_stranger_gets_the_accuracy_of_the_training_run(hub, tmp_path):
    """Train, publish; then a process without the package, and the Hub's name alone."""
    sizes = ["--num_attention_heads", "4", "--num_hidden_layers", "1", "--max_train_steps", "60"]
    left = ["--checkpointing_steps", "40", "--with_tracking", "--report_to", "tensorboard"]
    script = Path(__file__).parents[2] / "examples" / "train_accelerate.py"
    command = [sys.executable, str(script), *sizes, *left, "--output_dir", str(tmp_path / "digits")]
    command += ["--push_to_hub", "--hub_model_id", "user/digits"]
    environment = client_environment(hub, tmp_path, "hf_user")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    repo = hub.repos["user/digits"]
    assert f"{hub.url}/user/digits/commit/{repo.branches['main']}" in result.stdout
    names = {file.name for file in (tmp_path / "digits").iterdir() if file.is_file()}
    assert (tmp_path / "digits" / "checkpoint-40").exists() and "run.json" in names
    assert {
        "model.safetensors",
        "pipeline_hydravit.py",
        "preprocessor_config.json",
        "README.md",
        "results.json",
        "accuracy_over_macs.png",
    } < names
    assert repo.files().keys() == SERVED | names - {"run.json", "data.json"}

    digits = load_digits()["test"]
    np.save(tmp_path / "pixels.npy", np.stack([np.asarray(image) for image in digits["image"]]))
    np.save(tmp_path / "labels.npy", digits["label"])
    command = [sys.executable, "-P", "-c", STRANGER, str(tmp_path / "pixels.npy"), str(tmp_path / "labels.npy")]
    environment = client_environment(hub, tmp_path / "stranger", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (row,) = (row for row in json.loads(repo.files()["results.json"]) if row["num_heads"] == 3)
    assert row["accuracy"] > 0.3  # chance is 0.1
    found = json.loads(result.stdout)
    assert found == pytest.approx(dict.fromkeys(("model", "per call", "no task", "stock"), row["accuracy"]))
