"""Draws widths as HTML and SVG, in the colours of style.css."""

from html import escape

from hydravit_hf.reporting import COLUMNS


def name_width(num_heads: int) -> str:
    return f"{num_heads} head{'s' * (num_heads > 1)}"


def draw_heads(num_heads: int, held: int) -> str:
    """Draw a square for each head that the file holds. Those that run are filled."""
    squares = "".join(f'<i class="{"on" if head < num_heads else ""}"></i>' for head in range(held))
    return f'<div class="heads">{squares}</div>'


def compare_costs(narrow: dict, full: dict) -> str:
    lines = ""
    for key, name in (("parameters", "parameters"), ("macs", "MACs per image"), ("latency_ms", "latency here")):
        form, ratio = COLUMNS[key][1], full[key] / narrow[key]
        cells = (name, form(narrow[key]), form(full[key]), f"1 : {ratio:.1f}")
        lines += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    names = ("", name_width(narrow["num_heads"]), name_width(full["num_heads"]), "ratio")
    return f'<table class="costs"><tr>{"".join(f"<th>{name}</th>" for name in names)}</tr>{lines}</table>'


def draw_results(rows: list[dict], num_heads: int, width: int = 380, height: int = 230) -> str:
    """Draw accuracy over MACs as SVG, with a dot for each width. It marks the dot of `num_heads`."""
    if not rows:
        return ""
    percents, macs = [100 * row["accuracy"] for row in rows], [row["macs"] for row in rows]
    step = next(step for step in (5, 10, 25) if max(percents) - min(percents) <= 3 * step or step == 25)
    low, high = min(percents) // step * step, -(-max(percents) // step) * step
    high += step * (low == high)
    left, right, top, bottom = 44, width - 16, 24, height - 44

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / max(macs) * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    parts = []
    for number in range(round((high - low) / step) + 1):
        _, y = at(0, low + number * step)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{low + number * step:.0f}%</text>')
    dots = [at(x, y) for x, y in zip(macs, percents, strict=True)]
    parts.append(f'<path class="line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in dots)}"/>')
    for row, (x, y) in zip(rows, dots, strict=True):
        is_it, name = row["num_heads"] == num_heads, escape(str(row["num_heads"]))  # a file may hold any text
        parts.append(
            f'<g class="{"dot now" if is_it else "dot"}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{4 + 3 * is_it}"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{y - 12:.1f}" text-anchor="middle">{name}</text></g>')
    form = COLUMNS["macs"][1]
    parts.append(f'<text x="{left}" y="{bottom + 18}" text-anchor="middle">0</text>')
    parts.append(f'<text x="{right}" y="{bottom + 18}" text-anchor="end">{form(max(macs))}</text>')
    parts.append(f'<text x="0" y="{height - 6}">Accuracy over MACs per image; the numbers are heads</text>')
    return f'<svg class="results" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
