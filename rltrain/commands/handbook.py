"""A behaviour handbook: extract it from solutions, or write solutions with it for a cold start without it (2509.13237).

rltrain handbook extract +experiment=NAME [--from RUN] [model.path=FOLDER]
rltrain handbook traces +experiment=NAME data.handbook=FILE [model.path=FOLDER]

extract reads RUN's training samples, or solves problems itself. The model reflects on each solution, then names
behaviours.
RUN_DIR/extraction.jsonl   one line per problem as it is done: solution, reflection, answer, what was refused and why
RUN_DIR/handbook.jsonl     at the end: the entries, equal names merged, for data.handbook

traces solves problems with the handbook in the prompt and keeps the right solutions.
RUN_DIR/handbook_traces.jsonl   one line per problem as it is done
RUN_DIR/sft.jsonl               at the end: the kept rows, prompts without the handbook, for rltrain sft

The same command goes on where a killed one stopped, and gives the same files.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rltrain import cli
from rltrain.config import ConfigError, RunConfig, RunError
from rltrain.data import behaviours
from rltrain.data.handbook import filled, problems_of, tags_of
from rltrain.errors import require, require_one_of
from rltrain.evaluate import context_of, sampler_of
from rltrain.options import help as help_pages
from rltrain.policy.encode import encode_all, prompt_limit, refuse_long_entries
from rltrain.policy.load import load_policy
from rltrain.rewards.failures import refuse_broken
from rltrain.rewards.scoring import score
from rltrain.runs import run_folder
from rltrain.runs.rows_file import JsonRow, append_rows, read_rows, refuse_other_config, write_whole
from rltrain.runtime import dist, progress
from rltrain.types import AdvisedProblem, Group, Problem, bare_prompt, is_right, user_text

# Steps for sampling keys that nothing else uses.
SOLVE_STEP, REFLECT_STEP, EXTRACT_STEP = -4, -5, -6
ACTIONS = ("extract", "traces")
FREE_KEYS = tuple({*run_folder.FREE_KEYS, "steps", "cold_start"} - {"handbook"})
KEPT, OTHER, CUT, LEFT_OUT = "kept", "other", "cut", "left out"


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A problem's solution, where there is one of the wanted kind, and where it comes from."""

    problem: Problem
    status: str
    text: str = ""
    tokens: int = 0
    handbook_tokens: int = 0
    step: int | None = None


class Model:
    """The configured model, with its rollout engine and the run's rewards."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.policy = load_policy(config.model, device=dist.device())
        self.policy.model.to(dist.device())
        self._rollout = sampler_of(config, self.policy)

    @cached_property
    def _context(self) -> Any:
        return context_of(self.config, self.policy, self._rollout)

    def solve(self, problems: Sequence[Problem]) -> list[Solution]:
        """The first completion of each problem that is kept, of ``handbook.samples``."""
        model, limit = self.config.model, prompt_limit(self.policy, self.config.sampling)
        prompts, dropped = encode_all(self.policy, problems, model, max_prompt_tokens=limit)
        refuse_long_entries(self.policy, dropped, model, max_prompt_tokens=limit)
        drawn = self._rollout.generate(prompts, step=SOLVE_STEP, group_size=self.config.handbook.samples)
        groups = drawn
        if self.config.handbook.keep != "all":
            groups, _ = score(drawn, self.config.rewards, self._context)
            refuse_broken(self.config.rewards)
        found = {group.prompt.problem.id: self._chosen(group) for group in groups}
        return [found.get(problem.id, Solution(problem=problem, status=LEFT_OUT)) for problem in problems]

    def _chosen(self, group: Group) -> Solution:
        keep = self.config.handbook.keep
        cut = [each.finish != "stop" for each in group.completions]
        right = [keep == "all" or is_wanted(float(value), keep) for value in _judged(group)]
        wanted = [index for index in range(len(cut)) if right[index] and not cut[index]]
        if not wanted:
            return Solution(problem=group.prompt.problem, status=CUT if all(cut) else OTHER)
        completion = group.completions[wanted[0]]
        return Solution(
            problem=group.prompt.problem,
            status=KEPT,
            text=completion.text,
            tokens=len(completion.token_ids),
            handbook_tokens=group.prompt.handbook_tokens,
        )

    def answers(self, texts: Sequence[tuple[str, str]], *, step: int) -> dict[str, tuple[str, bool]]:
        """By id the answer to a text, and whether it ran into the limit; none for a text that is too long."""
        asked = self.config.handbook
        model = dataclasses.replace(self.config.model, system=None, examples=[])
        sampling = dataclasses.replace(
            self.config.sampling, temperature=asked.temperature, max_new_tokens=asked.max_new_tokens, stop=[],
            max_prompt_tokens=asked.max_prompt_tokens,
        )  # fmt: skip
        problems = [Problem(id=name, prompt=text, answer="") for name, text in texts]
        limit = prompt_limit(self.policy, sampling)
        prompts, _ = encode_all(self.policy, problems, model, max_prompt_tokens=limit)
        groups = self._rollout.generate(prompts, step=step, group_size=1, sampling=sampling) if prompts else []
        return {g.prompt.problem.id: (g.completions[0].text, g.completions[0].finish != "stop") for g in groups}


def _judged(group: Group) -> list[float]:
    """What says that a completion is right; NaN where nothing was judged."""
    values_G = group.rewards_G if group.right_G is None else group.right_G
    return [float("nan")] * len(group.completions) if values_G is None else values_G.tolist()


def is_wanted(value: float, keep: str) -> bool:
    """Whether a solution that was judged is of the kind ``handbook.keep``; abstentions are of none."""
    return keep == "all" or (value == value and is_right(value) == (keep == "right"))


# --- extraction --------------------------------------------------------------------------------------------------


def recorded(run: Path, config: RunConfig, problems: Sequence[Problem]) -> list[Solution]:
    """The newest solution of each problem among a run's training samples that is of the kind ``handbook.keep``.

    ConfigError for a folder without samples, and where no sample is of these problems.
    """
    import pyarrow.parquet as pq

    files = sorted((run / "samples").glob("step_*.parquet"), reverse=True)
    require(
        bool(files), f"--from {run}: has no training samples; give a run folder, of tracking.samples_every_steps > 0"
    )
    newest: dict[str, JsonRow] = {}
    for file in files:
        for row in pq.read_table(file).to_pylist():
            value = row.get("right") if row.get("right") is not None else row.get("reward")
            if row["finish"] == "stop" and is_wanted(float("nan") if value is None else value, config.handbook.keep):
                newest.setdefault(row["problem_id"], row)
    known: dict[str, Problem] = {}
    for problem in problems:
        if len(known) == len(newest):
            break
        if problem.id in newest:
            known[problem.id] = problem
    require(
        bool(known),
        f"--from {run}: of {len(newest)} problems with a solution that is {config.handbook.keep} none is in data's "
        f"{config.handbook.split} split; give the run's own experiment and data",
    )
    return [_of_row(problem, newest[name]) for name, problem in known.items()]


def _of_row(problem: Problem, row: JsonRow) -> Solution:
    tokens = len(row["token_ids"])
    return Solution(problem=problem, status=KEPT, text=row["completion"], tokens=tokens, step=row["step"])


def extracted(model: Model, solutions: Sequence[Solution], run: str) -> list[JsonRow]:
    """The row of each solution: what the model reflected and answered, the entries, and what was refused."""
    asked = model.config.handbook
    texts = {each.problem.id: _texts(each) for each in solutions if each.status == KEPT}
    reflecting = [(name, filled(asked.reflect, **each)) for name, each in texts.items()]
    reflections = model.answers(reflecting, step=REFLECT_STEP)
    for name, (text, _) in reflections.items():
        texts[name]["reflection"] = text
    asking = [(name, filled(asked.extract, **texts[name])) for name in reflections]
    answers = model.answers(asking, step=EXTRACT_STEP)
    return [_row(each, texts, answers, model.config, run) for each in solutions]


def _texts(solution: Solution) -> dict[str, str]:
    return {"question": user_text(bare_prompt(solution.problem)).strip(), "solution": solution.text.strip()}


def _row(
    solution: Solution,
    texts: dict[str, dict[str, str]],
    answers: dict[str, tuple[str, bool]],
    config: RunConfig,
    run: str,
) -> JsonRow:
    problem = solution.problem
    row: JsonRow = {"id": problem.id, "status": solution.status}
    if solution.status != KEPT:
        return row
    if problem.id not in answers:
        return row | {"status": LEFT_OUT}
    answer, cut = answers[problem.id]
    parsed = behaviours.parse(answer, config.handbook, cut=cut)
    entry = config.data.handbook_tag
    return row | {
        "origin": {"problem": problem.id, "run": run, "step": solution.step},
        "tags": tags_of(problem, entry, "data") if entry in problem.meta else [],
        **texts[problem.id],
        "answer": answer,
        "entries": [list(pair) for pair in parsed.entries],
        "refused": [list(pair) for pair in parsed.refused],
    }


def extract(config: RunConfig, run: Path | None) -> None:
    """Read or solve what is not done yet, write the handbook, and print what was refused."""
    folder = Path(config.run_dir)
    bare = dataclasses.replace(config.data, handbook=None) if run else config.data
    problems = problems_of(bare, config.handbook.split)
    read = None if run is None else recorded(run, config, problems)
    total = _total(config, len(problems) if read is None else len(read))

    def rows(model: Model, places: range) -> list[JsonRow]:
        solutions = model.solve([problems[i] for i in places]) if read is None else [read[i] for i in places]
        return extracted(model, solutions, str(run or folder))

    done = _all_rows(config, "extraction", total, rows, source=None if read is None else f"{run} ({_digest(read)})")
    kept = [row for row in done if "entries" in row]
    entries = behaviours.merged(kept)
    print(_told(done, kept, len(entries)))
    if not entries:
        raise RunError(
            f"handbook: {len(kept)} answers hold no behaviour; read {folder}/extraction.jsonl, then change "
            "handbook.extract or handbook.line, or give a larger model"
        )
    write_whole(folder / "handbook.jsonl", behaviours.written(entries))
    print(f"written to {folder}/handbook.jsonl\nuse it: data.handbook={folder}/handbook.jsonl")


def _digest(read: Sequence[Solution]) -> str:
    """How many solutions there are, and a hash of whose and from when: a run that went on has others."""
    facts = json.dumps([[each.problem.id, each.step] for each in read])
    return f"{len(read)} solutions, {hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def _told(done: Sequence[JsonRow], kept: Sequence[JsonRow], entries: int) -> str:
    """The counts: problems by status, entries before and after the merge, refused lines by reason."""
    refused = Counter(why for row in kept for _, why in row["refused"])
    found = sum(len(row["entries"]) for row in kept)
    counts = {**Counter(f"problems {row['status']}" for row in done), "behaviours": found, "entries": entries}
    counts |= {"merged": found - entries} | {f"refused: {why}": count for why, count in sorted(refused.items())}
    return "\n".join(f"{name:24s}{count}" for name, count in counts.items())


# --- traces ------------------------------------------------------------------------------------------------------


def traces(config: RunConfig) -> None:
    """Solve what is not done yet, and write what a cold start reads."""
    folder, data = Path(config.run_dir), config.data
    require(config.handbook.keep != "wrong", "handbook.keep=wrong: a cold start would learn mistakes; set right or all")
    problems = problems_of(data, config.handbook.split)

    def rows(model: Model, places: range) -> list[JsonRow]:
        return [_trace(each) for each in model.solve([problems[i] for i in places])]

    done = _all_rows(config, "handbook_traces", _total(config, len(problems)), rows)
    kept = [row for row in done if row["status"] == KEPT]
    if not kept:
        raise RunError(
            f"handbook: of {len(done)} problems none has a solution that is kept ({_in_words(done)}); take more "
            "handbook.problems or handbook.samples, or a model that solves some"
        )
    write_whole(folder / "sft.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    means = {name: sum(row[name] for row in kept) / max(1, len(kept)) for name in ("tokens", "handbook_tokens")}
    print("\n".join(f"{name:24s}{value:.4g}" for name, value in {**_statuses(done), **means}.items()))
    print(f"written to {folder}/sft.jsonl")


def _in_words(rows: Iterable[JsonRow]) -> str:
    return ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).items())


def _statuses(rows: Iterable[JsonRow]) -> dict[str, float]:
    return dict(Counter(f"problems {row['status']}" for row in rows))


def _trace(solution: Solution) -> JsonRow:
    problem = solution.problem
    row: JsonRow = {"id": problem.id, "status": solution.status}
    if solution.status != KEPT:
        return row
    facts = {"prompt": bare_prompt(problem), "solution": solution.text, "answer": problem.answer}
    names = list(problem.behaviours) if isinstance(problem, AdvisedProblem) else []
    return row | facts | {
        "tokens": solution.tokens, "handbook_tokens": solution.handbook_tokens, "behaviours": names,
    }  # fmt: skip


# --- both --------------------------------------------------------------------------------------------------------


def _total(config: RunConfig, count: int) -> int:
    return min(config.handbook.problems or count, count)


def _all_rows(
    config: RunConfig,
    name: str,
    total: int,
    rows: Callable[[Model, range], list[JsonRow]],
    *,
    source: str | None = None,
) -> list[JsonRow]:
    """The rows of a file, after those that it lacks are made and appended; ConfigError for another config's file."""
    folder = Path(config.run_dir)
    record, path = folder / f"{name}.json", folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_config(record, config, free_keys=FREE_KEYS)
    before = json.loads(record.read_text())["from"] if record.exists() else source
    require(before == source, f"--from {source}: {record} was made from {before}; set another run_dir")
    write_whole(record, json.dumps({"config": run_folder.resolved(config), "from": source}, indent=1))
    done = read_rows(path)
    model = Model(config) if len(done) < total else None
    bar = progress.Bar(name, total, done=len(done), every_s=5.0)
    for start in range(len(done), total, config.handbook.batch_size):
        assert model is not None
        made = rows(model, range(start, min(start + config.handbook.batch_size, total)))
        append_rows(path, made)
        done += made
        bar.update(len(done), [f"kept {sum(row['status'] == KEPT for row in done)}"])
    bar.close()
    return done[:total]


def main(config: RunConfig, options: argparse.Namespace) -> None:
    """One process: extract, or write traces."""
    require(dist.world_size() == 1, f"rltrain handbook: started on {dist.world_size()} ranks; start one")
    require(config.environment is None, "environment: solutions are read in one turn; set environment=none")
    if config.handbook.keep != "all" and not config.rewards and options.source is None:
        raise ConfigError("rewards: none is set, and nothing says what is right; choose one, or handbook.keep=all")
    with run_folder.opened(Path(config.run_dir)):
        if options.action == "traces":
            traces(config)
        else:
            extract(config, None if options.source is None else Path(options.source))


def parser() -> argparse.ArgumentParser:
    """The command's own words; the rest is Hydra's."""
    made = argparse.ArgumentParser(prog="rltrain handbook", add_help=False, allow_abbrev=False)
    made.add_argument("action", nargs="?", default="")
    made.add_argument("--from", dest="source", metavar="RUN")
    return made


def command_line() -> None:
    """Take the action and the flag off the command line and leave the rest to Hydra."""
    options, rest = parser().parse_known_args()
    sys.argv[1:] = rest
    with cli.errors_in_one_line():
        if not help_pages.wants_help(rest):
            require_one_of(ACTIONS, "rltrain handbook ACTION", options.action)
        require(options.action == "extract" or options.source is None, "--from: belongs to extract; leave it out")
    cli.run(lambda config: main(config, options))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    command_line()
