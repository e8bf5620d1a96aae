"""ConMax on solutions with detours: cold start, RL and its controls, data sets, students. Run it again to go on.

python scripts/reproduce/conmax.py [OUT] [--seeds 3] [--pieces rl,compress] [--rl-steps N] [--rate R]

Pieces run seed by seed, each in a process of its own. What is finished is not run again.

rl        the cold start, then RL, evaluated every 10 steps
random    its control: the same steps from the same cold start under a reward that is a coin
compress  traces that RL has not seen, shortened by the cold-started model (prompt only) and by RL's (conmax). RL's is
          the checkpoint of the shortest greedy outputs on held-out problems
students  trained from scratch on the problems that both sets kept: on the original traces and on each set's
more      RL's other control: as many sequences of the cold start's own training, at RL's rate and at five times it

At the end: Markdown tables of the pieces that every seed has.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from league import import_once, names, numbers

from rltrain.compare.statistics import detectable, paired
from rltrain.runs.metrics import read_jsonl

LEVEL = 0.95
LENGTH = "eval_completions/mean_length"
SETS = ("prompt_only", "conmax")
STUDENTS = ("original", *SETS)
FACTORS = (1, 5)  # of RL's rate, for more training
METRICS = ("length_ratio", "floored", "trace_score", "answer_score", "bare_nll", "redundant_lines", "redundant_nll")
METRICS += ("redundant_pays", "repeated_ngrams")


@dataclass(frozen=True, kw_only=True)
class Seed:
    """What is run for a seed, below ``out``."""

    out: Path
    seed: int
    rl_steps: int
    rate: float
    traces: int
    student_steps: int

    def folder(self, name: str) -> Path:
        return self.out / f"{name}-seed{self.seed}"

    def config(self, name: str, *words: str) -> Any:
        """The experiment in the folder ``name``."""
        from rltrain import cli

        given = ["+experiment=conmax", f"seed={self.seed}", f"run_dir={self.folder(name)}", f"name={name}"]
        given.append(f"optimizer.learning_rate={self.rate:g}")
        return cli.compose([*given, "tracking.wandb=disabled", "tracking.samples_every_steps=0", *words])

    @property
    def cold_start(self) -> Path:
        return self.folder("rl") / "cold_start"

    def has(self, piece: str) -> bool:
        """Whether the piece is finished."""
        return self.folder(piece).with_suffix(".json").is_file()

    def chosen(self) -> int:
        """The step whose greedy outputs are shortest, of those after step 0."""
        return min((length, step) for step, length in self.lengths("rl").items() if step)[1]

    def lengths(self, name: str) -> dict[int, float]:
        """Mean tokens of greedy outputs on held-out problems, by step."""
        rows = read_jsonl(self.folder(name) / "metrics.jsonl")
        return {row["step"]: row[LENGTH] for row in rows if row.get(LENGTH) is not None}


def rl(one: Seed, name: str = "rl", *words: str) -> None:
    """The cold start, if there is none yet, and RL from it."""
    from rltrain import sft, train

    often = ["evaluation.every_steps=10", "checkpoint.every_steps=10", "checkpoint.keep_last=100"]
    config = one.config(name, f"steps={one.rl_steps}", *often, *words)
    start = one.folder(name) / "cold_start"
    start.parent.mkdir(parents=True, exist_ok=True)
    if name == "rl" and not start.is_dir():
        sft.train(config, start)
    elif not start.is_dir():
        shutil.copytree(one.cold_start, start)
    train.main(config)


def random(one: Seed) -> None:
    """The control whose reward is a coin; its length and cold start are those of ConMax."""
    rl(one, "random", "reward@rewards.answer=random")
    shutil.rmtree(one.folder("random") / "checkpoints")


def more(one: Seed) -> None:
    """More of the cold start's training, on fresh problems: as many sequences as RL samples."""
    from rltrain import evaluate, sft

    for factor in FACTORS:
        name = f"more-{factor}"
        settings = one.config(name)
        sequences = one.rl_steps * settings.batch.prompts_per_step * settings.batch.group_size
        rate = factor * settings.optimizer.learning_rate
        words = ["cold_start_data.seed=1", f"cold_start.steps={sequences // settings.cold_start.batch_size}"]
        words += ["cold_start.warmup_steps=2", f"cold_start.learning_rate={rate:g}", f"model.path={one.cold_start}"]
        trained = one.folder(name) / "cold_start"
        trained.parent.mkdir(parents=True, exist_ok=True)
        if not trained.is_dir():
            sft.train(one.config(name, *words), trained)
        evaluate.main(one.config(name, f"model.path={trained}"))


def compress(one: Seed) -> None:
    """Both data sets."""
    from rltrain import compress as command

    chosen = one.folder("rl") / "checkpoints" / f"step_{one.chosen():06d}" / "policy"
    for name, compressor in zip(SETS, (one.cold_start, chosen), strict=True):
        words = [f"model.path={compressor}", f"scorer.path={one.cold_start}", f"data.validation_size={one.traces}"]
        command.compress(one.config(name, *words))


def students(one: Seed) -> None:
    """A student per column of traces, all on the same problems, evaluated on problems of the test split."""
    from rltrain import cli, evaluate, sft

    kept = [{row["id"]: row for row in read_jsonl(one.folder(name) / "sft.jsonl")} for name in SETS]
    both = [(row, kept[1][name]) for name, row in kept[0].items() if name in kept[1]]
    one.folder("students").mkdir(parents=True, exist_ok=True)
    file = one.folder("students") / "traces.jsonl"
    rows = [
        {"id": a["id"], "prompt": a["prompt"], "answer": a["answer"], "original": a["original_solution"]}
        | {"prompt_only": a["solution"], "conmax": b["solution"]}
        for a, b in both
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for column in STUDENTS:
        folder = one.folder(f"student-{column}")
        if (folder / "evaluation.json").is_file():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        words = ["model=micro_by_seed", f"seed={one.seed}", f"run_dir={folder}"]
        hub = ["data=hub", f"data.path={file}", "data.id=id", "data.prompt='{prompt}'", "data.holdout=1e-6"]
        training = [
            f"cold_start.steps={one.student_steps}",
            "cold_start.learning_rate=3e-3",
            "cold_start.max_length=256",
        ]
        training += ["cold_start.schedule=linear", "cold_start.batch_size=32"]
        sft.train(cli.compose([*words, *hub, f"+data.meta.solution={column}", *training]), folder / "cold_start")
        measured = ["data=wordy_detours", "data.tasks=[solve]", "reward@rewards.answer=exact_value"]
        measured += ["sampling.max_new_tokens=128", "sampling.max_prompt_tokens=64", "evaluation.problems=500"]
        evaluate.main(cli.compose([*words, *measured, f"model.path={folder / 'cold_start'}"]))


PIECES: dict[str, Callable[[Seed], None]] = {
    "rl": rl,
    "random": random,
    "compress": compress,
    "students": students,
    "more": more,
}


def in_own_process(piece: str, one: Seed) -> None:
    """Run a piece in a process forked from this one; what it prints goes to OUT/PIECE-seedS.txt."""
    from rltrain import cli
    from rltrain.runtime import dist, progress

    with one.folder(piece).with_suffix(".txt").open("a") as console:
        os.dup2(console.fileno(), 1)
        os.dup2(console.fileno(), 2)
    progress.begin()
    with progress.set_up(verbose=False), cli.errors_in_one_line():
        try:
            PIECES[piece](one)
        finally:
            dist.teardown()


def run(piece: str, one: Seed) -> None:
    """Run a piece that is not finished; SystemExit if it stops."""
    settings = {"rl_steps": one.rl_steps, "rate": one.rate, "traces": one.traces, "student_steps": one.student_steps}
    done = one.folder(piece).with_suffix(".json")
    if one.has(piece) and json.loads(done.read_text())["settings"] == settings:
        return
    start_s = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=in_own_process, args=(piece, one))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"conmax: {piece}, seed {one.seed} stopped; see {one.folder(piece).with_suffix('.txt')}")
    took_s = time.monotonic() - start_s
    done.write_text(json.dumps({"settings": settings, "seconds": took_s}))
    print(f"conmax  seed {one.seed}  {piece}  {took_s:.0f} s", flush=True)


def evaluation(folder: Path) -> dict[str, float]:
    """What ``rltrain.evaluate`` wrote."""
    return json.loads((folder / "evaluation.json").read_text())


def lengths_of(one: Seed) -> dict[str, float]:
    """Tokens of greedy outputs on held-out problems: the compressors of a seed."""
    shown = {"cold start": one.lengths("rl")[0], "RL, chosen step": one.lengths("rl")[one.chosen()]}
    shown["RL, last step"] = one.lengths("rl")[one.rl_steps]
    if one.has("random"):
        shown["random reward, last step"] = one.lengths("random")[one.rl_steps]
    if one.has("more"):
        for factor in FACTORS:
            shown[f"more training, {factor} x RL's rate"] = evaluation(one.folder(f"more-{factor}"))[LENGTH]
    return shown


def sets_of(one: Seed) -> dict[str, float]:
    """Of each data set: share kept in percent, tokens of the kept traces before and after."""
    shown = {}
    for name in SETS:
        counts = json.loads((one.folder(name) / "compress.json").read_text())["counts"]
        shown |= {f"{name}, kept %": 100 * (1 - counts["dropped_share"])}
        shown |= {f"{name}, original tokens": counts["original_tokens"], f"{name}, tokens": counts["compressed_tokens"]}
    return shown


def students_of(one: Seed) -> dict[str, float]:
    """Greedy accuracy in percent and tokens of each student."""
    found = {name: evaluation(one.folder(f"student-{name}")) for name in STUDENTS}
    shown = {f"{name}, accuracy %": 100 * values["eval_accuracy"] for name, values in found.items()}
    shown |= {f"{name}, tokens": values[LENGTH] for name, values in found.items()}
    return shown | {"problems": len(read_jsonl(one.folder("students") / "traces.jsonl"))}


def table(seeds: Sequence[Seed], each: Callable[[Seed], dict[str, float]], title: str, against: dict[str, str]) -> str:
    """A row per quantity: each seed, the mean, and the paired difference from the row that ``against`` names."""
    columns = [each(one) for one in seeds]
    lines = [f"| {title} | {' | '.join(f'seed {one.seed}' for one in seeds)} | mean | difference |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for name in [name for name in columns[0] if all(name in column for column in columns)]:
        values = np.array([column[name] for column in columns])
        cells = [name, *(f"{value:.1f}" for value in values), f"{values.mean():.1f}", "–"]
        if name in against:
            cells[-1] = shown_difference(values - np.array([column[against[name]] for column in columns]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown_difference(differences: np.ndarray) -> str:
    """``-9.1 (-12.0 to -6.2), detectable 5.0``."""
    interval = paired(differences, level=LEVEL)
    if interval is None:
        return f"{differences.mean():+.1f}"
    found = detectable(float(differences.std(ddof=1)), len(differences), level=LEVEL)
    return f"{interval.estimate:+.1f} ({interval.low:+.1f} to {interval.high:+.1f}), detectable {found:.1f}"


def reward_table(seeds: Sequence[Seed]) -> str:
    """The reward's metrics over RL, of five steps each at the start, the middle and the end: means over seeds."""
    rows = [read_jsonl(one.folder("rl") / "metrics.jsonl") for one in seeds]
    last = seeds[0].rl_steps
    spans = [(1, 5), (last // 2 - 4, last // 2), (last - 4, last)]
    lines = [
        f"| `compression/` | {' | '.join(f'steps {first} to {end}' for first, end in spans)} |",
        "|---|---|---|---|",
    ]
    for name in METRICS:
        values = [
            [row[f"compression/{name}"] for run in rows for row in run if first <= row["step"] <= end]
            for first, end in spans
        ]
        lines.append(f"| `{name}` | {' | '.join(f'{np.mean(each):.3f}' for each in values)} |")
    return "\n".join(lines)


def report(seeds: Sequence[Seed]) -> str:
    """The tables of the pieces that every seed has."""
    parts = []
    if all(one.has("rl") for one in seeds):
        others = {name: "cold start" for name in lengths_of(seeds[0]) if name != "cold start"}
        parts.append(table(seeds, lengths_of, "tokens of greedy outputs", others))
        parts += [f"seed {one.seed}, chosen step {one.chosen()}: {one.lengths('rl')}" for one in seeds]
        parts.append(reward_table(seeds))
    if all(one.has("compress") for one in seeds):
        against = {f"conmax, {what}": f"prompt_only, {what}" for what in ("kept %", "tokens")}
        parts.append(table(seeds, sets_of, "data set", against))
    if all(one.has("students") for one in seeds):
        against = {f"{name}, {what}": f"original, {what}" for name in SETS for what in ("accuracy %", "tokens")}
        parts.append(table(seeds, students_of, "student", against))
    return "\n\n".join(parts)


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/conmax"))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="a count, or a list with a comma (default: 3)")
    parser.add_argument("--pieces", type=names, default=list(PIECES), help="between commas (default: all)")
    parser.add_argument("--rl-steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate of RL (default: 5e-5)")
    parser.add_argument("--traces", type=int, default=2048)
    parser.add_argument("--student-steps", type=int, default=500)
    options = parser.parse_args()
    if unknown := [name for name in options.pieces if name not in PIECES]:
        parser.error(f"--pieces {unknown[0]}: unknown; choose from {', '.join(PIECES)}")
    os.environ |= {"OMP_NUM_THREADS": "1"}
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    sizes = {"rl_steps": options.rl_steps, "traces": options.traces, "student_steps": options.student_steps}
    seeds = [Seed(out=out, seed=seed, rate=options.rate, **sizes) for seed in options.seeds]
    import_once()
    for one in seeds:
        for piece in options.pieces:
            run(piece, one)
    print(report(seeds))


if __name__ == "__main__":
    main()
