"""Real processes: two ranks over gloo, kills and resumptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from support import fsdp_process, gradients_process
from support.cards import check_card
from support.training import SANDWICH, assert_close, assert_equal, make_config, make_model

from hydravit_hf import HydraViTForImageClassification, evaluate_subnetworks, make_image_processor
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.training.averaging import AveragedWeights

# Processes take seconds to start. The fast siblings are in one process: the runs that are resumed and preempted, the
# cards and the evaluation in test_trainer.py, the widths that share no gradients in test_steps.py, the swap of averaged
# weights in their place in test_averaging.py
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(TESTS)}
RUNS = {
    "one width a step": {},
    "sandwich, separate classifiers": {**SANDWICH, "model": {"separate_classifiers": True}, "write_model_card": True},
    "token recycling": {"model": {"token_recycling": True}},
}
KILLED = {"save_strategy": "steps", "save_steps": 4, "ema_decay": 0.9, "augment": True, "mixup_alpha": 0.2, **SANDWICH}
KILLED |= {"per_device_train_batch_size": 96, "model": {"drop_path_rate": 0.1}}  # 7 steps an epoch with two processes


def start(module: str, *arguments, processes: int) -> subprocess.Popen:
    """Start a module of `support`, in several processes over gloo if there are several."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command = [*launcher, module, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def start_training(*runs: dict, processes: int) -> subprocess.Popen:
    return start("support.trainer_process", json.dumps(runs), processes=processes)


def finish(process: subprocess.Popen):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]


def wait_for(process: subprocess.Popen, file: Path):
    """Wait until a run has written a file."""
    deadline = time.monotonic() + 200
    while not file.exists():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_after(process: subprocess.Popen, file: Path):
    """kill -9 all processes of a run once a file is there."""
    wait_for(process, file)
    running = [process, *psutil.Process(process.pid).children(recursive=True)]  # the launcher first
    for one in running:
        one.send_signal(signal.SIGKILL)
    psutil.wait_procs(running[1:])
    process.communicate()


def figures_of(folder: Path) -> dict:
    return json.loads((folder / "figures.json").read_text())


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(autouse=True)
def one_thread():
    """A process of its own has one, too; sums of several would be rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder where two processes have trained each of `RUNS`."""
    folder = tmp_path_factory.mktemp("two")
    runs = [{"output_dir": str(folder / name), "per_device_train_batch_size": 8} | RUNS[name] for name in RUNS]
    finish(start_training(*runs, processes=2))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_with_the_double_batch(two, tmp_path, name):
    finish(start_training({"output_dir": str(tmp_path), "per_device_train_batch_size": 16, **RUNS[name]}, processes=1))
    found, expected = figures_of(two / name), figures_of(tmp_path)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert len(set(expected["losses"])) == 12
    for key in ("eval_1_heads_loss", "eval_2_heads_loss", "eval_4_heads_loss"):
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-3)
    for name in ("eval_1_heads_accuracy", "eval_mean_accuracy"):  # 360 images that two processes share
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], abs=2 / 360)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_two_processes_train_an_adapter_as_one_with_the_double_batch(tmp_path):
    pytest.importorskip("peft")
    run = {"lora": True, **SANDWICH}
    finish(start_training({"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 8, **run}, processes=2))
    finish(start_training({"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 16, **run}, processes=1))
    found, expected = figures_of(tmp_path / "two"), figures_of(tmp_path / "one")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    adapters = [load_file(tmp_path / run / "adapter_model.safetensors") for run in ("two", "one")]
    assert_close(*adapters, atol=1e-4, rtol=0)


def test_processes_share_the_gradients_of_the_trained_heads_and_get_the_same_weights(tmp_path):
    finish(start("support.gradients_process", tmp_path / "counts.json", processes=2))
    ordinary, separate, recycling, *others = json.loads((tmp_path / "counts.json").read_text())
    config, heads = make_config(), [heads[0] for heads in gradients_process.STEPS]
    assert ordinary == [config.count_parameters(num_heads) for num_heads in heads]
    stacks = [2 * 10 * (8 * num_heads) + 2 * 10 for num_heads in heads]  # two classifiers more
    assert separate == [count + more for count, more in zip(ordinary, stacks, strict=True)]
    assert set(recycling) == {make_model(subnetwork_heads=[1, 2, 4], token_recycling=True).num_parameters()}
    assert others and set(others) == {"own"}  # the user's own hook stays


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    transform = to_pixel_values(make_image_processor(make_config()))
    return [*load_digits()["test"].with_transform(transform)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_evaluate_each_image_once_as_one_process_does(two, held_out, name):
    model, figures = HydraViTForImageClassification.from_pretrained(two / name), figures_of(two / name)
    for row, expected in zip(figures["rows"], evaluate_subnetworks(model, held_out[:37]), strict=True):
        assert row == pytest.approx(expected, rel=1e-6)
    for expected in evaluate_subnetworks(model, held_out):
        for score in ("accuracy", "loss"):
            found = figures["metrics"][f"eval_{expected['num_heads']}_heads_{score}"]
            assert found == pytest.approx(expected[score], rel=1e-6)


def test_two_processes_write_one_card_with_the_numbers_of_their_model(two, held_out):
    folder = two / "sandwich, separate classifiers"
    check_card(folder, HydraViTForImageClassification.from_pretrained(folder), held_out, [1, 2, 4])
    assert "| latency |" in (folder / "README.md").read_text()
    assert not (two / "one width a step" / "README.md").exists()


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
    assert_close(weights_in(tmp_path / "two"), weights_in(tmp_path / "one"), atol=1e-4, rtol=1e-3)


def test_two_processes_that_are_killed_or_preempted_and_resumed_end_with_the_weights_of_some_that_were_not(tmp_path):
    names = ("whole", "killed", "preempted")
    whole, killed, preempted = ({"output_dir": str(tmp_path / name), **KILLED} for name in names)
    kill_after(start_training(killed, processes=2), tmp_path / "killed" / "checkpoint-8")
    launched = start_training(preempted, processes=2)
    wait_for(launched, tmp_path / "preempted" / "checkpoint-4")
    psutil.Process(launched.pid).children()[1].send_signal(signal.SIGTERM)  # one of the two tells the other
    finish(launched)
    assert not list(tmp_path.glob("*/figures.json"))
    finish(start_training(whole, killed | {"resume": True}, preempted | {"resume": True}, processes=2))
    for name in names[1:]:
        check_resumed(tmp_path, name)


def check_resumed(folder: Path, name: str):
    """Check that a run that did not end by itself, and was resumed, has ended as the whole one."""
    assert_equal(weights_in(folder / name), weights_in(folder / "whole"))
    assert figures_of(folder / name)["losses"] == figures_of(folder / "whole")["losses"]
    loaded = HydraViTForImageClassification.from_pretrained(folder / name, num_attention_heads=2)
    assert loaded.config.num_attention_heads == 2


def test_fsdp2_trains_as_one_process_and_saves_one_checkpoint_that_loads_at_every_width(tmp_path):
    finish(start("support.fsdp_process", tmp_path, processes=2))
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
