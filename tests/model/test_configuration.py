"""The configuration: one dial, all else derived from it, and every wrong value refused by its name."""

import json
import math

import pytest
from transformers import AutoConfig, ViTConfig

from hydravit_hf import HydraViTConfig

SUBNETWORKS = {"subnetwork_heads": [2, 4, 6], "subnetwork_weights": [1.0, 2.5, 0.5]}


def make_config(**kwargs) -> HydraViTConfig:
    sizes = {"num_attention_heads": 6, "head_dim": 8, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    return HydraViTConfig(**sizes | kwargs)


def odds(config: HydraViTConfig) -> dict[int, float]:
    return dict(zip(config.subnetwork_heads, config.subnetwork_weights, strict=True))


# Derived sizes and defaults


def test_the_defaults_are_the_papers():
    config = HydraViTConfig()
    assert (config.num_attention_heads, config.hidden_size, config.intermediate_size) == (12, 768, 3072)
    assert (config.num_hidden_layers, config.image_size, config.patch_grid) == (12, 224, (14, 14))
    assert config.subnetwork_heads == list(range(3, 13))
    assert config.subnetwork_weights is None and config.num_heads_active is None


@pytest.mark.parametrize("num_heads", range(1, 7))
def test_every_width_follows_from_the_heads(num_heads):
    config = make_config(num_attention_heads=num_heads, mlp_ratio=3)
    assert (config.hidden_size, config.intermediate_size) == (8 * num_heads, 24 * num_heads)
    config = make_config()
    config.num_attention_heads, config.head_dim = num_heads, 5  # a later change is followed as well
    assert (config.hidden_size, config.intermediate_size) == (5 * num_heads, 20 * num_heads)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "patch_grid"])
def test_derived_sizes_are_read_only(name):
    config = make_config()
    value = getattr(config, name)
    with pytest.raises(AttributeError, match=name):
        setattr(config, name, value)


@pytest.mark.parametrize(("name", "derived"), [("hidden_size", 48), ("intermediate_size", 192)])
def test_a_stray_size_is_accepted_only_where_it_agrees(tmp_path, name, derived):
    assert getattr(make_config(**{name: derived}), name) == derived
    with pytest.raises(ValueError, match=f"`{name}={derived + 1}` disagrees with the {derived} "):
        make_config(**{name: derived + 1})
    make_config().save_pretrained(tmp_path)
    assert getattr(HydraViTConfig.from_pretrained(tmp_path, **{name: derived}), name) == derived
    with pytest.raises(ValueError, match=f"`{name}={derived + 1}` disagrees with the {derived} "):
        HydraViTConfig.from_pretrained(tmp_path, **{name: derived + 1})


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [(16, 4, (4, 4)), ((8, 16), 4, (2, 4)), ([8, 16], (2, 8), (4, 2)), (16, [16, 1], (1, 16))],
)
def test_the_patch_grid_has_rows_and_columns(image_size, patch_size, grid):
    assert make_config(image_size=image_size, patch_size=patch_size).patch_grid == grid


@pytest.mark.parametrize(("num_heads", "heads"), [(1, [1]), (2, [1, 2]), (3, [3]), (4, [3, 4]), (6, [3, 4, 5, 6])])
def test_the_subnetworks_are_three_heads_and_more_or_all_where_fewer_are_held(num_heads, heads):
    assert make_config(num_attention_heads=num_heads).subnetwork_heads == heads


# Saving and loading


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {**SUBNETWORKS, "num_heads_active": 5, "num_labels": 7},
        {"subnetwork_heads": [1, 6], "separate_classifiers": True, "qkv_bias": False, "hidden_act": "relu"},
        {"image_size": (8, 16), "patch_size": [2, 4], "num_channels": 1, "mlp_ratio": 2, "drop_path_rate": 0.1},
    ],
)
def test_a_configuration_survives_its_json_file(tmp_path, kwargs):
    config = make_config(**kwargs)
    config.save_pretrained(tmp_path)
    loaded = HydraViTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for name, value in kwargs.items():
        assert getattr(loaded, name) == (list(value) if isinstance(value, tuple) else value), name


def test_the_file_holds_the_dial_and_none_of_the_sizes_derived_from_it(tmp_path):
    make_config(**SUBNETWORKS).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_attention_heads"] == 6 and saved["model_type"] == "hydravit"
    assert saved["subnetwork_heads"] == [2, 4, 6] and saved["subnetwork_weights"] == [1.0, 2.5, 0.5]
    assert not saved.keys() & {"hidden_size", "intermediate_size", "patch_grid"}


@pytest.mark.parametrize("num_heads", range(1, 9))
def test_loading_at_another_number_of_heads_is_resizing(tmp_path, num_heads):
    make_config(**SUBNETWORKS, num_heads_active=4).save_pretrained(tmp_path)
    loaded = HydraViTConfig.from_pretrained(tmp_path, num_attention_heads=num_heads)
    assert loaded.to_dict() == HydraViTConfig.from_pretrained(tmp_path).resized(num_heads).to_dict()
    by_auto_class = AutoConfig.from_pretrained(tmp_path, num_attention_heads=num_heads)
    assert by_auto_class.to_json_string() == loaded.to_json_string()


def test_other_overrides_apply_after_the_resizing(tmp_path):
    make_config(num_heads_active=6).save_pretrained(tmp_path)
    config, unused = HydraViTConfig.from_pretrained(
        tmp_path,
        num_attention_heads=4,
        num_heads_active=3,
        subnetwork_heads=[1, 4],
        no_field=1,
        return_unused_kwargs=True,
    )
    assert (config.num_attention_heads, config.num_heads_active, config.subnetwork_heads) == (4, 3, [1, 4])
    assert unused == {"no_field": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_attention_heads": 0}, "`num_attention_heads` must be a positive integer"),
        ({"num_attention_heads": "4"}, "`num_attention_heads` must be a positive integer"),
        ({"num_attention_heads": 4, "num_heads_active": 5}, "`num_heads_active` must be an integer from 1 to 4"),
        ({"num_heads_active": 7}, "`num_heads_active` must be an integer from 1 to 6"),
        ({"subnetwork_heads": [7]}, "`subnetwork_heads` must be from 1 to 6"),
        ({"image_size": 15}, "`image_size=15` must be a multiple of `patch_size=4`"),
    ],
)
def test_overrides_are_checked(tmp_path, overrides, message):
    make_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        HydraViTConfig.from_pretrained(tmp_path, **overrides)


def test_auto_config_knows_the_model_type(tmp_path):
    config = make_config(**SUBNETWORKS)
    assert type(AutoConfig.for_model("hydravit", num_attention_heads=2)) is HydraViTConfig
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HydraViTConfig
    assert odds(loaded) == odds(config)


def test_the_configuration_of_another_model_is_refused(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'vit', not 'hydravit'.*from_vit"):
        HydraViTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_attention_heads", 3, "`subnetwork_heads` must be from 1 to 3"),
        ("num_heads_active", 7, "`num_heads_active` must be an integer from 1 to 6"),
        ("subnetwork_heads", None, "`subnetwork_heads` must be a list"),
        ("subnetwork_weights", [1.0], "one non-negative number for each of the 4 `subnetwork_heads`"),
        ("head_dim", 0, "`head_dim` must be a positive integer"),
        ("image_size", 18, "`image_size=18` must be a multiple of `patch_size=4`"),
        ("drop_path_rate", 1.0, "`drop_path_rate` must be from 0 to below 1"),
    ],
)
def test_what_is_set_later_is_checked_before_it_is_saved(tmp_path, name, value, message):
    config = make_config()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


# Resizing


@pytest.mark.parametrize("num_heads", range(1, 7))
def test_a_resized_configuration_keeps_the_subnetworks_that_fit(num_heads):
    config = make_config(**SUBNETWORKS)
    narrow = config.resized(num_heads)
    assert (narrow.num_attention_heads, narrow.hidden_size) == (num_heads, 8 * num_heads)
    *kept, widest = narrow.subnetwork_heads
    assert kept == [heads for heads in config.subnetwork_heads if heads < num_heads]
    assert widest == num_heads
    next_trained = min(heads for heads in config.subnetwork_heads if heads >= num_heads)
    assert odds(narrow) == {heads: odds(config)[heads] for heads in kept} | {widest: odds(config)[next_trained]}


@pytest.mark.parametrize("num_heads", [7, 9])
def test_more_heads_add_a_subnetwork_for_each_and_leave_the_others_in_place(num_heads):
    config = make_config(**SUBNETWORKS)
    wide = config.resized(num_heads)
    assert wide.subnetwork_heads == [2, 4, 6, *range(7, num_heads + 1)]
    assert odds(wide) == odds(config) | dict.fromkeys(range(7, num_heads + 1), 0.5)


def test_a_configuration_whose_widest_subnetwork_is_narrower_than_all_heads_is_resized_too():
    config = make_config(subnetwork_heads=[2, 4], subnetwork_weights=[3, 1])
    assert odds(config.resized(5)) == {2: 3, 4: 1, 5: 1}
    assert odds(config.resized(7)) == {2: 3, 4: 1, 7: 1}
    assert odds(config.resized(6)) == odds(config)


@pytest.mark.parametrize(("first", "second"), [(5, 3), (4, 4), (3, 1), (7, 8)])
def test_resizing_in_two_steps_is_resizing_in_one(first, second):
    config = make_config(**SUBNETWORKS)
    assert config.resized(first).resized(second).to_dict() == config.resized(second).to_dict()


@pytest.mark.parametrize("num_heads", [1, 3, 6, 8])
def test_uniform_odds_stay_uniform_and_all_else_stays_as_it_was(num_heads):
    config = make_config(num_labels=3, qkv_bias=False, separate_classifiers=True, mlp_ratio=2, note="kept")
    config._attn_implementation, config.name_or_path = "eager", "somewhere"
    before = config.to_dict()
    resized = config.resized(num_heads)
    assert resized.subnetwork_weights is None
    assert (resized._attn_implementation, resized.name_or_path) == ("eager", "somewhere")
    changed = {name for name, value in before.items() if resized.to_dict()[name] != value}
    assert changed == (set() if num_heads == 6 else {"num_attention_heads", "subnetwork_heads"})
    assert config.to_dict() == before


@pytest.mark.parametrize("num_heads", [1, 3, 4])
def test_a_configuration_that_trains_wide_subnetworks_only_is_resized_too(num_heads):
    config = make_config(subnetwork_heads=[3, 4, 6], subnetwork_weights=[0, 0, 1])
    assert config.resized(num_heads).subnetwork_heads == [heads for heads in (3, 4) if heads < num_heads] + [num_heads]


@pytest.mark.parametrize("num_heads", [8, 6, 4, 3])
def test_a_resized_model_runs_all_its_heads_by_default(num_heads):
    assert make_config(num_heads_active=2).resized(num_heads).num_heads_active is None


@pytest.mark.parametrize("num_heads", [0, -1, True, 3.0, "3", None])
def test_resizing_to_no_number_of_heads_is_an_error(num_heads):
    with pytest.raises(ValueError, match="`num_attention_heads` must be a positive integer"):
        make_config().resized(num_heads)


# Wrong values


@pytest.mark.parametrize("name", ["num_attention_heads", "head_dim", "num_hidden_layers", "mlp_ratio", "num_channels"])
@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "3", [3]])
def test_a_size_is_a_positive_integer(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
        make_config(**{name: value})


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
@pytest.mark.parametrize("value", [0, -4, True, 16.0, "16", (16, 0), [16, True], (16.0, 16), None])
def test_an_image_or_patch_has_sides_of_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
        make_config(**{name: value})


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
@pytest.mark.parametrize("value", [(), (16,), (16, 16, 16)])
def test_an_image_or_patch_has_one_side_or_two(name, value):
    with pytest.raises(ValueError, match=r"\(height, width\) pair"):
        make_config(**{name: value})


@pytest.mark.parametrize(
    ("image_size", "patch_size"), [(15, 4), ((16, 18), 4), ([18, 16], 4), (16, (4, 3)), (16, 32), ((8, 16), (16, 8))]
)
def test_an_image_is_a_whole_number_of_patches(image_size, patch_size):
    with pytest.raises(ValueError, match=r"`image_size=.*` must be a multiple of `patch_size=.*`"):
        make_config(image_size=image_size, patch_size=patch_size)


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
def test_a_rate_is_from_zero_to_below_one(name):
    for value in (0, 0.0, 0.5, 0.999):
        assert getattr(make_config(**{name: value}), name) == value
    for value in (-0.1, 1, 1.0, True, "0.1", math.nan, math.inf, None):
        with pytest.raises(ValueError, match=f"`{name}` must be from 0 to below 1"):
            make_config(**{name: value})


@pytest.mark.parametrize("heads", [[0, 3], [-1], [3, 7], [True, 3], [3, 4.0], ["3"], [None]])
def test_a_subnetwork_has_from_one_to_all_heads(heads):
    with pytest.raises(ValueError, match="`subnetwork_heads` must be from 1 to 6"):
        make_config(subnetwork_heads=heads)


@pytest.mark.parametrize("heads", [[4, 3], [3, 3], [3, 6, 4]])
def test_subnetworks_are_in_increasing_order(heads):
    with pytest.raises(ValueError, match="`subnetwork_heads` must be in increasing order"):
        make_config(subnetwork_heads=heads)


@pytest.mark.parametrize("heads", [[], (), 6, "346", {3, 4}, range(3, 7)])
def test_subnetworks_are_a_list_with_something_in_it(heads):
    with pytest.raises(ValueError, match="`subnetwork_heads` must be a list of head counts"):
        make_config(subnetwork_heads=heads)


@pytest.mark.parametrize(
    "weights",
    [
        [],
        [1, 1],
        [1, 1, 1, 1],
        [0, 0, 0],
        [1, -1, 1],
        [1, math.nan, 1],
        [1, math.inf, 1],
        [1, True, 1],
        [1, "1", 1],
        [1, None, 1],
        1,
        "111",
    ],
)
def test_there_is_one_finite_non_negative_weight_for_each_subnetwork(weights):
    with pytest.raises(ValueError, match="`subnetwork_weights` must hold one non-negative number for each of the 3 "):
        make_config(subnetwork_heads=[2, 4, 6], subnetwork_weights=weights)


def test_weights_need_not_add_up_to_one_and_some_may_be_zero():
    assert make_config(subnetwork_heads=[2, 4, 6], subnetwork_weights=[0, 3, 0.5]).subnetwork_weights == [0, 3, 0.5]


def test_separate_classifiers_end_with_all_heads():
    assert make_config(separate_classifiers=True, subnetwork_heads=[2, 6]).separate_classifiers
    with pytest.raises(ValueError, match="`subnetwork_heads` must end with all 6 heads"):
        make_config(separate_classifiers=True, subnetwork_heads=[2, 4])


@pytest.mark.parametrize("num_heads", [0, 7, -1, True, False, 3.0, "3", [3]])
def test_the_active_heads_are_an_integer_from_one_to_all(num_heads):
    with pytest.raises(ValueError, match="`num_heads_active` must be an integer from 1 to 6"):
        make_config(num_heads_active=num_heads)
    with pytest.raises(ValueError, match="`num_heads_active` must be an integer from 1 to 6"):
        make_config().check_num_heads(num_heads)


def test_every_held_width_can_be_active_whether_trained_or_not():
    for num_heads in range(1, 7):
        assert make_config(**SUBNETWORKS, num_heads_active=num_heads).num_heads_active == num_heads
        assert make_config(**SUBNETWORKS).check_num_heads(num_heads) == num_heads
