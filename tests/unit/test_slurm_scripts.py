"""What train.sbatch does with the exit code of its ranks, on stand-ins for srun and scontrol."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = 'echo "srun $*" >>"$CALLS"\nexit "$CODE"'
SCONTROL = """echo "scontrol $*" >>"$CALLS"
case "$*" in
*hostnames*) echo node1 ;;
*node1) echo " NodeName=node1 NodeAddr=10.0.0.1 x" ;;
*job*) echo " JobId=7 JobState=RUNNING Reason=None x" ;;
esac"""


def submit(tmp_path: Path, code: int, **more: str) -> tuple[int, list[str]]:
    for name, body in {"srun": SRUN, "scontrol": SCONTROL, "python": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "CALLS": str(tmp_path / "calls"),
        "CODE": str(code),
        "RUN_DIR": str(tmp_path / "run"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NTASKS": "2",
    }
    done = subprocess.run(["bash", ROOT / "slurm/train.sbatch"], env=environment | more, timeout=60)
    return done.returncode, (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("code", [75, 124, 134, 135, 137, 138, 139, 143])
def test_a_lost_rank_is_requeued(tmp_path, code):
    returned, calls = submit(tmp_path, code)
    assert (returned, calls[-1]) == (code, "scontrol requeue 7")


@pytest.mark.parametrize("code", [0, 1, 2, 133])
def test_an_end_or_an_error_is_not_requeued(tmp_path, code):
    returned, calls = submit(tmp_path, code)
    assert returned == code and "scontrol requeue 7" not in calls


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, ""),
        ({"SLURM_CPUS_PER_TASK": "8"}, "--cpus-per-task=8 --cpu-bind=cores "),
        ({"SLURM_CPUS_PER_TASK": "8", "CPU_BIND": "none"}, "--cpus-per-task=8 --cpu-bind=none "),
    ],
)
def test_the_threads_of_a_rank_are_bound_to_its_cores(tmp_path, variables, words):
    _, calls = submit(tmp_path, 0, **variables)
    (started,) = [call for call in calls if call.startswith("srun")]
    run = f"{tmp_path}/python -m rltrain.train run_dir={tmp_path}/run"
    assert started == f"srun --label --kill-on-bad-exit=0 --wait=300 {words}{run}"
