"""An elastified ViT has the ViT's function at full width, and what matters in its leading block."""

import copy
import gc
import weakref

import pytest
import torch
from support.vits import CLASSIFIERS, ENCODERS, SHAPES, SIZES, make, make_images, to_timm
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hydravit_hf import HydraViTForImageClassification, elastify, export_subnetwork
from hydravit_hf.elastification import find_rotation, fold_norms, helmert, measure, order, rotate
from hydravit_hf.training.optimizer import parameter_groups


def items_of(images: torch.Tensor) -> list[dict]:
    return [{"pixel_values": image} for image in images]


def order_of(vit, images, **options) -> HydraViTForImageClassification:
    return elastify(vit, items_of(images), disable_tqdm=True, **options)


@pytest.fixture
def vit():
    vit = make(ViTForImageClassification, ViTConfig, SIZES | {"intermediate_size": 64}, num_labels=5)
    with torch.no_grad():  # norms that are far from plain
        for name, parameter in vit.named_parameters():
            if "layernorm" in name:
                parameter.uniform_(-1.5, 1.5)
    return vit


@pytest.fixture
def images(vit):
    return torch.randn(20, 3, 16, 16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_keeps_its_logits(kind, shape):
    vit = make(*CLASSIFIERS[kind], num_labels=5, **SHAPES[shape])
    images = make_images(vit.config)
    before = copy.deepcopy(vit.state_dict())
    model = order_of(vit, images)
    torch.testing.assert_close(model(images).logits, vit(images).logits, atol=1e-4, rtol=0)
    assert model.config.num_attention_heads == 2
    for name, parameter in vit.state_dict().items():
        assert torch.equal(parameter, before[name])  # the source stays as it was


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_keeps_its_features_up_to_a_rotation_and_the_last_norm(kind):
    vit = make(*ENCODERS[kind])
    images = make_images(vit.config)
    with torch.no_grad():  # a plain last norm, as its weight has no place without a classifier
        vit.layernorm.weight.fill_(1)
        vit.layernorm.bias.zero_()
    features = order_of(vit, images).hydravit(images).pooler_output
    expected = vit(images).last_hidden_state[:, 0]
    torch.testing.assert_close(features @ features.T, expected @ expected.T, atol=1e-3, rtol=0)


def test_a_state_dict_of_timm_and_a_deit_keep_their_logits(tmp_path, vit, images):
    own = make(*CLASSIFIERS["vit"], num_labels=5, layer_norm_eps=1e-6)
    model = order_of(to_timm(own), images, head_dim=8)
    torch.testing.assert_close(model(images).logits, own(images).logits, atol=1e-4, rtol=0)
    deit = make(DeiTForImageClassification, DeiTConfig, SIZES | {"intermediate_size": 64}, num_labels=5)
    expected = HydraViTForImageClassification.from_vit(deit, num_attention_heads=2).eval()
    torch.testing.assert_close(order_of(deit, images)(images).logits, expected(images).logits, atol=1e-4, rtol=0)
    vit.save_pretrained(tmp_path)
    torch.testing.assert_close(order_of(tmp_path, images)(images).logits, vit(images).logits, atol=1e-4, rtol=0)


def test_each_step_keeps_the_logits(vit, images):
    model = HydraViTForImageClassification.from_vit(vit, num_attention_heads=2).eval().double()
    expected = model(images.double()).logits
    for step in (
        fold_norms,
        lambda model: rotate(model, find_rotation(torch.randn(16, 16).double().cov())),
        lambda model: order(model, torch.tensor([[1, 0]] * 2), torch.stack([torch.randperm(64) for _ in range(2)])),
    ):
        step(model)
        torch.testing.assert_close(model(images.double()).logits, expected)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_rotation_is_orthogonal_keeps_the_ones_and_leads_with_the_most_important_directions(rank):
    basis = torch.randn(16, rank, dtype=torch.float64)
    basis -= basis.mean(0)
    basis *= 2.0 ** -torch.arange(rank)
    stream = basis @ basis.T
    rotation = find_rotation(stream)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16, dtype=torch.float64))
    ones = torch.ones(16, dtype=torch.float64)
    torch.testing.assert_close(rotation @ ones, ones)
    rotated = rotation @ stream @ rotation.T
    strongest = torch.linalg.eigvalsh(stream).flip(0)
    for width in range(2, 17):  # less their mean, the channels hold all that any width - 1 directions can hold
        centre = torch.eye(width, dtype=torch.float64) - 1 / width
        held = (centre @ rotated[:width, :width] @ centre).trace()
        torch.testing.assert_close(held, strongest[: width - 1].sum())


def test_the_helmert_matrix_is_orthogonal_and_each_column_lives_in_leading_channels():
    matrix = helmert(6)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(6, dtype=torch.float64))
    for column in range(5):
        assert (matrix[column + 2 :, column] == 0).all()
        assert abs(matrix[:, column].sum()) < 1e-12


def test_hidden_structure_is_found(images):
    """A narrow ViT, hidden in a wider one by new heads and neurons that do nothing and a shuffle, comes out again."""
    narrow = make(*CLASSIFIERS["vit"], num_labels=5, layer_norm_eps=1e-6)
    wide = HydraViTForImageClassification.from_vit(narrow, num_attention_heads=4)
    with torch.no_grad():
        for layer in wide.hydravit.layers:  # the new heads and neurons write nothing
            layer.attention.o_proj.weight[:, 16:] = 0
            layer.mlp.fc2.weight[:, 64:] = 0
    neurons = torch.stack([torch.randperm(128) for _ in range(2)])
    order(wide, torch.tensor([[3, 1, 2, 0], [2, 3, 0, 1]]), neurons)
    model = order_of(wide.to_vit(4), images)
    for layer in model.hydravit.layers:
        assert (layer.attention.o_proj.weight[:, 16:].abs() < 1e-6).all()
        assert (layer.attention.o_proj.weight[:, :16].abs() > 1e-6).any(0).all()
        assert (layer.mlp.fc2.weight[:, 64:].abs() < 1e-6).all()


def shares_read(model, images, width: int) -> float:
    """How well the layers read the leading channels of the stream, less their mean: <W x, W P x> over <W x, W x>."""
    states, shares = {}, []
    readers = {model.hydravit.layernorm: [model.classifier]}
    for layer in model.hydravit.layers:
        readers[layer.layernorm_before] = [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]
        readers[layer.layernorm_after] = [layer.mlp.fc1]
    for norm in readers:
        norm.register_forward_hook(lambda norm, inputs, output: states.update({norm: output}))
    model(images)
    for norm, linears in readers.items():
        state = states[norm][:, 0] if norm is model.hydravit.layernorm else states[norm].flatten(0, 1)
        leading = torch.zeros_like(state)
        leading[:, :width] = state[:, :width] - state[:, :width].mean(1, keepdim=True)
        read = [(state @ linear.weight.T, leading @ linear.weight.T) for linear in linears]
        shares.append(sum((full * part).sum() for full, part in read) / sum((full**2).sum() for full, _ in read))
    return sum(shares).item()


def test_the_leading_channels_are_those_that_the_layers_read_most(vit, images):
    plain = HydraViTForImageClassification.from_vit(vit, num_attention_heads=2).eval()
    fold_norms(plain)
    statistics = measure(plain, DataLoader(items_of(images), batch_size=20), 20)
    centre = torch.eye(16, dtype=torch.float64) - 1 / 16  # of directions that a layer norm leaves
    strongest = torch.linalg.eigvalsh(centre @ statistics.importance @ centre).flip(0)
    elastic = order_of(vit, images)
    for width in (2, 4, 8, 12):
        found = shares_read(elastic, images, width)
        assert found == pytest.approx(strongest[: width - 1].sum().item(), abs=1e-3)
        assert found > shares_read(plain, images, width) + 0.01


def test_the_order_is_the_same_in_each_call_and_for_each_batch_size(vit, images):
    once = order_of(vit, images).state_dict()
    for options in ({}, {"batch_size": 7}):
        again = order_of(vit, images, **options).state_dict()
        for name, parameter in once.items():
            torch.testing.assert_close(again[name], parameter, atol=1e-4, rtol=0)
    again = elastify(vit, DataLoader(items_of(images)), disable_tqdm=True).state_dict()
    for name, parameter in once.items():
        torch.testing.assert_close(again[name], parameter, atol=1e-4, rtol=0)


def test_a_pass_leaves_nothing_in_memory_but_its_sums(vit, images):
    model, activations = HydraViTForImageClassification.from_vit(vit, num_attention_heads=2), []
    for layer in model.hydravit.layers:
        for linear in (layer.attention.o_proj, layer.mlp.fc2):
            linear.register_forward_pre_hook(lambda linear, inputs: activations.append(weakref.ref(inputs[0])))
    gc.disable()  # a cycle of references would stay until a collection
    try:
        measure(model, DataLoader(items_of(images), batch_size=5), 20, disable_tqdm=True)
        assert len(activations) == 16
        assert all(activation() is None for activation in activations)
    finally:
        gc.enable()


def test_no_more_images_than_asked_are_read(vit, images):
    read = []

    class Recorder(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            read.append(index)
            return {"pixel_values": images[index]}

    elastify(vit, Recorder(), max_images=5, disable_tqdm=True)
    assert read == [0, 5, 10, 14, 19]


def test_more_heads_are_new_ones_behind_those_of_the_vit(vit, images):
    model = order_of(vit, images, num_attention_heads=3, subnetwork_heads=[1, 2, 3]).eval()
    torch.testing.assert_close(model(images, num_heads_active=2).logits, vit(images).logits, atol=1e-4, rtol=0)
    assert model.config.subnetwork_heads == [1, 2, 3]


def test_other_arguments_are_those_of_from_vit(vit, images):
    model = order_of(vit, torch.randn(8, 3, 24, 24), image_size=24, num_labels=3, separate_classifiers=True)
    assert model.config.image_size == 24
    assert model(torch.randn(1, 3, 24, 24)).logits.shape == (1, 3)


def test_an_elastic_vit_is_an_ordinary_hydravit(tmp_path, vit, images):
    model = order_of(vit, images)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    parameter_groups(model, 0.1)
    model.save_pretrained(tmp_path)
    narrow = HydraViTForImageClassification.from_pretrained(tmp_path, num_attention_heads=1)
    expected = model(images, num_heads_active=1).logits
    torch.testing.assert_close(narrow(images).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.extract_subnetwork(1)(images).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.to_vit(1)(images).logits, expected, atol=1e-5, rtol=0)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images).logits, vit(images).logits, atol=1e-4, rtol=0)
    assert model.cascade(images, num_heads=[1, 2], thresholds=0.5).logits.shape == (20, 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's exporter
def test_an_elastic_vit_is_exported(tmp_path, vit, images):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = export_subnetwork(order_of(vit, images), 2, "onnx", tmp_path / "model.onnx")
    (logits,) = runtime.InferenceSession(path).run(None, {"pixel_values": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), vit(images).logits, atol=1e-4, rtol=0)


def test_in_bfloat16_it_is_as_close_to_the_vit_as_the_vit_itself():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 4}
    vit = make(ViTForImageClassification, ViTConfig, SIZES | sizes, num_labels=10)
    images = torch.randn(200, 3, 16, 16)
    model, expected = order_of(vit, images), vit(images).logits

    def distance(other) -> float:
        return (other.bfloat16()(images.bfloat16()).logits.float() - expected).square().mean().sqrt().item()

    assert distance(model) < 1.5 * distance(copy.deepcopy(vit))


def test_a_vit_in_bfloat16_or_in_training_stays_so(vit, images):
    model = elastify(vit.bfloat16().train(), items_of(images.bfloat16()), disable_tqdm=True)
    assert model.dtype == torch.bfloat16
    assert model.training


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "nothing to find the order on"),
        ([{"images": torch.zeros(3, 16, 16)}], "must have `pixel_values`; they have images"),
        ([{"pixel_values": torch.zeros(3, 24, 24)}], "resize the images"),
        ([{"pixel_values": torch.zeros(1, 16, 16)}], "check its channels"),
        ([{"pixel_values": torch.full((3, 16, 16), torch.nan)}], "`images` 0 to 0 give features that are no numbers"),
        ([{"pixel_values": torch.full((3, 16, 16), torch.inf)}] * 3, "`images` 0 to 2 give features"),
    ],
)
def test_images_that_fit_nothing_are_refused_in_one_line(vit, items, message):
    with pytest.raises(ValueError, match=message) as error:
        elastify(vit, items, disable_tqdm=True)
    assert "\n" not in str(error.value)
