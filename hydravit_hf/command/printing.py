"""Prints results: tables, JSON and CSV."""

import csv
import json
import sys

FINDINGS = {"broken": "broken", "huge": "huge", "duplicates": "in both splits"}


def print_rows(rows: list[dict]):
    from hydravit_hf.reporting import format_table

    print(format_table(rows))


def print_json(value):
    print(json.dumps(value, indent=2))


def print_csv(images: list[str], outputs: list):
    is_cascade = any("num_heads" in row for output in outputs if isinstance(output, list) for row in output)
    columns = ["image", "rank", "label", "score", *(["num_heads", "macs"] if is_cascade else [])]
    lines = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    lines.writeheader()
    for image, output in zip(images, outputs, strict=True):
        if isinstance(output, list):
            for rank, row in enumerate(output, start=1):
                lines.writerow({"image": image, "rank": rank, **row, "label": printable(row["label"])})


def print_fitted(fitted: dict):
    from hydravit_hf.reporting import COLUMNS

    settings = fitted["cascade"]
    thresholds = [*settings["thresholds"], None]
    steps = zip(settings["num_heads"], fitted["shares"], settings["temperatures"], thresholds, strict=True)
    for num_heads, share, temperature, threshold in steps:
        goes_on = "" if threshold is None else f", goes on from {settings['criterion']} {threshold:.4g}"
        print(f"{num_heads} heads: answers {share:.1%}, temperature {temperature:.3f}{goes_on}")
    costs = [f"{COLUMNS['macs'][1](fitted['macs'])} MACs"]
    costs += [COLUMNS["latency_ms"][1](fitted["latency_ms"])] if "latency_ms" in fitted else []
    reached = f"Accuracy {fitted['accuracy']:.2%} at {' and '.join(costs)} per image"
    print(f"{reached}; the widest alone {fitted['widest_accuracy']:.2%}")


def print_report(report: dict):
    def name(place: dict) -> str:
        return printable(place.get("path") or f"row {place['row']}") + f" ({place['split']})"

    for split, number in report["images"].items():
        print(f"{split}: {number} images")
    for label, numbers in report["classes"].items():
        print(f"  {printable(label)}: " + ", ".join(f"{number} {split}" for split, number in numbers.items()))
    for place in report["broken"]:
        print(f"broken: {place['split']}, row {place['row']}: {printable(place['error'])}")
    for place in report["huge"]:
        print(f"huge: {name(place)}: {place['pixels'] / 1e6:.0f} megapixels")
    for same in report["duplicates"]:
        print(f"in both splits: {', '.join(map(name, same))}")
    print(", ".join(f"{len(report[kind])} {words}" for kind, words in FINDINGS.items()))


def printable(text: str) -> str:
    """Escape the control characters of a name that comes with a model, which could steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
