"""Cold start: supervised fine-tuning with TRL's SFTTrainer on worked solutions or any prompt/completion data.

python -m rltrain.sft +experiment=NAME [cold_start.steps=…]
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rltrain import cli
from rltrain.config import ColdStartConfig, RunConfig
from rltrain.data.handbook import problems_of
from rltrain.environments.demonstrations import BadTurns, Demonstration, demonstrator
from rltrain.errors import ConfigError, RunError
from rltrain.policy import curio
from rltrain.policy.encode import encode_all, refuse_long_entries, why_left_out
from rltrain.policy.load import Policy, load_policy
from rltrain.policy.tiny import TinyConfig
from rltrain.runs import cold_starts, run_folder
from rltrain.runtime import dist, progress, watchdog
from rltrain.types import Problem, Prompt

log = logging.getLogger(__name__)

IGNORED = -100  # the label that transformers leaves out of the loss
REASONS_IN_WARNING = 5
BETWEEN_LINES_S = 5.0  # where there is no terminal
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


def scorer_cold_start(config: RunConfig) -> str:
    """The folder of phi where ``scorer.cold_start`` trains it: ``run_dir/scorer``. See :func:`cold_start`."""
    return cold_start(dataclasses.replace(config, cold_start=config.scorer.cold_start), name="scorer")


def cold_start(config: RunConfig, *, name: str = "cold_start") -> str:
    """The folder of the fine-tuned model: ``cold_start.path``, or ``name`` in ``run_dir``.

    Where there is none yet it is taken from another run (:mod:`rltrain.runs.cold_starts`), or trained: on rank 0, in a
    separate process, without the launcher's variables and with its own random state. The other ranks wait.

    ConfigError if the folder was made with another config.
    """
    if config.cold_start.path is not None:
        given = cold_starts.checked(config.cold_start.path, config)
        progress.say("cold start", f"taken from {given} (cold_start.path)")
        return str(given)
    folder = Path(config.run_dir) / name
    dist.main_alone("cold start", lambda: _make(config, folder))
    return str(folder)


def _make(config: RunConfig, folder: Path) -> None:
    if folder.is_dir():
        _refuse_other_config(folder, config)
        progress.say("cold start", f"taken from {folder}")
    elif not config.cold_start.share:
        _run_in_own_process(config, folder)
    else:
        _take_or_train(config, folder, shared=folder.parents[1] / cold_starts.FOLDER / cold_starts.key_of(config))


def _take_or_train(config: RunConfig, folder: Path, *, shared: Path) -> None:
    """Take the shared cold start, or train it and share it."""
    try:
        shared.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("cold start: not shared, since %s cannot be written to (%s)", shared.parent, error.strerror)
        _run_in_own_process(config, folder)
        return
    with cold_starts.alone(shared):
        if cold_starts.is_complete(shared):
            cold_starts.copied(shared, folder)
            progress.say("cold start", f"taken from {shared}, trained before with the same settings")
        else:
            _run_in_own_process(config, folder)
            cold_starts.copied(folder, shared)


def _refuse_other_config(folder: Path, config: RunConfig) -> None:
    before = run_folder.with_new_keys(json.loads((folder / "sft.json").read_text())["config"], config)
    held = {key: before[key] for key in cold_starts.DEPENDS_ON}
    ignored = cold_starts.HOW_TO_GET_IT
    if changes := run_folder.changes(held, cold_starts.made_with(config), ignored=ignored):
        raise ConfigError(
            f"{folder}: made with another config ({changes}); restore these keys, set another run_dir, or delete it"
        )


@dataclass(frozen=True, kw_only=True)
class _Telling:
    """What the training process tells the one that waits: its step, its loss, and what it would print or log."""

    steps: Any
    loss: Any
    records: Any

    @classmethod
    def made(cls, context: Any) -> _Telling:
        return cls(steps=context.Value("q", 0), loss=context.Value("d", math.nan), records=context.SimpleQueue())

    def pass_on(self) -> None:
        """Log what it has logged since."""
        while not self.records.empty():
            record = self.records.get()
            logging.getLogger(record.name).handle(record)


def _run_in_own_process(config: RunConfig, folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    telling = _Telling.made(context)
    process = context.Process(target=_in_own_process, args=(config, folder, telling))
    start_s, settings = time.monotonic(), config.cold_start
    progress.say("cold start", f"{settings.steps} steps of supervised fine-tuning, {settings.batch_size} examples each")
    process.start()
    bars: list[progress.Bar] = []

    def tell() -> None:
        telling.pass_on()
        if telling.steps.value:  # not before: an error that ends the process would be glued to the bar
            bars[:] = bars or [progress.Bar("cold start", settings.steps, every_s=BETWEEN_LINES_S)]
            loss = telling.loss.value
            bars[0].update(telling.steps.value, [] if math.isnan(loss) else [f"loss {loss:.3f}"])

    try:
        _wait_for(process, telling.steps, config.deadline("train"), each_time=tell)
        telling.pass_on()
    finally:
        process.kill()  # also when a signal ends the wait
        for bar in bars:
            bar.close()
    if process.exitcode != 0:
        raise RunError(f"cold start: failed with exit code {process.exitcode}; its message stands above")
    progress.say("cold start", f"done, took {progress.clock(time.monotonic() - start_s)}")


def _wait_for(process: Any, steps: Any, deadline_s: float, *, each_time: Callable[[], None] = lambda: None) -> None:
    """Wait for the process. DeadlineError if it makes no step within ``deadline_s``. ``each_time`` is called often."""
    last_step, since_s = steps.value, time.monotonic()
    while process.is_alive():
        process.join(watchdog.POLL_S)
        each_time()
        if steps.value != last_step:
            last_step, since_s = steps.value, time.monotonic()
        elif deadline_s and time.monotonic() - since_s > deadline_s:
            raise dist.DeadlineError(
                f"cold start: nothing for {deadline_s:g} s after step {last_step}; see watchdog.train_s"
            )


class _Passing(logging.Handler):
    """Hands records to the process that waits, with their text made."""

    def __init__(self, records: Any) -> None:
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        plain = logging.LogRecord(record.name, record.levelno, record.pathname, record.lineno, text, None, None)
        self._records.put(plain)


def _in_own_process(config: RunConfig, folder: Path, telling: _Telling) -> None:
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    cli.setup_logging(verbose=config.tracking.verbose)
    logging.getLogger().handlers[:] = [_Passing(telling.records)]
    cli.discover()
    with cli.errors_in_one_line():
        train(config, folder, telling)


def examples(problems: Sequence[Problem], policy: Policy, config: RunConfig) -> list[dict[str, list[int]]]:
    """Token ids and labels of each worked solution: the prompt as for RL and without loss, EOS at the end.

    Where the prompt is cut from a text, the rest of the text follows the solution. A solution that is a list has turns
    (:mod:`rltrain.environments.demonstrations`): what an environment writes in between carries no loss.
    """
    field = config.cold_start.solution_field
    missing = [problem.id for problem in problems if field not in problem.meta]
    if missing:
        raise ConfigError(
            f"cold_start.solution_field={field}: {len(missing)} problems have no such field, the first is "
            f"{missing[0]}; name its column with +data.meta.{field}=COLUMN, let the cold start learn from other data "
            "with +data@cold_start_data=small_integers, or leave it out with cold_start.steps=0"
        )
    other = next((problem.id for problem in problems if not isinstance(problem.meta[field], (str, list, tuple))), None)
    if other is not None:
        raise ConfigError(
            f"cold_start.solution_field={field}: of {other} is neither a text nor a list of turns; choose another field"
        )
    if policy.tokenizer.eos_token_id is None:
        raise ConfigError("cold start: the tokenizer has no EOS token to end a solution; set eos_token in its config")
    longest = config.cold_start.max_length
    encoded, dropped = encode_all(policy, problems, config.model, max_prompt_tokens=longest)
    refuse_long_entries(policy, dropped, config.model, max_prompt_tokens=longest, limits="cold_start.max_length")
    rows = [row for row in _rows(encoded, policy, config) if len(row["input_ids"]) <= longest]
    if len(rows) < len(problems):
        count = len(problems) - len(rows)
        log.warning("cold start: %d solutions over max_length, or without a prompt, were left out", count)
    if not rows:
        reason = why_left_out(policy, problems[0], config.model, max_prompt_tokens=longest)
        raise ConfigError(f"cold start: no example is within cold_start.max_length={longest}, the first is {reason}")
    return rows


def _rows(encoded: Sequence[Prompt], policy: Policy, config: RunConfig) -> list[dict[str, list[int]]]:
    field = config.cold_start.solution_field
    solutions = [prompt.problem.meta[field] for prompt in encoded]
    is_text = all(isinstance(solution, str) for solution in solutions)
    if is_text and (config.environment is None or any(prompt.continuation_ids for prompt in encoded)):
        return [_row_of_text(prompt, policy.tokenizer, field) for prompt in encoded]
    turns = [[solution] if isinstance(solution, str) else solution for solution in solutions]
    with demonstrator(policy, config) as maker:
        made = maker.all_of([prompt.problem for prompt in encoded], turns)
    _warn_of_bad_turns(encoded, made, field)
    return [
        _row_of_turns(prompt, one) for prompt, one in zip(encoded, made, strict=True) if isinstance(one, Demonstration)
    ]


def _row_of_text(prompt: Prompt, tokenizer: Any, field: str) -> dict[str, list[int]]:
    solution = tokenizer(prompt.problem.meta[field], add_special_tokens=False)["input_ids"]
    ids = [*prompt.token_ids, *solution, *prompt.continuation_ids, tokenizer.eos_token_id]
    start = len(prompt.token_ids)
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def _row_of_turns(prompt: Prompt, made: Demonstration) -> dict[str, list[int]]:
    labels = [token if written else IGNORED for token, written in zip(made.token_ids, made.written_T, strict=True)]
    return {
        "input_ids": [*prompt.token_ids, *made.token_ids],
        "labels": [IGNORED] * len(prompt.token_ids) + labels,
    }


def _warn_of_bad_turns(encoded: Sequence[Prompt], made: Sequence[Demonstration | BadTurns], field: str) -> None:
    """Name the first rows that are left out, each with its reason; ConfigError where all are."""
    reasons = [
        f"{prompt.problem.id}: {one}" for prompt, one in zip(encoded, made, strict=True) if isinstance(one, BadTurns)
    ]
    if reasons and len(reasons) == len(made):
        raise ConfigError(
            f"cold_start.solution_field={field}: no solution can be learnt from, the first is {reasons[0]}"
        )
    if reasons:
        log.warning("cold start: %d solutions are left out: %s", len(reasons), "; ".join(reasons[:REASONS_IN_WARNING]))


def train(config: RunConfig, folder: Path, telling: _Telling | None = None) -> None:
    """Fine-tune and save a plain transformers folder. It appears complete or not at all."""
    import datasets
    from transformers import PrinterCallback
    from trl import SFTTrainer

    other = config.cold_start_data
    source = problems_of(config.data, "train") if other is None else problems_of(other, "train", "cold_start_data")
    _refuse_random_start(config)
    count = min(config.cold_start.problems, len(source), config.cold_start.steps * config.cold_start.batch_size)
    # Weights and moments are fp32, also where RL trains in bf16: autocast then computes in bf16.
    policy = load_policy(dataclasses.replace(config.model, dtype="float32"))
    rows = examples([source[index] for index in range(count)], policy, config)
    writing = folder.with_name(".writing_cold_start")
    shutil.rmtree(writing, ignore_errors=True)
    trainer = _trainer_class(SFTTrainer, policy, config.cold_start)(
        model=policy.model,
        processing_class=policy.tokenizer,
        args=_arguments(config.cold_start, writing, seed=config.seed, dtype=config.model.dtype),
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[] if telling is None else [_counting(telling)],
    )
    trainer.remove_callback(PrinterCallback)  # prints dictionaries
    result = trainer.train()
    _merged(policy.model).save_pretrained(writing)
    policy.tokenizer.save_pretrained(writing)
    made = {"loss": result.training_loss, "examples": len(rows), "config": cold_starts.made_with(config)}
    (writing / "sft.json").write_text(json.dumps(made, indent=1))
    writing.replace(folder)
    log.info("cold start: loss %.4f after %d steps, saved to %s", result.training_loss, config.cold_start.steps, folder)


def _trainer_class(base: type, policy: Policy, config: ColdStartConfig) -> type:
    if config.objective != "curio":
        return base
    return curio.trainer_class(base, policy.model, alpha=config.curio_alpha)


def _refuse_random_start(config: RunConfig) -> None:
    is_random = isinstance(config.model, TinyConfig) and config.model.path is None
    if config.cold_start.objective == "curio" and is_random:
        raise ConfigError(
            "cold_start.objective=curio with model=tiny: it keeps the entropy of the model it starts from, and these "
            "are random weights; set model.path=FOLDER, such as another run's cold_start"
        )


def _counting(telling: _Telling) -> Any:
    from transformers import TrainerCallback

    class Counting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            telling.steps.value = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            telling.loss.value = float((logs or {}).get("loss", telling.loss.value))

    return Counting()


def _arguments(config: ColdStartConfig, folder: Path, *, seed: int, dtype: str) -> Any:
    from trl import SFTConfig

    in_order: dict[str, Any] = {"train_sampling_strategy": "sequential"} if config.order == "data" else {}
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
        **in_order,
        save_strategy="no",
        report_to=[],
        logging_steps=10,
        disable_tqdm=True,
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
    if config.cold_start.steps == 0 or config.cold_start.path is not None:
        raise ConfigError(
            "cold_start: nothing to train; set cold_start.steps and no cold_start.path, or name an experiment that does"
        )
    with run_folder.opened(Path(config.run_dir)):
        print(f"saved to {cold_start(config)}")


if __name__ == "__main__":
    cli.run(main)
