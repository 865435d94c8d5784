"""What all benchmarks share times in turns, and its tables and files are right."""

import pytest


@pytest.mark.parametrize("shuffle", [True, False])
def test_calls_take_turns_and_the_rounds_that_warm_up_do_not_count(load_module, shuffle):
    timing, called, ticks = load_module("timing"), [], iter(range(100))
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    times = timing.time_rounds(calls, 4, warmup=2, clock=lambda: next(ticks) / 1e3, shuffle=shuffle, desc=None)
    rounds = ["".join(called[start : start + 3]) for start in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1
    assert shuffle or set(rounds) == {"abc", "cba"}
    assert times == {name: pytest.approx([1.0] * 4) for name in "abc"}


def test_a_ratio_is_the_median_of_the_ratios_within_the_rounds(load_module):
    assert load_module("timing").median_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0


def test_a_table_is_aligned_and_leaves_missing_cells_empty(load_module):
    rows = [{"way": "a", "ms": 1.234}, {"way": "longer", "more": 1}]
    text = load_module("timing").format_rows(rows, {"way": ("way", ""), "ms": ("time, ms", ".1f")})
    assert text.splitlines() == [
        "|    way | time, ms |",
        "| -----: | -------: |",
        "|      a |      1.2 |",
        "| longer |          |",
    ]


def test_rows_are_added_to_a_file_one_a_line(load_module, tmp_path):
    timing, file = load_module("timing"), tmp_path / "new" / "rows.jsonl"
    assert timing.read_rows(file) == []
    timing.append_rows(file, [{"a": 0.1}])
    timing.append_rows(file, [{"a": 1e-9}, {"b": [1, None]}])
    assert timing.read_rows(file) == [{"a": 0.1}, {"a": 1e-9}, {"b": [1, None]}]
    assert len(file.read_text().splitlines()) == 3
    timing.write_rows(file, [{"c": 1}])
    assert timing.read_rows(file) == [{"c": 1}]
