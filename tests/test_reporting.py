"""Rows of results as people read them: the table's cells, and a plot that shows what it is given."""

import numpy as np
import pytest
from PIL import Image

from hydravit_hf.reporting import format_table, plot_accuracy

ROWS = [
    {
        "num_heads": 3,
        "parameters": 5_717_416,
        "macs": 987_654_321,
        "accuracy": 0.7056,
        "top5_accuracy": 0.9,
        "loss": 1.23456,
    },
    {
        "num_heads": 12,
        "parameters": 86_567_656,
        "macs": 17_563_830_000,
        "accuracy": 1.0,
        "top5_accuracy": 0.99999,
        "loss": 0.5,
    },
]
PROFILE = [
    {
        "num_heads": 3,
        "parameters": 5_717_416,
        "macs": 1_253_683_392,
        "batch_size": 1,
        "latency_ms": 2.3149,
        "latency_p90_ms": 22.96,
        "throughput": 431.98,
        "peak_memory_mb": 4.27,
        "device": "a CPU, 2 threads",
        "dtype": "float32",
    },
    {
        "num_heads": 12,
        "parameters": 86_567_656,
        "macs": 17_563_830_000,
        "batch_size": 1,
        "latency_ms": 267.41,
        "latency_p90_ms": 1000.0,
        "throughput": 3.7396,
        "peak_memory_mb": 354.14,
        "device": "a CPU, 2 threads",
        "dtype": "float32",
    },
]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]


def test_a_table_has_a_line_for_each_row_with_its_values_rounded_and_their_units():
    head, rule, *lines = cells(format_table(ROWS))
    assert head == ["heads", "parameters", "MACs", "accuracy", "top-5", "loss"]
    assert all(set(cell) == {"-", ":"} and cell.endswith(":") for cell in rule) and len(rule) == len(head)
    assert lines == [
        ["3", "5.72 M", "987.7 M", "70.56%", "90.00%", "1.235"],
        ["12", "86.57 M", "17.56 G", "100.00%", "100.00%", "0.500"],
    ]


def test_a_profile_reads_in_milliseconds_images_a_second_and_megabytes():
    head, _, *lines = cells(format_table(PROFILE))
    assert head == ["heads", "parameters", "MACs", "latency", "p90", "throughput", "peak memory"]
    assert lines == [
        ["3", "5.72 M", "1.25 G", "2.31 ms", "23.0 ms", "432 img/s", "4.3 MB"],
        ["12", "86.57 M", "17.56 G", "267.4 ms", "1000.0 ms", "3.7 img/s", "354 MB"],
    ]


def test_costs_stand_before_what_they_buy():
    both = [row | {"accuracy": 0.5} for row in PROFILE]
    assert [line[:-1] for line in cells(format_table(both))] == cells(format_table(PROFILE))


def test_the_columns_of_a_table_are_aligned_at_the_right():
    lines = format_table(ROWS).split("\n")
    bars = [[place for place, character in enumerate(line) if character == "|"] for line in lines]
    assert bars == [bars[0]] * 4 and len(bars[0]) == 7
    assert all(line[bar - 2] != " " for line in lines for bar in bars[0][1:])


@pytest.mark.parametrize("missing", ["parameters", "macs", "top5_accuracy", "loss"])
def test_a_column_is_there_if_all_rows_have_it(missing):
    whole = cells(format_table(ROWS))
    place = list(ROWS[0]).index(missing)
    partly = [{key: value for key, value in ROWS[0].items() if key != missing}, ROWS[1]]
    assert cells(format_table(partly)) == [line[:place] + line[place + 1 :] for line in whole]


def test_the_order_of_columns_is_fixed_and_unknown_keys_are_left_out():
    shuffled = [dict(reversed(row.items())) | {"seconds": 1.5} for row in ROWS]
    assert format_table(shuffled) == format_table(ROWS)


@pytest.fixture
def plot(tmp_path):
    """Plots rows and gives the picture."""

    def make(rows: list[dict] = ROWS, title: str = "digits") -> np.ndarray:
        plot_accuracy(rows, tmp_path / "plot.png", title)
        with Image.open(tmp_path / "plot.png") as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"))

    return make


def test_a_plot_is_a_readable_picture(plot, tmp_path):
    picture = plot()
    height, width, _ = picture.shape
    assert width >= 600 and height >= 400
    line = (picture == (0x43, 0x38, 0xCA)).all(-1)
    assert line.any(1).sum() > height / 4 and line.any(0).sum() > width / 4  # from one corner towards the other
    plot_accuracy(ROWS, str(tmp_path / "named by a string.png"), "digits")
    with Image.open(tmp_path / "named by a string.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), picture)


def test_a_plot_shows_its_title_and_its_rows(plot):
    picture = plot()
    assert np.array_equal(picture, plot())
    height = len(picture)
    differs = (picture != plot(title="other digits")).any((1, 2))
    assert differs[: height // 8].any() and not differs[height // 4 :].any()  # above the axes only
    for key, value in (("num_heads", 4), ("macs", 5_000_000_000), ("accuracy", 0.3)):
        assert not np.array_equal(picture, plot([{**ROWS[0], key: value}, ROWS[1]])), key


def test_one_row_and_small_models_can_be_plotted(plot):
    small = [{**row, "macs": row["macs"] / 1e6} for row in ROWS]
    assert not np.array_equal(plot(small), plot())
    assert plot(ROWS[:1]).shape == plot().shape
