"""A profile counts what runs and leaves the model as it was; what is chosen by it is the widest that fits."""

import math
import re
import statistics
import timeit
from functools import partial
from itertools import pairwise

import pytest
import torch

from hydravit_hf import HydraViTConfig, HydraViTModel, profiling
from hydravit_hf.profiling import add_costs, choose_num_heads, profile_subnetworks

HEADS = range(1, 7)
# As published with the paper: heads -> parameters in millions, GMACs
PUBLISHED = {
    3: (5.72, 1.25),
    4: (9.98, 2.14),
    5: (15.43, 3.25),
    6: (22.05, 4.60),
    7: (29.85, 6.18),
    8: (38.84, 7.99),
    9: (49.00, 10.04),
    10: (60.34, 12.31),
    11: (72.87, 14.82),
    12: (86.57, 17.56),
}
EXACT = {3: 5_717_416, 6: 22_050_664, 12: 86_567_656}  # parameters of the DeiT of that width
VARIANTS = {
    "no bias": {"qkv_bias": False},
    "separate classifiers": {"separate_classifiers": True, "subnetwork_heads": [2, 3, 6]},
    "token recycling": {"token_recycling": True, "subnetwork_heads": [1, 3, 6]},
    "rectangles": {"image_size": (8, 16), "patch_size": (2, 4)},
    "one channel": {"num_channels": 1},
    "narrow MLP": {"mlp_ratio": 1, "num_hidden_layers": 1},
    "no classifier": {"num_labels": 0},
}
KEYS = ["num_heads", "parameters", "macs", "batch_size", "latency_ms", "latency_p90_ms", "throughput"]
KEYS += ["peak_memory_mb", "device", "dtype"]
ONCE = {"rounds": 1, "warmup": 1, "disable_tqdm": True}


def test_the_costs_of_the_default_model_are_the_published_ones():
    rows = add_costs(HydraViTConfig(num_labels=1000), [{"num_heads": num_heads} for num_heads in PUBLISHED])
    assert {r["num_heads"]: (round(r["parameters"] / 1e6, 2), round(r["macs"] / 1e9, 2)) for r in rows} == PUBLISHED
    assert {row["num_heads"]: row["parameters"] for row in rows if row["num_heads"] in EXACT} == EXACT


def test_costs_that_a_row_has_stay():
    (row,) = add_costs(HydraViTConfig(), [{"num_heads": 3, "macs": 7, "accuracy": 0.5}])
    assert row == {"num_heads": 3, "macs": 7, "accuracy": 0.5, "parameters": HydraViTConfig().count_parameters(3)}


def state(model: torch.nn.Module) -> dict:
    return {name: (tensor.data_ptr(), tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}


def check_unchanged(model: torch.nn.Module, before: dict):
    after = state(model)
    assert after.keys() == before.keys()
    for name, (address, dtype, values) in before.items():
        assert after[name][:2] == (address, dtype) and torch.equal(after[name][2], values), name


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_profile_has_a_row_for_each_width_whose_counts_are_the_closed_forms(
    make_model, attn_implementation, batch_size
):
    model = make_model(subnetwork_heads=[2, 3, 6], attn_implementation=attn_implementation)
    rows = profile_subnetworks(model, batch_size=batch_size, rounds=3, warmup=2, disable_tqdm=True)
    assert [row["num_heads"] for row in rows] == [2, 3, 6]
    for row in rows:
        assert list(row) == KEYS
        assert row["parameters"] == model.config.count_parameters(row["num_heads"])
        assert row["macs"] == model.config.count_macs(row["num_heads"]) and isinstance(row["macs"], int)
        assert row["batch_size"] == batch_size and row["dtype"] == "float32"
        assert 0 < row["latency_ms"] <= row["latency_p90_ms"] < math.inf
        assert row["throughput"] == pytest.approx(1e3 * batch_size / row["latency_ms"])
        assert row["device"] == rows[0]["device"] and f", {torch.get_num_threads()} thread" in row["device"]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_profile_of_other_kinds_of_models_counts_what_the_closed_forms_do(make_model, variant):
    model = make_model(**variant)
    for row in profile_subnetworks(model, heads=[2, 3, 6], **ONCE):
        assert row["parameters"] == model.config.count_parameters(row["num_heads"])
        *narrower, _ = model.config.stages(row["num_heads"])
        # The closed form counts a classification at every stage, as a cascade has it; a pass has the last one only
        assert row["macs"] == model.config.count_macs(row["num_heads"]) - 8 * sum(narrower) * model.config.num_labels


def test_rows_are_in_the_order_that_is_asked_for(model):
    assert [row["num_heads"] for row in profile_subnetworks(model, heads=[5, 1, 5], **ONCE)] == [5, 1, 5]


@pytest.mark.parametrize("training", [False, True])
def test_a_profile_runs_in_eval_mode_and_leaves_the_model_as_it_was(model, training):
    modes = set()
    model.register_forward_hook(lambda module, *_: modes.add((module.training, torch.is_inference_mode_enabled())))
    before, random_state = state(model.train(training)), torch.get_rng_state()
    profile_subnetworks(model, heads=[2, 6], **ONCE)
    assert modes == {(False, True)}
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    check_unchanged(model, before)


def test_the_mode_is_restored_after_an_error(model):
    model.train().config.image_size = 20  # the images no longer fit
    with pytest.raises(ValueError, match="resize"):
        profile_subnetworks(model, **ONCE)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.parametrize("device", ["cpu", None])
def test_another_type_or_device_is_measured_on_a_copy(model, dtype, device):
    before, seen = state(model.train()), []
    model.register_forward_hook(lambda module, *_: seen.append(next(module.parameters()).data_ptr()))
    rows = profile_subnetworks(model, heads=[1, 6], dtype=dtype, device=device, **ONCE)
    own = {address for address, *_ in before.values()}
    assert seen and own.isdisjoint(seen) == (dtype is not None or device is not None)
    assert {row["dtype"] for row in rows} == {"float32" if dtype is None else "bfloat16"}
    assert model.training
    check_unchanged(model, before)


def test_every_round_times_each_width_once_in_an_order_of_its_own(monkeypatch):
    ran = []
    monkeypatch.setattr(profiling, "SHORTEST_SAMPLE", 1e-12)
    passes = {num_heads: lambda num_heads=num_heads: ran.append(num_heads) for num_heads in HEADS}

    def orders() -> list[tuple]:
        ran.clear()
        times = profiling.time_interleaved(passes, rounds=8, warmup=2, disable_tqdm=True)
        assert {num_heads: len(values) for num_heads, values in times.items()} == dict.fromkeys(HEADS, 8)
        timed = ran[2 * len(HEADS) :]
        return [tuple(timed[start : start + len(HEADS)]) for start in range(0, len(timed), len(HEADS))]

    first = orders()
    assert len(first) == 8 and all(sorted(order) == list(HEADS) for order in first)
    assert len(set(first)) > 4 and first == orders()


def test_a_fast_pass_is_repeated_until_a_sample_takes_long_enough(monkeypatch):
    clock, ran = [0.0], []

    def step(seconds: float):
        clock[0] += seconds
        ran.append(seconds)

    passes = {1: lambda: step(3e-4), 2: lambda: step(5e-3)}
    monkeypatch.setattr(timeit, "Timer", partial(timeit.Timer, timer=lambda: clock[0]))
    times = profiling.time_interleaved(passes, rounds=4, warmup=3, disable_tqdm=True)
    assert times == {1: pytest.approx([0.3] * 4), 2: pytest.approx([5.0] * 4)}
    assert ran.count(3e-4) == 3 + 4 * 7 and ran.count(5e-3) == 3 + 4


def test_the_latency_is_the_median_of_the_rounds_and_p90_their_ninth_decile(model, monkeypatch):
    times = {1: [5.0, 1.0, 3.0, 2.0, 4.0], 6: [float(value) for value in range(11)]}
    monkeypatch.setattr(profiling, "time_interleaved", lambda *_: times)
    rows = profile_subnetworks(model, heads=[1, 6], batch_size=4)
    assert [row["latency_ms"] for row in rows] == [statistics.median(values) for values in times.values()] == [3, 5]
    assert [row["latency_p90_ms"] for row in rows] == pytest.approx([4.6, 9])
    assert [row["throughput"] for row in rows] == pytest.approx([4000 / 3, 800])


def test_the_peak_of_allocations_is_that_of_the_tensors_that_live_at_a_time():
    size, weight = 4 * 50 * 50, torch.randn(50, 50)

    def chain(length: int):
        hidden = weight
        for _ in range(length):
            hidden = hidden @ weight

    def keep(length: int):
        return [weight @ weight for _ in range(length)]

    chains = {length: lambda length=length: chain(length) for length in (0, 1, 2, 5)}
    lists = {length: lambda length=length: keep(length) for length in (5, 1, 3)}
    with torch.inference_mode():
        assert profiling._peak_allocations(chains, weight.device) == {0: 0, 1: size, 2: 2 * size, 5: 2 * size}
        assert profiling._peak_allocations(lists, weight.device) == {5: 5 * size, 1: size, 3: 3 * size}


def test_the_memory_of_a_width_is_its_weights_the_images_and_the_widest_point_of_the_pass(model):
    batch_size, tokens = 4, 17
    rows = profile_subnetworks(model, batch_size=batch_size, **ONCE)
    for row in rows:
        # In the MLP, at 4 channels for each of the residual stream: its hidden ones before and after the activation,
        # its input, the layer's input, and the sum of that with the attention's output
        hidden = 4 * batch_size * tokens * 8 * row["num_heads"] * (4 + 4 + 1 + 1 + 1)
        fixed = 4 * row["parameters"] + 4 * batch_size * 3 * 16 * 16
        assert fixed + hidden <= 1e6 * row["peak_memory_mb"] <= fixed + 2 * hidden
    memory = [row["peak_memory_mb"] for row in rows]
    assert all(narrower < wider for narrower, wider in pairwise(memory))
    again = profile_subnetworks(model, batch_size=batch_size, **ONCE)
    assert memory == [row["peak_memory_mb"] for row in again]


def test_a_profile_of_what_cannot_be_profiled_is_refused(model):
    for heads in ([0], [7], [3, True]):
        with pytest.raises(ValueError, match="from 1 to 6"):
            profile_subnetworks(model, heads=heads)
    for name in ("batch_size", "rounds", "warmup"):
        for count in (0, -1, 1.0, True, None):
            with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
                profile_subnetworks(model, **{name: count})
    with pytest.raises(ValueError, match="`device` must be a CPU or a CUDA device, not 'meta'"):
        profile_subnetworks(model, device="meta")
    with pytest.raises(ValueError, match="`model` must be a HydraViTForImageClassification"):
        profile_subnetworks(HydraViTModel(model.config))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_profile_on_a_gpu_counts_what_one_on_the_cpu_does(model, dtype):
    on_gpu = profile_subnetworks(model, dtype=dtype, device="cuda", batch_size=4, **ONCE)
    for row in on_gpu:
        assert list(row) == KEYS
        assert row["macs"] == model.config.count_macs(row["num_heads"])
        assert row["device"] == torch.cuda.get_device_name() and row["dtype"] == str(dtype).removeprefix("torch.")
        assert row["peak_memory_mb"] * 1e6 > dtype.itemsize * (row["parameters"] + 4 * 3 * 16 * 16)
    assert on_gpu[0]["peak_memory_mb"] < on_gpu[-1]["peak_memory_mb"]
    assert model.device.type == "cpu" and model.dtype == torch.float32


ROWS = [
    {"num_heads": 3, "latency_ms": 23.04, "peak_memory_mb": 25.0, "macs": 1_253_683_392, "parameters": 5_717_416},
    {"num_heads": 12, "latency_ms": 267.4, "peak_memory_mb": 353.0, "macs": 17_560_000_000, "parameters": 86_567_656},
    {"num_heads": 6, "latency_ms": 68.2, "peak_memory_mb": 92.0, "macs": 4_600_000_000, "parameters": 22_050_664},
]
ARGUMENTS = {"max_latency_ms": "latency_ms", "max_memory_mb": "peak_memory_mb"}
ARGUMENTS |= {"max_macs": "macs", "max_parameters": "parameters"}


@pytest.mark.parametrize(("argument", "key"), ARGUMENTS.items())
def test_the_widest_that_meets_a_budget_is_chosen(argument, key):
    for row in ROWS:
        assert choose_num_heads(ROWS, **{argument: row[key]}) == row["num_heads"]
        assert choose_num_heads(ROWS, **{argument: 1.01 * row[key]}) == row["num_heads"]
    assert choose_num_heads(ROWS, **{argument: math.inf}) == 12
    with pytest.raises(ValueError, match="narrowest, 3 heads"):
        choose_num_heads(ROWS, **{argument: 0.99 * ROWS[0][key]})


def test_all_budgets_are_met():
    assert choose_num_heads(ROWS, max_latency_ms=70, max_memory_mb=1000) == 6
    assert choose_num_heads(ROWS, max_latency_ms=1000, max_memory_mb=92, max_macs=1e11) == 6
    assert choose_num_heads(ROWS, max_latency_ms=70, max_memory_mb=1000, max_macs=1e11, max_parameters=6e6) == 3


def test_an_error_says_what_the_narrowest_needs_and_what_was_allowed():
    with pytest.raises(ValueError, match=r"The narrowest, 3 heads, needs 23\.04 ms; allowed: 10 ms\.$"):
        choose_num_heads(ROWS, max_latency_ms=10)
    needs = "needs 23.04 ms, 25 MB, 1.254 GMACs, 5.717 M parameters; allowed: 1 ms, 20 MB, 0.5 GMACs, 6 M parameters."
    with pytest.raises(ValueError, match=re.escape(needs)):
        choose_num_heads(ROWS, max_parameters=6e6, max_macs=5e8, max_memory_mb=20, max_latency_ms=1)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_budget_that_is_not_a_positive_number_is_refused(argument):
    for budget in (0, -1, math.nan, True, False, "10", [10]):
        with pytest.raises(ValueError, match=f"`{argument}` must be a positive number"):
            choose_num_heads(ROWS, **{argument: budget})


def test_a_choice_needs_a_budget_and_rows_that_it_can_go_by():
    with pytest.raises(ValueError, match="at least one budget: `max_latency_ms`, `max_memory_mb`, `max_macs`"):
        choose_num_heads(ROWS)
    for rows in ([], None, [ROWS[0], {"num_heads": 6}], [{"macs": 3}]):
        with pytest.raises(ValueError, match=r"`rows` must .* 'macs'"):
            choose_num_heads(rows, max_macs=5)


def test_a_model_is_measured_only_where_a_budget_asks_for_it(make_model, monkeypatch):
    model, runs = make_model(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    for num_heads in HEADS:
        assert choose_num_heads(model, max_macs=model.config.count_macs(num_heads)) == num_heads
        assert choose_num_heads(model, max_parameters=model.config.count_parameters(num_heads) + 1) == num_heads
    assert not runs
    assert choose_num_heads(make_model(subnetwork_heads=[2, 5]), max_latency_ms=1e9) == 5
    monkeypatch.setattr(profiling, "profile_subnetworks", lambda _: ROWS)
    assert choose_num_heads(model, max_memory_mb=100) == 6
    with pytest.raises(ValueError, match="`model` must be a HydraViTForImageClassification"):
        choose_num_heads(HydraViTModel(model.config), max_macs=1e12)


def test_a_profile_is_what_one_chooses_by(model):
    rows = profile_subnetworks(model, **ONCE)
    for row in rows:
        assert choose_num_heads(rows, max_memory_mb=row["peak_memory_mb"]) == row["num_heads"]
    assert choose_num_heads(rows, max_latency_ms=max(row["latency_ms"] for row in rows)) == 6
