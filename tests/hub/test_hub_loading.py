"""Loading by id: `huggingface_hub`'s own client, in processes of its own, against a Hub on loopback."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.disks import contents
from support.hub_client import (
    SERVED,
    WITH_THE_PACKAGE,
    WITHOUT_THE_PACKAGE,
    Client,
    ClientError,
    check,
    client_environment,
    push,
)
from support.hub_server import HubServer

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification


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
            cached = client.logits("user/by-width", images, num_attention_heads=3, local_files_only=True)
            check(cached, model, images, 3)


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


@pytest.mark.parametrize("kills", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_a_download_that_is_killed_goes_on_where_it_was(hub, user, tmp_path, monkeypatch, kills):
    repo = f"user/killed-{kills}"
    size = constant_folder(tmp_path / "saved", shard_by_heads=True)
    push(user, tmp_path / "saved", repo)
    monkeypatch.setattr(hub, "rate", 4e6)
    start = len(hub.log)
    command = [sys.executable, "-c", KILL_WHILE_DOWNLOADING, repo, str(tmp_path / "cache"), str(kills), "0.5", "6"]
    environment = client_environment(hub, tmp_path, None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    downloads = int(result.stdout.split()[0])
    again = hub.bytes_sent("/storage/", start) / (downloads * size)
    assert again < 1 + 0.5 * kills / downloads  # what a kill loses is in buffers of the connection
