# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Token recycling (ThinkingViT, https://arxiv.org/abs/2507.10800): a width runs in stages, each from the tokens before.

`HydraViTConfig.stages` lists the stages of a width. Each stage after the first adds a learned projection of the
narrower stage's tokens to its own embeddings. This file travels with each saved checkpoint as remote code.

Letters in shapes: B images, N tokens, S stages, D' and D the widths of the narrower and of the present stage.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from .quantization_hydravit import cut_weight, is_quantized


class TokenRecycling(nn.Linear):
    """Adds a projection of the narrower stage's tokens, (B, N, D'), to the embeddings of a stage, (B, N, D).

    It is zero-initialised: adding it to a trained model changes nothing until you train.
    """

    def forward(self, hidden_states: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        if tokens is None:  # the first stage: nothing to add but a gradient of zeros, which DDP waits for
            if not torch.is_grad_enabled() or (not torch.compiler.is_compiling() and is_quantized(self)):
                return hidden_states
            trained = [parameter for parameter in (self.weight, self.bias) if parameter.requires_grad]
            return sum((parameter[:0].sum() for parameter in trained), hidden_states)
        batch, count, width = hidden_states.shape
        if tokens.ndim != 3 or tokens.shape[:2] != (batch, count) or tokens.shape[2] > width:
            raise ValueError(
                f"`recycled_tokens` must have the shape ({batch}, {count}, at most {width}), not {tuple(tokens.shape)}."
            )
        weight, bias = cut_weight(self.weight, width, tokens.shape[-1]), self.bias[:width]
        return hidden_states + nn.functional.linear(tokens, weight, bias)


@dataclass
class HydraViTStagesOutput(ImageClassifierOutput):
    """Output of a classifier that recycles tokens, in `train()` mode.

    Args:
        loss, logits, hidden_states, attentions: As in `ImageClassifierOutput`. The loss is the mean over the stages.
        stage_logits: The logits of all S stages, the narrowest first, (S, B, labels).
    """

    stage_logits: torch.Tensor | None = None


def forward_stages(model, pixel_values, labels, num_heads_active, interpolate_pos_encoding, **kwargs):
    """Classify at every stage up to the width, because training with token recycling trains all stages at once.

    The arguments are those of `HydraViTForImageClassification.forward`. Returns a `HydraViTStagesOutput`, or an
    `ImageClassifierOutput` if there is one stage only.
    """
    tokens, stage_logits = None, []
    for stage in model.config.stages(model._resolve_num_heads(num_heads_active)):
        outputs = model.hydravit(
            pixel_values,
            num_heads_active=stage,
            interpolate_pos_encoding=interpolate_pos_encoding,
            recycled_tokens=tokens,
            **kwargs,
        )
        tokens = outputs.last_hidden_state
        stage_logits.append(model.classifier(outputs.pooler_output))
    loss = None
    if labels is not None:
        losses = [model.loss_function(labels, logits, model.config, **kwargs) for logits in stage_logits]
        loss = torch.stack(losses).mean()
    output = ImageClassifierOutput(
        loss=loss, logits=stage_logits[-1], hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )
    if len(stage_logits) == 1:
        return output
    return HydraViTStagesOutput(**output, stage_logits=torch.stack(stage_logits))
