"""Converts a training file of the original implementation (https://github.com/ds-kiel/HydraViT) to a saved folder.

    python -m hydravit_hf.convert_checkpoint model_best.pth.tar hydravit-base-patch16-224

The original saves timm's training files: `{epoch, arch, state_dict, optimizer, version, args, state_dict_ema, metric}`.
"""

import argparse
import pickle
import re
import sys
from pathlib import Path

import torch

from .folders import check_new_or_empty
from .image_processing import make_image_processor
from .model.configuration_hydravit import HydraViTConfig
from .model.modeling_hydravit import HydraViTForImageClassification
from .model.sources_hydravit import TIMM_KEYS, arguments_by_shapes, find_name, split_projections

HEAD_DIM = 64  # every original model has it
CROP_FRACTION = 0.9  # the original evaluates with it


def read_original_checkpoint(
    path: str | Path, use_ema: bool = True
) -> tuple[dict[str, torch.Tensor], argparse.Namespace]:
    """Read the weights of an original training file, by their original names, and its training arguments.

    It unpickles only tensors, plain containers and one `argparse.Namespace`.

    Raises:
        OSError: The file does not exist or is damaged.
        ValueError: The file holds other objects, which could run code, or no weights.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise OSError(f"'{path}' is not a PyTorch checkpoint, or it is damaged.") from error
        raise ValueError(
            f"'{path}' is refused: besides tensors it holds {refused[1]}, and loading that could run code."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(f"'{path}' is not a PyTorch checkpoint, or it is damaged: {error}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"'{path}' holds a {type(checkpoint).__name__}, not the dictionary of a training file.")
    entry = "state_dict_ema" if use_ema else "state_dict"
    if not isinstance(checkpoint.get(entry), dict):
        raise ValueError(f"'{path}' has no '{entry}'; its entries are {sorted(map(str, checkpoint))}.")
    _check_weights(path, checkpoint[entry])
    weights = {name.removeprefix("module."): tensor for name, tensor in checkpoint[entry].items()}
    arguments = checkpoint.get("args")
    return weights, arguments if isinstance(arguments, argparse.Namespace) else argparse.Namespace()


def _check_weights(path: str | Path, weights: dict):
    """Raise a `ValueError` if weights are no plain tensors of real numbers, or more than the file holds of them."""
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"'{path}' holds a {type(tensor).__name__}, not a tensor, as '{name}'.")
        if not isinstance(name, str):
            raise ValueError(f"'{path}' holds a tensor with the name {name!r}, which is no text.")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"'{path}' holds '{name}' as a sparse, quantized or empty tensor, not as a plain one.")
        if not tensor.is_floating_point():
            raise ValueError(f"'{path}' holds '{name}' as {tensor.dtype}, not as floating-point numbers.")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights.values()}
    asked = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if asked > sum(storages.values()):  # by strides of 0, or by views of the same numbers
        raise ValueError(f"'{path}' holds {sum(storages.values())} bytes of weights, and asks for {asked}.")


def convert_original_checkpoint(path: str | Path, use_ema: bool = True, **config) -> HydraViTForImageClassification:
    """Make a HydraViT with the weights of an original training file.

        model = convert_original_checkpoint("model_best.pth.tar")
        model.save_pretrained("hydravit-base-patch16-224")

    Args:
        path: The `.pth.tar` file.
        use_ema: Whether to take the averaged weights, with which the original was evaluated. Otherwise it takes the
            last ones.
        config: Arguments of `HydraViTConfig` that do not follow from the weights, such as `id2label` or
            `subnetwork_heads`.

    Raises:
        OSError: The file does not exist or is damaged.
        ValueError: The file holds objects that could run code, or not the weights of a HydraViT.
    """
    original, _ = read_original_checkpoint(path, use_ema)
    return _convert(path, original, config)


def _convert(path: str | Path, original: dict[str, torch.Tensor], config: dict) -> HydraViTForImageClassification:
    """Make the model from weights with their original names. Messages name `path`."""
    weights = {}
    for name, tensor in original.items():
        renamed = find_name(name, TIMM_KEYS)
        if renamed is None:
            raise ValueError(f"'{path}' holds '{name}', which a HydraViT does not have.")
        weights[renamed] = tensor
    try:
        weights = split_projections(weights)
        config = HydraViTConfig(**arguments_by_shapes(weights, HEAD_DIM) | config)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"'{path}' does not hold all the weights of a HydraViT: {error}") from error
    with torch.device("meta"):  # the shapes alone: a file may name many layers and hold few
        expected = HydraViTForImageClassification(config).state_dict()
    for name in expected | weights:
        shapes = [tuple(tensors[name].shape) if name in tensors else "none" for tensors in (expected, weights)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"'{path}' does not hold all the weights of a HydraViT: '{name}' should have the shape {shapes[0]}, "
                f"and has {shapes[1]}."
            )
    model = HydraViTForImageClassification(config)
    model.load_state_dict(weights)
    return model.eval()


def convert_and_save(path: str | Path, folder: str | Path, use_ema: bool = True) -> HydraViTForImageClassification:
    """Convert an original training file and save the model, with the image processor of the original's evaluation.

    Args:
        path: The `.pth.tar` file.
        folder: Folder to save to, new or empty.
        use_ema: As in `convert_original_checkpoint`.

    Raises:
        OSError: The file does not exist or is damaged.
        ValueError: As in `convert_original_checkpoint`, or the folder is not empty.
    """
    folder = Path(folder)
    check_new_or_empty(folder)
    original, trained_with = read_original_checkpoint(path, use_ema)
    model = _convert(path, original, {})
    statistics = {
        f"image_{name}": values for name in ("mean", "std") if (values := getattr(trained_with, name, None)) is not None
    }
    processor = make_image_processor(model.config, crop_fraction=CROP_FRACTION, **statistics)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help=".pth.tar file of the original")
    parser.add_argument("folder", type=Path, metavar="DST", help="folder to save to, new or empty")
    parser.add_argument("--no_ema", action="store_true", help="take the last weights instead of the averaged ones")
    args = parser.parse_args(arguments)
    try:
        config = convert_and_save(args.source, args.folder, use_ema=not args.no_ema).config
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(
        f"Saved a {config.num_attention_heads}-head HydraViT with {config.num_hidden_layers} layers, for "
        f"{config.image_size}-pixel images and {config.num_labels} labels, to {args.folder}"
    )


if __name__ == "__main__":
    main()
