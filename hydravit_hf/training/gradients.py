"""What the processes of DDP send each other: the gradients of the heads that a step trains, without the zeros."""

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..model.modeling_hydravit import HydraViTPreTrainedModel
from ..model.nesting_hydravit import leading_block, width_dims

_hooks: WeakKeyDictionary[nn.Module, "_LeadingGradients | None"] = WeakKeyDictionary()


def share_leading_gradients(model: nn.Module, num_heads: int):
    """Let DDP average the gradients of the leading heads only, in the backward passes that follow.

    The other gradients of such a step are zeros, which DDP would send as well. The first call registers a communication
    hook. It must come before the first backward pass. A model that is not wrapped by DDP, is no HydraViT, or has a
    communication hook already is left alone.

    Args:
        model: What `accelerator.prepare` or `Trainer` made of the model.
        num_heads: The widest head count of the step. All processes give the same one.
    """
    if not isinstance(model, DistributedDataParallel) or not isinstance(model.module, HydraViTPreTrainedModel):
        return
    if model not in _hooks:
        hook = _LeadingGradients(model.module)
        try:
            model.register_comm_hook(hook, _LeadingGradients.average)
        except RuntimeError:  # DDP takes one hook, and the user has chosen it
            hook = None
        _hooks[model] = hook
    if _hooks[model] is not None:
        _hooks[model].num_heads = num_heads


class _LeadingGradients:
    def __init__(self, model: HydraViTPreTrainedModel):
        self.num_heads = self.max_heads = model.config.num_attention_heads
        self._dims = {parameter: _dims_of(name, parameter.ndim) for name, parameter in model.named_parameters()}

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradients = bucket.gradients()
        blocks = [self._block(*pair) for pair in zip(gradients, bucket.parameters(), strict=True)]
        is_whole = all(block.shape == gradient.shape for block, gradient in zip(blocks, gradients, strict=True))
        sent = bucket.buffer() if is_whole else torch.cat([block.flatten() for block in blocks])
        sent.div_(dist.get_world_size())
        averaged = dist.all_reduce(sent, async_op=True).get_future()
        if is_whole:
            return averaged.then(lambda future: future.value()[0])

        def fill(future: torch.futures.Future) -> torch.Tensor:
            parts = future.value()[0].split([block.numel() for block in blocks])
            for block, part in zip(blocks, parts, strict=True):
                block.copy_(part.view_as(block))
            return bucket.buffer()

        return averaged.then(fill)

    def _block(self, gradient: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        return leading_block(gradient, self._dims[parameter], self.num_heads, self.max_heads)


def _dims_of(name: str, ndim: int) -> tuple[int, ...]:
    """The dimensions along which a gradient is zero beyond the leading heads."""
    if ".lora_" in name:
        return ()  # an adapter is small
    dims = width_dims(name, ndim)
    return tuple(dim for dim in dims if dim != 0) if name.startswith("classifier.") else dims  # a stack's is its widths
