"""Rows of results, one for each width, as people read them: a table and a plot."""

from pathlib import Path


def _milliseconds(value: float) -> str:
    return f"{value:.{1 if value >= 10 else 2}f} ms"


# Key of a row -> heading, and how a value reads
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
    """A Markdown table of the known columns of `rows`, aligned so that it also reads well in a terminal."""
    columns = {key: (name, form) for key, (name, form) in COLUMNS.items() if all(key in row for row in rows)}
    cells = [[name for name, _ in columns.values()]]
    cells += [[form(row[key]) for key, (_, form) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |")
    return "\n".join(lines)


def plot_accuracy(rows: list[dict], path: str | Path, title: str):
    """Plot accuracy over MACs, a point for each width, into a PNG file.

    Args:
        rows: With the keys `num_heads`, `macs` and `accuracy`.
        path: The file to write.
        title: What was measured, such as the data set and its number of images.
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
