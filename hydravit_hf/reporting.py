"""Shows rows of results, one for each width, as a table and as a plot."""

from pathlib import Path


def _milliseconds(value: float) -> str:
    return f"{value:.{1 if value >= 10 else 2}f} ms"


# Key of a row -> heading, and function that formats a value
COLUMNS = {
    "num_heads": ("heads", str),
    "parameters": ("parameters", lambda value: f"{value / 1e6:.2f} M"),
    "macs": ("MACs", lambda value: f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"),
    "latency_ms": ("latency", _milliseconds),
    "latency_p90_ms": ("p90", _milliseconds),
    "throughput": ("throughput", lambda value: f"{value:.{0 if value >= 100 else 1}f} img/s"),
    "peak_memory_mb": ("peak memory", lambda value: f"{value:.{0 if value >= 10 else 1}f} MB"),
    "accuracy": ("accuracy", "{:.2%}".format),
    "top5_accuracy": ("top-5", "{:.2%}".format),
    "loss": ("loss", "{:.3f}".format),
}


def format_table(rows: list[dict]) -> str:
    """Format rows as a Markdown table that is also aligned for a terminal.

    It has the `COLUMNS` that all rows have, in a fixed order. It leaves out other keys.

    Examples:
        >>> from hydravit_hf.reporting import format_table
        >>> rows = [{"num_heads": 3, "macs": 1253683392, "accuracy": 0.7056}]
        >>> print(format_table([*rows, {"num_heads": 12, "macs": 17563830000, "accuracy": 0.81}]))
        | heads |    MACs | accuracy |
        | ----: | ------: | -------: |
        |     3 |  1.25 G |   70.56% |
        |    12 | 17.56 G |   81.00% |
    """
    columns = {key: (name, form) for key, (name, form) in COLUMNS.items() if all(key in row for row in rows)}
    cells = [[name for name, _ in columns.values()]]
    cells += [[form(row[key]) for key, (_, form) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |")
    return "\n".join(lines)


def plot_accuracy(rows: list[dict], path: str | Path, title: str):
    """Plot the accuracy over the MACs of each width into a PNG file.

    Args:
        rows: Rows with `num_heads`, `macs` and `accuracy`.
        path: File to write.
        title: Title of the plot, such as the name of the data set and the number of its images.
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    scale, unit = (1e9, "GMACs") if max(row["macs"] for row in rows) >= 1e9 else (1e6, "million MACs")
    macs, accuracies = [row["macs"] / scale for row in rows], [100 * row["accuracy"] for row in rows]
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(macs, accuracies, "o-", color="#4338ca", clip_on=False)
    for row, x, y in zip(rows, macs, accuracies, strict=True):
        style = {"ha": "center", "fontsize": 9, "path_effects": [withStroke(linewidth=3, foreground="white")]}
        axes.annotate(str(row["num_heads"]), (x, y), xytext=(0, 7), textcoords="offset points", **style)
    axes.set(xlabel=f"{unit} per image", ylabel="accuracy, %", title=title)
    axes.annotate("labels: attention heads", (1, 0.03), xycoords="axes fraction", ha="right", color="0.45", fontsize=9)
    axes.margins(y=0.15)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
