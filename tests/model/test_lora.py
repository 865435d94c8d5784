"""One adapter serves every width, and is cut like the weights. The reference is PEFT's own LoRA on the stock ViT."""

import copy
import pickle

import pytest
import torch
from support.models import HEADS, KINDS, make_model
from transformers import AutoModelForImageClassification

from hydravit_hf import HydraViTForImageClassification, HydraViTModel
from hydravit_hf.model.lora_hydravit import fit_adapter

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),  # PEFT asks for it by the earlier name
    pytest.mark.filterwarnings("ignore:.*lora_B.bias"),  # PEFT takes the biases of LoRA for parts of matrices
]
ENCODER = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
ADAPTERS = {
    "LoRA": {"target_modules": ENCODER, "modules_to_save": ["classifier"]},
    "rsLoRA": {"target_modules": ENCODER, "use_rslora": True},
    "DoRA": {"target_modules": ENCODER, "use_dora": True},
    "patches": {"target_modules": ["projection", "v_proj"]},
    "patches, DoRA": {"target_modules": ["projection", "v_proj"], "use_dora": True},
    "all linear layers": {"target_modules": "all-linear"},
    "biases": {"target_modules": ["fc1", "projection"], "lora_bias": True},
    "all biases": {"target_modules": ["fc1"], "bias": "all", "modules_to_save": ["classifier"]},
    "parameters": {"target_parameters": ["q_proj.weight"]},
    "patterns": {"target_modules": ENCODER, "rank_pattern": {"fc1": 2}, "alpha_pattern": {"q_proj": 3}},
}
FILES = [name for name in ADAPTERS if "DoRA" not in name]  # what is cut without the weights of all heads


def config_of(name: str, **kwargs):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 4, "init_lora_weights": False} | ADAPTERS[name] | kwargs)


def stir(model):
    """Move what is trained off its initial value, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def logits(model, images, num_heads: int | None = None):
    with torch.no_grad():
        return model(pixel_values=images, num_heads_active=num_heads).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def saved(folder, images):
    """Saves an adapter of that model. Returns its folder, and what the adapted model answers at each width."""

    def save(name: str, **kwargs):
        model = HydraViTForImageClassification.from_pretrained(folder)
        adapted = stir(peft.get_peft_model(model, config_of(name, **kwargs)))
        adapted.save_pretrained(folder.parent / "adapter")
        return folder.parent / "adapter", {k: logits(adapted, images, k) for k in HEADS}

    return save


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_cutting_give_what_the_unmerged_model_computes(kind, name, images):
    model = make_model(**KINDS[kind])
    adapted = stir(peft.get_peft_model(model, config_of(name)))
    widths = model.config.subnetwork_heads
    expected = {k: logits(adapted, images, k) for k in widths}
    merged = copy.deepcopy(adapted).merge_and_unload()
    for k in widths:
        close(logits(merged, images, k), expected[k])
        close(logits(merged.extract_subnetwork(k), images), expected[k])


def test_a_disabled_adapter_changes_no_width(images):
    model = make_model()
    expected = {k: logits(model, images, k) for k in HEADS}
    adapted = peft.get_peft_model(model, config_of("all linear layers"))
    assert not torch.equal(logits(adapted, images, 2), expected[2])
    with adapted.disable_adapter():
        for k in HEADS:
            assert torch.equal(logits(adapted, images, k), expected[k])


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_of_all_heads_is_cut_when_it_is_loaded(name, folder, saved, images):
    adapter, expected = saved(name)
    for k in (2, 6):
        for load in (HydraViTForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained):
            model = load(adapter, num_attention_heads=k)
            assert model.config.num_attention_heads == k
            close(logits(model, images), expected[k])
        narrow = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=k)
        adapted = peft.PeftModel.from_pretrained(narrow, adapter)
        close(logits(adapted, images), expected[k])
        close(logits(adapted.merge_and_unload(), images), expected[k])  # cut, then merged
        added = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=k)
        added.load_adapter(adapter)
        close(logits(added, images), expected[k])


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_adapter_loads_with_nothing_to_remember_and_runs_every_width(name, folder, saved, images):
    adapter, expected = saved(name)
    assert {file.name for file in adapter.iterdir()} <= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = HydraViTForImageClassification.from_pretrained(folder)
    added = HydraViTForImageClassification.from_pretrained(folder)
    added.load_adapter(adapter)
    loaded = [HydraViTForImageClassification.from_pretrained(adapter), peft.PeftModel.from_pretrained(base, adapter)]
    for model in (*loaded, added):
        for k in HEADS:
            assert torch.equal(logits(model, images, k), expected[k])
    assert loaded[0].config.num_heads_active is None
    running = HydraViTForImageClassification.from_pretrained(adapter, num_heads_active=2)
    assert torch.equal(logits(running, images), expected[2])


def test_a_dora_adapter_of_other_heads_is_an_error_that_says_what_to_do(folder, saved, images):
    """Its factors contain the norms of whole rows, which a narrower model does not have."""
    adapter, expected = saved("DoRA")
    with pytest.raises(ValueError, match="as many heads, merge it"):
        HydraViTForImageClassification.from_pretrained(adapter, num_attention_heads=3)
    model = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=3)
    for load in (model.load_adapter, lambda path: peft.PeftModel.from_pretrained(model, path)):
        with pytest.raises(ValueError, match="as many heads, merge it"):
            load(adapter)
    base = HydraViTForImageClassification.from_pretrained(folder)
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    close(logits(merged.extract_subnetwork(3), images), expected[3])


def test_an_adapter_of_few_heads_leaves_the_others_of_a_wider_model_as_they_are(folder, images, logged):
    narrow = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=2)
    adapted = stir(peft.get_peft_model(narrow, config_of("LoRA")))
    adapted.save_pretrained(folder.parent / "adapter")
    wide = HydraViTForImageClassification.from_pretrained(folder)
    wide.load_adapter(folder.parent / "adapter")
    assert torch.equal(logits(wide, images, 2), logits(adapted, images))
    assert "fewer heads" in logged[-1]
    plain = HydraViTForImageClassification.from_pretrained(folder)
    inside, outside = wide.hydravit.layers[0].mlp.fc1, plain.hydravit.layers[0].mlp.fc1
    hidden = torch.randn(3, 48)
    assert torch.equal(inside(hidden)[:, 64:], outside(hidden)[:, 64:])


@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "DoRA", "patches", "patches, DoRA", "biases"])
@pytest.mark.parametrize("training", [False, True])
def test_all_heads_give_what_peft_gives_on_the_stock_vit(name, training, images):
    model = make_model()
    vit = model.to_vit()
    adapted = stir(peft.get_peft_model(model, config_of(name, lora_dropout=0.5)))
    stock = peft.get_peft_model(vit, config_of(name, lora_dropout=0.5))
    state = peft.get_peft_model_state_dict(adapted)
    peft.set_peft_model_state_dict(stock, {key.replace(".hydravit.", ".vit."): value for key, value in state.items()})
    results = []
    for one in (adapted, stock):
        one.train(training)
        torch.manual_seed(0)  # the same dropout
        options = {"num_heads_active": 6} if one is adapted else {}
        results.append(one(pixel_values=images, **options).logits)
        results[-1].pow(2).sum().backward()
    close(*results)
    gradients = [[p.grad for p in one.parameters() if p.requires_grad] for one in (adapted, stock)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "patches, DoRA", "all linear layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_leading_part_of_the_adapter_and_are_never_none(kind, name, images):
    adapted = peft.get_peft_model(make_model(**KINDS[kind]), config_of(name)).train()
    adapted(pixel_values=images, num_heads_active=2).logits.pow(2).sum().backward()
    for parameter_name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all(), parameter_name
        if ".lora_A." in parameter_name and "projection" not in parameter_name:
            assert not gradient[:, gradient.shape[1] // 3 :].any(), parameter_name
        if ".lora_B." in parameter_name and "classifier" not in parameter_name:
            assert not gradient[gradient.shape[0] // 3 :].any(), parameter_name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, images):
    adapted = peft.get_peft_model(make_model(), config_of("LoRA")).train()
    other = copy.deepcopy(adapted)
    other.enable_input_require_grads()
    other.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (adapted, other):
        sum(model(pixel_values=images, num_heads_active=k).logits.pow(2).sum() for k in (2, 5)).backward()
    for found, expected in zip(other.parameters(), adapted.parameters(), strict=True):
        assert found.grad is expected.grad or torch.equal(found.grad, expected.grad)


def test_several_adapters_add_up_and_can_differ_among_the_images_of_a_batch(images):
    adapted = peft.get_peft_model(make_model(), config_of("all linear layers"))
    adapted.add_adapter("other", config_of("patches"))
    adapted.eval()
    mixed = adapted(pixel_values=images, num_heads_active=2, adapter_names=["other", "__base__", "default"]).logits
    for row, name in enumerate(("other", None, "default")):
        if name is not None:
            adapted.set_adapter(name)
            close(mixed[row], logits(adapted, images, 2)[row])
    with adapted.disable_adapter():
        close(mixed[1], logits(adapted, images, 2)[1])
    adapted.base_model.set_adapter(["default", "other"])
    expected = logits(adapted, images, 2)
    close(logits(adapted.merge_and_unload(), images, 2), expected)


def test_an_adapter_of_the_model_itself_is_saved_alone_and_loads(folder, images):
    model = HydraViTForImageClassification.from_pretrained(folder)
    model.add_adapter(config_of("all linear layers"))
    expected = logits(stir(model), images, 2)
    model.save_pretrained(folder.parent / "adapter")
    files = {file.name for file in (folder.parent / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(
        logits(HydraViTForImageClassification.from_pretrained(folder.parent / "adapter"), images, 2), expected
    )
    model.delete_adapter("default")
    plain = HydraViTForImageClassification.from_pretrained(folder)
    assert not torch.equal(logits(plain, images, 2), expected)


def test_an_adapter_beside_its_model_is_loaded_at_every_width(folder, saved, images):
    adapter, expected = saved("LoRA")
    for file in adapter.glob("adapter*"):
        file.rename(folder / file.name)
    for k in (2, 6):
        close(
            logits(HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=k), images), expected[k]
        )


@pytest.mark.parametrize("call", ["extract_subnetwork", "to_vit"])
def test_a_model_with_an_adapter_is_cut_after_merging_and_says_so(call, images):
    adapted = peft.get_peft_model(make_model(), config_of("LoRA"))
    with pytest.raises(ValueError, match="merge_and_unload"):
        getattr(adapted, call)(3)
    expected = logits(adapted.eval(), images, 3)
    close(getattr(adapted.merge_and_unload(), call)(3).eval()(images).logits, expected)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=["fc1"]),
        lambda: peft.LoHaConfig(target_modules=["q_proj"]),
        lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
        lambda: peft.VeraConfig(target_modules=["q_proj"]),
        lambda: peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
    ],
    ids=["ia3", "loha", "oft", "vera", "alora"],
)
def test_methods_that_are_not_cut_are_refused_before_the_model_changes(config, images):
    model = make_model()
    expected = logits(model, images, 3)
    with pytest.raises(ValueError, match=r"LoRA, rsLoRA and DoRA.*to_vit"):
        peft.get_peft_model(model, config())
    assert torch.equal(logits(model, images, 3), expected)
    model.extract_subnetwork(3)  # it has no parameters of an adapter


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_layer_norms_can_be_tuned_because_they_are_cut_already(images):
    adapted = peft.get_peft_model(make_model(), peft.LNTuningConfig(target_modules=["layernorm_before", "layernorm"]))
    expected = logits(stir(adapted), images, 2)
    close(logits(adapted.merge_and_unload(), images, 2), expected)


def test_an_adapted_model_can_be_pickled_and_copied(images):
    adapted = stir(peft.get_peft_model(make_model(), config_of("DoRA")))
    for other in (pickle.loads(pickle.dumps(adapted)), copy.deepcopy(adapted)):
        assert torch.equal(logits(other, images, 2), logits(adapted, images, 2))


def test_an_encoder_without_a_classifier_takes_an_adapter(images):
    encoder = HydraViTModel(make_model().config)
    adapted = stir(peft.get_peft_model(encoder, config_of("patterns")))
    states = adapted(pixel_values=images, num_heads_active=2).last_hidden_state
    close(adapted.merge_and_unload()(images, num_heads_active=2).last_hidden_state, states)


def test_fitting_there_and_back_keeps_the_leading_block():
    wide, narrow = make_model(), make_model(num_attention_heads=2, subnetwork_heads=None)
    adapted = peft.get_peft_model(copy.deepcopy(wide), config_of("LoRA"))
    tensors = peft.get_peft_model_state_dict(adapted)
    cut = fit_adapter(tensors, narrow)
    again = fit_adapter(fit_adapter(cut, wide), narrow)
    assert cut.keys() == tensors.keys()
    for name, tensor in cut.items():
        assert torch.equal(again[name], tensor), name
        assert tensor.numel() < tensors[name].numel() or name.endswith(".bias"), name


@pytest.mark.slow  # another process; the siblings above load by AutoModel in this one
def test_an_adapter_of_a_checkpoint_with_code_of_its_own_works_without_the_package(
    folder, saved, images, run_without_the_package
):
    adapter, expected = saved("LoRA")
    torch.save({"images": images, "expected": expected[2]}, folder.parent / "answers")
    script = """
import warnings
warnings.filterwarnings("ignore")
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification

folder, adapter, answers = sys.argv[1:]
answers = torch.load(answers)
load = AutoModelForImageClassification.from_pretrained
for num_heads in (2, 6):
    model = load(folder, trust_remote_code=True, num_attention_heads=num_heads)
    adapted = PeftModel.from_pretrained(model, adapter)
    found = adapted(pixel_values=answers["images"], num_heads_active=2).logits
    torch.testing.assert_close(found, answers["expected"], atol=1e-5, rtol=0)
"""
    run_without_the_package(script, folder, adapter, folder.parent / "answers")
