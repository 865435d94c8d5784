"""Publishing: what arrives at the Hub, and what is refused before anything is sent."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.disks import contents
from support.hub_client import SERVED, WITH_THE_PACKAGE, Client, ClientError, check, push

from hydravit_hf.hub import HANDLER
from hydravit_hf.reporting import plot_accuracy


def truncate(folder: Path, name: str = "model.safetensors"):
    os.truncate(folder / name, (folder / name).stat().st_size - 1)


def write_card(metadata: str):
    return lambda folder: (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")


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
