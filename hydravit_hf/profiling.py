"""What a width costs, in closed form."""

import math

from .configuration_hydravit import HydraViTConfig, as_pair


def count_parameters(config: HydraViTConfig, num_heads: int) -> int:
    """Parameters of the classifier with the leading `num_heads` heads: those of the extracted subnetwork, without the
    classifiers that other widths have to themselves."""
    width, ratio = config.check_num_heads(num_heads) * config.head_dim, config.mlp_ratio
    tokens = 1 + math.prod(config.patch_grid)
    embeddings = (config.num_channels * math.prod(as_pair(config.patch_size)) + 1) * width + (1 + tokens) * width
    matrices = (4 + 2 * ratio) * width * width
    biases = (3 * config.qkv_bias + 1 + ratio + 1) * width
    layer = matrices + biases + 4 * width
    return embeddings + config.num_hidden_layers * layer + 2 * width + config.num_labels * (width + 1)


def count_macs(config: HydraViTConfig, num_heads: int) -> int:
    """Multiply-accumulate operations of one image of `config.image_size` at `num_heads` heads: those of the matrix
    products, as the paper counts them (4.60 G at 6 heads of the default model)."""
    width = config.check_num_heads(num_heads) * config.head_dim
    patches = math.prod(config.patch_grid)
    tokens = 1 + patches
    embeddings = patches * width * config.num_channels * math.prod(as_pair(config.patch_size))
    projections = tokens * (4 + 2 * config.mlp_ratio) * width * width
    attention = 2 * tokens * tokens * width
    return embeddings + config.num_hidden_layers * (projections + attention) + width * config.num_labels
