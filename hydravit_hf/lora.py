"""Fine-tuning with LoRA: one small adapter for every width, with PEFT.

    model = HydraViTForImageClassification.from_pretrained("runs/digits")
    adapted = get_peft_model(model, lora_config())  # trains like any model
    adapted.save_pretrained("runs/adapter")
    model = HydraViTForImageClassification.from_pretrained("runs/adapter", num_attention_heads=3)

The adapter is cut to a width like the weights, by `model/lora_hydravit.py`. It needs the extra `lora`.
"""

from peft import LoraConfig

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


def lora_config(r: int = 8, lora_alpha: float | None = None, **kwargs) -> LoraConfig:
    """Configure a LoRA adapter of all linear layers of the encoder, and a classifier of its own.

    Any `LoraConfig` of LoRA, rsLoRA (`use_rslora=True`) or DoRA (`use_dora=True`) works. This one has defaults that
    suit a Vision Transformer.

    Args:
        r: Rank. An adapter of rank r adds r x (inputs + outputs) parameters to a layer.
        lora_alpha: The update is scaled by lora_alpha / r. None means 2 x r.
        kwargs: Further arguments of `LoraConfig`. `target_modules` names other layers: "projection" is the one that
            embeds patches, "classifier" the classifier, and "all-linear" stands for all linear layers.
            `modules_to_save` names what is trained whole and saved with the adapter; it is the classifier by default,
            unless the adapter targets that.

    Examples:
        >>> from peft import get_peft_model
        >>> from hydravit_hf import HydraViTConfig, HydraViTForImageClassification
        >>> model = HydraViTForImageClassification(HydraViTConfig(num_hidden_layers=2, image_size=32))
        >>> adapted = get_peft_model(model, lora_config(r=4))
        >>> trained, total = adapted.get_nb_trainable_parameters()
        >>> f"{trained / total:.1%}"
        '0.8%'
    """
    kwargs = {"target_modules": list(LAYERS)} | kwargs
    if "classifier" not in kwargs["target_modules"] and kwargs["target_modules"] != "all-linear":
        kwargs.setdefault("modules_to_save", ["classifier"])
    return LoraConfig(r=r, lora_alpha=2 * r if lora_alpha is None else lora_alpha, **kwargs)
