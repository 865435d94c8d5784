"""The commands that publish a model write its card, and say what would be published wrongly."""

import json
from pathlib import Path


def test_card_shows_the_results_and_replaces_a_card_only_if_it_is_told_to(hydravit, folder):
    code, _, err = hydravit("card", folder)
    assert code == 1 and f"`hydravit evaluate --output {folder}/results.json` writes it" in err
    results = [{"num_heads": num_heads, "accuracy": num_heads / 11} for num_heads in (3, 6)]
    Path(folder, "results.json").write_text(json.dumps(results))
    card = Path(folder, "README.md")
    assert hydravit("card", folder, "--no-measure")[0] == 0
    assert "| latency |" not in card.read_text() and 'path = "tiny"' in card.read_text()
    code, _, err = hydravit("card", folder)
    assert code == 1 and "--overwrite" in err
    code, *_ = hydravit("card", folder, "--dataset-name", "the digits", "--model-id", "user/tiny", "--overwrite")
    assert code == 0 and 'path = "user/tiny"' in card.read_text() and "| latency |" in card.read_text()
    assert "27.27%" in card.read_text() and "the digits" in card.read_text()
    for option, license in ((["--license", "mit"], "mit"), ([], "mit"), (["--license", "apache-2.0"], "apache-2.0")):
        assert hydravit("card", folder, "--no-measure", "--overwrite", *option)[0] == 0
        assert f"\nlicense: {license}\n" in card.read_text() and "the digits" in card.read_text()


def test_push_names_missing_weights_before_it_needs_the_hub(hydravit, folder):
    Path(folder, "model.safetensors").unlink()
    code, out, err = hydravit("push", folder, "user/tiny")
    assert code == 1 and out == "" and f"'{folder}' has no weights" in err.splitlines()[-1]
