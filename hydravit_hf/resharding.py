"""Changes the files of a saved checkpoint: one file, or a file for each width."""

import shutil
from pathlib import Path

from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from .model.configuration_hydravit import HydraViTConfig
from .model.files_hydravit import ENTRIES, SHARD, disk_errors, locked, move_checkpoint, staging
from .model.nesting_hydravit import count_heads
from .model.shards_hydravit import FILE_METADATA, find_weights, open_weights, resolve_shard_heads, write_by_heads


def reshard_checkpoint(
    folder: str | Path,
    new_folder: str | Path | None = None,
    shard_by_heads: bool | list[int] = True,
    max_shard_size: int | str = "50GB",
):
    """Write the weights of a saved HydraViT into files by width, or back into one file. No bit of a weight changes.

    Args:
        folder: Folder that `save_pretrained` wrote, with files of any kind.
        new_folder: Folder to write to. The other files of `folder` are copied; its subfolders are not. None replaces
            the files in `folder`, in the crash-safe way of `save_pretrained`.
        shard_by_heads: True gives each of `subnetwork_heads` a file, and a list the widths in it. False gives one file.
        max_shard_size: Size beyond which the files of one width are split further.

    Raises:
        OSError: The folder has no configuration or no safetensors files, or a file is damaged.
        ValueError: `shard_by_heads` names a width that was not trained, or the weights have other heads than the
            configuration says.

    Examples:
        >>> from pathlib import Path
        >>> from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, reshard_checkpoint
        >>> config = HydraViTConfig(num_hidden_layers=2, image_size=32, subnetwork_heads=[3, 12])
        >>> HydraViTForImageClassification(config).save_pretrained("one-file")
        >>> reshard_checkpoint("one-file", "by-width")
        >>> sorted(file.name for file in Path("by-width").glob("*.safetensors"))
        ['model-03-heads.safetensors', 'model-12-heads.safetensors']
        >>> HydraViTForImageClassification.from_pretrained("by-width", num_attention_heads=3).config.hidden_size
        192
    """
    folder = Path(folder)
    new_folder = folder if new_folder is None else Path(new_folder)
    config = HydraViTConfig.from_pretrained(folder)
    heads = None if shard_by_heads is False else resolve_shard_heads(shard_by_heads, config)
    shards = find_weights(folder, config.num_attention_heads, variant=None, named=None, hub_kwargs={})
    if not shards:
        raise FileNotFoundError(f"'{folder}' has no safetensors files.")
    with disk_errors(new_folder), staging(new_folder) as staged:
        with open_weights(shards) as (stored, metadata):
            tensors = {name: tensor[tuple(map(slice, tensor.shape))] for name, tensor in stored.items()}
        if count_heads(tensors, config) != config.num_attention_heads:
            raise ValueError(
                f"The weights in '{folder}' are not of the {config.num_attention_heads} heads in its {CONFIG_NAME}."
            )
        if heads:
            write_by_heads(staged, tensors, config, heads, max_shard_size, metadata)
        else:
            metadata = {name: text for name, text in metadata.items() if name not in FILE_METADATA}
            save_file(tensors, staged / SAFE_WEIGHTS_NAME, {"format": "pt"} | metadata)
        if new_folder != folder:
            for file in folder.iterdir():
                if file.is_file() and not is_weights(file.name):
                    shutil.copy2(file, staged)
        with locked(new_folder):
            move_checkpoint(staged, new_folder)


def is_weights(name: str) -> bool:
    """Whether a file is the weights of a checkpoint, one of their shards, or the index of these."""
    return name in ENTRIES or SHARD.fullmatch(name) is not None
