"""Makes a published ViT elastic: moves what matters into its leading block, and leaves its function as it is.

A ViT has freedoms that leave its logits as they are. `elastify` uses them to order its parts, before any training:

1. The weight and bias of each layer norm go into the layers that read it. The norms are plain then.
2. A rotation Q of the residual stream that keeps the vector of ones commutes with a plain norm: what writes to the
   stream becomes Q W, and what reads from it W Q^T. Q takes the directions that the layers read most from the stream
   into the leading channels.
3. The heads of each layer, and the neurons of each MLP, are put in the order of their scores.

Letters in shapes: B images, N tokens, D channels of the ViT, L layers, H heads, M neurons of an MLP.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.trainer_utils import has_length

from .evaluation import evaluating, make_loader
from .model.modeling_hydravit import HydraViTForImageClassification
from .model.sources_hydravit import Source, read_source

TOKENS = 400  # in a pass, by default: two images of 14 x 14 patches


def elastify(
    vit,
    images,
    num_attention_heads: int | None = None,
    max_images: int = 1024,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    disable_tqdm: bool = False,
    **config_kwargs,
) -> HydraViTForImageClassification:
    """Make a published ViT elastic: order its directions, heads and neurons by what they contribute.

    At the width of the ViT, the result gives the ViT's own logits. Its narrower widths are a better start for training
    than those of `from_vit` (docs/elastify.md has figures). The order needs no labels. The same images give the same
    result. An encoder without classifier gets a new one, and its features are rotated.

    Args:
        vit: A ViT, DeiT, ViTMAE, ViTMSN or DINOv2 of transformers, or a `vit_*` or `deit_*` of timm: the model, its
            path or its Hub id. A state dict is enough for timm. The model stays as it is.
        images: Images to find the order on, such as those of the training: a dataset of items with `pixel_values`,
            (C, H, W), or a `DataLoader` of batches of them.
        num_attention_heads: Number of heads that the new model holds. None means those of the ViT. If it is more, the
            others are newly initialised, with a warning.
        max_images: Number of images to take. They are spread evenly over a dataset; a `DataLoader` gives its first.
        batch_size: Number of images in a pass. Memory grows with it. None takes few, which suit a CPU; a GPU is faster
            with 32 or more.
        device: Device to work on. None means that of the ViT.
        disable_tqdm: Whether to hide the progress bar.
        config_kwargs: Further arguments of `HydraViTConfig`, as in `from_vit`.

    Raises:
        TypeError: `vit` is no model, no state dict and no path.
        ValueError: `vit` is no plain ViT (the message names the reason), or there are no images, or they don't fit the
            ViT or are not finite.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hydravit_hf import elastify
        >>> sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 192, "num_hidden_layers": 2}
        >>> vit = ViTForImageClassification(ViTConfig(**sizes, image_size=32)).eval()
        >>> images = torch.randn(8, 3, 32, 32)
        >>> model = elastify(vit, [{"pixel_values": image} for image in images], disable_tqdm=True)
        >>> torch.allclose(model(images).logits, vit(images).logits, atol=1e-4)
        True
    """
    source = read_source(vit, config_kwargs.pop("head_dim", None))
    image_size = config_kwargs.pop("image_size", source.arguments["image_size"])
    model = HydraViTForImageClassification.from_vit(
        _with_biases(source), source.arguments["num_attention_heads"], image_size=image_size
    )
    model.to(device or model.device)
    was_training, has_classifier = source.training, "classifier.weight" in source.tensors
    del source  # a ViT that was read from a path is held by nothing else
    fold_norms(model)
    if batch_size is None:
        batch_size = max(1, TOKENS // math.prod(model.config.patch_grid))
    loader = _take(images, max_images, batch_size)
    statistics = measure(model, loader, max_images, has_classifier, disable_tqdm)
    rotate(model, find_rotation(statistics.importance))
    order(model, *(scores.argsort(descending=True, stable=True) for scores in (statistics.heads, statistics.neurons)))
    if config_kwargs or num_attention_heads not in (None, model.config.num_attention_heads):
        heads = num_attention_heads or model.config.num_attention_heads
        model = HydraViTForImageClassification.from_vit(model.to_vit(), heads, **config_kwargs)
    return model.train(was_training)


def _with_biases(source: Source) -> Source:
    """Give projections without bias one of zeros, because the biases of the norms need a place."""
    for name, weight in list(source.tensors.items()):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            source.tensors.setdefault(name.replace("weight", "bias"), weight.new_zeros(len(weight)))
    source.arguments["qkv_bias"] = True
    return source


def _take(images, max_images: int, batch_size: int) -> DataLoader:
    if not isinstance(images, DataLoader) and has_length(images) and len(images) > max_images:
        images = Subset(images, np.linspace(0, len(images) - 1, max_images).round().astype(int).tolist())
    return make_loader(images, batch_size)


@torch.no_grad()
def fold_norms(model: HydraViTForImageClassification):
    """Move the weight and bias of each layer norm into the layers that read it, in place."""

    def fold(norm: nn.LayerNorm, *readers: nn.Linear):
        for reader in readers:
            reader.bias += (reader.weight.double() @ norm.bias.double()).to(reader.bias.dtype)
            reader.weight *= norm.weight
        norm.weight.fill_(1)
        norm.bias.zero_()

    for layer in model.hydravit.layers:
        attention = layer.attention
        fold(layer.layernorm_before, attention.q_proj, attention.k_proj, attention.v_proj)
        fold(layer.layernorm_after, layer.mlp.fc1)
    fold(model.hydravit.layernorm, model.classifier)


@dataclass
class Statistics:
    """The measurements that decide the order.

    - `importance`: (D, D), symmetric. trace(P @ importance) tells how well the layers W read a projection P of the
      normalised stream x. For each norm, it is the mean of <W x, W P x> over the tokens, divided by the mean of
      <W x, W x>. The norms are summed.
    - `heads`, `neurons`: the scores, (L, H) and (L, M). A score is the sum over the images of |sum over the tokens of
      activation x gradient|, where the gradient is that of a random projection of the class token. It estimates to
      first order how much the class token changes without the head or neuron.
    """

    importance: torch.Tensor
    heads: torch.Tensor
    neurons: torch.Tensor


def measure(
    model: HydraViTForImageClassification,
    loader,
    max_images: int,
    has_classifier: bool = True,
    disable_tqdm: bool = False,
) -> Statistics:
    """Run images through a model with plain norms, and keep only sums, in float64.

    Args:
        model: The model.
        loader: Batches with `pixel_values`, (B, C, H, W).
        max_images: Number of images to take.
        has_classifier: Whether the classifier tells which directions of the last norm are read. Otherwise all of them
            count alike.
        disable_tqdm: Whether to hide the progress bar.
    """
    encoder, config = model.hydravit, model.config
    readers = _readers(model, has_classifier)
    zeros = partial(torch.zeros, dtype=torch.float64)
    moments = {norm: zeros(config.hidden_size, config.hidden_size) for norm in readers}
    head_scores = zeros(config.num_hidden_layers, config.num_attention_heads)
    neuron_scores = zeros(config.num_hidden_layers, config.intermediate_size)

    def add_moments(norm, inputs, output):
        tokens = output.detach().float()
        tokens = tokens[:, 0] if norm is encoder.layernorm else tokens.flatten(0, 1)  # the classifier reads one token
        moments[norm] += (tokens.T @ tokens).double().cpu()

    def add_scores(scores, linear, inputs):
        (activations,) = inputs
        values = activations.detach().float()  # a hook that held `activations` would keep the graph of each pass alive

        def add(gradients):
            changes = (values * gradients.float()).sum(1)  # (B, D) or (B, M)
            changes = changes.unflatten(1, (len(scores), -1)).sum(2).abs()
            scores.add_(changes.sum(0).double().cpu())

        activations.register_hook(add)

    hooks = [norm.register_forward_hook(add_moments) for norm in readers]
    for layer, of_heads, of_neurons in zip(encoder.layers, head_scores, neuron_scores, strict=True):
        hooks.append(layer.attention.o_proj.register_forward_pre_hook(partial(add_scores, of_heads)))
        hooks.append(layer.mlp.fc2.register_forward_pre_hook(partial(add_scores, of_neurons)))
    model.requires_grad_(False)  # gradients of the activations are enough
    generator, count = torch.Generator().manual_seed(0), 0
    options = {"total": min(max_images, len(loader.dataset)) if has_length(loader.dataset) else None, "leave": False}
    try:
        with evaluating(model), tqdm(desc="Measuring", unit=" images", disable=disable_tqdm, **options) as progress:
            for batch in loader:
                pixel_values = _pixel_values_of(batch)[: max_images - count].to(model.device)
                token = encoder(pixel_values.requires_grad_(), config.num_attention_heads).pooler_output
                if not torch.isfinite(token).all():
                    raise ValueError(f"`images` {count} to {count + len(token) - 1} give features that are no numbers.")
                signs = torch.randint(2, token.shape, generator=generator) * 2 - 1
                (token * signs.to(token)).sum().backward()
                count += len(token)
                progress.update(len(token))
                if count == max_images:
                    break
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(True)
    if count == 0:
        raise ValueError("`images` is empty: there is nothing to find the order on.")
    importance = zeros(config.hidden_size, config.hidden_size)
    for norm, weights in readers.items():
        weights = torch.cat(weights).double().cpu()
        product = (weights.T @ weights) @ moments[norm]
        importance += (product + product.T) / (2 * product.trace())
    return Statistics(importance, head_scores, neuron_scores)


def _readers(model: HydraViTForImageClassification, has_classifier: bool) -> dict[nn.LayerNorm, list[torch.Tensor]]:
    """The weights of the layers that read each norm."""
    last = model.classifier.weight.detach() if has_classifier else torch.eye(model.config.hidden_size)
    readers = {model.hydravit.layernorm: [last]}
    for layer in model.hydravit.layers:
        attention = (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
        readers[layer.layernorm_before] = [linear.weight.detach() for linear in attention]
        readers[layer.layernorm_after] = [layer.mlp.fc1.weight.detach()]
    return readers


def _pixel_values_of(batch) -> torch.Tensor:
    if "pixel_values" not in batch:
        raise ValueError(f"The items of `images` must have `pixel_values`; they have {', '.join(map(str, batch))}.")
    return batch["pixel_values"].detach()


def helmert(width: int) -> torch.Tensor:
    """Make the Helmert matrix, an orthogonal (D, D). Its last column is the vector of ones, normalised. Column j of the
    others is constant in the first j + 1 channels, sums to zero, and is zero after the next channel."""
    rows = torch.arange(1, width + 1, dtype=torch.float64)[:, None]
    columns = torch.arange(1, width, dtype=torch.float64)
    matrix = (rows <= columns).double() - columns * (rows == columns + 1)
    ones = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    return torch.cat((matrix / (columns * (columns + 1)).sqrt(), ones), dim=1)


def find_rotation(importance: torch.Tensor) -> torch.Tensor:
    """Find the rotation Q, (D, D), that takes the most important directions into the leading channels.

    Q keeps the vector of ones, so that it commutes with a plain layer norm. Less their mean, which a layer norm
    removes, the first k channels hold the k - 1 most important directions and nothing else, for any k.

    Args:
        importance: A symmetric matrix, (D, D), whose eigenvectors are the directions and whose eigenvalues are their
            importance.
    """
    width = len(importance)
    mean = torch.full((width, width), 1 / width, dtype=torch.float64)
    centre = torch.eye(width, dtype=torch.float64) - mean
    # The ones get the least eigenvalue, so that they are the last direction
    directions = torch.linalg.eigh(centre @ importance @ centre - 2 * importance.norm() * mean).eigenvectors.flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return helmert(width) @ (directions * largest.sign()).T


@torch.no_grad()
def rotate(model: HydraViTForImageClassification, rotation: torch.Tensor):
    """Rotate the residual stream of a model with plain norms, in place."""
    rotation = rotation.to(model.device)

    def rotate_columns(parameter: torch.Tensor):
        parameter.copy_(parameter.double() @ rotation.T)

    def rotate_rows(parameter: torch.Tensor):
        parameter.copy_((rotation @ parameter.flatten(1).double()).view_as(parameter))

    embeddings = model.hydravit.embeddings
    rotate_columns(embeddings.cls_token)
    rotate_columns(embeddings.position_embeddings)
    writers, readers = [embeddings.patch_embeddings.projection], [model.classifier]
    for layer in model.hydravit.layers:
        attention, mlp = layer.attention, layer.mlp
        readers += [attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1]
        writers += [attention.o_proj, mlp.fc2]
    for reader in readers:
        rotate_columns(reader.weight)
    for writer in writers:
        rotate_rows(writer.weight)
        rotate_columns(writer.bias)


@torch.no_grad()
def order(model: HydraViTForImageClassification, heads: torch.Tensor, neurons: torch.Tensor):
    """Put the heads and neurons of each layer in an order, in place.

    Args:
        model: The model.
        heads, neurons: Indices in the new order, (L, H) and (L, M).
    """
    for layer, head_order, neuron_order in zip(model.hydravit.layers, heads, neurons, strict=True):
        attention, mlp = layer.attention, layer.mlp
        channels = torch.arange(model.config.hidden_size).unflatten(0, (-1, attention.head_dim))[head_order].flatten()
        for linears, reader, indices in (
            ((attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj, channels),
            ((mlp.fc1,), mlp.fc2, neuron_order),
        ):
            for parameter in (parameter for linear in linears for parameter in linear.parameters()):
                parameter.copy_(parameter[indices])
            reader.weight.copy_(reader.weight[:, indices])
