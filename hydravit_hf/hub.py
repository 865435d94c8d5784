"""Publishing a checkpoint on the Hub, checked first and in one step."""

import json
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .model.configuration_hydravit import HydraViTConfig

# What training leaves beside a checkpoint: its states, files that are being written, its settings and logs
LEFT_OUT = ["checkpoint-*", "_*", "run.json", "runs/*", "wandb/*", "*.tfevents.*", "*hparams.yml"]


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload HydraViT",
) -> CommitInfo:
    """Publish a saved HydraViT on the Hub: weights, configuration, code, and what else lies in its folder, such as the
    image processor, the card README.md, its plot and results.json.

    What training leaves there is left out: the states `checkpoint-*`, files that start with `_`, `run.json` and the
    logs of trackers. All files become one commit or none: an upload that breaks leaves the repository as it was, or, if
    it is new, empty. Files of the repository that the folder lacks stay.

    Args:
        folder: What `save_pretrained` wrote.
        repo_id: "user/name", or "name" for the user of the token. Made if it doesn't exist.
        private: Whether a new repository is private; None: as the user's or organization's settings say.
        token: A token that may write; None: the one that `hf auth login` stored, or HF_TOKEN.
        revision: The branch to commit to, made from the main one if it doesn't exist; None: the main branch.
        commit_message: First line of the commit's message.

    Raises:
        FileNotFoundError: No such folder, or one without configuration or without all of its weights.
        ValueError: A configuration of another model, a file of weights that isn't whole, or a card that the Hub
            refuses. In both cases nothing was sent but the card, to be checked.
        OSError: The Hub refuses (`HfHubHTTPError`), fails or can't be reached.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    # A commit of one's own: `upload_folder` may split a folder into several.
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    names = list(filter_repo_objects(names, ignore_patterns=LEFT_OUT + DEFAULT_IGNORE_PATTERNS))
    _check_config(folder)
    _check_weights(folder, names)
    try:
        if "README.md" in names:
            _check_card(folder / "README.md")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        return api.create_commit(repo_id, files, commit_message=commit_message, revision=revision)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the client's HTTP library, or of its threads
        reasons = dict.fromkeys(str(reason) for reason in (error, error.__cause__) if reason)
        raise OSError(f"Publishing '{folder}' as '{repo_id}' broke off: {' '.join(reasons)}") from error


def _check_config(folder: Path):
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"'{folder}' has no {CONFIG_NAME}: it is no saved model.")
    model_type = _read_json(file).get("model_type")
    if model_type != HydraViTConfig.model_type:
        raise ValueError(f"'{file}' must be of the model_type '{HydraViTConfig.model_type}', not {model_type!r}.")


def _check_weights(folder: Path, names: list[str]):
    if SAFE_WEIGHTS_NAME in names:
        needed = {SAFE_WEIGHTS_NAME}
    elif SAFE_WEIGHTS_INDEX_NAME in names:
        needed = set(_read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map", {}).values())
    else:
        raise FileNotFoundError(f"'{folder}' has no weights: no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}.")
    if missing := sorted(needed - set(names)):
        raise FileNotFoundError(f"'{folder}' lacks weights that {SAFE_WEIGHTS_INDEX_NAME} names: {', '.join(missing)}.")
    for name in names:
        if name.endswith(".safetensors"):
            try:
                safe_open(folder / name, framework="pt")  # compares the header with the size of the file
            except SafetensorError as error:
                raise ValueError(f"'{folder / name}' is not a whole safetensors file: {error}") from error


def _check_card(file: Path):
    try:
        ModelCard.load(file).validate()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The metadata of '{file}' is not what the Hub takes: {error}") from error


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"'{file}' must hold a JSON object.")
    return values
