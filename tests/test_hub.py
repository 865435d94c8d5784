"""Publishing and loading by id: `huggingface_hub`'s own client, in processes of its own, against a Hub on loopback."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from support.hub_server import HubServer
from transformers import ViTConfig, ViTForImageClassification

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, elastify, evaluate_subnetworks
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.hub import HANDLER
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model_card import save_model_card
from hydravit_hf.reporting import plot_accuracy

SERVED = {".gitattributes"}  # what every repository starts with
SEEDS = itertools.count()  # new weights for each model: the Hub takes no file twice

WITH_THE_PACKAGE = """
import torch
from transformers import AutoImageProcessor
from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.hub import push_checkpoint

load = HydraViTForImageClassification.from_pretrained
"""
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hydravit_hf"] = None  # importing it fails
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

def load(name, **kwargs):
    return AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True, **kwargs)
"""
SERVE = """
import json, sys

def logits(name, images, **kwargs):
    return load(name, **kwargs)(torch.tensor(images)).logits.tolist()

answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    code, values = json.loads(line)
    try:
        names = globals() | values
        exec(code, names)
        answer = {"result": names.get("result")}
    except Exception as error:
        answer = {"error": f"{' '.join(kind.__name__ for kind in type(error).__mro__)}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
"""


class ClientError(Exception):
    """An error in a client: the names of its class and their bases, and its message."""


class Client:
    """A process with an empty cache that runs code and gives what it leaves in `result`."""

    def __init__(self, hub: HubServer, home: Path, setup: str, token: str | None = None, **settings: str):
        self.home, self.errors = home, home / "stderr.txt"
        warnings = ["-W", "error", "-W", "default::DeprecationWarning"]  # the client sends files in a deprecated way
        command = [sys.executable, *warnings, "-P", "-c", setup + SERVE]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = client_environment(hub, home, token) | settings
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(command, env=environment, cwd=home, stderr=errors, **streams)

    def __call__(self, code: str, **values):
        try:
            self.process.stdin.write(json.dumps([code, values]) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except ValueError as error:
            raise RuntimeError(f"The client is gone: {self.errors.read_text()[-3000:]}") from error
        if "error" in answer:
            raise ClientError(answer["error"])
        return answer["result"]

    def logits(self, name: str, images: torch.Tensor, **kwargs) -> torch.Tensor:
        code = "result = logits(name, images, **kwargs)"
        return torch.tensor(self(code, name=name, images=images.tolist(), kwargs=kwargs))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def client_environment(hub: HubServer, home: Path, token: str | None) -> dict[str, str]:
    left_out = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return environment | settings | ({"HF_TOKEN": token} if token else {})


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_user": "user", "hf_other": "other"}) as server:
        yield server


@pytest.fixture(scope="module")
def user(hub, tmp_path_factory):
    """Has the package and a token."""
    with Client(hub, tmp_path_factory.mktemp("user"), WITH_THE_PACKAGE, "hf_user") as client:
        yield client


@pytest.fixture(scope="module")
def reader(hub, tmp_path_factory):
    """Has neither."""
    with Client(hub, tmp_path_factory.mktemp("reader"), WITHOUT_THE_PACKAGE) as client:
        yield client


@pytest.fixture
def save(make_model, tmp_path):
    """Saves a new tiny model and its processor into a folder, and gives both."""

    def save_new(name: str = "saved", heads: int = 6, **kwargs):
        torch.manual_seed(next(SEEDS))
        model = make_model(num_attention_heads=heads, subnetwork_heads=list(range(1, heads + 1)))
        folder = tmp_path / name
        model.save_pretrained(folder, **kwargs)
        make_image_processor(model.config).save_pretrained(folder)
        return folder, model

    return save_new


def push(client: Client, folder: Path, repo_id: str, **kwargs) -> str:
    """The commit's id."""
    code = "result = push_checkpoint(folder, repo_id, **kwargs).oid"
    return client(code, folder=str(folder), repo_id=repo_id, kwargs=kwargs)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check(found: torch.Tensor, model, images, num_heads: int | None = None):
    expected = model(images, num_heads_active=num_heads).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_pushed_model_loads_by_its_id_at_any_width_without_the_package(hub, user, reader, save, images):
    folder, model = save()
    user(
        'load(folder).push_to_hub("user/tiny"); AutoImageProcessor.from_pretrained(folder).push_to_hub("user/tiny")',
        folder=str(folder),
    )
    assert hub.repos["user/tiny"].files().keys() == SERVED | {"README.md"} | contents(folder).keys()
    with pytest.raises(ClientError, match="ModuleNotFoundError"):
        reader("import hydravit_hf")
    check(reader.logits("user/tiny", images), model, images)
    check(reader.logits("user/tiny", images, num_attention_heads=3), model, images, 3)
    check(reader.logits("user/tiny", images, num_heads_active=3), model, images, 3)
    backbone = """
from transformers import AutoBackbone
backbone = AutoBackbone.from_pretrained("user/tiny", trust_remote_code=True, num_heads_active=3, out_indices=[0, 2])
result = [list(feature_map.shape) for feature_map in backbone(torch.tensor(images)).feature_maps]
"""
    assert reader(backbone, images=images.tolist()) == [[3, 24, 4, 4]] * 2
    assert reader('result = AutoImageProcessor.from_pretrained("user/tiny").size["height"]') == 16


def test_saving_with_push_to_hub_publishes_the_files_that_it_saves(hub, user, save, tmp_path):
    folder, _ = save()
    user(
        'load(folder).save_pretrained(again, push_to_hub=True, repo_id="user/saved", max_shard_size="100KB")',
        folder=str(folder),
        again=str(tmp_path / "again"),
    )
    saved, repo = contents(tmp_path / "again"), hub.repos["user/saved"]
    assert "model.safetensors.index.json" in saved
    assert len(repo.commits) == 2
    assert {name: data for name, data in repo.files().items() if name not in SERVED} == saved


def test_a_revision_names_what_is_loaded(hub, user, reader, save, images):
    pushed = [save(str(number)) for number in range(3)]
    first = push(user, pushed[0][0], "user/revisions")
    push(user, pushed[1][0], "user/revisions")
    push(user, pushed[2][0], "user/revisions", revision="tests/other")
    assert hub.repos["user/revisions"].branches.keys() == {"main", "tests/other"}
    for client in (user, reader):
        for revision, (_, model) in zip((first, "main", "tests/other"), pushed, strict=True):
            options = {"revision": revision, "num_attention_heads": 3}
            check(client.logits("user/revisions", images, **options), model, images, 3)


def test_a_private_model_loads_with_a_token_of_its_owner_only(hub, user, reader, save, images, tmp_path):
    folder, model = save()
    push(user, folder, "user/private", private=True)
    assert hub.repos["user/private"].private
    assert not hub.repos["user/tiny"].private
    check(reader.logits("user/private", images, token="hf_user", num_attention_heads=3), model, images, 3)
    for token in (False, "hf_other"):
        for client in (user, reader):
            with pytest.raises(
                ClientError, match=r"(?s)OSError.*: user/private .* private repository.* token"
            ) as error:
                client.logits("user/private", images, token=token, num_attention_heads=3, cache_dir=str(tmp_path))
            assert len(str(error.value)) < 500


def test_a_repository_that_does_not_exist_is_one_error_that_names_it(user, reader, images, hub, save):
    push(user, save()[0], "user/existing")
    for client in (user, reader):
        for options in ({}, {"num_attention_heads": 3}):
            with pytest.raises(ClientError, match=r"OSError.*: user/nothing is not"):
                client.logits("user/nothing", images, **options)
            with pytest.raises(ClientError, match=r"(?s)OSError.*: typo is not a valid git id.*user/existing"):
                client.logits("user/existing", images, revision="typo", **options)


def test_weights_are_downloaded_once(hub, user, reader, save, images):
    folder, model = save()
    push(user, folder, "user/cached")
    for client in (user, reader):
        before = len(hub.log)
        check(client.logits("user/cached", images), model, images)
        assert sum(path.startswith("/storage/") for _, path in hub.log[before:]) == 1
        before = len(hub.log)
        check(client.logits("user/cached", images, num_attention_heads=3), model, images, 3)
        assert not [path for method, path in hub.log[before:] if method == "GET" and not path.startswith("/api/")]


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub, user, save, images):
    folder, model = save()
    push(user, folder, "user/cut")
    with hub.fail(lambda method, path: path.startswith("/storage/"), "cut", times=1) as fault:
        check(user.logits("user/cut", images, num_attention_heads=3), model, images, 3)
    assert fault["times"] == 0


@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize(
    "options", [{}, {"num_attention_heads": 3}, {"num_labels": 7}], ids=["as it is", "narrow", "labels"]
)
def test_a_load_that_can_not_fetch_the_weights_is_an_error_and_no_model(
    hub, user, save, images, tmp_path, options, times
):
    push(user, save()[0], "user/broken")
    options = options | {"ignore_mismatched_sizes": True, "cache_dir": str(tmp_path / "cache")}
    with (
        hub.fail(lambda method, path: path.startswith("/storage/"), 500, times),
        pytest.raises(ClientError, match=r"(?s)OSError.*user/broken"),
    ):
        user.logits("user/broken", images, **options)


def test_a_push_during_a_load_never_mixes_two_commits(hub, user, save, images, tmp_path):
    first, model = save("first")
    second, narrow = save("second", heads=4)
    push(user, first, "user/race")
    oid = push(user, second, "user/race", revision="next")
    branches = hub.repos["user/race"].branches

    def advance():
        branches["main"] = oid

    with hub.fail(lambda method, path: method == "GET" and path.endswith("/config.json"), advance, times=1) as fault:
        check(user.logits("user/race", images), model, images)
    assert fault["times"] == 0
    check(user.logits("user/race", images), narrow, images)


def test_the_cache_is_enough_offline_and_its_lack_is_one_error(hub, user, save, images, tmp_path):
    folder, model = save()
    push(user, folder, "user/offline")
    check(user.logits("user/offline", images), model, images)
    with Client(hub, user.home, WITH_THE_PACKAGE, HF_HUB_OFFLINE="1") as client:
        before = len(hub.log)
        for options in ({}, {"num_attention_heads": 3}):
            check(client.logits("user/offline", images, **options), model, images, options.get("num_attention_heads"))
            with pytest.raises(ClientError, match=r"OSError.*: We couldn't connect to 'http://127.0.0.1"):
                client.logits("user/offline", images, cache_dir=str(tmp_path / "empty"), **options)
        assert hub.log[before:] == []


@pytest.mark.slow  # the client tries for 23 seconds; its fast sibling is the test above
def test_the_cache_is_enough_without_a_network_and_its_lack_is_one_error(hub, user, save, images, tmp_path):
    folder, model = save()
    push(user, folder, "user/alone")
    with HubServer() as other:
        other.repos, other.storage = hub.repos, hub.storage
        client = Client(other, tmp_path, WITHOUT_THE_PACKAGE)
        check(client.logits("user/alone", images), model, images)
    with client:
        check(client.logits("user/alone", images, num_attention_heads=3), model, images, 3)
        with pytest.raises(ClientError, match=r"OSError.*: We couldn't connect to 'http://127.0.0.1"):
            client.logits("user/alone", images, cache_dir=str(tmp_path / "empty"))


def downloaded(hub: HubServer, start: int) -> int:
    return hub.bytes_sent("/storage/", start)


def test_a_width_downloads_its_files_only_and_a_wider_one_the_difference(hub, user, save, images, tmp_path):
    folder, model = save()
    push(user, folder, "user/by-width", shard_by_heads=[2, 4])
    sizes = {path: len(data) for path, data in hub.repos["user/by-width"].files().items() if "-heads." in path}
    assert sorted(sizes) == [f"model-0{heads}-heads.safetensors" for heads in (2, 4, 6)]
    for setup in (WITH_THE_PACKAGE, WITHOUT_THE_PACKAGE):
        home = tmp_path / str(len(setup))
        home.mkdir()
        with Client(hub, home, setup) as client:
            for num_heads, names in ((2, [2]), (1, []), (3, [4]), (4, []), (6, [6]), (None, [])):
                start = len(hub.log)
                options = {} if num_heads is None else {"num_attention_heads": num_heads}
                check(client.logits("user/by-width", images, **options), model, images, num_heads)
                expected = sum(sizes[f"model-0{heads}-heads.safetensors"] for heads in names)
                assert 0 <= downloaded(hub, start) - expected < 1000 * len(names) + 1  # the head of each answer
                getting = [path for method, path in hub.log[start:] if method == "GET" and "/storage/" in path]
                assert len(getting) == len(names)
        with Client(hub, home, setup, HF_HUB_OFFLINE="1") as client:
            check(client.logits("user/by-width", images, num_attention_heads=3), model, images, 3)


def test_offline_a_width_whose_files_are_missing_is_one_error(hub, user, save, images, tmp_path):
    folder, model = save(shard_by_heads=True)
    push(user, folder, "user/part")
    cache = {"cache_dir": str(tmp_path / "cache")}
    check(user.logits("user/part", images, num_attention_heads=3, **cache), model, images, 3)
    for num_heads in (1, 3):
        options = {"num_attention_heads": num_heads, "local_files_only": True, **cache}
        check(user.logits("user/part", images, **options), model, images, num_heads)
    with pytest.raises(ClientError, match=r"OSError.*: We couldn't connect"):
        user.logits("user/part", images, num_attention_heads=4, local_files_only=True, **cache)


def test_files_by_width_of_two_commits_never_mix(hub, user, save, images, tmp_path):
    """A push between two files of one download: those of the commit that it began with go on."""
    first, model = save("first", shard_by_heads=True)
    second, other = save("second", shard_by_heads=True)
    push(user, first, "user/moving")
    oid = push(user, second, "user/moving", revision="next")
    branches = hub.repos["user/moving"].branches

    def advance():
        branches["main"] = oid

    with hub.fail(lambda method, path: path.endswith("model-03-heads.safetensors"), advance, times=1) as fault:
        check(user.logits("user/moving", images), model, images)
    assert fault["times"] == 0
    check(user.logits("user/moving", images, num_attention_heads=3), other, images, 3)


def test_weights_of_one_format_replace_those_of_the_other_in_the_repository(hub, user, reader, save, images):
    folder, model = save()
    push(user, folder, "user/formats", include=["notes.txt"])
    for options in ({"shard_by_heads": True}, {"shard_by_heads": [3]}, {}):
        model.classifier.bias.data += 1
        model.save_pretrained(folder)
        push(user, folder, "user/formats", **options)
        names = {name for name in hub.repos["user/formats"].files() if "safetensors" in name}
        if options:
            index = json.loads(hub.repos["user/formats"].files()["model.safetensors.index.json"])
            assert names == {"model.safetensors.index.json", *index["weight_map"].values()}
        else:
            assert names == {"model.safetensors"}
        check(reader.logits("user/formats", images), model, images)
        check(reader.logits("user/formats", images, num_attention_heads=2), model, images, 2)


def test_files_by_width_that_do_not_belong_together_are_not_published(hub, user, save):
    folder, _ = save(shard_by_heads=True)
    other, _ = save("other", shard_by_heads=True)
    shutil.copy(other / "model-02-heads.safetensors", folder)
    for options in ({}, {"shard_by_heads": True}):
        with pytest.raises(ClientError, match=r"ValueError.*model-02-heads.safetensors' belongs to another"):
            push(user, folder, "user/damaged", **options)
    with pytest.raises(ClientError, match=r"ValueError.*`shard_by_heads` must list"):
        push(user, other, "user/damaged", shard_by_heads=[7])
    assert "user/damaged" not in hub.repos


KILL_WHILE_DOWNLOADING = """
import json, os, random, signal, sys, time, traceback
import torch
from huggingface_hub import constants
from hydravit_hf import HydraViTForImageClassification

repo, cache, kills, longest, num_heads = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
constants.DOWNLOAD_CHUNK_SIZE = 2**14  # what the client writes at once; it is 10 MB, and the model has 3
torch.set_num_threads(1)

def in_child(work, *arguments):
    child = os.fork()  # this process itself never starts a thread, so that its children can
    if child == 0:
        status = 1
        try:
            status = work(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child

def load(number, **options):
    try:
        folder = f"{cache}/{number}"
        loaded = HydraViTForImageClassification.from_pretrained(
            repo, num_attention_heads=num_heads, cache_dir=folder, **options
        )
    except OSError:
        return 2
    (value,) = {value.item() for parameter in loaded.parameters() for value in parameter.unique()}
    return 0 if value == 1 else 3

random.seed(0)
number = interrupted = 0
while interrupted < kills:
    child = in_child(load, number)
    time.sleep(random.uniform(0.05, longest))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    interrupted += status == signal.SIGKILL
    rest = os.waitstatus_to_exitcode(os.waitpid(in_child(lambda: load(number, local_files_only=True)), 0)[1])
    assert rest in (0, 2), rest  # a whole model or an error
    number += rest == 0  # a new cache
assert os.waitpid(in_child(load, number), 0)[1] == 0
print(number + 1, "downloads")
"""


def constant_folder(folder: Path, **options) -> int:
    """Save a model whose weights are all 1, so that a mixture or a gap is seen. Returns the size of its files."""
    config = HydraViTConfig(num_attention_heads=6, head_dim=32, num_hidden_layers=2, image_size=16, patch_size=4)
    model = HydraViTForImageClassification(config)
    for parameter in model.parameters():
        parameter.data.fill_(1)
    model.save_pretrained(folder, **options)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_download_that_is_killed_goes_on_where_it_was(user, tmp_path, kills):
    size = constant_folder(tmp_path / "saved", shard_by_heads=True)
    with HubServer({"hf_user": "user"}, rate=4e6) as slow:
        with Client(slow, tmp_path, WITH_THE_PACKAGE, "hf_user") as client:
            push(client, tmp_path / "saved", "user/killed")
        start = len(slow.log)
        command = [sys.executable, "-c", KILL_WHILE_DOWNLOADING, "user/killed", str(tmp_path / "cache")]
        environment = client_environment(slow, tmp_path, None)
        result = subprocess.run(
            [*command, str(kills), "0.5", "6"], env=environment, capture_output=True, text=True, timeout=500
        )
        assert result.returncode == 0, result.stderr[-3000:]
        downloads = int(result.stdout.split()[0])
        again = slow.bytes_sent("/storage/", start) / (downloads * size)
    assert again < 1 + 0.5 * kills / downloads  # what a kill loses is in buffers of the connection


def test_a_folder_is_published_in_one_commit_without_what_training_left(hub, user, save):
    folder, model = save(max_shard_size="100KB")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "results.json").write_text("[]\n")
    plot_accuracy([{"num_heads": 3, "accuracy": 0.5, "macs": 1e6}], folder / "accuracy_over_macs.png", "images")
    expected = contents(folder)
    for name in (
        "checkpoint-20/model.safetensors",
        "_saving/model.safetensors",
        "run.json",
        "runs/May01/events.out.tfevents.1",
        "hydravit/events.out.tfevents.1",
        "hydravit/1/hparams.yml",
        ".cache/huggingface/upload",
        ".env",
        "id_rsa",
        "notes.txt",
        "optimizer.pt",
        "trained_weights.safetensors",
        "training_args.bin",
        "other/model.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"left by training")
    (folder.parent / "secret").write_text("outside of the folder")
    (folder / "LICENSE").symlink_to(folder.parent / "secret")
    before = len(hub.log)
    oid = push(user, folder, "whole", commit_message="A message")  # the user's name is that of the token
    repo = hub.repos["user/whole"]
    assert list(repo.commits)[1:] == [oid]
    assert {name: data for name, data in repo.files().items() if name not in SERVED} == expected
    assert [path for method, path in hub.log[before:] if "/commit/" in path] == ["/api/models/user/whole/commit/main"]
    assert push(user, folder, "user/whole") == oid  # nothing is new
    model.save_pretrained(folder)
    assert push(user, folder, "user/whole") == list(repo.commits)[2]
    assert repo.files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "part", "how"),
    [("PUT", "/storage/", 500), ("POST", "/commit/", 500), ("POST", "/commit/", "cut"), ("POST", "/preupload/", 403)],
)
def test_a_push_that_breaks_leaves_the_repository_as_it_was(hub, user, save, method, part, how):
    push(user, save("old")[0], "user/kept")
    repo = hub.repos["user/kept"]
    before = (dict(repo.branches), dict(repo.commits))
    folder, _ = save("new")
    with (
        hub.fail(lambda found, path: found == method and part in path, how),
        pytest.raises(ClientError, match="OSError"),
    ):
        push(user, folder, "user/kept")
    assert (repo.branches, repo.commits) == before
    push(user, folder, "user/kept")
    assert repo.files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_further_files_are_published_by_pattern_only(hub, user, save):
    folder, _ = save()
    for name in ("examples/cat.jpg", "examples/more/dog.jpg", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"a file")
    push(user, folder, "patterns", include=["examples/*.jpg"])
    found = hub.repos["user/patterns"].files()
    assert "examples/cat.jpg" in found and not {"examples/more/dog.jpg", "notes.txt"} & found.keys()


def test_the_handler_of_an_endpoint_is_published_and_never_replaces_another(hub, user, save):
    folder, _ = save()
    push(user, folder, "user/endpoint", endpoint=True)
    assert hub.repos["user/endpoint"].files()["handler.py"] == HANDLER.read_bytes()
    assert not (folder / "handler.py").exists()
    (folder / "handler.py").write_text("mine")
    with pytest.raises(ClientError, match=r"ValueError.*handler\.py of its own"):
        push(user, folder, "user/endpoint", endpoint=True)


def test_an_upload_that_is_cut_once_is_repeated(hub, user, save):
    folder, _ = save()
    with hub.fail(lambda method, path: method == "PUT", "cut", times=1) as fault:
        push(user, folder, "user/repeated")
    assert fault["times"] == 0
    assert hub.repos["user/repeated"].files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def truncate(folder: Path, name: str = "model.safetensors"):
    os.truncate(folder / name, (folder / name).stat().st_size - 1)


def write_card(metadata: str):
    return lambda folder: (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")


DAMAGES = {
    "no folder": (shutil.rmtree, "FileNotFoundError.*There is no folder"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "FileNotFoundError.*has no config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "ValueError.*config.json' is not JSON"),
    "another model": (lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'), "ValueError.*'vit'"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "FileNotFoundError.*has no weights"),
    "truncated weights": (truncate, "ValueError.*model.safetensors' is not a whole"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "ValueError.*is not a whole"),
    "a card that is no mapping": (write_card("- license"), "ValueError.*README.md"),
    "a card that is no YAML": (write_card("license: [mit"), "ValueError.*README.md"),
    "a card with a licence that there is not": (write_card("license: my own"), "ValueError.*README.md.*license"),
    "a card without the name of its data": (write_card("datasets: [null]"), "ValueError.*README.md.*datasets"),
    "a card with a number for a tag": (write_card("tags: [birds, 5]"), "ValueError.*README.md.*tags"),
    "a card with a bad model-index": (write_card("model-index:\n- name: digits"), "ValueError.*README.md"),
}


def test_the_code_on_a_pushed_card_loads_the_repository_as_it_stands(hub, user, reader, save, tmp_path):
    folder, model = save()
    rows = [{"num_heads": num_heads, "accuracy": 0.5} for num_heads in (3, 6)]
    save_model_card(folder, model, rows, "saved", model_id="runs/saved")
    before = contents(folder)
    push(user, folder, "carded")  # the user's name is that of the token
    card = hub.repos["user/carded"].files()["README.md"].decode()
    assert 'path = "user/carded"' in card and "runs/saved" not in card
    assert contents(folder) == before
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    image = f"image = {str(tmp_path / 'image.png')!r}"
    blocks = re.findall("```python\n(.*?)```", card, flags=re.DOTALL)
    with_package = "\n".join(blocks[:2]).replace('image = "image.png"', image)
    assert user(f"{with_package}\nresult = vit.num_parameters()") == model.config.count_parameters(3)
    without = "\n".join(blocks[2:]).replace('image = "image.png"', image)
    assert reader(f"{without}\nresult = len(features), len(features[0])") == [1, 3 * model.config.head_dim]


def test_a_folder_without_a_card_is_published_and_told_how_to_make_one(hub, user, save):
    folder, _ = save()
    push(user, folder, "user/cardless")
    assert "README.md" not in hub.repos["user/cardless"].files()
    evaluate = f"`hydravit evaluate {folder} IMAGES --output {folder}/results.json`, and then "
    card = f"`hydravit card {folder}` makes one; then push again."
    assert f"'{folder}' has no card README.md. {evaluate}{card}" in user.errors.read_text()
    (folder / "results.json").write_text("[]")
    push(user, folder, "user/cardless")
    assert f"'{folder}' has no card README.md. {card}" in user.errors.read_text()


def test_a_stranger_runs_the_card_of_an_elastic_vit_as_it_stands(hub, user, tmp_path):
    """elastify, a card, a push in files by width; then a process without the package and with an empty cache."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 192, "num_hidden_layers": 1}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=10)).eval()
    processor, digits = make_image_processor(vit.config), load_digits()
    images = {name: digits[name].with_transform(to_pixel_values(processor)) for name in digits}
    model = elastify(vit, images["train"], max_images=64)
    folder = tmp_path / "elastic"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    rows = evaluate_subnetworks(model, images["test"].select(range(64)), disable_tqdm=True)
    save_model_card(folder, model, rows, "elastic", dataset_name="64 digits", ordered_from="a new ViT")
    push(user, folder, "user/elastic", shard_by_heads=[3])

    repo = hub.repos["user/elastic"].files()
    card = ModelCard(repo["README.md"].decode())
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    assert html.count("<tr>") == 1 + len(rows) and "It is a new ViT with its directions" in html
    (plot,) = re.findall('<img src="(.*?)"', html)
    assert repo[plot].startswith(b"\x89PNG")
    assert [result.metric_value for result in card.data.eval_results] == [round(row["accuracy"], 5) for row in rows]

    home = tmp_path / "stranger"
    home.mkdir()
    digit = digits["test"][0]["image"]
    digit.save(home / "image.png")
    blocks = re.findall("```python\n(.*?)```", card.text, flags=re.DOTALL)
    (block,) = (block for block in blocks if "AutoModelForImageClassification" in block)
    start = len(hub.log)
    with Client(hub, home, WITHOUT_THE_PACKAGE) as stranger:
        found = stranger(f"{block}\nresult = small.num_parameters(), classify(image, num_heads_active=3)[0]['score']")
    scores = model(processor(digit, return_tensors="pt").pixel_values, num_heads_active=3).logits.softmax(-1)
    assert found == [model.config.count_parameters(3), pytest.approx(scores.max().item(), abs=1e-4)]
    loaded = [path for method, path in hub.log[start:] if method == "GET" and path.startswith("/storage/")]
    assert len(loaded) == 2  # the narrow model downloads the first file, and the pipeline the other one


@pytest.mark.parametrize(
    "card",
    [
        "---\nbase_model: ./runs/vit\n---\n# A model\n",
        "---\nbase_model: /srv/models/vit\n---\n# A model\n",
        "---\ndatasets: [mnist, ../photos]\n---\n# A model\n",
        "---\nlicense: mit\n---\nAccuracy on /home/ada/photos.\n",
        "---\nlicense: mit\n---\n```yaml\ndata_dir: ~/photos/cats\n```\n",
        "---\nlicense: mit\n---\nTrained on C:\\Users\\ada\\photos.\n",
        "---\nlicense: mit\n---\nTrained on {folder}.\n",
    ],
)
def test_a_card_that_names_what_is_on_this_machine_only_is_refused(hub, user, save, card):
    folder, _ = save()
    (folder / "README.md").write_text(card.replace("{folder}", str(folder)))
    before = len(hub.log)
    with pytest.raises(ClientError, match=r"ValueError.*README.md' names what is on this machine only"):
        push(user, folder, "user/local")
    assert len(hub.log) == before


def test_a_card_may_name_addresses_and_paths_that_are_nobodys(hub, user, save):
    folder, _ = save()
    text = (
        "---\nbase_model: google/vit-base-patch16-224\ndatasets: [mnist]\n---\nSee https://a.b/home/x, and/or 1/2/3.\n"
    )
    (folder / "README.md").write_text(text)
    push(user, folder, "user/addresses")
    assert hub.repos["user/addresses"].files()["README.md"].decode() == text


def test_without_a_token_one_line_says_how_to_get_one(hub, user, save, tmp_path):
    folder, _ = save()
    with Client(hub, tmp_path, WITH_THE_PACKAGE) as nobody, pytest.raises(ClientError, match=r"OSError.*hf auth login"):
        push(nobody, folder, "user/nobody")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_before_anything_is_sent(hub, user, save, damage):
    folder, _ = save()
    spoil, message = DAMAGES[damage]
    spoil(folder)
    before = len(hub.log)
    with pytest.raises(ClientError, match=f"(?s){message}"):
        push(user, folder, "user/damaged")
    assert set(hub.log[before:]) <= {("POST", "/api/validate-yaml")}
    assert "user/damaged" not in hub.repos


def test_a_folder_without_one_of_its_shards_is_refused(hub, user, save):
    folder, _ = save(max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    truncate(folder, shard.name)
    with pytest.raises(ClientError, match=f"ValueError.*{shard.name}' is not a whole"):
        push(user, folder, "user/damaged")
    shard.unlink()
    with pytest.raises(ClientError, match=f"FileNotFoundError.*lacks weights .*: {shard.name}[.]"):
        push(user, folder, "user/damaged")
    assert "user/damaged" not in hub.repos


def test_the_hub_itself_refuses_metadata_that_only_it_checks(hub, user, save):
    folder, _ = save()
    write_card("model-index:\n- name: digits\n  results: []")(folder)
    with (
        hub.fail(lambda method, path: path == "/api/validate-yaml", 400),
        pytest.raises(ClientError, match="ValueError"),
    ):
        push(user, folder, "user/damaged")
    assert "user/damaged" not in hub.repos


def test_a_token_that_may_not_write_is_one_error(hub, user, reader, save):
    folder, _ = save()
    push(user, folder, "user/mine")
    head = dict(hub.repos["user/mine"].branches)
    for options in ({"token": "hf_other"}, {"token": "hf_wrong"}):
        with pytest.raises(ClientError, match=r"HfHubHTTPError.* OSError"):
            push(user, folder, "user/mine", **options)
    assert hub.repos["user/mine"].branches == head


STRANGER = """
import json, sys
sys.modules["hydravit_hf"] = None  # importing it fails
import numpy as np, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from PIL import Image

pixels, labels = (np.load(file) for file in sys.argv[1:])
images = [Image.fromarray(image) for image in pixels]
repo, trust = "user/digits", {"trust_remote_code": True}
small = AutoModelForImageClassification.from_pretrained(repo, num_attention_heads=3, **trust)
pixel_values = AutoImageProcessor.from_pretrained(repo)(images, return_tensors="pt").pixel_values
found = {"model": small(pixel_values).logits.argmax(-1).numpy()}

def ask(pipe, **kwargs):
    return np.array([int(rows[0]["label"]) for rows in pipe(images, batch_size=90, **kwargs)])

found["per call"] = ask(pipeline("hydravit-image-classification", repo, **trust), num_heads_active=3)
found["no task"] = ask(pipeline(model=repo, **trust), num_heads_active=3)
options = {"model_kwargs": {"num_attention_heads": 3}, **trust}
found["stock"] = ask(pipeline("image-classification", repo, **options))
print(json.dumps({name: float((answers == labels).mean()) for name, answers in found.items()}))
"""


@pytest.mark.slow  # its fast siblings are the tests of publishing and of loading without the package
def test_a_stranger_gets_the_accuracy_of_the_training_run(hub, tmp_path):
    """Train, publish; then a process without the package, and the Hub's name alone."""
    sizes = ["--num_attention_heads", "4", "--num_hidden_layers", "1", "--max_train_steps", "60"]
    left = ["--checkpointing_steps", "40", "--with_tracking", "--report_to", "tensorboard"]
    script = Path(__file__).parents[1] / "examples" / "train_accelerate.py"
    command = [sys.executable, str(script), *sizes, *left, "--output_dir", str(tmp_path / "digits")]
    command += ["--push_to_hub", "--hub_model_id", "user/digits"]
    environment = client_environment(hub, tmp_path, "hf_user")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    repo = hub.repos["user/digits"]
    assert f"{hub.url}/user/digits/commit/{repo.branches['main']}" in result.stdout
    names = {file.name for file in (tmp_path / "digits").iterdir() if file.is_file()}
    assert (tmp_path / "digits" / "checkpoint-40").exists() and "run.json" in names
    assert {
        "model.safetensors",
        "pipeline_hydravit.py",
        "preprocessor_config.json",
        "README.md",
        "results.json",
        "accuracy_over_macs.png",
    } < names
    assert repo.files().keys() == SERVED | names - {"run.json", "data.json"}

    digits = load_digits()["test"]
    np.save(tmp_path / "pixels.npy", np.stack([np.asarray(image) for image in digits["image"]]))
    np.save(tmp_path / "labels.npy", digits["label"])
    command = [sys.executable, "-P", "-c", STRANGER, str(tmp_path / "pixels.npy"), str(tmp_path / "labels.npy")]
    environment = client_environment(hub, tmp_path / "stranger", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (row,) = (row for row in json.loads(repo.files()["results.json"]) if row["num_heads"] == 3)
    assert row["accuracy"] > 0.3  # chance is 0.1
    found = json.loads(result.stdout)
    assert found == pytest.approx(dict.fromkeys(("model", "per call", "no task", "stock"), row["accuracy"]))
