"""Publishes a checkpoint on the Hub: checks it first, then uploads it in one commit."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .model.configuration_hydravit import HydraViTConfig
from .model.shards_hydravit import Shard, open_weights, read_index
from .resharding import is_weights, reshard_checkpoint

logger = logging.get_logger(__name__)

# The files that a checkpoint consists of
SENT = [
    *("config.json", "model.safetensors", "model-*.safetensors", "model.*.safetensors", "model.safetensors.index.json"),
    *("*_hydravit.py", "preprocessor_config.json", "processor_config.json", "README.md", "results.json"),
    *("accuracy_over_macs.png", "LICENSE", "LICENSE.*", ".gitattributes", "*.onnx", "*.onnx.data"),
]
HOMES = ("/home/", "/Users/", "/root/", "~")  # folders that are nobody else's business
HANDLER = Path(__file__).with_name("endpoint_handler.py")


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload HydraViT",
    include: list[str] | None = None,
    shard_by_heads: bool | list[int] = False,
    endpoint: bool = False,
) -> CommitInfo:
    """Publish the folder of a saved HydraViT on the Hub.

    It uploads what a checkpoint consists of: weights, configuration, code, the image processor, the card README.md, its
    plot, results.json, licences and ONNX files. A line names the other files, which stay here: they may hold secrets,
    states of the training or logs. So do links that lead out of the folder. Files that are only in the repository stay,
    but for weights of its last commit that these replace. The code on the uploaded card loads the repository.

    All files become one commit. If an upload breaks off, the repository stays as it was, or empty if it is new.

        push_checkpoint("runs/digits", "user/hydravit-digits")

    Args:
        folder: Folder that `save_pretrained` wrote.
        repo_id: "user/name", or "name" for the user of the token. The repository is made if it does not exist.
        private: Whether a new repository is private. None follows the settings of the user or organization.
        token: Token with write access. None means the one that `hf auth login` stored, or HF_TOKEN.
        revision: Branch to commit to. It is made from the main branch if it does not exist. None means the main branch.
        commit_message: First line of the commit's message.
        include: Patterns of further files to upload, such as "examples/*.jpg", relative to the folder.
        shard_by_heads: Whether to upload the weights in files by width, so that a load of k heads downloads those of k
            heads only. A list names the widths that get a file. False uploads the files as they are.

    Raises:
        FileNotFoundError: The folder does not exist, or lacks its configuration or some of its weights.
        ValueError: The configuration belongs to another model, a weights file is damaged, `shard_by_heads` names a
            width that was not trained, the folder has a handler.py of its own beside `endpoint`, the card names paths
            of this machine, or the Hub refuses it. Nothing is uploaded then; only the card is sent, to be checked.
        OSError: There is no token, or the Hub refuses the upload (`HfHubHTTPError`), fails or can't be reached.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    # `upload_folder` would do this too, but it may split a folder into several commits
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    inside = [name for name in names if (folder / name).resolve().is_relative_to(folder.resolve())]
    patterns = [*SENT, *(include or [])]
    sent = [name for name in inside if any(_matches(name, pattern) for pattern in patterns)]
    if left := [name for name in names if name not in sent]:
        shown = ", ".join(left[:10]) + (f" and {len(left) - 10} more" if len(left) > 10 else "")
        added = "`include`, or `--include` in a shell, adds files"
        logger.warning(f"Not uploaded, as no checkpoint needs it ({added}): {shown}")
    names = list(filter_repo_objects(sent, ignore_patterns=DEFAULT_IGNORE_PATTERNS))
    _check_config(folder)
    _check_weights(folder, names)
    if (token or get_token()) is None:
        raise OSError("Nothing can be published without a token: run `hf auth login`, or set HF_TOKEN.")
    if "README.md" in names:
        _check_local_paths(folder / "README.md")
    else:
        logger.warning(f"'{folder}' has no card README.md. {_how_to_make_a_card(folder)} makes one; then push again.")
    paths = {name: folder / name for name in names}
    if endpoint:
        if (folder / "handler.py").exists():
            raise ValueError(f"'{folder}' has a handler.py of its own, which `include` would upload.")
        paths["handler.py"] = HANDLER
    with TemporaryDirectory() as temporary:
        if shard_by_heads is not False:
            reshard_checkpoint(folder, temporary, shard_by_heads)
            resharded = {path.name: path for path in Path(temporary).iterdir() if is_weights(path.name)}
            paths = {name: path for name, path in paths.items() if not is_weights(name)} | resharded
        try:
            if "README.md" in names:
                _check_card(folder / "README.md")
            return _commit(paths, HfApi(token=token), repo_id, private, revision, commit_message)
        except (OSError, ValueError):
            raise
        except Exception as error:  # from the client's HTTP library or its threads
            reasons = dict.fromkeys(str(reason) for reason in (error, error.__cause__) if reason)
            raise OSError(f"The upload of '{folder}' to '{repo_id}' broke off: {' '.join(reasons)}") from error


def _commit(paths: dict[str, Path], api: HfApi, repo_id: str, private, revision, commit_message: str) -> CommitInfo:
    """Upload files under their names, and remove the weights that they replace, all in one commit."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = set(api.list_repo_files(repo_id, revision=revision))
    # A load starts from `model.safetensors` if there is one, so an old one must not stay beside a new index
    steps = [CommitOperationDelete(name) for name in sorted(there - paths.keys()) if is_weights(name)]
    contents = {name: str(path) for name, path in paths.items()}
    if "README.md" in paths:
        contents["README.md"] = _with_repo_id(paths["README.md"].read_text(encoding="utf-8"), repo_id).encode()
    steps += [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
    return api.create_commit(repo_id, steps, commit_message=commit_message, revision=revision)


def _matches(name: str, pattern: str) -> bool:
    """Whether a file matches a pattern, whose `*` stands for no `/`."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _check_config(folder: Path):
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"'{folder}' has no {CONFIG_NAME}, so it is not a saved model.")
    model_type = _read_json(file).get("model_type")
    if model_type != HydraViTConfig.model_type:
        raise ValueError(f"'{file}' must have the model_type '{HydraViTConfig.model_type}', not {model_type!r}.")


def _check_weights(folder: Path, names: list[str]):
    try:
        if SAFE_WEIGHTS_NAME in names:
            needed = [Shard(SAFE_WEIGHTS_NAME)]
        elif SAFE_WEIGHTS_INDEX_NAME in names:
            needed = read_index(folder / SAFE_WEIGHTS_INDEX_NAME)
        else:
            entries = f"no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}"
            raise FileNotFoundError(f"'{folder}' has no weights: {entries}.")
        listed = [shard.path for shard in needed]
        if missing := sorted(set(listed) - set(names)):
            index = SAFE_WEIGHTS_INDEX_NAME
            raise FileNotFoundError(f"'{folder}' lacks weights that {index} names: {', '.join(missing)}.")
        others = [[Shard(name)] for name in names if name.endswith(".safetensors") and name not in listed]
        for shards in (needed, *others):
            with open_weights([shard._replace(path=str(folder / shard.path)) for shard in shards]):
                pass  # it compares each header with the file's size, and a file by width with the index
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(str(error)) from error


def _check_card(file: Path):
    try:
        ModelCard.load(file).validate()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The Hub does not accept the metadata of '{file}': {error}") from error


def _how_to_make_a_card(folder: Path) -> str:
    results = folder / "results.json"
    evaluate = "" if results.is_file() else f"`hydravit evaluate {folder} IMAGES --output {results}`, and then "
    return f"{evaluate}`hydravit card {folder}`"


def _check_local_paths(file: Path):
    """Raise a `ValueError` if a card tells the folders of this machine, or loads its model from one."""
    text = file.read_text(encoding="utf-8")
    found = re.findall(r"(?<![\w.:/])(?:~|/[\w.-]+)(?:/[\w.-]+)+|\b[A-Z]:\\[\w.\\-]+", text)
    found = {path.rstrip(".") for path in found}  # at the end of a sentence
    local = {path for path in found if path.startswith(HOMES) or path[0] != "/" or Path(path).exists()}
    try:
        metadata = ModelCard(text).data.to_dict()
    except (ValueError, yaml.YAMLError):
        metadata = {}  # `_check_card` says what is wrong
    for name in ("base_model", "datasets"):
        values = metadata.get(name) or []
        for value in map(str, [values] if isinstance(values, str) else values):
            if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", value):
                local.add(value)
    if local:
        raise ValueError(
            f"'{file}' names what is on this machine only: {', '.join(sorted(local))}. Replace it by an id of the Hub "
            "or by a name."
        )


def _with_repo_id(text: str, repo_id: str) -> str:
    """A card of this package whose code loads the repository."""
    first = re.search('^path = ".*"$', text, flags=re.MULTILINE)
    return text if first is None else text.replace(f"\n{first[0]}\n", f'\npath = "{repo_id}"\n')


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"'{file}' must hold a JSON object.")
    return values
