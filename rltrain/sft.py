"""Cold start: supervised fine-tuning with TRL's SFTTrainer on worked solutions or any prompt/completion data.

python -m rltrain.sft +experiment=NAME [cold_start.steps=…]
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rltrain import cli, dist, runs
from rltrain.config import ColdStartConfig, ConfigError, RunConfig, RunError, part_of
from rltrain.model import Policy, encode, load_policy
from rltrain.types import Problem

log = logging.getLogger(__name__)

IGNORED = -100  # the label that transformers leaves out of the loss
DEPENDS_ON = ("seed", "model", "data", "cold_start_data", "cold_start")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


def cold_start(config: RunConfig) -> str:
    """The folder of the fine-tuned model, ``run_dir/cold_start``; trained first if it is not there yet.

    One that was made with another config is refused.

    Training runs on rank 0 in a process of its own, so that neither the launcher's variables nor the random state of
    the trainer's libraries reach across; the other ranks wait.
    """
    folder = Path(config.run_dir) / "cold_start"
    if folder.is_dir():
        _refuse_other_config(folder, config)
    elif dist.is_main():
        _run_in_own_process(config, folder)
    dist.barrier("cold start")
    return str(folder)


def made_with(config: RunConfig) -> dict[str, Any]:
    """The part of the config that a cold start is a function of."""
    return {key: value for key, value in runs.resolved(config).items() if key in DEPENDS_ON}


def _refuse_other_config(folder: Path, config: RunConfig) -> None:
    before = json.loads((folder / "sft.json").read_text())["config"]
    if changes := runs.changes(before, made_with(config)):
        raise ConfigError(
            f"{folder}: made with another config ({changes}); restore these keys, set another run_dir, or delete it"
        )


def _run_in_own_process(config: RunConfig, folder: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_in_own_process, args=(config, folder))
    process.start()
    try:
        process.join(config.deadline_s)
        if process.is_alive():
            raise dist.DeadlineError(f"cold start: not done after deadline_s={config.deadline_s}; raise it")
    finally:
        process.kill()  # also when a signal ends the wait
    if process.exitcode != 0:
        raise RunError(f"cold start: failed with exit code {process.exitcode}; its message stands above")


def _in_own_process(config: RunConfig, folder: Path) -> None:
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    cli.setup_logging()
    cli.discover()
    with cli.errors_in_one_line():
        train(config, folder)


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
    rows = []
    for problem in problems:
        encoded = encode(policy, problem, config.model)
        prompt = encoded.token_ids
        solution = policy.tokenizer(problem.meta[field], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *solution, *encoded.continuation_ids, policy.tokenizer.eos_token_id]
        if prompt and len(ids) <= config.cold_start.max_length:
            rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    if len(rows) < len(problems):
        log.warning("cold start: %d solutions over max_length were left out", len(problems) - len(rows))
    if not rows:
        raise ConfigError("cold start: no example is within cold_start.max_length; raise it")
    return rows


def train(config: RunConfig, folder: Path) -> None:
    """Fine-tune and save a plain transformers folder; it appears whole or not at all."""
    import datasets
    from trl import SFTTrainer

    data = config.data if config.cold_start_data is None else config.cold_start_data
    source = part_of(data).function(data, "train")
    count = min(config.cold_start.problems, len(source), config.cold_start.steps * config.cold_start.batch_size)
    policy = load_policy(config.model)
    rows = examples([source[index] for index in range(count)], policy, config)
    writing = folder.with_name(".writing_cold_start")
    shutil.rmtree(writing, ignore_errors=True)
    trainer = SFTTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        args=_arguments(config.cold_start, writing, config.seed),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    result = trainer.train()
    _merged(policy.model).save_pretrained(writing)
    policy.tokenizer.save_pretrained(writing)
    made = {"loss": result.training_loss, "examples": len(rows), "config": made_with(config)}
    (writing / "sft.json").write_text(json.dumps(made, indent=1))
    writing.replace(folder)
    log.info("cold start: loss %.4f after %d steps, saved to %s", result.training_loss, config.cold_start.steps, folder)


def _arguments(config: ColdStartConfig, folder: Path, seed: int) -> Any:
    from trl import SFTConfig

    return SFTConfig(
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
        bf16=False,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        report_to=[],
        logging_steps=50,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
    )


def _merged(model: Any) -> Any:
    """Adapters are folded into the weights: RL starts from one plain model."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def main(config: RunConfig) -> None:
    """Fine-tune into ``run_dir/cold_start``."""
    if config.cold_start.steps == 0:
        raise ConfigError("cold_start.steps=0: nothing to do; set cold_start.steps, or name an experiment that does")
    print(f"saved to {cold_start(config)}")


if __name__ == "__main__":
    cli.run(main)
