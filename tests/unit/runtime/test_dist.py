"""A process of a Slurm allocation that srun has not started is told so, instead of waiting for its peers."""

import pytest

from rltrain.errors import ConfigError
from rltrain.runtime import dist

VARIABLES = ("SLURM_NTASKS", "SLURM_STEP_ID", "WORLD_SIZE", "RANK", "SLURM_PROCID", "SLURM_JOB_ID")


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def give(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize("step", [None, "4294967290", "4294967291"])
def test_several_tasks_without_a_step_are_refused(environment, step):
    """No step in a batch script's shell; salloc's shell and the batch step may have one of the special numbers."""
    environment(
        SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_JOB_ID="1234", **({} if step is None else {"SLURM_STEP_ID": step})
    )
    with pytest.raises(ConfigError) as error:
        dist.setup(deadline_s=1800)
    assert str(error.value) == (
        "SLURM_NTASKS=2: this process was not started by srun, so its 1 peers will not come; start it with "
        "srun python -m …, submit slurm/train.sbatch, or set WORLD_SIZE=1 RANK=0 to run on one rank"
    )


@pytest.mark.parametrize("values", [
    {}, {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "7"},
    {"SLURM_NTASKS": "2", "WORLD_SIZE": "1"}, {"SLURM_NTASKS": "2", "WORLD_SIZE": "2", "RANK": "0"},
])  # fmt: skip
def test_srun_torchrun_and_one_task_are_not(environment, values):
    environment(**values)
    dist.refuse_tasks_without_srun()
