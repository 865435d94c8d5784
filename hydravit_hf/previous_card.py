"""What only the card of a folder knows: a new card takes it over, as far as it is still true."""

import re
from itertools import chain
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

TEMPLATE = Path(__file__).with_name("model_card_template.md")


class PreviousCard:
    """A card that is about to be replaced, and what only it knows."""

    def __init__(self, card: ModelCard):
        self.card, self.sections, self.results = card, _sections(card.text), card.data.eval_results or []

    @classmethod
    def read(cls, file: Path):
        """The card of this package in a file, or None."""
        if not file.is_file():
            return None
        try:
            card = ModelCard.load(file, ignore_metadata_errors=True)
        except (ValueError, yaml.YAMLError):  # it is damaged
            return None
        return cls(card) if "hydravit" in (card.data.tags or []) else None

    def complete(self, given: dict, results: list[dict]) -> dict:
        """Complete the arguments of a new card. `results` are its rows."""
        path = re.search('^path = "(.*)"$', self.card.text, flags=re.MULTILINE)
        known = {"license": self.card.data.license, "model_id": path[1] if path else None}
        name = given.get("dataset_name", self.results[0].dataset_name if self.results else None)
        accuracies = {row["num_heads"]: round(row["accuracy"], 5) for row in results}
        same_data = [result for result in self.results if result.dataset_name == name]
        measured = [result for result in same_data if result.metric_type == "accuracy"]
        again = {_heads_of(result): result for result in measured if _heads_of(result) in accuracies}
        if any(result.metric_value != accuracies[heads] for heads, result in again.items()):
            self.results = []  # these and the texts are of other weights
            self.card.data.base_model = self.card.data.datasets = None
        else:
            self.results = [result for result in self.results if result not in again.values()]
            known |= self._texts() | (self._data(next(iter(again.values()))) if again else {})
        return {name: value for name, value in known.items() if value} | given

    def _texts(self) -> dict:
        limits = re.sub(r"(?s)^(The narrow widths .*? stand|Widths other .*? chance)\.", "", self._body("Limits"))
        order = re.search(r"It is (.*) with its directions, heads and neurons in the order", self.card.text)
        texts = {"training": self._body("Training"), "limits": limits.strip()}
        return texts | {"base_model": self.card.data.base_model, "ordered_from": order[1] if order else None}

    def _data(self, result: EvalResult) -> dict:
        """The data that the results are of."""
        note = self._body("How good each width is, and what it costs").partition("\n\n|")[0]
        has_id = result.dataset_type != result.dataset_name
        return {
            "dataset_name": result.dataset_name,
            "dataset_id": result.dataset_type if has_id else None,
            "dataset_split": result.dataset_split,
            "results_source": (result.source_name, result.source_url) if result.source_name else None,
            "results_note": note,
        }

    def _body(self, heading: str) -> str:
        return self.sections.get(heading, "").partition("\n")[2].strip()

    def add_to(self, card: ModelCard):
        """Add the results, the metadata and the sections that a new card does not have."""
        card.data.eval_results = [*card.data.eval_results, *self.results]
        new = card.data.to_dict()
        for name, value in self.card.data.to_dict().items():
            if name in ("tags", "datasets", "metrics") and name in new:
                values = [[field] if isinstance(field, str) else field for field in (new[name], value)]
                merged = list(dict.fromkeys(chain(*values)))
                card.data[name] = merged if len(merged) > 1 else new[name]
            elif name not in new:
                card.data[name] = value
        written = _sections(TEMPLATE.read_text(encoding="utf-8"))
        own = [text.strip() + "\n\n" for heading, text in self.sections.items() if heading not in written]
        card.text = card.text.replace("## Citation\n", "".join(own) + "## Citation\n")


def _heads_of(result: EvalResult) -> int | None:
    return (result.metric_args or {}).get("num_heads_active")


def _sections(text: str) -> dict[str, str]:
    """The parts of a page by their headings of the second level. The part before the first has the key ""."""
    sections, heading, is_code = {"": ""}, "", False
    for line in text.splitlines(keepends=True):
        is_code ^= line.startswith("```")
        if line.startswith("## ") and not is_code:
            heading = line[3:].strip()
        sections[heading] = sections.get(heading, "") + line
    return sections
