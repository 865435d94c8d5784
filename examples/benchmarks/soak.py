"""Calls of one model at mixed widths and batch sizes from several threads: is memory flat, and is every answer right?

    python examples/benchmarks/soak.py                # 100,000 calls
    python examples/benchmarks/soak.py --calls 2000

It prints the resident memory after each tenth of the calls. It fails if the memory grows by more than `--max_growth_mb`
after the first tenth, or if an answer differs from that of its width alone.
"""

import argparse
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

BATCH_SIZES = range(1, 9)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="number of calls in all threads together")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--max_growth_mb", type=float, default=8.0, help="growth of memory after the first tenth")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.calls < 10 * args.threads or args.threads < 1:
        parser.error("--calls must be at least ten for each thread")
    return args


def main(arguments: list[str] | None = None):
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)

    # 1. A tiny model, images, and the answer of each width on its own
    config = HydraViTConfig(head_dim=8, num_hidden_layers=2, image_size=16, patch_size=4, num_labels=10)
    model = HydraViTForImageClassification(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.randn(max(BATCH_SIZES), 3, 16, 16)
    with torch.inference_mode():
        expected = {k: model.extract_subnetwork(k)(images).logits for k in config.subnetwork_heads}

    # 2. Each thread draws widths and batch sizes, and calls the model
    def wrong_answers(thread: int, part: int) -> int:
        draw = random.Random(f"{args.seed} {thread} {part}")
        wrong = 0
        with torch.inference_mode():
            for _ in range(args.calls // 10 // args.threads):
                num_heads, size = draw.choice(config.subnetwork_heads), draw.choice(BATCH_SIZES)
                logits = model(images[:size], num_heads_active=num_heads).logits
                wrong += not torch.allclose(logits, expected[num_heads][:size], atol=1e-4)
        return wrong

    # 3. The memory after each tenth
    process, memory, wrong, start = psutil.Process(os.getpid()), [], 0, time.perf_counter()
    with ThreadPoolExecutor(args.threads) as threads:
        for part in range(10):
            wrong += sum(threads.map(wrong_answers, range(args.threads), [part] * args.threads))
            memory.append(process.memory_info().rss / 2**20)
            calls = args.calls // 10 // args.threads * args.threads * (part + 1)
            print(f"{calls:>9,} calls  {memory[-1]:8.1f} MB  {time.perf_counter() - start:8.1f} s", flush=True)
    growth = max(memory[1:]) - memory[0]
    print(f"{wrong} wrong answers; the memory grew by {growth:.1f} MB after the first tenth")
    if wrong or growth > args.max_growth_mb:
        sys.exit(f"error: no answer may be wrong, and the memory may grow by {args.max_growth_mb} MB")


if __name__ == "__main__":
    main()
