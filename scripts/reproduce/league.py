"""Train every estimator of the league on every task, from one cold start per task and seed. Run it again to go on.

python scripts/reproduce/league.py [OUT] [--tasks forks,mirror] [--methods GRPO,TEMPO] [--seeds 8] [--jobs 1] [--rates]
                                      [--rate 6e-4]

Tasks and methods are in league.yaml beside this file, or in the file of --specification. Cells run seed by seed, all
required ones of a seed before the next seed, so that what is finished is balanced at any time. A finished cell is never
run again, and an interrupted run resumes. With --rates GRPO and regression run at three rates each. With --rate all
chosen tasks run at that rate, which belongs into another OUT.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SPECIFICATION = Path(__file__).with_name("league.yaml")
IMPORTED = ("rltrain.cli", "rltrain.trainer", "transformers.models.qwen3.modeling_qwen3", "matplotlib.pyplot")
IMPORTED += ("pyarrow.parquet", "scipy.stats", "scipy.optimize", "matplotlib.backends.backend_agg")  # the slow ones
FINISHED = "league.json"  # written into a run's folder when it is done


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run of the league: its folder below OUT, and the words of its command line."""

    task: str
    method: str
    seed: int
    folder: str
    words: tuple[str, ...]

    def finished(self, out: Path) -> bool:
        """Whether this very command has run to its end."""
        record = out / self.folder / FINISHED
        return record.is_file() and json.loads(record.read_text())["words"] == list(self.words)


def specification(file: Path = SPECIFICATION) -> dict[str, Any]:
    """league.yaml, or another file like it."""
    return yaml.safe_load(file.read_text())


def plain(name: str) -> str:
    """A name as part of a path: ``regression / std`` is ``regression-std``."""
    return "-".join(name.replace("/", " ").split())


def cell(given: Mapping[str, Any], task: str, method: str, seed: int, *, rate: float | None = None) -> Cell:
    """The run of ``method`` on ``task`` with ``seed``, at ``rate`` in place of the task's."""
    settings = given["tasks"][task]
    chosen = float(settings["rate"]) if rate is None else rate
    name = plain(method) if rate is None else f"{plain(method)}-{rate:g}"
    words = [
        f"+experiment={settings['experiment']}",
        *settings.get("words", []),
        *given["methods"][method],
        *given["equal_tokens"].get(method, {}).get(task, []),
        f"optimizer.learning_rate={chosen:g}",
        f"seed={seed}",
        f"name='{method}'",
    ]
    return Cell(task=task, method=method, seed=seed, folder=f"{plain(task)}/{name}-seed{seed}", words=tuple(words))


def cells(
    given: Mapping[str, Any], *, tasks: Sequence[str] = (), methods: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Cell]:
    """The cells in the order in which they run: the required ones seed by seed, then the others seed by seed."""
    required, more = given["required"], given["more"]
    seeds = seeds or range(required["seeds"])
    every = [(task, method) for task in [*required["tasks"], *more["tasks"]] for method in given["methods"]]
    first = [pair for pair in every if pair[0] in required["tasks"] and pair[1] in required["methods"]]
    rest = [pair for pair in every if pair not in first]
    return [
        cell(given, task, method, seed)
        for pairs in (first, rest)
        for seed in seeds
        for task, method in pairs
        if (not tasks or task in tasks) and (not methods or method in methods)
    ]


def cells_by_rate(
    given: Mapping[str, Any], *, tasks: Sequence[str] = (), methods: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Cell]:
    """The methods of ``by_rate`` at the three rates of each required task, seed by seed."""
    return [
        cell(given, task, method, seed, rate=float(rate))
        for seed in seeds or range(given["required"]["seeds"])
        for task in tasks or given["required"]["tasks"]
        for method in methods or given["by_rate"]
        for rate in given["tasks"][task]["rates"]
    ]


def at_rate(tasks: Mapping[str, Mapping[str, Any]], rate: float) -> dict[str, dict[str, Any]]:
    """The tasks, each at ``rate``."""
    return {name: {**settings, "rate": rate} for name, settings in tasks.items()}


def train(words: Sequence[str], folder: Path) -> None:
    """Train in this process, which was forked from one that had imported everything."""
    with (folder / "console.txt").open("a") as console:
        os.dup2(console.fileno(), 1)
        os.dup2(console.fileno(), 2)
    from rltrain import cli
    from rltrain import train as command
    from rltrain.runtime import dist, progress

    progress.begin()
    with progress.set_up(verbose=False), cli.errors_in_one_line():
        try:
            command.main(cli.compose([*words, f"run_dir={folder}"]))
        finally:
            dist.teardown()


def import_once() -> None:
    """Everything that a run imports, so that a forked one does not."""
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("rltrain.cli").store_nodes()
    importlib.import_module("torch").set_num_threads(1)


@dataclass(kw_only=True)
class Progress:
    """One line: how many cells are done, the last one, and when all will be."""

    total: int
    done: int = 0
    started_s: float = 0.0
    made: int = 0

    def line(self, last: Cell, took_s: float, *, failed: bool) -> str:
        """``league 12/224  seed 0  forks  TEMPO  6 s  ETA 21:40``; the ETA is by the pace of this call."""
        left_s = (time.monotonic() - self.started_s) / self.made * (self.total - self.done)
        end = time.strftime("%H:%M", time.localtime(time.time() + left_s))
        state = "STOPPED" if failed else f"{took_s:.0f} s"
        return f"league {self.done}/{self.total}  seed {last.seed}  {last.task}  {last.method}  {state}  ETA {end}"


def run(chosen: Sequence[Cell], out: Path, jobs: int) -> int:
    """Run what is not finished, ``jobs`` cells at a time; the number of cells that stopped."""
    waiting = [one for one in chosen if not one.finished(out)]
    shown = Progress(total=len(chosen), done=len(chosen) - len(waiting), started_s=time.monotonic())
    print(f"league {shown.done}/{shown.total}  in {out}", flush=True)
    failed = 0
    with stopped_at_the_end() as running:
        while waiting or running:
            while waiting and len(running) < jobs:
                start(waiting.pop(0), out, running)
            for process, (one, since_s) in list(running.items()):
                process.join(0.2)
                if process.is_alive():
                    continue
                del running[process]
                took_s, stopped = time.monotonic() - since_s, process.exitcode != 0
                failed += stopped
                if not stopped:
                    conclude(one, out, took_s)
                shown.done, shown.made = shown.done + (not stopped), shown.made + 1
                ends = "\r" if sys.stdout.isatty() and (waiting or running) else "\n"
                print(shown.line(one, took_s, failed=stopped), end=ends, flush=True)
    return failed


def start(one: Cell, out: Path, running: dict[Any, tuple[Cell, float]]) -> None:
    """Fork a process for a cell."""
    folder = out / one.folder
    folder.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=train, args=(one.words, folder))
    process.start()
    running[process] = (one, time.monotonic())


def conclude(one: Cell, out: Path, took_s: float) -> None:
    """Note that a cell is done, and drop what only a resume would need."""
    folder = out / one.folder
    record = {"task": one.task, "method": one.method, "seed": one.seed, "seconds": took_s, "words": list(one.words)}
    (folder / FINISHED).write_text(json.dumps(record, indent=1))
    for name in ("checkpoints", "cold_start"):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextlib.contextmanager
def stopped_at_the_end() -> Iterator[dict[Any, tuple[Cell, float]]]:
    """The running processes; those left when the league is interrupted save their step and end."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    running: dict[Any, tuple[Cell, float]] = {}
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield running
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def numbers(text: str) -> list[int]:
    """``8`` is 0 to 7; ``3,5`` is 3 and 5."""
    values = [int(word) for word in text.split(",") if word]
    return values if "," in text else list(range(values[0]))


def names(text: str) -> list[str]:
    """The names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose the cells, run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/league"))
    parser.add_argument("--tasks", type=names, default=[], help="between commas (default: all)")
    parser.add_argument("--methods", type=names, default=[], help="between commas (default: all)")
    parser.add_argument("--seeds", type=numbers, default=[], help="a count, or a list with a comma (default: 8)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument("--specification", type=Path, default=SPECIFICATION, help="tasks and methods (league.yaml)")
    parser.add_argument("--rates", action="store_true", help="the methods of by_rate at each rate, in OUT/rates")
    parser.add_argument("--rate", type=float, help="a learning rate in place of the tasks' (not with --rates)")
    options = parser.parse_args(arguments)
    given = specification(options.specification)
    for kind, chosen in (("tasks", options.tasks), ("methods", options.methods)):
        if unknown := [name for name in chosen if name not in given[kind]]:
            parser.error(f"--{kind} {unknown[0]}: unknown; choose from {', '.join(given[kind])}")
    if options.rate is not None and options.rates:
        parser.error("--rate: --rates has its own; give one of the two")
    if options.rate is not None:
        given["tasks"] = at_rate(given["tasks"], options.rate)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    choose = cells_by_rate if options.rates else cells
    wanted = choose(given, tasks=options.tasks, methods=options.methods, seeds=options.seeds)
    out = (options.out / "rates" if options.rates else options.out).resolve()
    import_once()
    raise SystemExit(1 if run(wanted, out, options.jobs) else 0)


if __name__ == "__main__":
    main()
