"""The scheduler on a simulated clock: what it chooses, what it keeps, and what it learns."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydravit_hf.serving import FORGET_MS, Latencies, Request, Scheduler, replay

MS = {3: 5.0, 6: 15.0, 12: 50.0}  # of an image
ACCURACY = {3: 0.80, 6: 0.84, 12: 0.87}
ROWS = [
    {"num_heads": num_heads, "batch_size": size, "latency_ms": ms * (0.2 + 0.8 * size)}
    for num_heads, ms in MS.items()
    for size in (1, 2, 4, 8)
]
DEADLINE = 200.0


def make_scheduler(**kwargs) -> Scheduler:
    return Scheduler(Latencies(ROWS), **kwargs)


def exact(num_heads: int, size: int, now: float = 0) -> float:
    return MS[num_heads] * (0.2 + 0.8 * size)


def poisson(rate, duration: float, seed: int = 0) -> list[Request]:
    """Requests at a rate (per ms) that is a function of the time."""
    draw, most = random.Random(seed), max(rate(time) for time in range(0, int(duration), 10))
    now, requests = 0.0, []
    while (now := now + draw.expovariate(most)) < duration:
        if draw.random() < rate(now) / most:
            requests.append(Request(now, now + DEADLINE))
    return requests


def effective_accuracy(rows: list[dict]) -> float:
    return sum(ACCURACY[row["num_heads"]] for row in rows if row["is_on_time"]) / len(rows)


requests = st.builds(
    lambda arrival, slack, num_heads: Request(arrival, arrival + slack, num_heads),
    st.floats(0, 1000),
    st.floats(0, 500),
    st.sampled_from([None, None, None, *MS]),
)


def test_an_idle_machine_runs_the_widest_and_a_long_queue_the_narrowest():
    widths = []
    for count in range(1, 40):
        scheduler = make_scheduler()
        for _ in range(count):
            scheduler.add(Request(0, DEADLINE))
        widths.append(scheduler.next_batch(0).num_heads)
    assert widths[0] == 12 and widths[-1] == 3 and set(widths) == set(MS)
    assert widths == sorted(widths, reverse=True)


def test_less_time_never_makes_a_batch_wider():
    widths = []
    for slack in range(1, 400):
        scheduler = make_scheduler()
        for _ in range(3):
            scheduler.add(Request(0, slack))
        widths.append(scheduler.next_batch(0).num_heads)
    assert set(widths) == set(MS) and widths == sorted(widths)


@given(st.lists(requests, max_size=60), st.sampled_from(["answer", "refuse"]))
@settings(deadline=None, max_examples=100)
def test_each_request_ends_once_at_the_width_that_it_asks_for(trace, late):
    rows = replay(make_scheduler(late=late), trace, exact)
    assert sorted(id(row["request"]) for row in rows) == sorted(map(id, trace))
    batches = {}
    for row in rows:
        request = row["request"]
        if row["num_heads"] is None:
            assert late == "refuse" and row["end"] + exact(request.num_heads or 3, 1) > request.deadline - 20
            continue
        assert row["start"] >= request.arrival and row["num_heads"] in (request.num_heads, *MS)
        assert request.num_heads in (None, row["num_heads"])
        batches.setdefault(row["start"], []).append(row)
    ends = [(start, rows[0]["end"]) for start, rows in sorted(batches.items())]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))  # one at a time
    for rows in batches.values():
        assert len({row["num_heads"] for row in rows}) == 1 and len(rows) == rows[0]["batch_size"] <= 8


@given(st.lists(st.floats(10, 2000), min_size=1, max_size=60))
@settings(deadline=None, max_examples=100)
def test_deadlines_that_the_narrowest_can_keep_are_kept(slacks):
    """With exact times, no further requests and largest batches of the narrowest as the way out."""
    trace = [Request(0, slack) for slack in slacks]
    end, feasible = 2.0, True
    for first in range(0, len(slacks), 8):
        chunk = sorted(slacks)[first : first + 8]
        end += exact(3, len(chunk))
        feasible = feasible and chunk[0] >= end
    rows = replay(make_scheduler(), trace, exact)
    assert all(row["is_on_time"] for row in rows) or not feasible


def test_a_trace_is_replayed_in_the_same_way():
    trace = [(request.arrival, request.deadline) for request in poisson(lambda time: 0.05, 2000)]
    runs = [replay(make_scheduler(), [Request(*times) for times in trace], exact) for _ in range(2)]
    first, second = ([(row["num_heads"], row["start"], row["end"]) for row in rows] for rows in runs)
    assert first == second and len(first) == len(trace)


@pytest.mark.parametrize(
    ("rate", "slower"),
    [
        (lambda time: (0.25 + 3.75 * time / 8000) / 50, lambda time: 1),  # a ramp to 4 times what the widest can do
        (lambda time: 0.05 if time % 2000 < 200 else 0.005, lambda time: 1),  # bursts
        (lambda time: 0.008, lambda time: 2.5 if 2000 < time < 5000 else 1),  # a neighbour that takes the processor
    ],
    ids=["ramp", "bursts", "neighbour"],
)
def test_more_requests_are_right_in_time_than_at_each_fixed_width(rate, slower):
    def took(num_heads, size, now):
        return exact(num_heads, size) * slower(now)

    scores = {}
    for heads in (None, *([num_heads] for num_heads in MS)):
        rows = replay(make_scheduler(heads=heads), poisson(rate, 8000), took)
        scores[heads and heads[0]] = effective_accuracy(rows)
    assert scores.pop(None) > max(scores.values()) + 0.005


@pytest.mark.parametrize("asked", [None, 3])
def test_too_many_requests_are_answered_on_time_as_fast_as_the_narrowest_can(asked):
    """Twice what the largest batches of 3 heads can do. A batch that its most urgent request still has time for would
    be small and slow, and the queue would never become shorter."""
    most = 8 / exact(3, 8)  # per ms
    trace = poisson(lambda time: 2 * most, 8000)
    for request in trace:
        request.num_heads = asked
    rows = replay(make_scheduler(), trace, exact)
    assert sum(row["is_on_time"] for row in rows) > 0.9 * most * 8000


def test_an_urgent_request_is_not_given_up_where_all_can_be_on_time():
    scheduler = make_scheduler()
    for deadline in (60, *[400] * 5):
        scheduler.add(Request(0, deadline, num_heads=12))
    assert [request.deadline for request in scheduler.next_batch(0).requests] == [60]


def test_a_quiet_machine_runs_almost_always_the_widest():
    rows = replay(make_scheduler(), poisson(lambda time: 0.005, 20_000), exact)
    assert effective_accuracy(rows) > ACCURACY[12] - 0.003


def test_what_batches_take_moves_the_choice_and_is_forgotten():
    scheduler = make_scheduler()
    trace = [Request(0, 120) for _ in range(2)]
    for request in trace:
        scheduler.add(request)
    batch = scheduler.next_batch(0)
    assert batch.num_heads == 12
    for _ in range(10):  # a neighbour takes half of the processor
        scheduler.done(batch, 2 * exact(12, 2), 0)
    for request in trace:
        scheduler.add(request)
    assert scheduler.next_batch(0).num_heads == 6
    for request in trace:
        request.arrival, request.deadline = 10 * FORGET_MS, 10 * FORGET_MS + 120
        scheduler.add(request)
    assert scheduler.next_batch(10 * FORGET_MS).num_heads == 12


def test_one_long_pause_does_not_refuse_requests_for_ever():
    scheduler = make_scheduler(late="refuse")
    times = iter([5000.0])
    rows = replay(scheduler, [Request(t, t + 60) for t in range(0, 20_000, 100)], lambda *args: next(times, 10.0))
    after = [row for row in rows if row["request"].arrival > 5000 + 5 * FORGET_MS]
    assert after and all(row["is_on_time"] for row in after)


def test_late_requests_run_after_the_others_or_are_refused():
    late, early = Request(0, 1), Request(0, 300)
    for how in ("answer", "refuse"):
        scheduler = make_scheduler(late=how)
        scheduler.add(late)
        scheduler.add(early)
        assert len(scheduler) == 2
        batch = scheduler.next_batch(0)
        assert batch.requests == [early] and batch.refused == ([late] if how == "refuse" else [])
        after = scheduler.next_batch(10)
        assert after.requests == ([late] if how == "answer" else [])
        assert after.num_heads == (3 if how == "answer" else None) and len(scheduler) == 0


def test_a_late_request_gets_the_width_that_it_asks_for():
    scheduler = make_scheduler()
    scheduler.add(Request(0, 10, num_heads=12))
    assert scheduler.next_batch(0).num_heads == 12


def test_requests_of_a_width_leave_time_for_themselves():
    """The free ones go narrower, as the widest would make those of 12 heads late."""
    scheduler = make_scheduler()
    for _ in range(2):
        scheduler.add(Request(0, 150, num_heads=12))
        scheduler.add(Request(0, 149))
    assert scheduler.next_batch(0).num_heads == 6
    assert [request.num_heads for request in scheduler.next_batch(30).requests] == [12, 12]


def test_disturbed_measurements_are_lowered_to_those_of_wider_widths_and_larger_batches():
    rows = [{"num_heads": 3, "batch_size": 1, "latency_ms": 90.0}, *(row for row in ROWS[1:])]
    latencies = Latencies(rows)
    assert latencies(3, 1) == latencies(3, 2) == ROWS[1]["latency_ms"]
    assert latencies(12, 3) == pytest.approx(exact(12, 3)) and latencies.largest(12) == 8
    assert Latencies([*ROWS[:1], {"num_heads": 12, "batch_size": 3, "latency_ms": 30.0}])(12, 1) == 10


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Latencies([]), "at least one row"),
        (lambda: Latencies([{"num_heads": 3, "batch_size": 1, "latency_ms": float("nan")}]), "latency_ms"),
        (lambda: make_scheduler(late="never"), "late"),
        (lambda: make_scheduler(heads=[3, 4]), "heads"),
        (lambda: make_scheduler(heads=[]), "heads"),
        (lambda: make_scheduler().add(Request(0, 1, num_heads=4)), "num_heads"),
    ],
)
def test_errors_name_the_argument(make, named):
    with pytest.raises(ValueError, match=named):
        make()
