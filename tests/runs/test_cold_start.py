"""How a cold start is waited for: by its steps, and by the other ranks."""

import multiprocessing
import os
import socket
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments
from trl import SFTTrainer

from rltrain import cli, sft
from rltrain.config import ColdStartConfig
from rltrain.policy.load import load_policy
from rltrain.registry import part_of
from rltrain.runtime import dist
from rltrain.runtime.watchdog import DeadlineError


def _count(steps, pause_s, last):
    for step in range(1, last + 1):
        time.sleep(pause_s)
        steps.value = step
    if not last:
        time.sleep(1000)


@pytest.fixture
def counting():
    """Starts a process that makes steps, and ends it."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(pause_s, last):
        steps = context.Value("q", 0)
        started.append(context.Process(target=_count, args=(steps, pause_s, last)))
        started[-1].start()
        return started[-1], steps

    yield start
    for process in started:
        process.kill()


def test_a_cold_start_may_take_any_time_as_long_as_it_makes_steps(counting):
    process, steps = counting(1.0, 5)
    sft._wait_for(process, steps, deadline_s=3.0)
    assert (process.exitcode, steps.value) == (0, 5)


def test_a_cold_start_without_steps_ends(counting):
    process, steps = counting(0.0, 0)
    with pytest.raises(DeadlineError, match="cold start: nothing for 1 s after step 0; see watchdog.train_s"):
        sft._wait_for(process, steps, deadline_s=1.0)


def _rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.setup(deadline_s=2.0, join_s=200.0)
    dist.main_alone("cold start", lambda: (time.sleep(6), (folder / "made").touch())[0])
    assert (folder / "made").exists()
    (folder / f"seen_{rank}").touch()
    dist.teardown()


def test_the_other_ranks_wait_longer_than_a_collective_may_take(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, tmp_path), nprocs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "seen_0", "seen_1"]


@pytest.mark.parametrize("visible", [1, 8])
def test_a_cold_start_takes_one_gpu_of_those_in_sight(tmp_path, monkeypatch, visible):
    """With more than one in ``n_gpu`` transformers' Trainer goes through DataParallel and multiplies the batch."""
    dist.teardown()  # an earlier test's group, and what accelerate remembers of it
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == visible  # what would be taken
    arguments = sft._arguments(ColdStartConfig(batch_size=4), tmp_path, seed=0, dtype="float32")
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("bfloat16", True)])
def test_a_cold_start_in_bf16_is_autocast_over_fp32_weights(tmp_path, monkeypatch, dtype, autocast):
    trained = []

    class Trainer(SFTTrainer):
        def train(self, *arguments, **options):
            trained.append((self.model.dtype, self.args.bf16))
            return super().train(*arguments, **options)

    monkeypatch.setattr("trl.SFTTrainer", Trainer)
    options = ["+experiment=quickstart", "cold_start.steps=1", "cold_start.problems=4", f"model.dtype={dtype}"]
    sft.train(cli.compose([*options, f"run_dir={tmp_path}"]), tmp_path / "cold_start")
    assert trained == [(torch.float32, autocast)]


def test_runs_of_one_cold_start_share_it_and_go_on_from_a_given_one(tmp_path, capsys, monkeypatch):
    tiny = [
        "model.hidden_size=32",
        "model.layers=1",
        "model.heads=2",
        "model.intermediate_size=64",
        "data=small_integers",
    ]
    options = [*tiny, "cold_start.steps=2", "cold_start.batch_size=2", "cold_start.problems=4"]

    def run_config(name, *more):
        return cli.compose([*options, f"run_dir={tmp_path / name}", *more])

    first = sft.cold_start(run_config("first"))
    assert "done, took" in capsys.readouterr().err
    monkeypatch.setattr(sft, "_run_in_own_process", lambda *arguments: pytest.fail("trained again"))
    second = sft.cold_start(run_config("second", "algorithm=dapo"))
    (shared,) = (path for path in (tmp_path / "cold_starts").iterdir() if path.is_dir())
    assert f"taken from {shared}, trained before with the same settings" in capsys.readouterr().err
    weights = [(tmp_path / name / "cold_start/model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    assert (first, second) == tuple(str(tmp_path / name / "cold_start") for name in ("first", "second"))
    given = cli.compose([*tiny, "data=small_integers", f"cold_start.path={first}", f"run_dir={tmp_path / 'third'}"])
    assert given.cold_start.is_wanted and sft.cold_start(given) == first
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("order", ["data", "shuffled"])
def test_a_cold_start_reads_its_examples_in_the_order_of_the_data_where_asked(tmp_path, monkeypatch, order):
    read = []

    class Trainer(SFTTrainer):
        def training_step(self, model, inputs, *arguments, **options):
            read.extend(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *arguments, **options)

    monkeypatch.setattr("trl.SFTTrainer", Trainer)
    options = ["cold_start.steps=4", "cold_start.batch_size=8", f"cold_start.order={order}", f"run_dir={tmp_path}"]
    config = cli.compose(["+experiment=quickstart", *options])
    sft.train(config, tmp_path / "cold_start")
    policy = load_policy(config.model)
    problems = part_of(config.data).function(config.data, "train")[:32]
    expected = [row["input_ids"] for row in sft.examples(problems, policy, config)]
    as_read = [[token for token in row if token != policy.tokenizer.pad_token_id] for row in read]
    assert (as_read == expected) is (order == "data")
    assert sorted(as_read) == sorted(expected)
