"""Parameter groups, and an AdamW that leaves the weights alone that a step has not used."""

import torch
from torch import nn

from ..model.modeling_hydravit import HydraViTPreTrainedModel
from ..model.nesting_hydravit import leading_block, width_dims


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Group parameters for an optimizer: matrices and kernels decay; biases, norms, tokens and positions do not."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.endswith("weight") and parameter.ndim > 1].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


class PrefixAdamW(torch.optim.Optimizer):
    """AdamW that updates the leading heads only. Before a step, set `num_heads` to the widest that it has trained.

    To an ordinary AdamW, weights outside the subnetwork have gradients of zero, so decay and momentum move them in each
    step, as in the original. Here those weights, their moments and their count of updates stay as they are.

    Args:
        model: The model to train.
        lr, betas, eps, weight_decay: As in `torch.optim.AdamW`. `parameter_groups` says which weights decay.
    """

    def __init__(
        self,
        model: HydraViTPreTrainedModel,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(parameter_groups(model, weight_decay), {"lr": lr, "betas": betas, "eps": eps})
        self.num_heads = self.max_heads = model.config.num_attention_heads
        self._names = {weight: name for name, weight in model.named_parameters()}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state, name = self.state[weight], self._names[weight]
                is_stack = name.startswith("classifier.") and 0 in width_dims(name, weight.ndim)
                if not state:
                    state["step"] = torch.zeros(
                        len(weight) if is_stack else 1, self.max_heads
                    )  # number of updates of each head
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                tensors = (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])
                if is_stack:  # separate classifiers: those of other widths have no gradient
                    for index in weight.grad.flatten(1).any(1).nonzero().flatten().tolist():
                        self._update(*(tensor[index] for tensor in tensors), state["step"][index], name, group)
                else:
                    self._update(*tensors, state["step"][0], name, group)
        return loss

    def _update(self, weight, gradient, mean, square, updates, name: str, group: dict):
        dims = width_dims(name, weight.ndim)
        weight, gradient, mean, square = (
            leading_block(tensor, dims, self.num_heads, self.max_heads) for tensor in (weight, gradient, mean, square)
        )
        sizes = weight.shape
        beta1, beta2 = group["betas"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        updates = updates[: self.num_heads].add_(1)
        # double precision, because 1 - 0.999 has few digits in single
        rest1, rest2 = ((1 - beta ** updates.double()).float().to(mean.device) for beta in (beta1, beta2))
        mean, square = mean / self._spread(rest1, sizes, dims), square / self._spread(rest2, sizes, dims)
        weight.addcdiv_(mean, square.sqrt_().add_(group["eps"]), value=-group["lr"])

    def _spread(self, values: torch.Tensor, sizes: torch.Size, dims: tuple[int, ...]) -> torch.Tensor:
        """Expand one value per head to the block's shape. An entry shared by two heads takes that of the wider one,
        because it has been updated as often as the wider head."""
        spread = values[0]  # the first head has been updated most often
        for dim in dims:
            along = values.repeat_interleave(sizes[dim] // self.num_heads)
            spread = torch.minimum(spread, along.view(-1, *[1] * (len(sizes) - 1 - dim)))
        return spread
