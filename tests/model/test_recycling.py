"""With token recycling, a stage starts from the tokens of the stage before, in every part of the package."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from support.thresholds import splitting
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hydravit_hf import (
    HydraViTBackbone,
    HydraViTConfig,
    HydraViTForImageClassification,
    HydraViTModel,
    create_model_card,
    evaluate_subnetworks,
    fit_cascade,
)
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.training.optimizer import PrefixAdamW
from hydravit_hf.training.steps import classification_loss, sample_subnetworks

STAGES = [1, 3, 6]
RECYCLING = {"subnetwork_heads": STAGES, "token_recycling": True}
NEW = {"hydravit.recycling.weight", "hydravit.recycling.bias"}


@pytest.fixture
def recycling(make_model):
    return make_model(**RECYCLING)


def by_hand(model, images, stages) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The logits and tokens of each stage, written out: patch embeddings plus a projection of the tokens before."""
    encoder, tokens, outputs = model.hydravit, None, []
    with torch.no_grad():
        for num_heads in stages:
            width = 8 * num_heads
            hidden = encoder.embeddings(images, width)
            if tokens is not None:
                weight, bias = encoder.recycling.weight, encoder.recycling.bias
                hidden = hidden + tokens @ weight[:width, : tokens.shape[-1]].T + bias[:width]
            for layer in encoder.layers:
                hidden = layer(hidden)
            tokens = encoder.layernorm(hidden)
            outputs.append((model.classifier(tokens[:, 0]), tokens))
    return outputs


# Forward


@pytest.mark.parametrize("separate_classifiers", [False, True])
def test_a_width_is_all_stages_up_to_it_each_from_the_tokens_of_the_one_before(
    make_model, images, separate_classifiers
):
    model = make_model(**RECYCLING, separate_classifiers=separate_classifiers)
    for num_heads, stages in ((1, [1]), (2, [1, 2]), (3, [1, 3]), (5, [1, 3, 5]), (6, [1, 3, 6])):
        assert model.config.stages(num_heads) == stages
        logits, tokens = by_hand(model, images, stages)[-1]
        with torch.no_grad():
            torch.testing.assert_close(model(images, num_heads_active=num_heads).logits, logits)
            encoded = model.hydravit(images, num_heads_active=num_heads)
        torch.testing.assert_close(encoded.last_hidden_state, tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, logits)
        model.hydravit.recycling.weight.zero_()
        assert (model(images).logits - logits).abs().max() > 0.01  # the tokens before do matter


def test_a_stage_alone_takes_the_tokens_that_it_is_given(recycling, images):
    encoder = recycling.hydravit
    with torch.no_grad():
        first = encoder(images, num_heads_active=1).last_hidden_state
        second = encoder(images, num_heads_active=3, recycled_tokens=first).last_hidden_state
        torch.testing.assert_close(second, encoder(images, num_heads_active=3).last_hidden_state)
    for tokens in (first[:2], first[:, 1:], first[0], torch.zeros(3, 17, 32)):
        with pytest.raises(ValueError, match=r"`recycled_tokens` must have the shape \(3, 17, at most 24\)"):
            encoder(images, num_heads_active=3, recycled_tokens=tokens)


def test_a_model_without_recycling_takes_no_tokens_and_has_one_stage(model, images):
    assert model.config.stages(6) == [6] and not hasattr(model.hydravit, "recycling")
    with pytest.raises(ValueError, match="needs a model with `token_recycling`"):
        model.hydravit(images, recycled_tokens=torch.zeros(3, 17, 8))


def test_maps_and_hidden_states_are_those_of_the_last_stage(recycling, images):
    outputs = recycling(images, num_heads_active=3, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(3, 17, 24)] * 3
    assert [tuple(maps.shape) for maps in outputs.attentions] == [(3, 3, 17, 17)] * 2
    encoded = recycling.hydravit(images, num_heads_active=3, output_hidden_states=True)
    torch.testing.assert_close(encoded.hidden_states, outputs.hidden_states)
    assert len(recycling(images, return_dict=False)) == 1


def test_a_backbone_gives_the_feature_maps_of_the_last_stage(recycling, images, tmp_path):
    recycling.save_pretrained(tmp_path)
    backbone = HydraViTBackbone.from_pretrained(tmp_path, num_heads_active=3, out_indices=[1, 2]).eval()
    maps = backbone(images).feature_maps
    expected = recycling.hydravit(images, num_heads_active=3).last_hidden_state
    assert [tuple(each.shape) for each in maps] == [(3, 24, 4, 4)] * 2
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), expected[:, 1:])


def test_images_of_another_size_recycle_as_many_tokens_as_they_have(recycling):
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        logits = recycling(images, num_heads_active=3, interpolate_pos_encoding=True).logits
        first = recycling.hydravit(images, num_heads_active=1, interpolate_pos_encoding=True).last_hidden_state
        again = {"num_heads_active": 3, "interpolate_pos_encoding": True, "recycled_tokens": first}
        tokens = recycling.hydravit(images, **again).last_hidden_state
    assert tokens.shape == (2, 49, 24)
    torch.testing.assert_close(logits, recycling.classifier(tokens[:, 0]))


def test_all_stages_compile_as_one_graph(make_model, images):
    recycling = make_model(**RECYCLING, num_hidden_layers=1)
    compiled = torch.compile(recycling, backend="eager", fullgraph=True)
    with torch.no_grad():
        for num_heads in (1, 6):
            expected = recycling(images, num_heads_active=num_heads).logits
            torch.testing.assert_close(compiled(images, num_heads_active=num_heads).logits, expected)


# Configuration and costs


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "needs its stages: give `subnetwork_heads`"),
        ({"subnetwork_heads": [6]}, "two stages or more"),
        ({"subnetwork_heads": STAGES, "subnetwork_weights": [1, 1, 1]}, "`subnetwork_weights` None"),
        ({"subnetwork_heads": STAGES, "token_recycling": 1}, "`token_recycling` must be True or False"),
        ({"subnetwork_heads": STAGES, "cascade": {"num_heads": [2, 6], "thresholds": 1}}, r"its stages, \[1, 3, 6\]"),
    ],
)
def test_settings_that_make_no_stages_are_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HydraViTConfig(**{"num_attention_heads": 6, "token_recycling": True} | kwargs)


def test_the_costs_are_those_of_all_stages_and_what_joins_them(recycling):
    config, plain = recycling.config, HydraViTConfig(**recycling.config.to_dict() | {"token_recycling": False})
    assert config.count_macs(1) == plain.count_macs(1)
    assert config.count_macs(3) == plain.count_macs(1) + plain.count_macs(3) + 17 * 8 * 24
    assert config.count_macs(6) == config.count_macs(3) + plain.count_macs(6) + 17 * 24 * 48
    assert config.count_cascade_macs(STAGES) == [config.count_macs(num_heads) for num_heads in STAGES]


def test_resizing_keeps_the_stages_that_fit_and_adds_one(recycling):
    config = recycling.config
    assert (config.resized(3).subnetwork_heads, config.resized(3).token_recycling) == ([1, 3], True)
    assert (config.resized(1).subnetwork_heads, config.resized(1).token_recycling) == ([1], False)
    assert (config.resized(8).subnetwork_heads, config.resized(8).token_recycling) == ([1, 3, 6, 8], True)


# Files


def test_a_checkpoint_without_recycling_stays_what_it_was_and_can_get_it(make_model, images, tmp_path):
    plain = make_model(subnetwork_heads=STAGES)
    plain.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert not values.pop("token_recycling") and not NEW & load_file(tmp_path / "model.safetensors").keys()
    (tmp_path / "config.json").write_text(json.dumps(values))  # as saved before there was token recycling
    assert not HydraViTForImageClassification.from_pretrained(tmp_path).config.token_recycling
    for kwargs in ({}, {"num_attention_heads": 3, "subnetwork_heads": [1, 3]}):
        upgraded, info = HydraViTForImageClassification.from_pretrained(
            tmp_path, token_recycling=True, output_loading_info=True, **kwargs
        )
        assert set(info["missing_keys"]) == NEW and not upgraded.hydravit.recycling.weight.any()
        with torch.no_grad():
            for num_heads in upgraded.config.subnetwork_heads:  # the projection starts at zero: it works as before
                expected = plain(images, num_heads_active=num_heads).logits
                torch.testing.assert_close(upgraded(images, num_heads_active=num_heads).logits, expected)


def test_a_model_that_recycles_is_saved_and_loads_at_any_width(recycling, images, tmp_path):
    recycling.save_pretrained(tmp_path)
    for num_heads in (1, 3, 6):
        loaded = HydraViTForImageClassification.from_pretrained(tmp_path, num_attention_heads=num_heads)
        extracted = recycling.extract_subnetwork(num_heads)
        with torch.no_grad():
            expected = recycling(images, num_heads_active=num_heads).logits
            torch.testing.assert_close(loaded(images).logits, expected)
            torch.testing.assert_close(extracted(images).logits, expected)
        assert loaded.config.token_recycling == extracted.config.token_recycling == (num_heads > 1)
        assert {name for name in loaded.state_dict() if "recycling" in name} == (NEW if num_heads > 1 else set())
    wider = HydraViTForImageClassification.from_pretrained(tmp_path, num_attention_heads=8)
    with torch.no_grad():
        torch.testing.assert_close(
            wider(images, num_heads_active=6).logits, recycling(images, num_heads_active=6).logits
        )
    encoder = HydraViTModel.from_pretrained(tmp_path, num_attention_heads=3).eval()
    with torch.no_grad():
        expected = recycling.hydravit(images, num_heads_active=3).last_hidden_state
        torch.testing.assert_close(encoder(images).last_hidden_state, expected)


def test_the_first_stage_alone_is_a_vit(recycling, images):
    with torch.no_grad():
        torch.testing.assert_close(recycling.to_vit(1)(images).logits, recycling(images, num_heads_active=1).logits)
    for num_heads in (2, None):
        with pytest.raises(ValueError, match=r"passes of \[1, .*\] heads, as it recycles tokens"):
            recycling.to_vit(num_heads)


def test_a_model_that_recycles_can_start_from_a_vit(images):
    sizes = {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4, "num_labels": 5}
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=48, num_attention_heads=6, intermediate_size=192, layer_norm_eps=1e-6, **sizes)
    ).eval()
    model = HydraViTForImageClassification.from_vit(
        vit, num_attention_heads=6, subnetwork_heads=[3, 6], token_recycling=True
    )
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, vit(images).logits)


# Training


def test_the_loss_in_training_is_the_mean_of_all_stages(recycling, images):
    labels = torch.tensor([0, 3, 4])
    expected = [logits for logits, _ in by_hand(recycling, images, STAGES)]
    losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in expected]
    outputs = recycling(images, labels)
    assert type(outputs) is ImageClassifierOutput
    torch.testing.assert_close(outputs.loss, losses[-1])
    outputs = recycling.train()(images, labels)
    torch.testing.assert_close(outputs.stage_logits, torch.stack(expected))
    torch.testing.assert_close(outputs.logits, expected[-1])
    torch.testing.assert_close(outputs.loss, torch.stack(losses).mean())
    torch.testing.assert_close(classification_loss(outputs.stage_logits, labels), outputs.loss)
    mixed = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(classification_loss(outputs.stage_logits, mixed), outputs.loss)
    torch.testing.assert_close(recycling(images, labels, num_heads_active=3).loss, torch.stack(losses[:2]).mean())
    assert type(recycling(images, labels, num_heads_active=1)) is ImageClassifierOutput


def test_the_gradient_is_that_of_the_stages_one_by_one(recycling, images):
    """Through the tokens too: a wider stage's loss teaches the narrower one what to hand on."""
    labels = torch.tensor([0, 3, 4])
    recycling(images, labels, num_heads_active=1).loss.backward()
    narrow_alone = recycling.hydravit.layers[0].mlp.fc1.weight.grad.clone()
    assert not recycling.hydravit.recycling.weight.grad.any()  # zeros, and not None, for which DDP would wait
    recycling.zero_grad()
    for num_heads in STAGES:  # in `eval()` mode the loss is that of the last stage
        (recycling(images, labels, num_heads_active=num_heads).loss / 3).backward()
    expected = {name: parameter.grad.clone() for name, parameter in recycling.named_parameters()}
    recycling.zero_grad()
    recycling.train()(images, labels).loss.backward()
    for name, parameter in recycling.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    gradient = expected["hydravit.recycling.weight"]
    assert gradient[:24, :8].any() and gradient[:48, :24].any() and not gradient[:, 24:].any()
    assert not torch.allclose(narrow_alone[:32, :8], 3 * expected["hydravit.layers.0.mlp.fc1.weight"][:32, :8])


def test_checkpointed_gradients_are_the_same(recycling, images):
    labels = torch.tensor([0, 3, 4])
    recycling.train()(images, labels).loss.backward()
    expected = recycling.hydravit.recycling.weight.grad.clone()
    recycling.zero_grad()
    recycling.activation_checkpointing_enable()
    recycling(images, labels).loss.backward()
    torch.testing.assert_close(recycling.hydravit.recycling.weight.grad, expected)


def test_weights_outside_of_a_pinned_width_stay_as_they_are(recycling, images):
    recycling.config.num_heads_active = 3
    assert sample_subnetworks(recycling.config, 0, 0) == [3]
    weight = recycling.hydravit.recycling.weight
    before, optimizer = weight.detach().clone(), PrefixAdamW(recycling, 0.1)
    recycling.train()(images, torch.tensor([0, 1, 2])).loss.backward()
    optimizer.num_heads = 3
    optimizer.step()
    assert not torch.equal(weight[:24, :8], before[:24, :8])
    assert torch.equal(weight[24:], before[24:]) and torch.equal(weight[:, 24:], before[:, 24:])


def test_the_stock_trainer_trains_every_stage(make_model, tmp_path):
    model, kinds = make_model(**RECYCLING, num_hidden_layers=1), torch.randn(5, 3, 16, 16)
    labels = torch.randint(5, (260,))
    items = [{"pixel_values": kinds[label] + 0.5 * torch.randn(3, 16, 16), "labels": label} for label in labels]
    options = {"report_to": "none", "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
    options |= {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "save_strategy": "no"}
    before = model.hydravit.recycling.weight.detach().clone()
    Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=items[:200]).train()
    for row in evaluate_subnetworks(model, items[200:], disable_tqdm=True):
        assert row["accuracy"] > 0.5, row  # chance is 0.2
    assert (model.hydravit.recycling.weight - before).abs().max() > 0.01


# Cascades


@pytest.mark.parametrize("heads", [[1, 3, 6], [1, 6], [3, 6], [6]])
def test_a_cascade_goes_on_where_it_stopped_and_answers_as_the_widths_do(recycling, many, heads):
    thresholds, seen = splitting(recycling, many, heads), []
    recycling.hydravit.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    outputs = recycling.cascade(many, heads, thresholds)
    reached = [(outputs.num_heads >= min(k for k in heads if k >= stage)).sum().item() for stage in STAGES]
    assert seen == [(count, 17, 8 * stage) for count, stage in zip(reached, STAGES, strict=True)]  # no stage twice
    assert len(set(outputs.num_heads.tolist())) == len(heads)
    with torch.no_grad():
        for num_heads in heads:
            chosen = outputs.num_heads == num_heads
            expected = recycling(many[chosen], num_heads_active=num_heads).logits
            torch.testing.assert_close(outputs.logits[chosen], expected)
            assert set(outputs.macs[chosen].tolist()) == {recycling.config.count_macs(num_heads)}


def test_thresholds_of_zero_and_of_infinity_are_exactly_the_widest_and_the_narrowest(recycling, many):
    with torch.no_grad():
        for threshold, num_heads in ((0, 6), (math.inf, 1)):
            outputs = recycling.cascade(many, STAGES, threshold)
            assert torch.equal(outputs.logits, recycling(many, num_heads_active=num_heads).logits)
            assert set(outputs.num_heads.tolist()) == {num_heads}
    assert recycling.cascade(many[:0], STAGES, 0).logits.shape == (0, 5)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_answers_are_the_same_whatever_the_batch_size_and_the_order(recycling, many, batch_size):
    thresholds, order = splitting(recycling, many, STAGES), torch.randperm(40)
    whole = recycling.cascade(many, STAGES, thresholds)
    parts = [recycling.cascade(batch, STAGES, thresholds) for batch in many[order].split(batch_size)]
    torch.testing.assert_close(torch.cat([part.logits for part in parts]), whole.logits[order])
    assert torch.equal(torch.cat([part.num_heads for part in parts]), whole.num_heads[order])


def test_a_width_that_is_no_stage_has_no_place_in_a_cascade(recycling, many):
    with pytest.raises(ValueError, match=r"must be among its stages, \[1, 3, 6\]: not \[2, 6\]"):
        recycling.cascade(many, [2, 6], 0.5)


def test_thresholds_are_fitted_to_what_the_stages_cost(recycling, many):
    data = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(many)]
    costs = {num_heads: recycling.config.count_macs(num_heads) for num_heads in STAGES}
    fitted = fit_cascade(recycling, data, max_macs=0.5 * costs[6], disable_tqdm=True)
    outputs = recycling.cascade(many, *fitted["cascade"].values())
    assert fitted["macs"] == pytest.approx(outputs.macs.double().mean().item()) and fitted["macs"] <= 0.5 * costs[6]
    fitted = fit_cascade(recycling, data, max_accuracy_loss=0.0, disable_tqdm=True)
    assert costs[1] <= fitted["macs"] <= costs[6]


def test_the_card_says_that_tokens_are_recycled(recycling, model):
    rows = [{"num_heads": num_heads, "accuracy": 0.5} for num_heads in STAGES]
    text = create_model_card(recycling, rows, "tiny", dataset_name="noise").text
    assert "recycles tokens" in text and "to_vit(1)" in text
    assert "recycles tokens" not in create_model_card(model, rows, "tiny", dataset_name="noise").text


def test_the_command_says_which_width_can_leave_as_a_vit(recycling, hydravit, tmp_path):
    recycling.save_pretrained(tmp_path / "model")
    make_image_processor(recycling.config).save_pretrained(tmp_path / "model")
    code, _, err = hydravit("extract", tmp_path / "model", 3, tmp_path / "vit", "--vit")
    assert code == 1 and "error: 3 heads of this model are the passes of [1, 3] heads" in err
