"""Models that are saved and loaded by several processes at once."""

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification

SIZES = {"num_attention_heads": 6, "head_dim": 4, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}


def constant_model(value: float) -> HydraViTForImageClassification:
    """A model whose weights are all `value`, so that a mixture of two is seen."""
    model = HydraViTForImageClassification(HydraViTConfig(num_labels=2, **SIZES))
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def save_often(folder, value: float, ways: list[dict], rounds: int, errors):
    """Save a model in some ways in turn. `errors` gets what goes wrong."""
    model = constant_model(value)
    for options in rounds * ways:
        try:
            model.save_pretrained(folder, **options)
        except Exception as error:
            errors.put(repr(error))
