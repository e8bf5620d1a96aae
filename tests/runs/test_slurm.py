"""The batch scripts on a real Slurm of two nodes (scripts/slurm_lab.sh), with the real trainer."""

import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny_run import OVERRIDES, metrics

from rltrain.runs import checkpoint

ROOT = Path(__file__).parents[2]
LAB = ROOT / "scripts" / "slurm_lab.sh"
STEPS = 10
SHORT = [*OVERRIDES, "evaluation.every_steps=5", "checkpoint.every_steps=0"]
ONE_SECOND_A_STEP = [
    "+reward@rewards.slow=custom",
    "rewards.slow.import_path=slow_reward:same_for_all",
    "+rewards.slow.options={seconds: 1}",
]


def call(*command, env, seconds=60) -> str:
    """Standard output; Slurm's commands may wait for ever, so each has its seconds."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def wait_for(condition, what: str, log: Path, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds:.0f} s; {log.name}:\n{text(log)}"
        time.sleep(0.1)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@dataclass(frozen=True, kw_only=True)
class Job:
    number: str
    log: Path
    env: dict[str, str]

    def field(self, name: str) -> str:
        shown = call("scontrol", "-o", "show", "job", self.number, env=self.env)
        return re.findall(rf"\b{name}=(\S*)", shown)[-1]

    def wait_until_over(self) -> str:
        def over() -> bool:
            return self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        wait_for(over, "the end of the job", self.log)
        return self.field("JobState")


@dataclass(frozen=True, kw_only=True)
class Lab:
    folder: Path
    env: dict[str, str]

    def submit(self, script: str, *arguments, options=(), env=None) -> Job:
        log = self.folder.parent / f"{len(list(self.folder.parent.iterdir()))}.log"
        environment = self.env | (env or {})
        submitted = call(
            "sbatch", "--parsable", f"--output={log}", *options, ROOT / "slurm" / script, *arguments, env=environment
        )
        return Job(number=submitted, log=log, env=self.env)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    folder = tmp_path_factory.mktemp("slurm") / "lab"
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= {"SLURM_LAB": str(folder), "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}
    env |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # a submitting shell's own, which no job may believe
    exported = call(LAB, "start", 2, env=env, seconds=120)
    yield Lab(folder=folder, env=env | {"SLURM_CONF": exported.removeprefix("export SLURM_CONF=")})
    call(LAB, "stop", env=env, seconds=120)
    assert not folder.exists()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in command_line(path)]
    assert left == []


def command_line(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""


def weights_hash(run_dir: Path) -> str:
    saved = checkpoint.list_checkpoints(run_dir)[-1]
    assert saved.step == STEPS
    return hashlib.sha256((saved.policy / "model.safetensors").read_bytes()).hexdigest()


def steps_written(run_dir: Path) -> int:
    return text(run_dir / "metrics.jsonl").count("\n") - 1


@pytest.mark.slurm
def test_a_job_that_is_preempted_and_out_of_time_ends_as_the_unbroken_run(lab, tmp_path):
    run_dir, unbroken = tmp_path / "run", tmp_path / "unbroken"
    overrides = [*SHORT, *ONE_SECOND_A_STEP, f"steps={STEPS}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rltrain.train"]
    command = [sys.executable, *launcher, *overrides, f"run_dir={unbroken}"]
    with (tmp_path / "unbroken.log").open("w") as log:
        other = subprocess.Popen(command, cwd=ROOT, env=lab.env, stdout=log, stderr=log)

    two_nodes = ["--nodes=2", "--ntasks-per-node=1"]
    job = lab.submit("train.sbatch", *overrides, f"run_dir={run_dir}", "tracking.wandb=offline", options=two_nodes)
    wait_for(lambda: steps_written(run_dir) >= 2, "step 2", job.log)
    call("scontrol", "requeue", job.number, env=lab.env)
    wait_for(lambda: text(job.log).count("resumed from") >= 2 and steps_written(run_dir) >= 5, "step 5", job.log)
    call("scancel", "--batch", "--signal=USR1", job.number, env=lab.env)  # what --signal=B:USR1 sends before the limit
    assert job.wait_until_over() == "COMPLETED", text(job.log)
    assert other.wait(timeout=300) == 0, text(tmp_path / "unbroken.log")

    assert job.field("Restarts") == "2"
    starts = (run_dir / "starts.txt").read_text().splitlines()
    assert starts[0] == f"job {job.number} from nothing"
    assert len(set(starts)) == len(starts) == 3
    assert [line["step"] for line in metrics(run_dir)] == list(range(STEPS + 1))
    assert metrics(run_dir) == metrics(unbroken)
    assert weights_hash(run_dir) == weights_hash(unbroken)
    pieces = [path.name.rpartition("-")[2] for path in run_dir.glob("wandb/offline-run-*")]
    assert pieces == [text(run_dir / "wandb_id.txt")] * 3


@pytest.mark.slurm
def test_a_sweep_runs_every_method_with_every_seed(lab, tmp_path):
    methods = tmp_path / "methods.txt"
    methods.write_text("mean advantage=group\nothers advantage=group advantage.baseline=leave_one_out\n")
    job = lab.submit(
        "sweep.sbatch", methods, 1, *SHORT, "steps=1", options=["--array=0-1"], env={"OUT": str(tmp_path / "out")}
    )
    for task in ("0", "1"):
        one = Job(number=f"{job.number}_{task}", log=job.log, env=job.env)
        assert one.wait_until_over() == "COMPLETED", text(job.log)
    baselines = {}
    for run_dir in (tmp_path / "out").iterdir():
        assert [line["step"] for line in metrics(run_dir)] == [0, 1]
        baselines[run_dir.name] = yaml.safe_load((run_dir / "config.yaml").read_text())["advantage"]["baseline"]
    assert baselines == {"mean-seed0": "mean", "others-seed0": "leave_one_out"}


@pytest.mark.slurm
def test_a_run_that_fails_is_not_started_again(lab, tmp_path):
    job = lab.submit("train.sbatch", *OVERRIDES, "steps=-1", f"run_dir={tmp_path / 'run'}")
    assert job.wait_until_over() == "FAILED"
    assert job.field("Restarts") == "0"
    assert "config error: steps=-1: must be >= 0" in text(job.log)
    assert "exit code 2, newest is nothing; not requeued" in text(job.log)


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slurm
def test_a_run_that_gets_no_further_is_not_started_for_ever(lab, tmp_path):
    """A stand-in for the trainer under a time limit that is shorter than a step."""
    env = {"PYTHON": program(tmp_path / "never_saves", "exit 75"), "FRUITLESS_STARTS": "2"}
    job = lab.submit("train.sbatch", f"run_dir={tmp_path / 'run'}", env=env)
    assert job.wait_until_over() == "FAILED"
    assert job.field("Restarts") == "2"
    assert f"2 starts of job {job.number} from nothing came no further (FRUITLESS_STARTS)" in text(job.log)


LISTENS = f"""
while [ "$1" != --port ]; do shift; done
echo "port $2 GPUs $CUDA_VISIBLE_DEVICES"
exec {sys.executable} -m http.server "$2" --bind 127.0.0.1
"""
TRAINERS_AND_SERVERS = ["--nodes=1", "--cpus-per-task=2", ":", "--nodes=1", "--ntasks-per-node=2"]


@pytest.mark.slurm
def test_servers_come_before_the_trainers_and_end_with_them(lab, tmp_path):
    """Stand-ins for vLLM, which only listens, and for the trainer, which is done at its second start."""
    run_dir = tmp_path / "run"
    env = {"VLLM_PYTHON": program(tmp_path / "vllm", LISTENS), "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    trainer = 'echo "$SLURM_CPUS_PER_TASK $@"; exit $((SLURM_RESTART_COUNT ? 0 : 75))'
    env["PYTHON"] = program(tmp_path / "trainer", trainer)
    overrides = ["+experiment=NAME", f"run_dir={run_dir}"]
    job = lab.submit("vllm.sbatch", "MODEL", *overrides, options=TRAINERS_AND_SERVERS, env=env)
    wait_for(lambda: "requeued" in text(job.log), "the requeue", job.log)
    # Nothing else happens here, and Slurm looks at jobs of several parts only when something does.
    call("sbatch", "--begin=now+7", "--output=/dev/null", "--wrap=true", env=lab.env)
    assert job.wait_until_over() == "COMPLETED", text(job.log)
    assert job.field("Restarts") == "1"
    port = 10000 + int(job.number) * 10
    urls = f"rollout.urls=[http://127.0.0.1:{port},http://127.0.0.1:{port + 1}]"
    asked = ["2 -m rltrain.train", f"run_dir={run_dir}", *overrides, "rollout=vllm", "rollout.mode=server", urls]
    assert text(job.log).count(f"0: {' '.join(asked)}\n") == 2
    for place, gpus in enumerate(("0,1", "2,3")):
        assert f"port {port + place} GPUs {gpus}" in text(job.log.with_name(f"{job.log.name}.server-{place}.out"))
        assert socket.socket().connect_ex(("127.0.0.1", port + place)) != 0


@pytest.mark.slurm
def test_servers_that_never_answer_end_the_job_with_what_they_said(lab, tmp_path):
    env = {"VLLM_PYTHON": program(tmp_path / "vllm", "echo no model of this name; exit 7")}
    job = lab.submit("vllm.sbatch", "MODEL", "+experiment=NAME", options=TRAINERS_AND_SERVERS, env=env)
    assert job.wait_until_over() == "FAILED"
    for line in ("no model of this name", "ended with 7 before it answered", "all servers ended before any answered"):
        assert line in text(job.log)


@pytest.mark.parametrize("command", [["stop"], ["start", "2"]])
def test_the_lab_leaves_a_folder_alone_that_it_has_not_made(tmp_path, command):
    (tmp_path / "mine").write_text("kept")
    env = os.environ | {"SLURM_LAB": str(tmp_path)}
    done = subprocess.run([LAB, *command], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(f"no lab in {tmp_path}|{tmp_path}: exists|not installed|must be root", done.stderr)
    assert (tmp_path / "mine").read_text() == "kept"
