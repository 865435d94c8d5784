"""How long does `elastify` take, and how much memory? On random weights and images, in a process of its own.

    python examples/benchmarks/benchmark_elastify.py                    # ViT-B/16 at 224 pixels, 256 images

Memory is the process's peak, less what it held before it read the ViT's folder, as a multiple of the model's size.
"""

import argparse
import json
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from timing import machine
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from hydravit_hf import elastify


class Noise(Dataset):
    """Random images, made when they are read."""

    def __init__(self, count: int, image_size: int):
        self.count, self.image_size = count, image_size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, self.image_size, self.image_size, generator=generator)}


def peak() -> float:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: str, images: int, image_size: int, batch_size: int | None, threads: int) -> dict:
    torch.set_num_threads(threads)
    torch.randn(8, 8) @ torch.randn(8, 8)  # what torch takes by itself
    before, start, processor = peak(), time.perf_counter(), time.process_time()
    model = elastify(folder, Noise(images, image_size), batch_size=batch_size, disable_tqdm=True)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    size = 4 * model.num_parameters() / 2**20
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "model_mb": round(size),
        "peak_over_model": round((peak() - before) / size, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of ViTConfig, as JSON")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch_size", type=int, help="images in a pass; default: that of elastify")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    config = ViTConfig(num_labels=1000, **args.config)
    with tempfile.TemporaryDirectory() as folder:
        ViTForImageClassification(config).save_pretrained(folder)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            options = (folder, args.images, config.image_size, args.batch_size, args.threads)
            row = pool.submit(measure, *options).result()
    print(json.dumps(row | {"images": args.images, "threads": args.threads, "machine": machine()}))


if __name__ == "__main__":
    main()
