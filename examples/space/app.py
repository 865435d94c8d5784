"""A page that runs one HydraViT file at the width of a slider, beside its widest.

python examples/space/app.py    # first trains a small model on handwritten digits, once: half a minute
HYDRAVIT_CHECKPOINT=runs/imagenet python examples/space/app.py    # a folder or a Hub id
"""

import json
import os
from itertools import pairwise
from pathlib import Path

import gradio as gr
from digits import find_or_train
from drawing import compare_costs, draw_heads, draw_results, name_width
from gradio.utils import get_upload_folder
from transformers import pipeline
from transformers.utils import cached_file

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.model.pipeline_hydravit import TASK
from hydravit_hf.profiling import profile_subnetworks

HERE = Path(__file__).parent
DIGITS = """A small model, trained on this machine on the 8 x 8 pixels of scikit-learn's digits. Accuracy: 360 held-out
images, so one image is 0.3 points. The examples are held out too. The last five are the hardest ones for 3 heads."""
TOP = 3  # number of labels on the page
UNREADABLE = "This file can't be read as an image. Try a PNG, JPEG or WebP."


def build(checkpoint: str | Path | None = None) -> gr.Blocks:
    """Build the page for a checkpoint. None means `HYDRAVIT_CHECKPOINT`, or the digits if that is not set."""
    checkpoint = checkpoint or os.environ.get("HYDRAVIT_CHECKPOINT")
    note, examples = "", HERE / "examples"
    if not checkpoint:
        checkpoint = find_or_train()
        note, examples = DIGITS, checkpoint / "examples"
    model = HydraViTForImageClassification.from_pretrained(checkpoint)
    classify = pipeline(TASK, model=model, image_processor=str(checkpoint), allow_urls=False)
    costs = {row["num_heads"]: row for row in profile_subnetworks(model, rounds=15, disable_tqdm=True)}
    results, heads = read_results(checkpoint), list(costs)

    def compare(image: dict | None, num_heads: int):
        table = compare_costs(costs[num_heads], costs[heads[-1]])
        strip, plot = draw_heads(num_heads, model.config.num_attention_heads), draw_results(results, num_heads)
        file = find_upload(image)
        narrow, full = (predict(classify, file, width) for width in (num_heads, heads[-1]))
        return strip, gr.Label(narrow, label=name_width(num_heads)), full, table, plot

    files = sorted(str(file) for file in examples.glob("*") if file.suffix in (".jpg", ".jpeg", ".png", ".webp"))
    return lay_out(compare, heads, files, note, with_plot=bool(results))


def lay_out(compare, heads: list[int], files: list[str], note: str, with_plot: bool) -> gr.Blocks:
    with gr.Blocks(title="HydraViT", analytics_enabled=False) as page:
        gr.HTML(
            f"<h1>One model file, {len(heads)} widths</h1><p>A Vision Transformer, loaded once. Pick how many of its "
            "attention heads run: each number is a model of its own, inside the same weights. "
            '<a href="https://arxiv.org/abs/2409.17978">How it works</a></p>'
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                first = files[0] if files else None
                image = gr.Image(first, show_label=False, sources=["upload"], height=270)
                if files:
                    gr.Examples([[file] for file in files], image, label=None, examples_per_page=15)
                gr.Markdown(note, elem_classes="note")
            with gr.Column(scale=5, min_width=320):
                with gr.Group(elem_classes="pick"):
                    num_heads = pick_width(heads)
                    strip = gr.HTML()
                with gr.Row():
                    narrow = gr.Label(num_top_classes=TOP, label=" ", min_width=150)
                    full = gr.Label(num_top_classes=TOP, label=name_width(heads[-1]), min_width=150)
                with gr.Row():
                    with gr.Column(min_width=300):
                        table = gr.HTML()
                    with gr.Column(min_width=300, visible=with_plot):
                        plot = gr.HTML()
        event = gr.on(
            [page.load, image.change, num_heads.change],
            compare,
            [image, num_heads],
            [strip, narrow, full, table, plot],
            preprocess=False,  # the pipeline reads the file, and its errors name the fault
            trigger_mode="always_last",  # a moving slider has many positions: answer the last one
            show_progress="hidden",
        )
        event.failure(lambda: None, outputs=image, api_visibility="private")  # the browser can't show it either
    return page


def read_results(checkpoint: str | Path) -> list[dict]:
    """Read the rows of the checkpoint's results.json, with `num_heads`, `accuracy` and `macs`, if it has that file."""
    try:
        return json.loads(Path(cached_file(str(checkpoint), "results.json")).read_text(encoding="utf-8"))
    except OSError:
        return []


def find_upload(image: dict | None) -> Path | None:
    """Find the file of an image that the page sends. It must be an upload: the page reads no other file and no URL."""
    if image is None:
        return None
    file = Path(image["path"] or "").resolve()
    if not file.is_relative_to(Path(get_upload_folder()).resolve()):
        raise gr.Error(UNREADABLE, print_exception=False)
    return file


def predict(classify, file: Path | None, num_heads: int) -> dict[str, float]:
    """Predict the most likely labels and their scores."""
    if file is None:
        return {}
    try:
        rows = classify(str(file), num_heads_active=num_heads, top_k=TOP)
    except ValueError as error:
        raise gr.Error(UNREADABLE, print_exception=False) from error
    return {row["label"]: row["score"] for row in rows}


def pick_width(heads: list[int]) -> gr.Slider | gr.Radio:
    """Make a slider if the widths are evenly spaced, or else a button for each."""
    steps, label = {wider - narrower for narrower, wider in pairwise(heads)}, "Attention heads that run"
    if len(steps) == 1:
        return gr.Slider(heads[0], heads[-1], heads[0], step=steps.pop(), label=label, buttons=[])
    return gr.Radio(heads, value=heads[0], label=label)


if __name__ == "__main__":
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # nothing is fetched
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", **fonts)
    style = {"theme": theme, "css_paths": HERE / "style.css", "footer_links": ["api", "gradio"]}
    build().launch(ssr_mode=False, max_file_size="20mb", **style)
