"""A full disk is one error that says so. What was saved before is intact, and nothing half-written stays.

Saves of a model are in model/test_checkpoint.py.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from support.disks import FULL, contents, files_of_at_most, fill
from support.hub_server import HubServer, Repo, is_large, object_id
from test_convert_checkpoint import training_file

from hydravit_hf.convert_checkpoint import convert_and_save
from hydravit_hf.training.runs import list_checkpoints, save_checkpoint


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
    with files_of_at_most(100_000), pytest.raises(OSError, match="too large"):
        convert_and_save(source, tmp_path / "converted")
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


@pytest.mark.slow  # its fast sibling is the test of a load that can not fetch the weights, in tests/hub
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
