"""Mistakes of users: one clear line each, and nothing lost."""

import dataclasses
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from chat_tokenizers import DATED, NO_SYSTEM, character_tokenizer, small_model
from tiny_run import OVERRIDES, config, metrics

from rltrain import cli, trainer
from rltrain.data.hub import hub as hub_problems
from rltrain.errors import ConfigError
from rltrain.runs import checkpoint

ROOT = Path(__file__).parents[2]


def refused(run_dir, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        trainer.fit(config(run_dir, *overrides))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_missing_model_folder(tmp_path):
    overrides = ["model=pretrained", "model.path=./no/such/folder", "data=small_integers"]
    with pytest.raises(ConfigError, match=r"model.path=./no/such/folder: no such folder; give a folder"):
        trainer.fit(cli.compose([*overrides, f"run_dir={tmp_path / 'run'}"]))


def test_missing_folder_of_a_tiny_model(tmp_path):
    assert "model.path=nowhere: no such folder" in refused(tmp_path / "run", "model.path=nowhere")


def test_chat_without_a_template(tmp_path):
    message = "model.chat=true: the tokenizer has no chat template; set model.chat=false"
    assert message in refused(tmp_path / "run", "model.chat=true")


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hub(path: Path) -> list[str]:
    return ["data=hub", f"data.path={path}", "data.prompt='{question}'", "data.answer=answer"]


def test_empty_data_set(tmp_path):
    message = refused(tmp_path / "run", *hub(jsonl(tmp_path / "empty.jsonl", [])))
    assert "empty.jsonl" in message


def test_data_set_without_the_mapped_column(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"query": "1+1", "answer": "2"}])
    message = refused(tmp_path / "run", *hub(path))
    assert "question" in message
    assert "query" in message


def test_cold_start_without_solutions(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(8)])
    from rltrain import sft

    run_config = config(tmp_path / "run", *hub(path), "cold_start.steps=1", "cold_start.batch_size=2")
    with pytest.raises(ConfigError, match="cold_start.solution_field=solution: .* have no such field"):
        sft.train(run_config, tmp_path / "cold_start")
    assert not (tmp_path / "cold_start").exists()


def test_cold_start_with_solutions_that_are_no_text(tmp_path):
    rows = [{"question": f"{i}+1", "answer": str(i + 1), "worked": {"a": "b"}} for i in range(8)]
    from rltrain import sft

    overrides = [*hub(jsonl(tmp_path / "data.jsonl", rows)), "+data.meta.solution=worked", "cold_start.steps=1"]
    with pytest.raises(
        ConfigError, match=r"cold_start.solution_field=solution: of train-\d is neither a text nor a list"
    ):
        sft.train(config(tmp_path / "run", *overrides, "cold_start.batch_size=2"), tmp_path / "cold_start")


def test_cold_start_without_solutions_is_one_line_on_the_command_line(tmp_path):
    """The cold start runs in a process of its own, whose traceback nobody needs."""
    path = jsonl(tmp_path / "data.jsonl", [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(8)])
    small = [one for one in OVERRIDES if not one.startswith("data=")]
    overrides = [*small, *hub(path), "cold_start.steps=1", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "rltrain.sft", *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    cause, outcome = result.stderr.strip().splitlines()[-2:]
    assert cause.startswith("config error: cold_start.solution_field=solution: ")
    assert outcome == "error: cold start: failed with exit code 2; its message stands above"


def test_cold_start_made_with_another_config_is_refused(tmp_path):
    from rltrain import sft

    cold = ["cold_start.steps=1", "cold_start.batch_size=2"]
    sft.train(config(tmp_path / "run", *cold), tmp_path / "run" / "cold_start")
    assert sft.cold_start(config(tmp_path / "run", *cold, "steps=9")) == str(tmp_path / "run" / "cold_start")
    message = refused(tmp_path / "run", *cold, "cold_start.learning_rate=0.5", "data.max_operand=3")
    assert "cold_start.learning_rate: " in message
    assert "-> 0.5" in message
    assert "data.max_operand: " in message


def test_disk_full_while_saving_leaves_the_old_checkpoint_and_resumes(tmp_path):
    """The second save is cut by a file-size limit; the first one is whole, and the run goes on from it."""
    trainer.fit(config(tmp_path / "run", "steps=2"))
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, {resource.RLIM_INFINITY})); "
    code = limit + "import sys, runpy; sys.argv[0] = 'train'; runpy.run_module('rltrain.train', run_name='__main__')"
    command = [sys.executable, "-c", code, *OVERRIDES, f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: checkpoint of step 4 was not written to ")
    assert "older checkpoints are intact" in last
    assert [saved.step for saved in checkpoint.list_checkpoints(tmp_path / "run")] == [2]
    trainer.fit(config(tmp_path / "run"))
    trainer.fit(config(tmp_path / "unbroken"))
    assert metrics(tmp_path / "run")[3:] == metrics(tmp_path / "unbroken")[3:]


def test_every_prompt_over_the_limit(tmp_path):
    message = refused(tmp_path / "run", "sampling.max_prompt_tokens=2")
    assert message.startswith("data: none of ")
    assert " tokens, over 2 (sampling.max_prompt_tokens" in message


@pytest.fixture
def chat_model(tmp_path):
    """Overrides that train a small model of a folder, whose chat template knows no system role."""
    tokenizer = character_tokenizer(before="<s>", template=NO_SYSTEM)
    small_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"{i}+1", "m": [{"role": "user", "content": f"{i}+1"}], "answer": "2"} for i in range(40)]
    path = jsonl(tmp_path / "data.jsonl", rows)
    chosen = ["model=pretrained", f"model.path={tmp_path / 'model'}", "reward@rewards.answer=random", "steps=1"]
    chosen += ["data=hub", f"data.path={path}", "sampling.max_new_tokens=4", "sampling.max_prompt_tokens=64"]
    return [*chosen, "batch.prompts_per_step=2", "batch.group_size=2", "tracking.wandb=disabled"]


def test_prompts_that_a_model_cannot_be_asked_train_nothing(tmp_path, chat_model):
    def message(*overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            trainer.fit(cli.compose([*chat_model, f"run_dir={tmp_path / 'run'}", *overrides]))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return str(error.value)

    text, chat = 'data.prompt="{question}"', "data.messages=m"
    assert "(System role not supported); if it knows no system role, unset model.system" in message(
        text, "model.chat=true", "model.system=brief"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(DATED)
    assert message(chat).startswith("model.template_date: the chat template writes the date into every prompt")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert message(chat).startswith("data.messages: the tokenizer has no chat template; ")
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    assert f"model.path={tmp_path / 'model'}: no tokenizer" in message(text)


def test_a_cold_start_leaves_out_what_the_template_refuses(tmp_path, chat_model, caplog):
    from rltrain import sft
    from rltrain.policy.load import load_policy

    user = {"role": "user", "content": "1+1"}
    rows = [{"m": [user], "answer": "2"}, {"m": [user, user], "answer": "2"}]
    path = jsonl(tmp_path / "chats.jsonl", rows)
    run = cli.compose([*chat_model, f"data.path={path}", "data.messages=m", "+data.meta.solution=answer"])
    policy = load_policy(run.model)
    problems = hub_problems(dataclasses.replace(run.data, holdout=1e-9), "train")
    (kept,) = sft.examples(problems, policy, run)
    prompt = policy.tokenizer("<s><|user|>1+1<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    assert kept["input_ids"] == [*prompt, *policy.tokenizer("2", add_special_tokens=False)["input_ids"], 2]
    assert "cold start: 1 solutions over max_length, or without a prompt, were left out" in caplog.text
    with pytest.raises(ConfigError, match=r"no example .*, the first is train-1: the chat template refuses"):
        sft.examples(problems[1:], policy, run)
    policy.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="cold start: the tokenizer has no EOS token"):
        sft.examples(problems, policy, run)


def test_a_chat_that_is_asked_as_it_should_be_trains(tmp_path, chat_model):
    overrides = ["data.messages=m", "evaluation.every_steps=0", "tracking.samples_every_steps=1"]
    trainer.fit(cli.compose([*chat_model, f"run_dir={tmp_path / 'run'}", *overrides]))
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "samples" / "step_000001.parquet").to_pylist()
    assert len(rows) == 4
    assert all(re.fullmatch(r"<s><\|user\|>\d+\+1<\|end\|><\|assistant\|>", row["prompt"]) for row in rows)
    assert all(row["prompt_ids"][:2] != [1, 1] for row in rows)


def test_prompts_leave_room_for_completions_in_the_positions_of_the_model(tmp_path):
    """A learned position table has no row past its end, and rotations past it were never trained."""
    assert (
        " tokens, over 2 (sampling.max_prompt_tokens, or the model's positions less sampling.max_new_tokens)"
        in refused(tmp_path / "run", "model.max_positions=14", "sampling.max_new_tokens=12")
    )
    assert "sampling.max_new_tokens=12: leaves no room for a prompt in the model's 12 positions; lower it" in refused(
        tmp_path / "run", "model.max_positions=12", "sampling.max_new_tokens=12"
    )


def test_wandb_that_cannot_start_is_a_warning(tmp_path, caplog, monkeypatch):
    """An unwritable wandb folder: the run ends well and its files are whole."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file where wandb wants its folder")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trainer.fit(config(tmp_path / "run", "tracking.wandb=offline", "steps=1"))
    assert len(metrics(tmp_path / "run")) == 2
