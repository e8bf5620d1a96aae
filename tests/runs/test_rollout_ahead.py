"""Off-policy by one step: which weights sample what, exact resume, two ranks, servers, and threads that end."""

import dataclasses
import json
import logging
import math
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest
import torch
from small_runs import THINKING
from tiny_run import OVERRIDES, config, metrics
from two_ranks import PERSISTENCE, assert_same_run, train
from whole_runs import assert_same_weights, final_weights, metrics_if_any, wait_for

from rltrain import cli, trainer
from rltrain.batching.collate import empty_batch
from rltrain.data.prompts import PromptSource
from rltrain.errors import ConfigError, RunError
from rltrain.loss import policy_loss
from rltrain.policy.load import load_policy
from rltrain.registry import register
from rltrain.rollout import RolloutLost
from rltrain.rollout.ahead import Ahead, Cancelled
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.runs import checkpoint
from rltrain.runtime.interrupts import EXIT_INTERRUPTED

AHEAD = ["rollout.ahead=true", "evaluation.every_steps=0"]
KEPT = ["checkpoint.every_steps=1", "checkpoint.keep_last=9", "tracking.samples_every_steps=1"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Four steps without interruption."""
    folder = tmp_path_factory.mktemp("ahead") / "run"
    trainer.fit(config(folder, *AHEAD, *KEPT))
    return folder


def samples(run_dir, step):
    return pq.read_table(run_dir / "samples" / f"step_{step:06d}.parquet").to_pylist()


def logprob_error(rows, policy) -> float:
    """The largest difference between the sampler's log-probs and those of plain forwards of a policy."""
    worst = 0.0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
        with torch.no_grad():
            logprobs = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(row["prompt_ids"])
        expected = [float(logprobs[start - 1 + i, token]) for i, token in enumerate(row["token_ids"])]
        worst = max(worst, *(abs(a - b) for a, b in zip(expected, row["logprobs"], strict=True)))
    return worst


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("rollout ahead")]


def test_a_batch_is_sampled_with_the_weights_before_the_last_update(unbroken):
    """Step 1 samples from theta_0, and step s > 1 from theta_{s-2}: its own update begins with theta_{s-1}."""
    saved = {one.step: str(one.policy) for one in checkpoint.list_checkpoints(unbroken)}
    model = config(unbroken).model
    theta = [load_policy(model), *(load_policy(model, path=saved[step]) for step in (1, 2, 3))]
    for step in (1, 2, 3, 4):
        rows = samples(unbroken, step)
        assert logprob_error(rows, theta[max(0, step - 2)]) < 1e-5
        if step > 1:
            assert logprob_error(rows, theta[step - 1]) > 1e-3


def test_staleness_and_the_difference_it_makes_are_logged(unbroken):
    lines = metrics(unbroken)[1:]
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 1]
    assert lines[0]["sampling/sampling_logp_difference/max"] < 1e-5
    assert all(line["sampling/sampling_logp_difference/max"] > 1e-3 for line in lines[1:])
    assert all(line["clip_ratio/region_mean"] == 0 for line in lines), "ratios are to theta_k, not to the sampler"


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "rloo", "cispo"])
def test_one_update_takes_its_own_logprobs_for_the_old_ones(tmp_path, algorithm):
    """Loss and gradient are those with log-probs of a pass before the update, weights w = pi_old / mu included."""
    loss = config(tmp_path, "rollout.ahead=true", f"algorithm={algorithm}").loss
    batch = dataclasses.replace(
        empty_batch(),
        **{name: torch.tensor([0, 1, 1]) for name in ("source_N", "sequence_N", "targets_N", "keys_N")},
        boundaries_S1=torch.tensor([0, 1, 2]),
        weights_N=torch.tensor([0.5, 0.25, 0.25]),
        advantages_N=torch.tensor([1.0, -2.0, 1.0]),
        sampler_logprobs_N=torch.tensor([-1.0, -2.0, -3.0]),
        old_logprobs_N=None,
        remaining_N=None,
        rewards_N=None,
    )
    logprobs_N = torch.tensor([-1.1, -1.0, -3.5])  # w = e^-0.1, e (cut at 2), e^-0.5
    gradients = []
    for old_logprobs_N in (None, logprobs_N):
        current_N = logprobs_N.clone().requires_grad_()
        value = policy_loss(current_N, dataclasses.replace(batch, old_logprobs_N=old_logprobs_N), loss).loss
        value.backward()
        gradients.append(current_N.grad)
    assert torch.equal(*gradients)
    if algorithm != "gspo":
        expected_N = -batch.weights_N * batch.advantages_N * torch.tensor([math.exp(-0.1), 2, math.exp(-0.5)])
        torch.testing.assert_close(gradients[0], expected_N)


def test_staleness_counts_optimiser_steps(tmp_path):
    trainer.fit(config(tmp_path / "run", *AHEAD, "batch.update_epochs=3", "steps=2"))
    assert [line["rollout/staleness"] for line in metrics(tmp_path / "run")[1:]] == [0, 3]


def test_time_beside_the_step_is_no_part_of_it(unbroken):
    lines = [line for line in (unbroken / "metrics.jsonl").read_text().splitlines() if "timing_s/step" in line]
    for line in map(json.loads, lines):
        stages = {key: value for key, value in line.items() if key.startswith("timing_s/")}
        beside, whole = stages.pop("timing_s/rollout_ahead"), stages.pop("timing_s/step")
        assert whole == pytest.approx(sum(stages.values()))
        assert beside > 0 and "timing_s/rollout_wait" in stages


def test_weights_that_stay_give_the_batches_of_the_usual_order(tmp_path):
    """With a rate that moves no fp32 weight it does not matter which weights sample."""
    still = ["optimizer.learning_rate=1e-30", "evaluation.every_steps=0", *KEPT]
    trainer.fit(config(tmp_path / "usual", *still))
    trainer.fit(config(tmp_path / "ahead", *still, "rollout.ahead=true"))
    for step in (1, 2, 3, 4):
        usual, ahead = samples(tmp_path / "usual", step), samples(tmp_path / "ahead", step)
        assert [row["token_ids"] for row in ahead] == [row["token_ids"] for row in usual]
        assert [row["problem_id"] for row in ahead] == [row["problem_id"] for row in usual]


@pytest.mark.parametrize("last", [1, 3])
def test_a_killed_run_goes_on_bit_for_bit(unbroken, tmp_path, last):
    shutil.copytree(unbroken, tmp_path / "run")
    for step in range(last + 1, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    trainer.fit(config(tmp_path / "run", *AHEAD, *KEPT))
    assert metrics(tmp_path / "run") == metrics(unbroken)
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(unbroken))
    assert samples(tmp_path / "run", last + 1) == samples(unbroken, last + 1)


def test_a_prolonged_run_is_the_longer_one(unbroken, tmp_path):
    trainer.fit(config(tmp_path / "run", *AHEAD, *KEPT, "steps=2"))
    trainer.fit(config(tmp_path / "run", *AHEAD, *KEPT))
    assert metrics(tmp_path / "run") == metrics(unbroken)
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(unbroken))


def test_the_waiting_batch_is_under_the_checkpoints_checksums(unbroken, tmp_path):
    shutil.copytree(unbroken / "checkpoints" / "step_000003", tmp_path / "checkpoints" / "step_000003")
    (saved,) = checkpoint.list_checkpoints(tmp_path)
    assert checkpoint.find_damage(saved) is None
    path = saved.path / checkpoint.TENSORS
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert checkpoint.find_damage(saved) == "tensors.safetensors has another checksum"


def test_a_batch_that_answers_other_problems_is_refused(unbroken):
    saved = checkpoint.list_checkpoints(unbroken)[-1]
    run = trainer.build(config(unbroken, *AHEAD, *KEPT))
    state = json.loads((saved.path / "parts.json").read_text())["ahead"]
    other, _ = PromptSource(run.config, run.policy).next(7)
    with pytest.raises(RunError, match="step 5 has other problems .*; restore the data set"):
        run.ahead.restore(4, state, checkpoint.load_tensors(saved), other)
    run.ahead.close()


def test_refills_of_dynamic_sampling_are_of_now_and_resume_exactly(tmp_path):
    dynamic = ["batch.dynamic_sampling=true", "batch.group_size=2", *AHEAD, *KEPT]
    trainer.fit(config(tmp_path / "unbroken", *dynamic))
    lines = metrics(tmp_path / "unbroken")[1:]
    assert all(line["loss_denominator/rows"] == 8 for line in lines)
    assert [line["rollout/staleness"] for line in lines] == [
        pytest.approx((step > 0) / line["dynamic_sampling/attempts"]) for step, line in enumerate(lines)
    ]
    assert any(0 < line["rollout/staleness"] < 1 for line in lines)
    trainer.fit(config(tmp_path / "run", *dynamic, "steps=2"))
    trainer.fit(config(tmp_path / "run", *dynamic))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "unbroken")


def test_evaluations_and_probes_are_of_the_newest_weights(tmp_path):
    """SPAE probes with the policy; the evaluation of a run is that of its checkpoint."""
    probing = ["algorithm=spae", "advantage.delimiter='1'", "batch.dynamic_sampling=false", "evaluation.every_steps=2"]
    trainer.fit(config(tmp_path / "run", "rollout.ahead=true", *probing, "steps=2", "evaluation.temperature=1.0"))
    saved = checkpoint.list_checkpoints(tmp_path / "run")[-1]
    rows = pq.read_table(tmp_path / "run" / "samples" / "eval_step_000002.parquet").to_pylist()
    assert logprob_error(rows, load_policy(config(tmp_path).model, path=str(saved.policy))) < 1e-5


def test_adapters_and_another_type_are_copied_too(tmp_path):
    overrides = ["model.lora.rank=4", "rollout.dtype=bfloat16", *AHEAD, *KEPT, "steps=3"]
    trainer.fit(config(tmp_path / "run", *overrides))
    lines = metrics(tmp_path / "run")[1:]
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1]
    assert all(0 < line["sampling/sampling_logp_difference/mean"] < 0.1 for line in lines)
    model = config(tmp_path, *overrides).model
    saved = next(one for one in checkpoint.list_checkpoints(tmp_path / "run") if one.step == 1)
    assert logprob_error(samples(tmp_path / "run", 3), load_policy(model, path=str(saved.policy))) < 0.1


def test_an_ema_keeps_its_own_tensors_in_the_checkpoint(tmp_path):
    def thinking(folder, steps):
        trainer.fit(cli.compose([*THINKING, *AHEAD, f"run_dir={folder}", f"steps={steps}"]))
        return metrics(folder)

    unbroken = thinking(tmp_path / "unbroken", 3)
    thinking(tmp_path / "run", 2)
    assert thinking(tmp_path / "run", 3) == unbroken


def test_sigterm_saves_the_waiting_batch_and_resumes_exactly(tmp_path):
    arguments = [*AHEAD, "checkpoint.every_steps=0"]
    command = [
        sys.executable,
        "-m",
        "rltrain.train",
        *OVERRIDES,
        *arguments,
        f"run_dir={tmp_path / 'run'}",
        "steps=1000",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(metrics_if_any(tmp_path / "run")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    for folder in ("run", "unbroken"):
        trainer.fit(config(tmp_path / folder, *arguments, f"steps={saved.step + 1}"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "unbroken")
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(tmp_path / "unbroken"))


def test_two_ranks_under_zero_3_are_one_rank_and_resume_bit_for_bit(unbroken, tmp_path):
    sharded = ["deepspeed.zero_stage=3", *(f"+deepspeed.extra.zero_optimization.{key}=0" for key in PERSISTENCE)]
    result = train(tmp_path / "two", 2, *AHEAD, *KEPT, *sharded)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "two", unbroken)
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step_{step:06d}")
    result = train(tmp_path / "resumed", 2, *AHEAD, *KEPT, *sharded)
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "two")
    assert_same_weights(final_weights(tmp_path / "resumed"), final_weights(tmp_path / "two"))


# --- servers -------------------------------------------------------------------------------------------------------


def servers(*urls):
    return ["rollout=vllm", "rollout.mode=server", f"rollout.urls=[{','.join(urls)}]", "rollout.restart_s=0.1", *AHEAD]


def test_servers_sample_ahead_with_the_weights_they_were_pushed(serve, tmp_path):
    server = serve()
    trainer.fit(config(tmp_path / "run", *servers(server.url), *KEPT, "steps=3"))
    assert [line["rollout/staleness"] for line in metrics(tmp_path / "run")[1:]] == [0, 1, 1]
    saved = next(one for one in checkpoint.list_checkpoints(tmp_path / "run") if one.step == 1)
    theta_1 = load_policy(config(tmp_path).model, path=str(saved.policy))
    assert logprob_error(samples(tmp_path / "run", 3), theta_1) < 1e-5
    assert len(server.pushes) == 4


def test_a_batch_that_servers_took_along_is_sampled_anew(serve, tmp_path, caplog):
    """They die while step 2 is sampled ahead, in step 1: it is tried again in step 2, which then saves and ends."""
    dying, steady = serve(answers=20), serve()  # one to try it out, 16 for the first step
    with caplog.at_level(logging.WARNING), pytest.raises(RolloutLost, match="saved to .*step_000001"):
        trainer.fit(config(tmp_path / "run", *servers(dying.url)))
    assert "what was sampled ahead is dropped" in caplog.text
    assert threads() == []
    trainer.fit(config(tmp_path / "run", *servers(steady.url)))
    assert [line["rollout/staleness"] for line in metrics(tmp_path / "run")[1:]] == [0, 0, 1, 1]


@pytest.mark.slow
def test_ranks_do_not_talk_from_the_thread(serve, tmp_path):
    """Servers' losses are told to every rank: by the main thread once the other has ended."""
    for ranks in (1, 2):
        result = train(tmp_path / str(ranks), ranks, *servers(serve().url), "steps=3")
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "2", tmp_path / "1")


# --- what can go wrong ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class BreakingConfig(LocalRolloutConfig):
    """An engine that breaks at ``step``."""

    step: int = 2


@register("rollout", "breaking", BreakingConfig)
class BreakingRollout(LocalRollout):
    def generate(self, prompts, *, step, group_size, sampling=None):
        if step == self._config.step:
            raise ValueError(f"the decoder broke in {threading.current_thread().name}")
        return super().generate(prompts, step=step, group_size=group_size, sampling=sampling)


def test_an_error_of_the_thread_reaches_the_user_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="the decoder broke in rollout ahead"):
        trainer.fit(config(tmp_path / "run", "rollout=breaking", *AHEAD))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1]
    assert threads() == []


def test_an_error_of_the_step_ends_the_thread_at_its_next_token(tmp_path):
    settings = config(tmp_path, *AHEAD, "sampling.max_new_tokens=400", "batch.token_budget=512")
    run = trainer.build(settings)
    prompts, _ = run.source.next(1)
    run.ahead.begin(prompts, step=1, group_size=4)
    begun = run.ahead._under_way
    run.ahead.close()
    assert threads() == []
    with pytest.raises(Cancelled):
        begun.result()


def test_impossible_settings_are_refused_with_the_remedy(tmp_path):
    refusals = {
        "rollout.device_offset=1 rollout.ahead=false": "has no effect without rollout.ahead=true",
        "rollout=vllm": "rollout.mode=colocated: engine and trainer take turns.*set rollout.mode=server",
        "sampling.top_p=0.9": "set sampling.top_k=0 sampling.top_p=1, or rollout.ahead=false",
    }
    for overrides, message in refusals.items():
        with pytest.raises(ConfigError, match=message):
            config(tmp_path, *AHEAD, *overrides.split())


def test_the_correction_is_on(tmp_path):
    assert config(tmp_path).loss.importance_correction == "none"
    assert config(tmp_path, "rollout.ahead=true").loss.importance_correction == "truncate"
    masked = config(tmp_path, "rollout.ahead=true", "loss.importance_correction=mask")
    assert masked.loss.importance_correction == "mask"


def test_the_usual_order_has_no_thread_and_no_copy(tmp_path):
    run = trainer.build(config(tmp_path, "evaluation.every_steps=0"))
    assert run.ahead is None and not isinstance(run.rollout, Ahead)
    assert run.rollout._model is run.policy.model
    assert math.isfinite(trainer.fit(config(tmp_path, "evaluation.every_steps=0", "steps=1"))["loss"])
    assert threads() == []
