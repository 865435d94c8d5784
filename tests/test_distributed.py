"""Real processes: two ranks over gloo, kills and resumptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsdp_process
import psutil
import pytest
import torch
from safetensors.torch import load_file

from hydravit_hf import HydraViTForImageClassification
from hydravit_hf.training.averaging import AveragedWeights

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(script: Path, *arguments, processes: int) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, str(script), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    return out


def train(output_dir: Path, processes: int = 1, **options) -> dict:
    """Train to the end with `HydraViTTrainer`; its losses and metrics."""
    options = json.dumps({"output_dir": str(output_dir), **options})
    finish(start(TESTS / "trainer_process.py", options, processes=processes))
    return json.loads((output_dir / "figures.json").read_text())


def kill_after(process: subprocess.Popen, file: Path):
    """kill -9 all processes of a run once a file is there."""
    deadline = time.monotonic() + 200
    while not file.exists():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    running = [process, *psutil.Process(process.pid).children(recursive=True)]  # the launcher first
    for one in running:
        one.send_signal(signal.SIGKILL)
    psutil.wait_procs(running[1:])
    process.communicate()


def assert_equal_weights(one: Path, other: Path):
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subnetwork_sampling": "sandwich", "distillation_weight": 0.5, "model": {"separate_classifiers": True}},
        {"model": {"token_recycling": True}},
    ],
    ids=["one width a step", "sandwich, separate classifiers", "token recycling"],
)
def test_two_processes_train_as_one_with_the_double_batch(tmp_path, options):
    two = train(tmp_path / "two", processes=2, per_device_train_batch_size=8, **options)
    one = train(tmp_path / "one", per_device_train_batch_size=16, **options)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert len(set(one["losses"])) == 12
    for key in ("eval_1_heads_loss", "eval_2_heads_loss", "eval_4_heads_loss"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-3)
    for name in ("eval_1_heads_accuracy", "eval_mean_accuracy"):  # 360 images that two processes share
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=2 / 360)


def test_accelerate_launch_trains_in_two_processes_as_in_one_with_the_double_batch(tmp_path):
    options = [
        "--num_attention_heads",
        "4",
        "--num_hidden_layers",
        "1",
        "--max_train_steps",
        "12",
        "--max_grad_norm",
        "0",
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(EXAMPLES / "accelerate_multi_gpu.yaml"), "--num_processes", "2"]
    rows = {}
    for name, command, batch_size in (("two", launch, 8), ("one", [sys.executable], 16)):
        command = [*command, str(EXAMPLES / "train_accelerate.py"), *options, "--output_dir", str(tmp_path / name)]
        command += ["--per_device_train_batch_size", str(batch_size), "--separate_classifiers"]
        result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        assert f"{ {'two': 2, 'one': 1}[name] } processes" in result.stdout
        rows[name] = json.loads((tmp_path / name / "results.json").read_text())
    for two, one in zip(rows["two"], rows["one"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)


def test_each_process_may_draw_its_own_width(tmp_path):
    same = train(tmp_path / "same", processes=2, max_steps=4)
    own = train(tmp_path / "own", processes=2, max_steps=4, one_width_per_process=True, freeze_unused_weights=True)
    assert same["losses"] != own["losses"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_trainer_that_is_killed_and_resumed_ends_with_the_weights_of_one_that_was_not(tmp_path, processes):
    options = {"save_strategy": "steps", "save_steps": 4, "ema_decay": 0.9, "augment": True, "mixup_alpha": 0.2}
    options |= {"subnetwork_sampling": "sandwich", "distillation_weight": 0.5, "per_device_train_batch_size": 96}
    options |= {"model": {"drop_path_rate": 0.1}}  # 7 steps an epoch with two processes, 14 with one
    train(tmp_path / "whole", processes, **options)
    killed = tmp_path / "killed"
    process = start(
        TESTS / "trainer_process.py", json.dumps({"output_dir": str(killed), **options}), processes=processes
    )
    kill_after(process, killed / "checkpoint-8")  # as its folder appears, before it is whole
    assert not (killed / "figures.json").exists()
    train(killed, processes, resume=True, **options)
    assert_equal_weights(tmp_path / "whole", killed)
    whole, resumed = (json.loads((tmp_path / name / "figures.json").read_text()) for name in ("whole", "killed"))
    assert whole["losses"] == resumed["losses"]
    loaded = HydraViTForImageClassification.from_pretrained(killed, num_attention_heads=2)
    assert loaded.config.num_attention_heads == 2


def test_fsdp2_trains_as_one_process_and_saves_one_checkpoint_that_loads_at_every_width(tmp_path):
    finish(start(TESTS / "fsdp_process.py", tmp_path, processes=2))
    model = fsdp_process.make_model()
    optimizer, everything = fsdp_process.make_optimizer(model), slice(None)
    half = fsdp_process.STEPS // 2
    fsdp_process.train(model, optimizer, AveragedWeights(model, 0.9), range(half), everything)
    average = AveragedWeights(model, 0.9)
    fsdp_process.train(model, optimizer, average, range(half, 2 * half), everything)
    for name in ("last", "average"):
        if name == "average":
            average.swap()
        found = HydraViTForImageClassification.from_pretrained(tmp_path / name)
        for weight, expected in zip(found.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)
    images, _ = fsdp_process.make_batch(0)
    for num_heads in (1, 2, 3, 4):
        narrow = HydraViTForImageClassification.from_pretrained(tmp_path / "average", num_attention_heads=num_heads)
        expected = model.eval()(images, num_heads_active=num_heads).logits
        torch.testing.assert_close(narrow(images).logits, expected, atol=1e-4, rtol=1e-4)
