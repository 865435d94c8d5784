"""A subnetwork is the leading part of the model, and nothing else about it is special."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from support.drawing import configs_and_widths, costly, make
from support.models import HEADS, KINDS, blocks_of
from transformers import AutoModel, AutoModelForImageClassification, ViTForImageClassification

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, HydraViTModel

close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@costly
@given(configs_and_widths())
def test_a_width_is_the_extracted_model_and_the_stock_vit(pair):
    config, num_heads = pair
    model, images = make(config)
    outputs = model(images, num_heads_active=num_heads, output_hidden_states=True)
    extracted, stock = model.extract_subnetwork(num_heads), model.to_vit(num_heads)
    assert type(stock) is ViTForImageClassification
    for other in (extracted, stock):
        found = other(images, output_hidden_states=True)
        close(found.logits, outputs.logits)
        close(found.hidden_states, outputs.hidden_states)


@costly
@given(configs_and_widths())
def test_what_lies_outside_the_prefix_never_matters(pair):
    config, num_heads = pair
    model, images = make(config)
    before = model(images, num_heads_active=num_heads).logits
    with torch.no_grad():
        for name, block in blocks_of(model, num_heads).items():
            parameter = model.get_parameter(name)
            kept = parameter[block].clone()
            parameter.fill_(torch.nan)
            parameter[block] = kept
    # a width without a classifier of its own uses that of the next wider one, which extraction keeps as the last
    assert torch.equal(model(images, num_heads_active=num_heads).logits, before)


@costly
@given(configs_and_widths())
def test_gradients_outside_the_prefix_are_zero_and_never_none(pair):
    config, num_heads = pair
    model, images = make(config)
    model.train()(images, num_heads_active=num_heads).logits.pow(2).sum().backward()
    for name, block in blocks_of(model, num_heads).items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.count_nonzero() == gradient[block].count_nonzero(), name


def test_every_parameter_inside_the_prefix_matters(model, images):
    num_heads = 3
    model(images, num_heads_active=num_heads).logits.pow(2).sum().backward()
    for name, block in blocks_of(model, num_heads).items():
        gradient = model.get_parameter(name).grad[block]
        if not name.endswith("k_proj.bias"):  # adds the same to all scores of a query, which softmax ignores
            assert gradient.count_nonzero() == gradient.numel(), name


def test_widths_do_not_depend_on_what_ran_before(model, images):
    first, narrow, again = (model(images, num_heads_active=k).logits for k in (6, 3, 6))
    assert torch.equal(first, again)
    assert torch.equal(narrow, model(images, num_heads_active=3).logits)


def test_threads_at_different_widths_never_mix(model):
    images = torch.randn(1, 3, 16, 16)
    expected = {k: model(images, num_heads_active=k).logits for k in HEADS}

    def mismatches(thread: int) -> int:
        widths = np.random.default_rng(thread).integers(1, 7, 150).tolist()
        with torch.inference_mode():
            results = [(k, model(images, num_heads_active=k).logits) for k in widths]
        return sum(not torch.allclose(logits, expected[k], atol=1e-6) for k, logits in results)

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(mismatches, range(4))) == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_widths_before_one_backward_agree_under_gradient_checkpointing(make_model, images, use_reentrant):
    plain = make_model()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    labels = torch.tensor([0, 1, 2])
    for model in (plain.train(), checkpointed.train()):
        sum(model(images, labels=labels, num_heads_active=k).loss for k in (2, 5)).backward()
    for (name, expected), parameter in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


def test_separate_classifiers_share_the_encoder_and_nothing_else(make_model, images):
    model = make_model(separate_classifiers=True)
    before = {k: model(images, num_heads_active=k).logits for k in HEADS}
    with torch.no_grad():
        model.classifier.weight[2] += 1.0  # that of 3 heads
    changed = [k for k in HEADS if not torch.equal(before[k], model(images, num_heads_active=k).logits)]
    assert changed == [3]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree_and_maps_are_one_for_each_active_head(model, images, implementation):
    expected = model(images, num_heads_active=4).logits
    model.set_attn_implementation(implementation)
    outputs = model(images, num_heads_active=4, output_attentions=True)
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=0)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(3, 4, 17, 17)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(3, 4, 17))
    assert model(images, num_heads_active=4).attentions is None


def test_hidden_states_are_as_wide_as_the_subnetwork(model, images):
    states = model(images, num_heads_active=2, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(3, 17, 16)] * 3


def test_the_default_width_is_all_heads_then_the_configured_then_the_argument(model, images):
    assert torch.equal(model(images).logits, model(images, num_heads_active=6).logits)
    model.config.num_heads_active = 4
    assert torch.equal(model(images).logits, model(images, num_heads_active=4).logits)
    assert not torch.equal(model(images).logits, model(images, num_heads_active=2).logits)


def test_training_mode_draws_the_widths_by_their_odds(make_model, images):
    model = make_model(subnetwork_heads=[2, 4, 6], subnetwork_weights=[1, 0, 3]).train()
    widths = [model.hydravit(images[:1]).pooler_output.shape[-1] // 8 for _ in range(400)]
    assert set(widths) == {2, 6}
    assert 0.65 < widths.count(6) / len(widths) < 0.85
    model.config.num_heads_active = 4  # pinned: this width only
    assert {model.hydravit(images[:1]).pooler_output.shape[-1] for _ in range(20)} == {32}
    model.config.num_heads_active = None
    assert {model.eval().hydravit(images[:1]).pooler_output.shape[-1] for _ in range(20)} == {48}


@pytest.mark.parametrize("num_heads", [0, 7, -1, True, False, 3.0, "3", np.float64(3)])
def test_a_wrong_width_is_an_error_that_names_the_range(model, images, num_heads):
    for call in (
        lambda: model(images, num_heads_active=num_heads),
        lambda: model.extract_subnetwork(num_heads),
        lambda: model.to_vit(num_heads),
    ):
        with pytest.raises(ValueError, match="from 1 to 6"):
            call()


def test_an_untrained_width_runs_with_one_warning(make_model, images, logged):
    model = make_model(subnetwork_heads=[2, 6])
    for _ in range(3):
        model(images, num_heads_active=5)
    model(images, num_heads_active=2)
    (message,) = logged
    assert "not trained to run 5 heads" in message and "[2, 6]" in message


def test_a_loss_with_gradients_in_evaluation_mode_warns_once_that_no_width_is_drawn(make_model, images, logged):
    model, labels = make_model(), torch.tensor([0, 1, 2])
    model.train()(images, labels)
    model.eval()(images, labels, num_heads_active=3)
    make_model(num_heads_active=3)(images, labels)
    make_model(subnetwork_heads=[6])(images, labels)
    with torch.no_grad():
        model(images, labels)
    assert not logged
    for _ in range(3):
        model(images, labels)
    (message,) = logged
    assert "Call `model.train()` first" in message


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_empty_outputs_at_every_width(make_model, kind):
    model = make_model(**KINDS[kind])
    for num_heads in HEADS:
        outputs = model(torch.empty(0, 3, 16, 16), num_heads_active=num_heads, output_hidden_states=True)
        assert outputs.logits.shape == (0, 5)
        assert outputs.hidden_states[-1].shape == (0, 17, 8 * num_heads)


def test_an_integer_of_numpy_is_a_width_like_any_other(model, images):
    expected = model(images, num_heads_active=3).logits
    assert torch.equal(model(images, num_heads_active=np.int64(3)).logits, expected)
    assert torch.equal(model.extract_subnetwork(np.int64(3))(images).logits, model.extract_subnetwork(3)(images).logits)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 16, 16), "channels"),
        ((3, 16, 16), r"\(batch, 3, 16, 16\)"),
        ((2, 3, 16, 20), "interpolate_pos_encoding=True"),
        ((2, 3, 8, 8), "interpolate_pos_encoding=True"),
    ],
)
def test_images_of_a_wrong_shape_are_an_error_that_says_so(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))


def test_other_image_sizes_run_with_interpolated_positions(model):
    with pytest.raises(ValueError, match="multiple of the patch size"):
        model(torch.randn(1, 3, 17, 16), interpolate_pos_encoding=True)
    images = torch.randn(2, 3, 24, 24)
    stock = model.to_vit(4)(images, interpolate_pos_encoding=True).logits
    elastic = model(images, num_heads_active=4, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(elastic, stock, atol=1e-5, rtol=0)
    assert model(torch.randn(2, 3, 8, 24), interpolate_pos_encoding=True).logits.shape == (2, 5)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images, interpolate_pos_encoding=True).logits, model(images).logits)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 4, 2])),
        ("multi_label_classification", torch.eye(5)[[0, 4, 2]]),
        ("regression", torch.randn(3, 5)),
    ],
)
def test_every_problem_type_has_the_loss_of_the_stock_vit(make_model, images, problem_type, labels):
    model = make_model(problem_type=problem_type)
    loss = model(images, labels=labels, num_heads_active=3).loss
    torch.testing.assert_close(loss, model.to_vit(3)(images, labels=labels).loss)
    loss.backward()


def test_outputs_are_tuples_on_request(model, images):
    loss, logits = model(images, labels=torch.tensor([0, 1, 2]), return_dict=False)
    assert loss.ndim == 0 and logits.shape == (3, 5)


def test_drop_path_drops_whole_images_and_keeps_the_mean(make_model):
    model = make_model(drop_path_rate=0.5)
    assert [layer.drop_path_rate for layer in model.hydravit.layers] == [0.0, 0.5]
    images = torch.randn(1, 3, 16, 16).expand(500, -1, -1, -1)
    tokens = model.hydravit.embeddings(images, 48)
    outputs = model.hydravit.layers[1].train()(tokens)
    kinds = {tuple(output.round(decimals=2).flatten().tolist()) for output in outputs}
    assert len(kinds) == 4  # each of the two branches kept or dropped
    untouched = sum(torch.equal(output, token) for output, token in zip(outputs, tokens, strict=True))
    assert 0.15 < untouched / 500 < 0.35  # both dropped


def test_weights_start_as_the_configuration_says():
    config = HydraViTConfig(num_attention_heads=4, num_hidden_layers=2, image_size=32, initializer_range=0.1)
    for name, parameter in HydraViTForImageClassification(config).named_parameters():
        if "layernorm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert 0.08 < parameter.std() < 0.12 and parameter.mean().abs() < 0.02, name


def test_importing_the_package_registers_its_classes(model):
    assert type(AutoModel.from_config(model.config)) is HydraViTModel
    assert type(AutoModelForImageClassification.from_config(model.config)) is HydraViTForImageClassification


def test_one_compiled_graph_serves_many_widths(make_model, images):
    model, graphs = make_model(num_hidden_layers=1), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        for num_heads in HEADS:
            expected = model(images, num_heads_active=num_heads).logits
            torch.testing.assert_close(compiled(images, num_heads_active=num_heads).logits, expected)
    assert len(graphs) <= 4
