"""Which device a rank takes, with stand-ins for the driver and for torch's count of devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist

from rltrain.errors import ConfigError
from rltrain.rollout.ahead import copy_device
from rltrain.runtime import dist

LISTED = "GPU 0: NVIDIA H200 (UUID: GPU-1)"


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """Let torch count so many devices."""

    def count(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H200 number {device.index}")

    return count


def driver_lists(tmp_path: Path, line: str, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize(("rank", "visible", "index"), [(0, 8, 0), (5, 8, 5), (5, 1, 0), (3, 2, 1)])
def test_a_rank_takes_a_gpu_that_it_sees(gpus, monkeypatch, rank, visible, index):
    gpus(visible)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert dist.device() == torch.device("cuda", index)
    assert dist.device_in_words() == f"cuda:{index} H200 number {index}"


@pytest.mark.parametrize(
    ("rank", "visible", "offset", "index"),
    [(0, 2, 1, 1), (0, 8, 4, 4), (1, 2, 1, 0), (5, 2, 1, 0)],  # Slurm shows tasks 1 and 5 two GPUs each
)
def test_a_copy_that_samples_lies_on_a_gpu_that_the_rank_sees(gpus, monkeypatch, caplog, rank, visible, offset, index):
    gpus(visible)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert copy_device(offset) == torch.device("cuda", index)
    assert not caplog.records


def test_a_single_gpu_in_sight_is_shared_with_its_copy_and_named(gpus, monkeypatch, caplog):
    gpus(1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert copy_device(1) == torch.device("cuda", 0)
    assert [record.getMessage() for record in caplog.records] == [
        "rollout.device_offset=1: rank 0 sees 1 GPU, so it samples on cuda:0, where it trains"
    ]


def test_without_a_gpu_a_copy_lies_beside_the_policy(no_cuda):
    assert copy_device(0) == torch.device("cpu")
    with pytest.raises(ConfigError, match="rollout.device_offset=1: there is no GPU to sample on; set 0"):
        copy_device(1)


def test_the_cpu_is_named_with_its_threads(no_cuda):
    assert dist.device_in_words() == f"cpu ({torch.get_num_threads()} threads)"


def test_a_gpu_that_torch_cannot_use_is_an_error(no_cuda, monkeypatch, tmp_path):
    driver_lists(tmp_path, LISTED, monkeypatch)
    with pytest.raises(ConfigError, match=r"^GPU 0: NVIDIA H200 is here, and torch .*CUDA_VISIBLE_DEVICES= before"):
        dist.refuse_unused_gpu()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_is_not_wanted(no_cuda, monkeypatch, tmp_path, hidden):
    driver_lists(tmp_path, LISTED, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    dist.refuse_unused_gpu()


def test_a_driver_without_a_gpu_is_no_error(no_cuda, monkeypatch, tmp_path):
    driver_lists(tmp_path, "No devices were found", monkeypatch)
    dist.refuse_unused_gpu()


def command(module: str, *words: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    full = kept | {"OMP_NUM_THREADS": "2"} | environment
    arguments = [sys.executable, "-m", module, *words, f"run_dir={tmp_path / 'run'}"]
    return subprocess.run(arguments, env=full, capture_output=True, text=True, timeout=200)


def test_a_command_names_its_device_once(tmp_path):
    done = command("rltrain.plan", "+experiment=quickstart", tmp_path=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    named = [line for line in done.stderr.splitlines() if "device" in line]
    assert [line.split("  start       ")[1] for line in named] == ["device: cpu (2 threads)"]


def test_training_stops_where_torch_cannot_use_the_gpu(tmp_path, no_cuda, monkeypatch):
    if torch.version.cuda is not None:
        pytest.skip("needs a build of torch without CUDA")
    driver_lists(tmp_path, LISTED, monkeypatch)
    done = command("rltrain.train", "+experiment=quickstart", tmp_path=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 2)
    assert done.stderr.splitlines()[1].startswith("config error: GPU 0: NVIDIA H200 is here, and torch")


def test_a_single_process_on_a_gpu_takes_no_port(gpus, monkeypatch):
    """MASTER_PORT is in use, as it is beside another run. gloo stands in for NCCL, which the CPU build lacks."""
    dist.teardown()  # an earlier test's group
    gpus(1)
    backends = []
    join = torch_dist.init_process_group

    def joined(backend, **options):
        backends.append(backend)
        join("gloo", **options)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch_dist, "init_process_group", joined)
    for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        dist.setup(deadline_s=20.0)
        try:
            assert (backends, dist.world_size()) == (["nccl"], 1)
        finally:
            dist.teardown()


def test_two_runs_start_at_once_on_one_host_each_on_its_gpu(tmp_path):
    """As scripts/sweep.sh starts them. Somebody else has the port that both would take by default."""
    script = Path(__file__).parents[2] / "helpers/start_on_stand_in_gpu.py"
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        kept |= {"DS_ACCELERATOR": "cpu", "MASTER_PORT": str(taken.getsockname()[1]), "MASTER_ADDR": "127.0.0.1"}
        runs = [
            subprocess.Popen(
                [sys.executable, script, tmp_path, name, twin],
                env=kept | {"CUDA_VISIBLE_DEVICES": gpu},
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, twin, gpu in (("a", "b", "3"), ("b", "a", "5"))
        ]
        said = [run.communicate(timeout=200)[0].splitlines()[-1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert said == ["cuda:0 GPU 3 1", "cuda:0 GPU 5 1"]
