"""A full disk is one error that says so; what was saved before is intact, and nothing half-written stays.

The disk is a real one of a few megabytes, where this process may mount it. Everywhere else, and for what it can't show,
the largest size of a file is limited in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from support.hub_server import HubServer, Repo, is_large, object_id
from test_convert_checkpoint import training_file

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.convert_checkpoint import convert_and_save
from hydravit_hf.training.runs import list_checkpoints, save_checkpoint

FULL = "No space left on device|os error 28|File too large|os error 27"
LIMITED = """
import resource, signal
from hydravit_hf import HydraViTForImageClassification
{setup}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error instead
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    {work}
except Exception as error:
    print(*[kind.__name__ for kind in type(error).__mro__], error)
"""


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def large_model(make_model):
    """One whose weights are 1.8 MB, and so fit once and not twice."""
    return make_model(head_dim=16, num_hidden_layers=4)


def fill(disk: Path, left: int = 0) -> Path:
    """A file that takes all but `left` bytes of the disk."""
    (disk / "blocks").write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return disk / "blocks"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def limited(setup: str, work: str, **environment: str) -> str:
    """What the error says when `work` writes more than 100 kB into one file."""
    command = [sys.executable, "-c", LIMITED.format(setup=setup, work=work)]
    environment = os.environ | environment
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("max_shard_size", ["1GB", "300KB"])
def test_a_save_on_a_full_disk_keeps_the_checkpoint_that_was_there(large_model, disk, max_shard_size):
    folder = disk / "saved"
    large_model.save_pretrained(folder, max_shard_size=max_shard_size)
    before = contents(folder)
    for parameter in large_model.parameters():
        parameter.data += 1
    with pytest.raises(OSError, match=FULL):
        large_model.save_pretrained(folder, max_shard_size=max_shard_size)
    assert contents(folder) == before
    assert not (folder / "_saving").exists()
    with pytest.raises(OSError, match=FULL):
        large_model.extract_subnetwork(5).save_pretrained(disk / "other")
    assert contents(disk / "other") == {}
    blocks = fill(disk)
    with pytest.raises(OSError, match=FULL):
        large_model.extract_subnetwork(1).save_pretrained(folder)
    assert contents(folder) == before
    blocks.unlink()
    loaded = HydraViTForImageClassification.from_pretrained(folder)
    for old, new in zip(loaded.parameters(), large_model.parameters(), strict=True):
        assert torch.equal(old + 1, new)
    del loaded, old  # they are mapped from the file
    shutil.rmtree(folder)
    large_model.save_pretrained(folder, max_shard_size=max_shard_size)  # with room again, it works again


@pytest.mark.parametrize("max_shard_size", ["1GB", "300KB"])
def test_a_save_of_too_large_a_file_keeps_the_checkpoint_that_was_there(large_model, tmp_path, max_shard_size):
    large_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    before = contents(tmp_path)
    said = limited(
        f"model = HydraViTForImageClassification.from_pretrained({str(tmp_path)!r})",
        f"model.save_pretrained({str(tmp_path)!r}, max_shard_size={max_shard_size!r})",
    )
    assert "OSError" in said and "too large" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("left", [0, 100_000])
def test_the_state_of_a_run_on_a_full_disk_keeps_the_one_before(large_model, disk, left):
    accelerator = Accelerator()
    model = accelerator.prepare(large_model.extract_subnetwork(4))
    save_checkpoint(accelerator, disk, 1)
    before = contents(disk / "checkpoint-1")
    blocks = fill(disk, left)
    with pytest.raises(Exception, match=FULL):
        save_checkpoint(accelerator, disk, 2)
    assert [folder.name for folder in list_checkpoints(disk)] == ["checkpoint-1"]
    assert contents(disk / "checkpoint-1") == before
    blocks.unlink()
    save_checkpoint(accelerator, disk, 2)
    assert not (disk / "_checkpoint").exists()
    for parameter in model.parameters():
        parameter.data += 1
    accelerator.load_state(str(disk / "checkpoint-2"))
    for name, tensor in large_model.extract_subnetwork(4).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_conversion_onto_a_full_disk_leaves_an_empty_folder(disk, tmp_path):
    source = training_file(tmp_path / "original.pth.tar")
    with pytest.raises(OSError, match=FULL):
        convert_and_save(source, disk / "converted")
    assert contents(disk / "converted") == {}
    shutil.rmtree(disk / "converted")
    said = limited(
        "from hydravit_hf.convert_checkpoint import convert_and_save",
        f"convert_and_save({str(source)!r}, {str(tmp_path / 'converted')!r})",
    )
    assert "OSError" in said and "too large" in said
    assert contents(tmp_path / "converted") == {}
    convert_and_save(source, tmp_path / "converted")  # the empty folder is no obstacle


DOWNLOAD = """
from hydravit_hf import HydraViTForImageClassification
try:
    HydraViTForImageClassification.from_pretrained("user/large", cache_dir={cache!r}, **{options!r})
    print("loaded")
except Exception as error:
    print(*[kind.__name__ for kind in type(error).__mro__], error)
"""


@pytest.mark.slow  # its fast sibling is test_a_load_that_can_not_fetch_the_weights_is_an_error_and_no_model of test_hub
@pytest.mark.parametrize("options", [{}, {"num_attention_heads": 3}])
def test_a_download_onto_a_full_disk_is_an_error_and_no_model(large_model, disk, tmp_path, options):
    large_model.save_pretrained(tmp_path / "saved")
    with HubServer({"hf_user": "user"}) as hub:
        repo = hub.repos["user/large"] = Repo(private=False)
        files = contents(tmp_path / "saved")
        repo.commit("main", files)
        hub.storage |= {object_id(name, data): data for name, data in files.items() if is_large(name, len(data))}
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", DOWNLOAD.format(cache=str(disk / "cache"), options=options)]

        def download() -> str:
            environment = os.environ | settings
            result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
            assert result.returncode == 0, result.stderr[-2000:]
            return result.stdout

        blocks = fill(disk, left=1_000_000)
        said = download()
        assert "OSError" in said and "No space left on device" in said
        assert not list(disk.glob("cache/*/snapshots/*/*.safetensors"))
        blocks.unlink()
        assert download() == "loaded\n"
