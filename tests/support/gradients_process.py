"""Takes the same steps under DDP with and without `share_leading_gradients`; see test_distributed.py."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from support.training import assert_equal, make_model, weights_of
from torch.nn.parallel import DistributedDataParallel

from hydravit_hf.training.gradients import share_leading_gradients

STEPS = ([1], [4], [2], [3, 1], [2, 1], [4, 1], [1])  # the widths of each
MODELS = ({}, {"separate_classifiers": True}, {"token_recycling": True})


def train(shares: bool, **options) -> tuple[dict, list[int]]:
    """Returns the weights after all steps, and the numbers that each of them sent."""
    sent, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sent[-1] += tensor.numel()
        return all_reduce(tensor, *args, **kwargs)

    model = DistributedDataParallel(make_model(subnetwork_heads=[1, 2, 4], **options), bucket_cap_mb=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(dist.get_rank())
    dist.all_reduce = counting
    for heads in STEPS:
        heads = [4] if options.get("token_recycling") else heads
        sent.append(0)
        if shares:
            share_leading_gradients(model, heads[0])
        for num_heads in heads:
            with nullcontext() if num_heads == heads[-1] else model.no_sync():
                images = torch.randn(5, 3, 8, 8, generator=generator)
                model(images, num_heads_active=num_heads).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.all_reduce = all_reduce
    return weights_of(model.module), sent


def main(file: Path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    counts = []
    for options in MODELS:
        weights, sent = train(True, **options)
        assert_equal(weights, train(False, **options)[0])
        counts.append(sent)
    model = DistributedDataParallel(make_model())
    model.register_comm_hook(None, lambda state, bucket: counts.append("own") or bucket_as_it_is(bucket))
    share_leading_gradients(model, 1)
    model(torch.randn(2, 3, 8, 8)).logits.sum().backward()
    if dist.get_rank() == 0:
        file.write_text(json.dumps(counts))
    dist.barrier()
    del model
    dist.destroy_process_group()


def bucket_as_it_is(bucket) -> torch.futures.Future:
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


if __name__ == "__main__":
    main(Path(sys.argv[1]))
