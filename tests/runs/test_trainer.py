"""Whole runs of a very small policy: determinism, exact resume, micro-batch invariance, and what is written."""

import copy
import json
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import OVERRIDES, config, metrics
from whole_runs import assert_same_weights, final_weights, metrics_if_any, wait_for

from rltrain import trainer, update
from rltrain.batching.minibatches import split
from rltrain.batching.zero_variance import ZeroVarianceError
from rltrain.errors import ConfigError
from rltrain.policy.load import load_policy
from rltrain.rewards.failures import RewardError
from rltrain.runs import checkpoint, run_folder
from rltrain.runtime.interrupts import EXIT_INTERRUPTED
from rltrain.types import Need


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Four steps without interruption."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    trainer.fit(config(folder))
    return folder


def test_the_policy_moves_and_every_step_is_recorded(unbroken):
    lines = metrics(unbroken)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(line["grad_norm"] > 0 for line in lines[1:])
    assert [("eval_accuracy" in line) for line in lines] == [True, False, True, False, True]


def test_same_seed_gives_identical_metrics_and_weights(unbroken, tmp_path):
    trainer.fit(config(tmp_path / "again"))
    assert metrics(tmp_path / "again") == metrics(unbroken)
    assert_same_weights(final_weights(tmp_path / "again"), final_weights(unbroken))


def test_dropout_is_a_function_of_the_step(tmp_path):
    """Torch's generator is seeded anew at each step, so that a resumed run drops the same units."""
    overrides = ["model.lora.rank=4", "model.lora.dropout=0.5", "evaluation.every_steps=0"]
    trainer.fit(config(tmp_path / "unbroken", *overrides))
    trainer.fit(config(tmp_path / "run", *overrides, "steps=2"))
    trainer.fit(config(tmp_path / "run", *overrides))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "unbroken")


def test_a_run_after_a_left_process_group(unbroken, tmp_path):
    """Another library may end the group between two runs of one process."""
    torch.distributed.destroy_process_group()
    trainer.fit(config(tmp_path / "again", "steps=2"))
    assert metrics(tmp_path / "again")[1] == metrics(unbroken)[1]


def test_another_seed_gives_other_metrics(unbroken, tmp_path):
    trainer.fit(config(tmp_path / "other", "seed=1", "steps=1"))
    assert metrics(tmp_path / "other")[1] != metrics(unbroken)[1]


def test_stop_and_resume_equal_the_unbroken_run(unbroken, tmp_path):
    trainer.fit(config(tmp_path / "run", "steps=2"))
    trainer.fit(config(tmp_path / "run"))
    assert metrics(tmp_path / "run")[3:] == metrics(unbroken)[3:]
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(unbroken))


def test_work_after_the_last_checkpoint_is_done_again(unbroken, tmp_path):
    """A kill between two checkpoints: lines past the checkpoint are dropped and written again, the same."""
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # torn by the kill
    trainer.fit(config(tmp_path / "run"))
    assert metrics(tmp_path / "run") == metrics(unbroken)
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(unbroken))


def test_a_damaged_checkpoint_is_passed_over(unbroken, tmp_path, caplog):
    shutil.copytree(unbroken, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step_000004" / "policy" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    trainer.fit(config(tmp_path / "run"))
    assert "policy/model.safetensors has another checksum" in caplog.text
    assert metrics(tmp_path / "run") == metrics(unbroken)


def test_a_damaged_checkpoint_does_not_push_out_intact_ones(tmp_path):
    options = ["checkpoint.keep_last=1", "checkpoint.every_steps=1", "checkpoint.keep_best=false"]
    trainer.fit(config(tmp_path / "run", *options, "steps=1"))
    shutil.copytree(tmp_path / "run", tmp_path / "later")
    trainer.fit(config(tmp_path / "later", *options, "steps=3"))
    last = "checkpoints/step_000003"
    damaged = shutil.copytree(tmp_path / "later" / last, tmp_path / "run" / last)
    (damaged / "parts.json").unlink()
    trainer.fit(config(tmp_path / "run", *options, "steps=2"))
    assert checkpoint.newest_intact(tmp_path / "run").step == 2


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_micro_batches_change_nothing_but_rounding(tmp_path, aggregation):
    """1 micro-batch of 16 rows, or one per row or two: the same step."""
    results = []
    for budget in (2048, 128, 48):
        folder = tmp_path / str(budget)
        trainer.fit(config(folder, f"batch.token_budget={budget}", f"loss.aggregation={aggregation}", "steps=2"))
        results.append((metrics(folder), final_weights(folder)))
    (reference, weights), *others = results
    for lines, other_weights in others:
        for line, expected in zip(lines, reference, strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=1e-4, atol=2e-5)


def test_sampler_and_trainer_agree(unbroken):
    """The log-probs that the sampler returned are those of the training forward before the update."""
    for line in metrics(unbroken)[1:]:
        assert line["sampling/sampling_logp_difference/max"] < 1e-4


def test_run_folder_holds_what_it_takes_to_repeat_the_run(unbroken):
    resolved = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert resolved["rewards"]["answer"]["kind"] == "random"
    assert resolved["data"]["kind"] == "random_calculation"
    provenance = json.loads((unbroken / "run.json").read_text())
    assert provenance["packages"]["torch"] == torch.__version__
    assert (unbroken / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"


def test_samples_hold_ids_logprobs_rewards_and_advantages(unbroken):
    rows = pq.read_table(unbroken / "samples" / "step_000002.parquet").to_pylist()
    assert len(rows) == 16
    for row in rows:
        assert len(row["token_ids"]) == len(row["logprobs"]) == len(row["advantages"]) == len(row["tokens"])
        assert row["reward"] == row["reward/answer"]
        assert 0 < len(row["prompt_ids"]) <= 32
    mean = sum(row["reward"] for row in rows) / 16
    assert mean == pytest.approx(metrics(unbroken)[2]["reward"])


def test_exported_policy_is_a_plain_transformers_model(unbroken):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint.list_checkpoints(unbroken)[-1].policy
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("3+4=7\n\\boxed{7}")["input_ids"]) == "3+4=7\n\\boxed{7}"
    assert torch.isfinite(model(torch.tensor([[10, 11]])).logits).all()


def test_old_checkpoints_are_pruned_but_not_the_best(tmp_path):
    options = ["checkpoint.every_steps=1", "checkpoint.keep_last=1", "evaluation.every_steps=0"]
    trainer.fit(config(tmp_path / "run", *options))
    assert [saved.step for saved in checkpoint.list_checkpoints(tmp_path / "run")] == [4]


def test_kl_penalty_needs_and_uses_the_initial_policy(tmp_path):
    run_config = config(tmp_path / "run", "loss.kl_coef=0.1", "steps=2")
    assert run_config.needs() == {Need.REFERENCE_LOGPROBS}
    trainer.fit(run_config)
    first, second = metrics(tmp_path / "run")[1:]
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-6


def test_several_update_epochs_clip(tmp_path):
    trainer.fit(config(tmp_path / "run", "batch.update_epochs=4", "optimizer.learning_rate=1e-2", "steps=1"))
    line = metrics(tmp_path / "run")[1]
    assert line["clip_ratio/region_mean"] > 0
    assert 0 < line["policy_tokens"] <= line["loss_denominator/tokens"]


def test_minibatches_are_optimiser_steps_of_a_plain_loop(tmp_path):
    """Two AdamW steps on two halves of the rollout's groups, each a mean over its own tokens, by plain autograd."""
    settings = config(
        tmp_path / "run", "batch.minibatches=2", "steps=1", "algorithm=dapo", "batch.dynamic_sampling=false"
    )
    run = trainer.build(settings)
    plain = copy.deepcopy(run.policy.model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=settings.optimizer.learning_rate, weight_decay=0.0)
    scope = run.scope(0)
    groups = trainer.collect(run, scope)
    advantages = trainer.estimate(run, scope, groups).values
    for part in split(len(groups), 2, seed=settings.seed, step=0):
        pairs = [(groups[i], g, advantages[i][g]) for i in part for g in range(len(groups[i].completions))]
        tokens = sum(len(advantages_T) for _, _, advantages_T in pairs)
        loss = 0.0
        for group, g, advantages_T in pairs:
            ids, first = group.prompt.token_ids + group.completions[g].token_ids, len(group.prompt.token_ids)
            logprobs_T = plain(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
            logprobs_T = logprobs_T.gather(1, torch.tensor(ids[first:])[:, None])[:, 0]
            ratio_T = (logprobs_T - torch.tensor(group.completions[g].logprobs)).exp()
            clipped_T = ratio_T.clamp(1 - settings.loss.clip_low, 1 + settings.loss.clip_high)
            loss = loss - torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T).sum() / tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.optimizer.max_grad_norm)
        optimizer.step()
    trainer.fit(settings)
    for name, value in final_weights(tmp_path / "run").items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=2e-6)


def test_minibatches_clip_and_resume_exactly(tmp_path):
    overrides = ["batch.minibatches=4", "optimizer.learning_rate=1e-2"]
    trainer.fit(config(tmp_path / "unbroken", *overrides))
    trainer.fit(config(tmp_path / "run", *overrides, "steps=2"))
    trainer.fit(config(tmp_path / "run", *overrides))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "unbroken")
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(tmp_path / "unbroken"))
    lines = metrics(tmp_path / "unbroken")[1:]
    assert max(line["clip_ratio/region_mean"] for line in lines) > 0


def test_old_logprobs_drop_nothing(tmp_path):
    """They are of the distribution that was sampled from, which LoRA's dropout has no part in."""
    lora = ["model.lora.rank=4", "model.lora.dropout=0.5", "sampling.top_k=5", "batch.update_epochs=2"]
    run = trainer.build(config(tmp_path / "run", *lora, "model.lora.target_modules=[q_proj]"))
    with torch.no_grad():
        for name, parameter in run.policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    run.engine.module.train()
    groups = trainer.collect(run, run.scope(0))
    batches, _ = update.micro_batches(run, groups, trainer.estimate(run, run.scope(0), groups).values)
    first, second = ([batch.old_logprobs_N for batch in update.with_fixed_logprobs(run, batches)] for _ in range(2))
    assert all(torch.equal(one_N, two_N) for one_N, two_N in zip(first, second, strict=True))


def test_an_evaluation_reward_that_is_broken_ends_the_run(tmp_path):
    broken = ["+reward@eval_rewards.answer=custom", "eval_rewards.answer.import_path=user_rewards:raises"]
    with pytest.raises(RewardError, match="reward answer: failed on every completion"):
        trainer.fit(config(tmp_path / "run", *broken))


def test_lora_trains_adapters_alone(tmp_path):
    trainer.fit(config(tmp_path / "run", "model.lora.rank=4", "steps=1", "loss.kl_coef=0.01"))
    saved = checkpoint.list_checkpoints(tmp_path / "run")[-1]
    names = load_file(saved.policy / "adapter_model.safetensors").keys()
    assert names
    assert all("lora_" in name for name in names)


def test_gradient_checkpointing_of_a_loaded_model_runs_each_layer_twice(unbroken):
    """transformers loads in evaluation mode, in which it would keep every activation all the same."""
    path = checkpoint.list_checkpoints(unbroken)[-1].policy
    calls = []
    for enabled in ("false", "true"):
        overrides = [f"model.path={path}", f"model.gradient_checkpointing={enabled}"]
        model = load_policy(config(unbroken, *overrides).model).model
        counted = [0]
        attention = model.model.layers[0].self_attn
        attention.register_forward_hook(lambda *_, counted=counted: counted.__setitem__(0, counted[0] + 1))
        model(torch.tensor([[10, 11]])).logits.sum().backward()
        calls += counted
    assert calls == [1, 2]


def test_dynamic_sampling_fills_the_batch_with_groups_that_teach(tmp_path):
    trainer.fit(config(tmp_path / "run", "batch.dynamic_sampling=true", "batch.group_size=2", "steps=2"))
    for line in metrics(tmp_path / "run")[1:]:
        assert line["loss_denominator/rows"] == 8
        assert line["policy_tokens"] == line["loss_denominator/tokens"]
        assert line["dynamic_sampling/attempts"] >= 1


def test_dynamic_sampling_without_signal_is_an_error_that_says_so(tmp_path):
    overrides = ["batch.dynamic_sampling=true", "batch.max_sampling_attempts=2", "rewards.answer.probability=1.0"]
    message = "0 of 4 groups had unequal rewards after batch.max_sampling_attempts=2"
    with pytest.raises(ZeroVarianceError, match=message):
        trainer.fit(config(tmp_path / "run", *overrides))


def test_zero_signal_steps_end_the_run_at_the_limit(tmp_path):
    overrides = ["rewards.answer.probability=1.0", "max_zero_signal_steps=2", "loss.kl_coef=0"]
    with pytest.raises(ZeroVarianceError, match="2 steps in a row had equal rewards in every group"):
        trainer.fit(config(tmp_path / "run", *overrides))


def test_sigterm_finishes_the_step_saves_and_resumes_exactly(tmp_path):
    arguments = [f"run_dir={tmp_path / 'run'}", "steps=1000", "evaluation.every_steps=0", "checkpoint.every_steps=0"]
    command = [sys.executable, "-m", "rltrain.train", *OVERRIDES, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(metrics_if_any(tmp_path / "run")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert f"SIGTERM: stopped after step {saved.step}, saved to {saved.path}; the same command resumes it" in errors
    overrides = [f"steps={saved.step + 2}", "evaluation.every_steps=0", "checkpoint.every_steps=0"]
    trainer.fit(config(tmp_path / "run", *overrides))
    trainer.fit(config(tmp_path / "unbroken", *overrides))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "unbroken")
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(tmp_path / "unbroken"))


def test_a_signal_during_the_cold_start_ends_it_too(tmp_path):
    arguments = [f"run_dir={tmp_path / 'run'}", "cold_start.steps=100000", "cold_start.batch_size=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rltrain.train", *OVERRIDES, *arguments], stderr=subprocess.PIPE, text=True
    )
    wait_for((tmp_path / "run" / ".writing_cold_start").exists, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)  # returns once the child too has closed its end of the pipe
    assert process.returncode == EXIT_INTERRUPTED
    assert "SIGTERM: stopped before the first step; the same command starts it" in errors


def test_checkpoint_of_another_config_is_refused_by_key(unbroken):
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.001 -> 0.01"):
        trainer.fit(config(unbroken, "optimizer.learning_rate=0.01"))


@pytest.mark.parametrize("free", ["compress.batch_size=7", "debug.bundle_weights=true", "watchdog.train_s=99"])
def test_a_key_that_training_does_not_depend_on_may_change(unbroken, free):
    saved = checkpoint.list_checkpoints(unbroken)[-1]
    now = config(unbroken, free)
    assert free.split("=")[0] in run_folder.differences(saved.manifest["config"], run_folder.resolved(now))
    assert checkpoint.resume_point(unbroken, now) == saved


def test_a_key_that_a_checkpoint_is_older_than_counts_as_its_default(unbroken):
    """As if rltrain had got three keys since: one of a part, one of a reward, a whole group."""
    newest = checkpoint.list_checkpoints(unbroken)[-1]
    made_with = newest.manifest["config"]
    reward = next(iter(made_with["rewards"]))
    older = {key: dict(value) if isinstance(value, dict) else value for key, value in made_with.items()}
    older["rewards"] = {reward: {**made_with["rewards"][reward]}}
    del older["rollout"]["speculate_tokens"], older["rewards"][reward]["weight"], older["watchdog"]
    now = config(unbroken)
    assert run_folder.with_new_keys(older, now) == made_with
    other = config(unbroken, "rollout.speculate_tokens=2", f"rewards.{reward}.weight=0.5")
    changed = run_folder.changes(
        run_folder.with_new_keys(older, other), run_folder.resolved(other), ignored=["run_dir"]
    )
    assert changed == (
        f"rewards.{reward}.weight: 1.0 -> 0.5 (rewards before and after would mean different things), "
        "rollout.speculate_tokens: 0 -> 2 (completions would come from another sampler)"
    )


def test_more_steps_are_free_under_a_constant_rate_alone(tmp_path):
    trainer.fit(config(tmp_path / "run", "steps=1", "optimizer.schedule=linear"))
    with pytest.raises(ConfigError, match="steps: 1 -> 2"):
        trainer.fit(config(tmp_path / "run", "steps=2", "optimizer.schedule=linear"))


def test_a_used_run_folder_is_refused_when_asked(unbroken):
    with pytest.raises(ConfigError, match="holds a run; set another run_dir"):
        trainer.fit(config(unbroken, "checkpoint.resume=never"))


def test_prompts_over_the_limit_are_dropped_and_counted(tmp_path):
    trainer.fit(config(tmp_path / "run", "sampling.max_prompt_tokens=9", "steps=1", "batch.prompts_per_step=16"))
    line = metrics(tmp_path / "run")[1]
    assert line["data/prompts_dropped"] > 0
    assert line["loss_denominator/rows"] == (16 - line["data/prompts_dropped"]) * 4
