"""The commands that write a model in another form: smaller, in other files, for another runtime, or made elastic."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .loading import check_has_cascade, device_named, load_config, load_model, load_splits, naming, without_bars
from .options import ConfigName, Device, Heads, ImageColumn, LabelColumn, Model, NewFolder, check_at_most_one
from .printing import print_rows


def extract(
    model: Model,
    num_heads: Annotated[int, typer.Argument(metavar="NUM_HEADS", help="Number of heads to keep.")],
    folder: NewFolder,
    vit: Annotated[bool, typer.Option("--vit", help="Save a stock ViT, which needs no custom code.")] = False,
):
    """Save the leading heads of a model as a model of their own."""
    from transformers import AutoImageProcessor

    from hydravit_hf.folders import check_new_or_empty

    check_new_or_empty(folder)
    load_config(model).check_num_heads(num_heads)
    small = load_model(model, "cpu", num_attention_heads=num_heads)
    processor = AutoImageProcessor.from_pretrained(model)
    saved = small.to_vit() if vit else small
    saved.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = f"{saved.num_parameters() / 1e6:.2f} M parameters"
    print(f"Saved a {type(saved).__name__} of {num_heads} heads and {size} to {folder}")


def quantize(
    model: Model,
    folder: NewFolder,
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic",
            help="Quantize the inputs of each layer too, with a scale for each row of a weight: the fastest when "
            "compiled. Otherwise, each head has scales of its own, and a narrow width the bits of quantizing it alone.",
        ),
    ] = False,
    shard_by_heads: Annotated[
        bool, typer.Option("--shard-by-heads", help="Write a file for each width instead of one.")
    ] = False,
):
    """Save a model with weights in int8, of which any width loads."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerGroup
    from transformers import AutoImageProcessor, TorchAoConfig

    from hydravit_hf.folders import check_new_or_empty

    check_new_or_empty(folder)
    groups = PerGroup(load_config(model).head_dim)
    scheme = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig(granularity=groups)
    quantized = load_model(model, "cpu", quantization_config=TorchAoConfig(scheme))
    processor = AutoImageProcessor.from_pretrained(model)
    quantized.save_pretrained(folder, shard_by_heads=shard_by_heads)
    processor.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    print(f"Saved a HydraViT of {quantized.config.num_attention_heads} heads in int8 and {size:.2f} MB to {folder}")


def export(
    model: Model,
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="File to write, or a new folder for several widths, with a file for each."),
    ],
    num_heads: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Number of heads to export.", show_default="the model's default"),
    ] = None,
    heads: Annotated[
        list[int] | None,
        typer.Option(metavar="K", help="Head counts of widths to export together, such as 3,6,12, in ONNX only."),
    ] = None,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Export the cascade that is saved with the model, in ONNX only.")
    ] = False,
    format: Annotated[
        Literal["onnx", "openvino", "torch_export", "executorch"], typer.Option(help="Format of the file.")
    ] = "onnx",
    transformers_js: Annotated[
        bool, typer.Option("--transformers-js", help="Export one width as a folder that transformers.js loads.")
    ] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Export a folder with a page that runs several widths in the browser.")
    ] = False,
    examples: Annotated[
        list[Path] | None,
        typer.Option("--example", metavar="IMAGE", help="Image that the page offers. Repeat it for several."),
    ] = None,
):
    """Write one or several widths as files for another runtime.

    The files run without this package.
    """
    from transformers import AutoImageProcessor

    from hydravit_hf.browser import export_page, export_transformers_js
    from hydravit_hf.export import export_cascade, export_subnetwork, export_subnetworks
    from hydravit_hf.folders import short_name

    check_at_most_one({"--num-heads": num_heads, "--heads": heads, "--cascade": cascade})
    check_at_most_one({"--cascade": cascade, "--page": page, "--transformers-js": transformers_js})
    check_at_most_one({"--num-heads": num_heads, "--page": page})
    check_at_most_one({"--heads": heads, "--transformers-js": transformers_js})
    if format != "onnx" and (heads or cascade or page or transformers_js):
        raise ValueError(f"Several widths, cascades, pages and transformers.js are for ONNX only, not for '{format}'.")
    if examples and not page:
        raise ValueError("`--example` belongs to a page: give `--page` too.")
    loaded, processor = load_model(model, "cpu"), AutoImageProcessor.from_pretrained(model)
    if cascade:
        check_has_cascade(loaded.config)
    if transformers_js:
        written = export_transformers_js(loaded, num_heads, path, processor)
    elif page:
        written = export_page(loaded, heads, path, processor, examples or (), short_name(model))
    elif cascade:
        written = export_cascade(loaded, path, processor)
    elif heads:
        written = export_subnetworks(loaded, heads, path, processor)
    else:
        written = export_subnetwork(loaded, num_heads, format, path, processor)
    print(f"Wrote {written}")


def reshard(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a saved HydraViT.")],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to save to, new or empty.")],
    heads: Heads = None,
    one_file: Annotated[bool, typer.Option("--one-file", help="Write one file instead of one for each width.")] = False,
):
    """Save the weights in a file for each width, or in one file.

    The other files are copied. From files by width, a load of k heads downloads and reads those up to k only.
    """
    from hydravit_hf.folders import check_new_or_empty
    from hydravit_hf.resharding import is_weights, reshard_checkpoint

    check_at_most_one({"--heads": heads, "--one-file": one_file})
    check_new_or_empty(folder)
    reshard_checkpoint(source, folder, shard_by_heads=not one_file and (heads or True))
    for file in sorted(file for file in folder.glob("*.safetensors") if is_weights(file.name)):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Training file of the original implementation, *.pth.tar.")
    ],
    folder: NewFolder,
    no_ema: Annotated[
        bool, typer.Option("--no-ema", help="Take the last weights instead of the averaged ones.")
    ] = False,
):
    """Convert a training file of the original implementation."""
    from hydravit_hf.convert_checkpoint import convert_and_save

    config = convert_and_save(source, folder, use_ema=not no_ema).config
    print(f"Saved a HydraViT of {config.num_attention_heads} heads and {config.num_labels} labels to {folder}")


def elastify(
    vit: Annotated[
        str, typer.Argument(metavar="VIT", help="ViT, DeiT, ViTMAE, ViTMSN or DINOv2, or vit_* or deit_* of timm.")
    ],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="Images to find the order on: as DATA elsewhere.")],
    folder: NewFolder,
    num_attention_heads: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Heads to hold. More are new ones.", show_default="the ViT's")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images to take.")] = 1024,
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images in a pass.", show_default="few, which suit a CPU")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    config_name: ConfigName = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="IMAGES is a folder without classes; nothing is evaluated.")
    ] = False,
    device: Device = None,
):
    """Make a published ViT elastic, with the same logits.

    It orders the parts of the ViT by what they contribute. Where the images have the classes of the ViT, every width is
    evaluated on those held out, and the card is written.
    """
    from datasets import ClassLabel

    from hydravit_hf.data import to_pixel_values, undecoded
    from hydravit_hf.data_folders import load_image_files
    from hydravit_hf.elastification import elastify
    from hydravit_hf.folders import check_new_or_empty, short_name
    from hydravit_hf.image_processing import load_image_processor
    from hydravit_hf.model.configuration_hydravit import HydraViTConfig
    from hydravit_hf.model.sources_hydravit import read_source

    check_new_or_empty(folder)
    with naming(vit):
        source = read_source(vit)
    processor = load_image_processor(vit, HydraViTConfig(**source.arguments))
    if unlabelled:
        splits = {"train": load_image_files(images)}
    else:
        splits = load_splits(images, image_column=image_column, label_column=label_column, name=config_name)
    measured = undecoded(splits["train"]).with_transform(to_pixel_values(processor))
    model = elastify(source, measured, num_attention_heads, max_images, batch_size, device_named(device))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = f"{model.num_parameters() / 1e6:.2f} M parameters"
    print(f"Saved a HydraViT of {model.config.num_attention_heads} heads and {size} to {folder}")
    test = splits.get("test")
    if (
        test is None
        or "classifier.weight" not in source.tensors
        or not isinstance(test.features["label"], ClassLabel)
        or not set(test.features["label"].names) <= model.config.label2id.keys()
    ):
        return print("The images do not have the classes of the ViT: no width was evaluated, and there is no card.")
    recipe = f"`hydravit elastify` measured {min(max_images, len(measured))} images of {short_name(images)}."
    _evaluate_elastified(model, source, processor, test, folder, short_name(vit), short_name(images), recipe)


def _evaluate_elastified(model, source, processor, test, folder: Path, vit: str, images: str, recipe: str):
    """Evaluate every width beside the ViT that the model was made from, and write the card."""
    from hydravit_hf.data import align_labels, to_pixel_values, undecoded
    from hydravit_hf.evaluation import evaluate_classifier, evaluate_subnetworks
    from hydravit_hf.model.modeling_hydravit import HydraViTForImageClassification
    from hydravit_hf.model_card import save_model_card

    with without_bars():
        test = align_labels(test, model.config.label2id)
    test = undecoded(test).with_transform(to_pixel_values(processor))
    original = HydraViTForImageClassification.from_vit(source, source.arguments["num_attention_heads"])
    accuracy = evaluate_classifier(original.to(model.device), test)["accuracy"]
    rows = evaluate_subnetworks(model, test)
    data = f"{len(test)} held-out images of {images}"
    save_model_card(
        folder,
        model,
        rows,
        folder.resolve().name,
        dataset_name=data,
        results_note=f"Accuracy on {data}. The original, {vit}, has {accuracy:.2%}.",
        training=f"{recipe} Nothing was trained.",
        base_model=vit if "/" in vit else None,
        ordered_from=vit,
    )
    print_rows(rows)
    print(f"\nThe original: {accuracy:.2%}, on {data}")
    print(f"Wrote the card README.md, results.json and accuracy_over_macs.png to {folder}")
