"""Pass rates of training problems, measured with the model as it is, for the filter data.pass_rate.

rltrain pass_rates +experiment=NAME model.path=FOLDER [--to FILE] [--samples 8] [--problems N] [--batch 64]

Completions are drawn as training draws them (``sampling.*``) and judged by the run's rewards. The file grows by
``--batch`` problems at a time. The same command goes on where a killed one stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.data.handbook import problems_of
from rltrain.data.mixture import Mixture
from rltrain.data.pass_rates import PassRate, fingerprint, read
from rltrain.errors import require
from rltrain.evaluate import EVALUATION_STEP, context_of, sampler_of
from rltrain.policy.encode import encode_all, prompt_limit, refuse_long_entries
from rltrain.policy.load import load_policy
from rltrain.rewards.failures import refuse_broken
from rltrain.rewards.scoring import score
from rltrain.runs import run_folder
from rltrain.runtime import dist, progress
from rltrain.types import Group, Problem

MEASURED_WITH = (
    "seed",
    "model",
    "rewards",
    "sampling",
    "environment",
)  # sections that a rate depends on, beside the data


class Measurement:
    """A model, a rollout engine and rewards, which give the pass rates of problems."""

    def __init__(self, config: RunConfig, samples: int) -> None:
        self._config, self._samples = config, samples
        self._policy = load_policy(config.model, device=dist.device())
        self._policy.model.to(dist.device())
        self._rollout = sampler_of(config, self._policy)
        self._context = context_of(config, self._policy, self._rollout)

    def rates(self, problems: Sequence[tuple[int, Problem]]) -> list[PassRate]:
        """Of these problems with their indices, in order, over all ranks; 0 judged where no prompt can be made."""
        mine = problems[dist.rank() :: dist.world_size()]
        limit = prompt_limit(self._policy, self._config.sampling)
        prompts, dropped = encode_all(
            self._policy, [problem for _, problem in mine], self._config.model, max_prompt_tokens=limit
        )
        refuse_long_entries(self._policy, dropped, self._config.model, max_prompt_tokens=limit)
        drawn = self._rollout.generate(prompts, step=EVALUATION_STEP, group_size=self._samples)
        groups, _ = score(drawn, self._config.rewards, self._context)
        refuse_broken(self._config.rewards)
        judged = {group.prompt.problem.id: group for group in groups}
        rows = [pass_rate(index, problem.id, judged.get(problem.id)) for index, problem in mine]
        every = [row for some in dist.gather_objects(rows, name="pass rates") for row in some]
        return sorted(every, key=lambda row: row.index)


def pass_rate(index: int, problem_id: str, group: Group | None) -> PassRate:
    """The row of a problem; abstentions are not judged."""
    if group is None or group.right_G is None:
        return PassRate(index=index, id=problem_id, right=0, judged=0)
    judged_G = group.right_G[~group.right_G.isnan()]
    return PassRate(index=index, id=problem_id, right=int(judged_G.sum()), judged=len(judged_G))


def header_of(config: RunConfig, problems: Sequence[Problem], samples: int) -> dict[str, Any]:
    """What a file of pass rates is a measurement of."""
    plain = run_folder.resolved(config)
    return {"data": fingerprint(problems), "samples": samples} | {
        key: plain[key] for key in MEASURED_WITH if plain[key] is not None
    }


def begun(path: Path, header: dict[str, Any]) -> int:
    """The number of rows that a file already holds; writes the header of a new file, and drops a torn line.

    ConfigError for the file of another measurement.
    """
    if not path.exists() or b"\n" not in path.read_bytes():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n")
        return 0
    held = read(path, "--to")
    differing = run_folder.changes(held.header, header, reasons=False)
    require(not differing, f"--to {path}: holds rates of another measurement ({differing}); give another file")
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    path.write_bytes(whole + end)
    return len(held.rows)


def batches(start: int, stop: int, size: int) -> Iterator[range]:
    """``range(start, stop)`` in pieces of ``size``."""
    return (range(first, min(first + size, stop)) for first in range(start, stop, size))


def main(config: RunConfig, options: argparse.Namespace) -> None:
    """Measure, append to the file, and print what to do with it."""
    dist.setup(deadline_s=config.deadline("collective"), join_s=config.deadline("join"))
    problems = problems_of(config.data, "train")
    require(not isinstance(problems, Mixture), "data: rates are of one data set; measure the sources one by one")
    require(bool(config.rewards), "rewards: none is set, and nothing says what is right; choose one")
    path = Path(options.to or Path(config.run_dir) / "pass_rates.jsonl")
    held = begun(path, header_of(config, problems, options.samples)) if dist.is_main() else 0
    (done, *_) = dist.gather_objects(held, name="rates that the file holds")
    stop = min(options.problems or len(problems), len(problems))
    measurement = Measurement(config, options.samples) if done < stop else None
    for part in batches(done, stop, options.batch):
        assert measurement is not None
        with dist.stage("pass rates", config.deadline("evaluation")):
            rows = measurement.rates([(index, problems[index]) for index in part])
        if dist.is_main():
            with path.open("a") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
            progress.say("evaluation", f"pass rates of {part.stop} of {stop} problems")
    if dist.is_main():
        print(summary(read(path, "--to").rows))
        print(f"written to {path}\nuse it: data.pass_rate=[0.2,0.8] data.pass_rate_file={path}")


def summary(rows: Sequence[PassRate]) -> str:
    """How many problems have a rate of 0, of 1, in each fifth between, and none."""
    rates = [row.rate for row in rows if row.rate is not None]
    between = [rate for rate in rates if 0 < rate < 1]
    fifths = [sum(low <= 5 * rate < low + 1 for rate in between) for low in range(5)]
    counts = [(f"{low / 5:.1f}..{(low + 1) / 5:.1f}", count) for low, count in enumerate(fifths)]
    lines = [("0", rates.count(0.0)), *counts, ("1", rates.count(1.0)), ("not judged", len(rows) - len(rates))]
    return "\n".join(["pass rate   problems", *(f"{name:12s}{count}" for name, count in lines)])


def parser() -> argparse.ArgumentParser:
    """The command's own flags; the rest is Hydra's."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    made.add_argument("--to", metavar="FILE")
    for flag, default in (("--samples", 8), ("--problems", 0), ("--batch", 64)):
        made.add_argument(flag, type=int, default=default, metavar="N")
    return made


def command_line() -> None:
    """Take the flags off the command line and leave the rest to Hydra."""
    options, rest = parser().parse_known_args()
    sys.argv[1:] = rest
    with cli.errors_in_one_line():
        for flag, least in (("samples", 1), ("problems", 0), ("batch", 1)):
            given = vars(options)[flag]
            require(given >= least, f"--{flag} {given}: must be at least {least}")
    cli.run(lambda config: main(config, options))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    command_line()
