"""What travels with every saved checkpoint: the network, its configuration, loading, saving and its pipeline.

Transformers copies these files beside the weights, flat, so that a checkpoint also loads where `hydravit_hf` is not
installed. They therefore import the standard library, torch, transformers and each other only.
"""
