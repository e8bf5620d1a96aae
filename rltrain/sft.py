"""Cold start: supervised fine-tuning with TRL's SFTTrainer on worked solutions or any prompt/completion data.

python -m rltrain.sft +experiment=NAME [cold_start.steps=…]
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rltrain import cli
from rltrain.config import ColdStartConfig, RunConfig
from rltrain.errors import ConfigError, RunError
from rltrain.policy.encode import encode_all, why_left_out
from rltrain.policy.load import Policy, load_policy
from rltrain.registry import part_of
from rltrain.runs import run_folder
from rltrain.runtime import dist, watchdog
from rltrain.types import Problem

log = logging.getLogger(__name__)

IGNORED = -100  # the label that transformers leaves out of the loss
DEPENDS_ON = ("seed", "model", "data", "cold_start_data", "cold_start")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


def cold_start(config: RunConfig) -> str:
    """The folder of the fine-tuned model, ``run_dir/cold_start``. Trains it if there is none yet.

    ConfigError if the folder was made with another config. Training runs on rank 0 in a separate process, without the
    launcher's variables and with its own random state. The other ranks wait.
    """
    folder = Path(config.run_dir) / "cold_start"
    dist.main_alone("cold start", lambda: _make(config, folder))
    return str(folder)


def _make(config: RunConfig, folder: Path) -> None:
    if folder.is_dir():
        _refuse_other_config(folder, config)
    else:
        _run_in_own_process(config, folder)


def made_with(config: RunConfig) -> dict[str, Any]:
    """The config keys on which a cold start depends."""
    return {key: value for key, value in run_folder.resolved(config).items() if key in DEPENDS_ON}


def _refuse_other_config(folder: Path, config: RunConfig) -> None:
    before = run_folder.with_new_keys(json.loads((folder / "sft.json").read_text())["config"], config)
    if changes := run_folder.changes({key: before[key] for key in DEPENDS_ON}, made_with(config)):
        raise ConfigError(
            f"{folder}: made with another config ({changes}); restore these keys, set another run_dir, or delete it"
        )


def _run_in_own_process(config: RunConfig, folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    steps = context.Value("q", 0)
    process = context.Process(target=_in_own_process, args=(config, folder, steps))
    process.start()
    try:
        _wait_for(process, steps, config.deadline("train"))
    finally:
        process.kill()  # also when a signal ends the wait
    if process.exitcode != 0:
        raise RunError(f"cold start: failed with exit code {process.exitcode}; its message stands above")


def _wait_for(process: Any, steps: Any, deadline_s: float) -> None:
    """Wait for the process. DeadlineError if it makes no step within ``deadline_s``."""
    last_step, since_s = steps.value, time.monotonic()
    while process.is_alive():
        process.join(watchdog.POLL_S)
        if steps.value != last_step:
            last_step, since_s = steps.value, time.monotonic()
        elif deadline_s and time.monotonic() - since_s > deadline_s:
            raise dist.DeadlineError(
                f"cold start: nothing for {deadline_s:g} s after step {last_step}; see watchdog.train_s"
            )


def _in_own_process(config: RunConfig, folder: Path, steps: Any) -> None:
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    cli.setup_logging()
    cli.discover()
    with cli.errors_in_one_line():
        train(config, folder, steps)


def examples(problems: Sequence[Problem], policy: Policy, config: RunConfig) -> list[dict[str, list[int]]]:
    """Token ids and labels of each worked solution: the prompt as for RL and without loss, EOS at the end.

    Where the prompt is cut from a text, the rest of the text follows the solution.
    """
    field = config.cold_start.solution_field
    missing = [problem.id for problem in problems if field not in problem.meta]
    if missing:
        raise ConfigError(
            f"cold_start.solution_field={field}: {len(missing)} problems have no such field, the first is "
            f"{missing[0]}; choose data with worked solutions or set cold_start.steps=0"
        )
    other = next((problem.id for problem in problems if not isinstance(problem.meta[field], str)), None)
    if other is not None:
        raise ConfigError(f"cold_start.solution_field={field}: of {other} is no text; choose a field that holds text")
    if policy.tokenizer.eos_token_id is None:
        raise ConfigError("cold start: the tokenizer has no EOS token to end a solution; set eos_token in its config")
    rows = []
    longest = config.cold_start.max_length
    for encoded in encode_all(policy, problems, config.model, max_prompt_tokens=longest)[0]:
        prompt = encoded.token_ids
        solution = policy.tokenizer(encoded.problem.meta[field], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *solution, *encoded.continuation_ids, policy.tokenizer.eos_token_id]
        if len(ids) <= longest:
            rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    if len(rows) < len(problems):
        count = len(problems) - len(rows)
        log.warning("cold start: %d solutions over max_length, or without a prompt, were left out", count)
    if not rows:
        reason = why_left_out(policy, problems[0], config.model, max_prompt_tokens=longest)
        raise ConfigError(f"cold start: no example is within cold_start.max_length={longest}, the first is {reason}")
    return rows


def train(config: RunConfig, folder: Path, steps: Any = None) -> None:
    """Fine-tune and save a plain transformers folder. It appears complete or not at all. ``steps`` counts along."""
    import datasets
    from trl import SFTTrainer

    data = config.data if config.cold_start_data is None else config.cold_start_data
    source = part_of(data).function(data, "train")
    count = min(config.cold_start.problems, len(source), config.cold_start.steps * config.cold_start.batch_size)
    # Weights and moments are fp32, also where RL trains in bf16: autocast then computes in bf16.
    policy = load_policy(dataclasses.replace(config.model, dtype="float32"))
    rows = examples([source[index] for index in range(count)], policy, config)
    writing = folder.with_name(".writing_cold_start")
    shutil.rmtree(writing, ignore_errors=True)
    trainer = SFTTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        args=_arguments(config.cold_start, writing, seed=config.seed, dtype=config.model.dtype),
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[] if steps is None else [_counting(steps)],
    )
    result = trainer.train()
    _merged(policy.model).save_pretrained(writing)
    policy.tokenizer.save_pretrained(writing)
    made = {"loss": result.training_loss, "examples": len(rows), "config": made_with(config)}
    (writing / "sft.json").write_text(json.dumps(made, indent=1))
    writing.replace(folder)
    log.info("cold start: loss %.4f after %d steps, saved to %s", result.training_loss, config.cold_start.steps, folder)


def _counting(steps: Any) -> Any:
    from transformers import TrainerCallback

    class Counting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.value = state.global_step

    return Counting()


def _arguments(config: ColdStartConfig, folder: Path, *, seed: int, dtype: str) -> Any:
    from trl import SFTConfig

    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_length=config.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=dtype == "bfloat16",
        use_cpu=dtype == "bfloat16" and not torch.cuda.is_available(),  # else refused without a GPU
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        report_to=[],
        logging_steps=50,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
    )
    # With several GPUs in sight transformers wraps the model in DataParallel and multiplies the batch by their number.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _merged(model: Any) -> Any:
    """The model with adapters merged into the weights, because RL starts from a plain model."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def main(config: RunConfig) -> None:
    """Fine-tune into ``run_dir/cold_start``."""
    if config.cold_start.steps == 0:
        raise ConfigError("cold_start.steps=0: nothing to do; set cold_start.steps, or name an experiment that does")
    with run_folder.opened(Path(config.run_dir)):
        print(f"saved to {cold_start(config)}")


if __name__ == "__main__":
    cli.run(main)
