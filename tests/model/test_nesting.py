"""Every parameter of a width is a leading block of the full one, and a block can be copied into any other width."""

import pytest
import torch
from hypothesis import given
from support.drawing import configs_and_widths, costly, make
from support.models import KINDS, make_config, shapes
from torch.nn.utils import prune

from hydravit_hf import HydraViTForImageClassification, HydraViTModel
from hydravit_hf.model.nesting_hydravit import (
    assemble,
    count_heads,
    fill_leading_blocks,
    fit_positions_to_grid,
    interpolate_positions,
    leading_blocks,
    own_parameters,
    width_dims,
)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_the_dimensions_that_grow_with_the_heads_are_those_in_which_two_widths_differ(kind):
    for model_class in (HydraViTForImageClassification, HydraViTModel):
        wide, narrow = (shapes(model_class(config)) for config in (make_config(**kind), make_config(**kind).resized(4)))
        assert wide.keys() == narrow.keys()
        for name, shape in wide.items():
            differ = tuple(dim for dim, (a, b) in enumerate(zip(shape, narrow[name], strict=True)) if a != b)
            assert width_dims(name, len(shape)) == differ, name


def test_the_heads_of_a_checkpoint_are_counted_by_its_class_token(model):
    parameters = model.state_dict()
    assert count_heads(parameters, model.config) == count_heads(model.hydravit.state_dict(), model.config) == 6
    assert count_heads(model.extract_subnetwork(2).state_dict(), model.config) == 2
    with pytest.raises(ValueError, match="48 channels wide, which is no multiple of head_dim=7"):
        count_heads(parameters, make_config(head_dim=7))
    del parameters["hydravit.embeddings.cls_token"]
    assert count_heads(parameters, model.config) is None


@costly
@given(configs_and_widths())
def test_the_blocks_of_a_width_are_the_parameters_of_its_model_and_are_cut_in_any_number_of_steps(pair):
    config, num_heads = pair
    stored, narrow = make(config)[0].state_dict(), config.resized(num_heads)
    blocks = leading_blocks(stored, narrow)
    assert {name: tuple(block.shape) for name, block in blocks.items()} == shapes(
        HydraViTForImageClassification(narrow)
    )
    middle = config.resized((num_heads + config.num_attention_heads) // 2)
    for name, block in leading_blocks(leading_blocks(stored, middle), narrow).items():
        assert torch.equal(block, blocks[name]), name
        assert block.untyped_storage().data_ptr() == stored[name].untyped_storage().data_ptr()  # no copy is made
    for name, block in leading_blocks(blocks, config).items():
        assert torch.equal(block, blocks[name]), name  # fewer heads than asked for are taken whole


def test_one_stage_has_no_projection_of_recycled_tokens(make_model):
    stored = make_model(**KINDS["recycling"]).state_dict()
    new = {"hydravit.recycling.weight", "hydravit.recycling.bias"}
    assert new <= leading_blocks(stored, make_config(**KINDS["recycling"]).resized(4)).keys()
    assert not new & leading_blocks(stored, make_config(**KINDS["recycling"]).resized(2)).keys()


def test_interpolated_positions_keep_the_class_token_and_what_is_constant():
    positions = torch.randn(1, 1 + 12, 8)
    assert interpolate_positions(positions, (3, 4), (3, 4)) is positions
    wider = interpolate_positions(positions, (3, 4), (6, 5))
    assert wider.shape == (1, 1 + 30, 8) and torch.equal(wider[:, 0], positions[:, 0])
    constant = positions[:, :1].expand(1, 13, 8)
    torch.testing.assert_close(interpolate_positions(constant, (3, 4), (6, 5)), constant[:, :1].expand(1, 31, 8))
    columns = torch.arange(4.0).repeat(3)[None, :, None]  # rows and columns are not confused
    ramp = interpolate_positions(torch.cat((columns[:, :1], columns), dim=1), (3, 4), (6, 4))[0, 1:, 0].unflatten(
        0, (6, 4)
    )
    torch.testing.assert_close(ramp, torch.arange(4.0).expand(6, 4))


def test_only_positions_of_the_known_grid_are_fitted_to_another(model):
    parameters = model.state_dict()
    name = "hydravit.embeddings.position_embeddings"
    fitted = fit_positions_to_grid(parameters, (4, 4), (2, 8))
    assert torch.equal(fitted[name], interpolate_positions(parameters[name], (4, 4), (2, 8)))
    assert all(fitted[other] is parameters[other] for other in parameters.keys() - {name})
    unknown = fit_positions_to_grid(parameters, (5, 5), (2, 8))
    assert all(unknown[other] is parameters[other] for other in parameters)


@pytest.mark.parametrize("prefix", ["hydravit.", ""])
def test_blocks_fill_the_leading_part_of_a_wider_model_and_leave_the_rest(model, make_model, prefix):
    blocks = model.hydravit.extract_subnetwork(4).state_dict()
    blocks = {prefix + name: block for name, block in blocks.items()} | {"other": torch.ones(3)}
    wide = make_model()
    before = {name: parameter.clone() for name, parameter in wide.state_dict().items()}
    filled = fill_leading_blocks(wide, blocks)
    assert filled.keys() == {f"hydravit.{name.removeprefix(prefix)}" for name in blocks if name != "other"} | {"other"}
    assert filled.pop("other") is blocks["other"]  # the loading that follows reports it
    for name, parameter in filled.items():
        block = blocks[prefix + name.removeprefix("hydravit.")]
        leading = tuple(map(slice, block.shape))
        assert torch.equal(parameter[leading], block), name
        rest = torch.ones_like(parameter, dtype=torch.bool)
        rest[leading] = False
        assert torch.equal(parameter[rest], before[name][rest]), name


def test_a_block_that_fits_no_parameter_is_left_as_it_is(model, make_model):
    blocks = model.state_dict()
    filled = fill_leading_blocks(make_model(num_labels=7, image_size=32), blocks)
    differ = {"classifier.weight", "classifier.bias", "hydravit.embeddings.position_embeddings"}
    assert {name for name in blocks if filled[name] is blocks[name]} == differ


def test_a_model_is_assembled_from_copies_and_initialises_nothing(model):
    drawn = torch.get_rng_state()
    copied = assemble(HydraViTForImageClassification, model.config, model.state_dict())
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, parameter in model.state_dict().items():
        assert torch.equal(copied.state_dict()[name], parameter), name
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert storages.isdisjoint(parameter.untyped_storage().data_ptr() for parameter in copied.parameters())


def test_parameters_that_are_not_the_models_own_are_not_cut(model):
    assert own_parameters(model).keys() == model.state_dict().keys()
    for spoil, message in (
        (lambda: prune.identity(model.hydravit.layers[0].mlp.fc1, "weight"), r"such as '.*fc1\.weight_mask'"),
        (lambda: model.to("meta"), "are offloaded"),
    ):
        spoil()
        for call in (lambda: own_parameters(model), lambda: model.extract_subnetwork(3), lambda: model.to_vit(3)):
            with pytest.raises(ValueError, match=message):
                call()
