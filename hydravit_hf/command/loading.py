"""Loads the models and the images that commands name."""

import json
from contextlib import contextmanager
from pathlib import Path


def load_model(model: str, device: str | None = None, **kwargs):
    from hydravit_hf.folders import check_path
    from hydravit_hf.model.modeling_hydravit import HydraViTForImageClassification

    check_path(model)
    with naming(model):
        loaded = HydraViTForImageClassification.from_pretrained(model, **kwargs)
    return loaded.to(device_named(device))


def load_config(model: str):
    from hydravit_hf.folders import check_path
    from hydravit_hf.model.configuration_hydravit import HydraViTConfig

    check_path(model)
    with naming(model):
        return HydraViTConfig.from_pretrained(model)


def check_has_cascade(config):
    if config.cascade is None:
        raise ValueError("The model has no cascade: `hydravit cascade --save` fits one and saves it.")


@contextmanager
def naming(model: str):
    """Name the model in the error if it can't be loaded. Without a network, the errors of transformers don't."""
    try:
        yield
    except OSError as error:
        raise OSError(f"'{model}' could not be loaded: {error}") from error


def device_named(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def dtype_named(name: str | None):
    import torch

    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`--dtype` must be a floating-point type of torch, such as bfloat16, not '{name}'.")
    return dtype


def accuracies_of(model: str) -> dict[int, dict]:
    """The accuracy of each width that the model's results.json tells."""
    from transformers.utils import cached_file

    file = cached_file(model, "results.json", _raise_exceptions_for_missing_entries=False)
    results = json.loads(Path(file).read_text(encoding="utf-8")) if file else []
    return {row["num_heads"]: {"accuracy": row["accuracy"]} for row in results if "accuracy" in row}


def load_splits(data: str, **columns: str | None):
    from hydravit_hf.data import load_images
    from hydravit_hf.folders import check_path

    if data != "digits":
        check_path(data)
    sources = {} if data == "digits" else {"data_dir" if Path(data).is_dir() else "dataset_name": data}
    return load_images(**sources, **{name: value for name, value in columns.items() if value is not None})


def load_images(model: str, config, data: str, split: str, skip_broken: bool = False, **columns: str | None):
    """Load labelled images and prepare them for a model, whose classes they must have. Returns them, and the number of
    those that were left out."""
    from datasets import ClassLabel
    from transformers import AutoImageProcessor

    from hydravit_hf.data import align_labels, check_labels, to_pixel_values, undecoded
    from hydravit_hf.data_checks import leave_out_broken

    splits = load_splits(data, **columns)
    if split not in splits:
        raise ValueError(f"`--split` must be one of {', '.join(splits)}, not '{split}'.")
    images = splits[split]
    if not isinstance(images.features["label"], ClassLabel):
        raise ValueError("The images have several labels or numbers as labels: `HydraViTTrainer.evaluate` takes them.")
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise ValueError(f"The model must number its labels from 0, not {sorted(config.id2label)[0]}, in `id2label`.")
    if config.id2label[0] != "LABEL_0":  # the names of classes tell more than their numbers
        with without_bars():
            images = align_labels(images, config.label2id)
    check_labels(images, config.num_labels)
    left_out = 0
    if skip_broken:
        kept, numbers = leave_out_broken({split: images})
        images, left_out = kept[split], numbers[split]
    transform = to_pixel_values(AutoImageProcessor.from_pretrained(model))
    return undecoded(images).with_transform(transform), left_out


@contextmanager
def without_bars():
    """Hide the progress bars of `datasets` around what takes a moment."""
    from datasets import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def files_named_by(source: str) -> list[str]:
    """The image files in a folder, or what is no folder."""
    from hydravit_hf.folders import images_in

    if not Path(source).is_dir():
        return [source]
    found = [str(file) for file in images_in(Path(source))]
    if not found:
        raise FileNotFoundError(f"There are no images in '{source}'.")
    return found
