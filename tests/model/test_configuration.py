"""The configuration: one dial, all else derived from it, and every wrong value refused by its name."""

import json
import math
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.drawing import cheap, configs, configs_and_widths, costly, make
from support.models import SIZES
from transformers import AutoConfig, ViTConfig

from hydravit_hf import HydraViTConfig
from hydravit_hf.profiling import _count_macs_of

SUBNETWORKS = {"subnetwork_heads": [2, 4, 6], "subnetwork_weights": [1.0, 2.5, 0.5]}


def make_config(**kwargs) -> HydraViTConfig:
    """A configuration of 6 heads, without `subnetwork_heads`."""
    return HydraViTConfig(**SIZES | kwargs)


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


@cheap
@given(configs())
def test_a_configuration_survives_dictionaries_and_json(config):
    values = config.to_dict()
    assert HydraViTConfig.from_dict(values).to_dict() == values
    assert HydraViTConfig(**values).to_dict() == values
    again = HydraViTConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_json_string() == config.to_json_string()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = HydraViTConfig.from_pretrained(folder)
    assert loaded.to_json_string() == config.to_json_string()
    assert (loaded.hidden_size, loaded.patch_grid) == (config.hidden_size, config.patch_grid)


@pytest.mark.parametrize("integer", [np.int64, np.uint8])
def test_integers_of_numpy_are_saved_as_any_other(tmp_path, integer):
    def build(integer) -> HydraViTConfig:
        sizes = {name: integer(value) for name, value in SIZES.items()} | {"patch_size": (integer(4), integer(2))}
        heads = {"subnetwork_heads": [integer(2), integer(6)], "num_heads_active": integer(2)}
        cascade = {"num_heads": [integer(2), integer(6)], "thresholds": 0.5}
        return make_config(**sizes, **heads, cascade=cascade)

    for name, config in (("numpy", build(integer)), ("python", build(int))):
        config.save_pretrained(tmp_path / name)
    saved = [(tmp_path / name / "config.json").read_text() for name in ("numpy", "python")]
    assert saved[0] == saved[1]


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


TEXTS = {
    "truncated": lambda text: text[:100],
    "empty": lambda text: "",
    "no JSON": lambda text: "<html>Not found</html>",
    "not text": lambda text: b"\xff\xfe\0",
    "a list with the configuration": lambda text: f"[{text}]",
    "null": lambda text: "null",
    "a string": lambda text: '"hydravit"',
    "not a number": lambda text: "NaN",
    "brackets without end": lambda text: "[" * 10**5,
    "a number of 5,000 digits": lambda text: text.replace('"head_dim": 8', f'"head_dim": {"9" * 5000}'),
    "no values": lambda text: "{}",
}


@pytest.mark.parametrize("damage", TEXTS)
def test_a_file_that_holds_no_configuration_is_an_error_that_names_it(tmp_path, damage):
    make_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    damaged = TEXTS[damage](file.read_text())
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        HydraViTConfig.from_pretrained(tmp_path)


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


@cheap
@given(configs_and_widths(), st.integers(1, 8))
def test_resizing_in_two_steps_is_resizing_in_one_where_the_first_holds_the_second(pair, wider):
    config, num_heads = pair
    held = config.num_attention_heads
    for first in {num_heads, max(num_heads, min(wider, held))}:
        assert config.resized(first).resized(num_heads).to_dict() == config.resized(num_heads).to_dict()
    grown = config.resized(held + wider)
    assert grown.subnetwork_heads[: len(config.subnetwork_heads)] == config.subnetwork_heads
    for first in (held + 1, held + wider):
        assert config.resized(first).resized(held + wider).to_dict() == grown.to_dict()


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

JUNK = ["4", 4.5, 2.0, True, False, None, [], {}, [4], {"a": 1}, -1, 0, 10**9, 10**30, "x", math.nan, math.inf]
SIZE, RATE, FLAG = "must be a positive integer", "must be from 0 to below 1", "must be True or False"
SIDES = f"{SIZE}|must be a number or a .height, width. pair"
ARGUMENTS = {  # what the error says, and which of JUNK the argument may be
    "num_attention_heads": (SIZE, []),
    "head_dim": (SIZE, []),
    "num_hidden_layers": (SIZE, []),
    "mlp_ratio": (SIZE, []),
    "num_channels": (SIZE, []),
    "image_size": (SIDES, []),
    "patch_size": (SIDES, []),
    "num_heads_active": ("must be an integer from 1 to 6", [None]),
    "subnetwork_heads": ("must be a list of head counts", [None, [4]]),
    "subnetwork_weights": ("must hold one non-negative number for each of the 4 ", [None]),
    "separate_classifiers": (FLAG, [True, False]),
    "token_recycling": (FLAG, [True, False]),
    "qkv_bias": (FLAG, [True, False]),
    "hidden_act": ("must be the name of an activation", []),
    "layer_norm_eps": ("must be from 0 to 1", [0]),
    "hidden_dropout_prob": (RATE, [0]),
    "attention_probs_dropout_prob": (RATE, [0]),
    "drop_path_rate": (RATE, [0]),
    "initializer_range": ("must be a positive number", [4.5, 2.0]),
    "apply_layernorm": (FLAG, [True, False]),
    "reshape_hidden_states": (FLAG, [True, False]),
    "cascade": ("must have the keys 'num_heads' and 'thresholds'", [None]),
    "dtype": ("must be one of float64, float32, ", [None]),
    "hidden_size": ("disagrees with the 48 ", [None]),
    "intermediate_size": ("disagrees with the 192 ", [None]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_value_is_an_error_that_names_the_argument(tmp_path, name):
    message, allowed = ARGUMENTS[name]
    make_config(subnetwork_heads=[3, 4, 5, 6]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for junk in JUNK:
        file.write_text(json.dumps(values | {name: junk}))
        by_hand = {"subnetwork_heads": [3, 4, 5, 6], name: junk}
        for build in (lambda by_hand=by_hand: make_config(**by_hand), lambda: HydraViTConfig.from_pretrained(tmp_path)):
            if any(type(junk) is type(value) and junk == value for value in allowed):
                build()
            else:
                with pytest.raises(ValueError, match=f"`{name}[`=].*({message})"):
                    build()


@pytest.mark.parametrize("name", ["id2label", "label2id", "num_labels"])
def test_labels_that_are_none_are_an_error_that_names_the_argument(tmp_path, name):
    make_config(num_labels=5).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    if name == "num_labels":  # counts where there are no names
        del values["id2label"], values["label2id"]
    for junk in ("4", 4.5, True, [4], -1, 10**9, "x", math.nan):
        file.write_text(json.dumps(values | {name: junk}))
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            HydraViTConfig.from_pretrained(tmp_path)
    file.write_text(json.dumps(values | {"id2label": {"a": 1}}))
    with pytest.raises(ValueError, match="invalid literal"):
        HydraViTConfig.from_pretrained(tmp_path)


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


@pytest.mark.parametrize("heads", [(), "346", {3, 4}, range(3, 7)])
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


# Costs


@costly
@given(configs_and_widths())
def test_the_costs_in_closed_form_are_those_of_the_extracted_model(pair):
    config, num_heads = pair
    model, images = make(config)
    extracted = model.extract_subnetwork(num_heads)
    others = sum(parameter[:-1].numel() for parameter in extracted.classifier.parameters())
    expected = extracted.num_parameters() - (others if config.separate_classifiers else 0)
    assert config.count_parameters(num_heads) == expected
    assert config.count_macs(num_heads) == extracted.config.count_macs(num_heads)
    assert config.count_macs(num_heads) == _count_macs_of(model, images[:1], num_heads)
