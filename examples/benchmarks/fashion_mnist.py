"""Fashion-MNIST for the studies, and the accuracy of a model on its images."""

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts the idx files


def read_idx(file: Path) -> np.ndarray:
    """Read an array of bytes from a gzipped idx file."""
    data = gzip.decompress(file.read_bytes())
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


@cache
def load(folder: Path = FOLDER) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Load the images, from -1 to 1, and labels of the splits train, validation and test.

    5,000 of the 60,000 training images are for validation.
    """
    splits = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        images = torch.from_numpy(read_idx(folder / f"{name}-images-idx3-ubyte.gz").copy())
        labels = torch.from_numpy(read_idx(folder / f"{name}-labels-idx1-ubyte.gz").astype(np.int64))
        splits[split] = images[:, None] / 127.5 - 1, labels
    shuffled = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    train, validation = shuffled[:55_000], shuffled[55_000:]
    images, labels = splits["train"]
    return splits | {"train": (images[train], labels[train]), "validation": (images[validation], labels[validation])}


class Flipped(Dataset):
    """Images of which a random half is mirrored."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return {"pixel_values": image.flip(-1) if torch.rand(()) < 0.5 else image, "labels": self.labels[index]}


@torch.no_grad()
def accuracies(model, images: torch.Tensor, labels: torch.Tensor, heads: list[int | None]) -> list[float]:
    """The share of right answers at each width. None in `heads` stands for a model of one width."""
    found = []
    for num_heads in heads:
        option = {} if num_heads is None else {"num_heads_active": num_heads}
        hits = [
            (model(part, **option).logits.argmax(-1) == truth).sum().item()
            for part, truth in zip(images.split(500), labels.split(500), strict=True)
        ]
        found.append(sum(hits) / len(images))
    return found
