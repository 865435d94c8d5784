"""Where the benchmarks are, and how to read the tables that they print."""

from support.scripts import EXAMPLES

BENCHMARKS = EXAMPLES / "benchmarks"
DOCS = EXAMPLES.parent / "docs"
TINY = ["--config", '{"num_hidden_layers": 1, "image_size": 32}']


def table_of(printed: str) -> list[list[str]]:
    """The cells of the tables that a script has printed, without their rulers."""
    lines = [line for line in printed.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
