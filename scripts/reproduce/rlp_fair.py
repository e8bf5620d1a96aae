"""RLP against next-token training, from one cold start a seed, before and after the same GRPO steps.

python scripts/reproduce/rlp_fair.py [OUT] [--experiment rlp_automaton] [--seeds 5] [--pieces start,rlp,…] [--table]

Pieces of a seed, each made once: ``start`` (the cold start and what it measures), one for each arm (its training, then
its accuracy), and ``grpo_ARM`` (GRPO from there, then its accuracy). All required pieces come first, seed by seed, then
the others. Run it again to go on. --table prints Markdown and writes OUT/EXPERIMENT/accuracy.png.

Compute, in passes of a token, a backward pass counted as two forward passes. A step of RLP on words of 8 letters: 256
thoughts of at most 9 tokens after 10, so 2,500 sampled, 5,500 scored, 3 x 4,900 trained on, 22,600 in all. A step of
next-token training on 64 documents of 12 tokens: 2,300. So 10 of them cost a little more than one of RLP. On equations
of six operations RLP's 128 thoughts of 34 tokens after 23 cost 34,000, and a step on 64 documents of 27 tokens 5,200.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from league import import_once, names, numbers

from rltrain.compare.comparison import LEVEL
from rltrain.compare.statistics import detectable, paired

BATCH = 64  # documents of a step of supervised training
SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An experiment, the steps of its arms, and GRPO's."""

    words: str  # the data set of the documents
    thoughts: str  # that of the cold start
    rlp_steps: int
    documents: int  # that RLP reads
    next_token_steps: int  # that cost as much as RLP
    grpo: tuple[str, ...]


SETTINGS = {
    "rlp_automaton": Setting(
        words="automaton_words",
        thoughts="automaton_thoughts",
        rlp_steps=60,
        documents=60 * 16,
        next_token_steps=10 * 60,
        grpo=("steps=20", "batch.prompts_per_step=16", "batch.group_size=8"),
    ),
    "rlp_equations": Setting(
        words="equations_six",
        thoughts="equations_six_thoughts",
        rlp_steps=60,
        documents=60 * 8,
        next_token_steps=7 * 60,
        grpo=("steps=20", "batch.prompts_per_step=8", "batch.group_size=8"),
    ),
}
SHOWN = {
    "start": "no further training",
    "rlp": "RLP",
    "answers": "GRPO in RLP's place, on the same documents",
    "next_documents_0.0003": "next token, the same documents",
    "next_compute_0.0003": "next token, the same compute, rate 3e-4",
    "next_compute_3e-05": "next token, the same compute, rate 3e-5",
    "more_start_0.0003": "more of the cold start, the compute of RLP",
}
MORE = ["more_start_0.0003", "next_compute_3e-05", "grpo_next_compute_3e-05"]  # after all required pieces
REQUIRED = [*(arm for arm in SHOWN if arm not in MORE), *(f"grpo_{arm}" for arm in SHOWN if arm not in MORE)]


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One seed of an experiment: its folder, and the words of its commands."""

    out: Path
    experiment: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.out / self.experiment / f"seed_{self.seed}"

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.experiment]

    def words(self, *more: str) -> list[str]:
        """A command line; the documents are those that RLP reads in one epoch."""
        documents = f"data.train_size={self.setting.documents}"
        return [f"+experiment={self.experiment}", f"seed={self.seed}", documents, *more]

    def policy(self, arm: str) -> Path:
        """The model that an arm ends with."""
        if arm in ("rlp", "answers") or arm.startswith("grpo_"):
            return sorted((self.folder / arm / "checkpoints").glob("step_*/policy"))[-1]
        return self.folder / arm / "cold_start"


def supervised(one: Seed, arm: str, *more: str) -> None:
    """Train ``arm`` on documents or thoughts, from random weights or from a model."""
    from rltrain import cli, sft

    folder = one.folder / arm
    if not (folder / "cold_start").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sft.train(cli.compose(one.words(*more, f"run_dir={folder}")), folder / "cold_start")


def with_rl(one: Seed, arm: str, *more: str) -> None:
    """Train ``arm`` with RL."""
    from rltrain import cli
    from rltrain import train as command
    from rltrain.runtime import dist

    try:
        command.main(cli.compose(one.words(*more, f"run_dir={one.folder / arm}")))
    finally:
        dist.teardown()


def evaluated(one: Seed, arm: str) -> None:
    """Accuracy with a thought, greedy and sampled, and greedy without one."""
    from rltrain import cli, evaluate

    grading = ["reward@rewards.answer=target_text", "sampling.stop=['.']", f"model.path={one.policy(arm)}"]
    sampled = ["evaluation.temperature=1", f"evaluation.samples={SAMPLES}"]
    greedy = ["evaluation.temperature=0", "evaluation.samples=1", "data.plain_share=1"]
    for how, more in (("thought", sampled), ("direct", greedy)):
        target = one.folder / arm / how
        if not (target / "evaluation.json").is_file():
            evaluate.main(cli.compose(one.words(*grading, *more, f"run_dir={target}")))


def further(one: Seed, data: str, steps: int, rate: float, *more: str) -> list[str]:
    """More supervised training from the cold start, annealed."""
    words = [f"data@cold_start_data={data}", f"model.path={one.policy('start')}", f"cold_start.steps={steps}"]
    words += [f"cold_start.learning_rate={rate:g}", "cold_start.warmup_steps=5", "cold_start.order=shuffled"]
    return [*words, *more]


def make(one: Seed, arm: str) -> None:
    """Train and evaluate an arm."""
    setting, name = one.setting, arm.rpartition("_")[0]
    start = f"cold_start.path={one.policy('start')}"
    grading = ["algorithm=grpo", "reward@rewards.answer=target_text", "sampling.stop=['.']"]
    plain = "cold_start_data.plain_share=1"
    if arm == "start":
        supervised(one, arm)
    elif arm == "rlp":
        with_rl(one, arm, start, f"steps={setting.rlp_steps}")
    elif arm == "answers":
        with_rl(one, arm, start, f"steps={setting.rlp_steps}", *grading)
    elif arm.startswith("grpo_"):
        before = f"model.path={one.policy(arm.removeprefix('grpo_'))}"
        with_rl(one, arm, before, "cold_start.steps=0", "data.seed=3", *grading, *setting.grpo)
    elif name == "next_documents":
        same = [plain, f"cold_start_data.train_size={setting.documents}"]
        supervised(one, arm, *further(one, setting.words, setting.documents // BATCH, rate_of(arm), *same))
    elif name == "next_compute":
        other = [plain, "cold_start_data.seed=2"]
        supervised(one, arm, *further(one, setting.words, setting.next_token_steps, rate_of(arm), *other))
    else:
        fresh = ["cold_start_data.seed=2", "cold_start_data.all_worked=0"]
        supervised(one, arm, *further(one, setting.thoughts, setting.next_token_steps, rate_of(arm), *fresh))
    evaluated(one, arm)


def rate_of(arm: str) -> float:
    """The learning rate in an arm's name."""
    return float(arm.rpartition("_")[2])


def in_own_process(function: Callable[..., None], *arguments: object, console: Path) -> bool:
    """Call it in a forked process that writes to ``console``; whether it came to its end."""

    def quietly() -> None:
        with console.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=quietly)
    process.start()
    process.join()
    return process.exitcode == 0


def pieces(seed_list: Sequence[int], chosen: Sequence[str]) -> list[tuple[int, str]]:
    """The pieces in order: the required ones seed by seed, then the others."""
    every = [(seed, piece) for part in (REQUIRED, MORE) for seed in seed_list for piece in part]
    return [(seed, piece) for seed, piece in every if not chosen or piece in chosen]


def run(out: Path, experiment: str, seed_list: Sequence[int], chosen: Sequence[str]) -> int:
    """Make what is missing, one piece at a time; the number of pieces that stopped."""
    stopped = 0
    for seed, piece in pieces(seed_list, chosen):
        one = Seed(out=out, experiment=experiment, seed=seed)
        if (one.folder / piece / "direct" / "evaluation.json").is_file():
            continue
        one.folder.mkdir(parents=True, exist_ok=True)
        since_s = time.monotonic()
        ended = in_own_process(make, one, piece, console=one.folder / f"{piece}.txt")
        stopped += not ended
        state = f"{time.monotonic() - since_s:.0f} s" if ended else f"STOPPED, see {one.folder / piece}.txt"
        print(f"seed {seed}  {piece}  {state}", flush=True)
        if ended and piece.startswith("grpo_"):
            shutil.rmtree(one.folder / piece / "checkpoints")
    return stopped


def accuracies(one: Seed, arm: str) -> dict[str, float] | None:
    """Per cent: sampled and greedy with a thought, greedy without; None where it was not measured."""
    files = {how: one.folder / arm / how / "evaluation.json" for how in ("thought", "direct")}
    if not all(file.is_file() for file in files.values()):
        return None
    values = {how: json.loads(file.read_text()) for how, file in files.items()}
    return {
        "sampled": 100 * values["thought"]["eval_accuracy"],
        "greedy": 100 * values["thought"]["greedy"]["eval_accuracy"],
        "direct": 100 * values["direct"]["eval_accuracy"],
    }


def table(measured: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """Means over seeds of each arm, and RLP's sampled accuracy less the arm's, over the seeds that have both."""
    lines = ["| arm | seeds | sampled | greedy | greedy, no thought | RLP less it, sampled | detectable |"]
    lines.append("|---" * 7 + "|")
    for arm, rows in measured.items():
        means = [f"{np.mean([row[key] for row in rows.values()]):.1f} %" for key in ("sampled", "greedy", "direct")]
        is_after = arm.startswith("grpo_")
        rlp = measured.get("grpo_rlp" if is_after else "rlp", {})
        both = [seed for seed in rows if seed in rlp]
        values = np.array([rlp[seed]["sampled"] - rows[seed]["sampled"] for seed in both])
        cells = ["–", "–"] if arm.endswith("rlp") or not both else difference(values)
        name = SHOWN[arm.removeprefix("grpo_")] + (", then GRPO" if is_after else "")
        lines.append(f"| {' | '.join([name, str(len(rows)), *means, *cells])} |")
    return "\n".join(lines)


def draw(measured: Mapping[str, Mapping[int, Mapping[str, float]]], path: Path) -> None:
    """A panel before and a panel after GRPO: sampled accuracy, a row an arm, a dot a seed, a bar for the mean."""
    from matplotlib.figure import Figure

    arms = [arm for arm in SHOWN if arm in measured]
    figure = Figure(figsize=(9, 0.5 + 0.4 * len(arms)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, prefix, title in zip(panels, ("", "grpo_"), ("before GRPO", "after the same GRPO steps"), strict=True):
        for row, arm in enumerate(arms):
            values = [seed["sampled"] for seed in measured.get(prefix + arm, {}).values()]
            if values:
                panel.barh(row, np.mean(values), color="tab:green" if arm == "rlp" else "lightgray")
                panel.plot(values, [row] * len(values), ".", color="black", markersize=4)
        panel.set(title=title, xlabel="sampled accuracy with a thought, %", xlim=(0, 100))
        panel.set_yticks(range(len(arms)), [SHOWN[arm] for arm in arms])
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def difference(values: np.ndarray) -> list[str]:
    """Mean with its interval, and what the seeds detect with 80 % probability."""
    interval = paired(values, level=LEVEL)
    if interval is None:
        return [f"{values.mean():+.1f}", "–"]
    found = detectable(float(values.std(ddof=1)), len(values), level=LEVEL)
    return [f"{interval.estimate:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})", f"{found:.1f}"]


def measured_arms(out: Path, experiment: str, seed_list: Sequence[int]) -> dict[str, dict[int, dict[str, float]]]:
    """What every arm measures, by seed."""
    every = sorted(
        [*REQUIRED, *MORE], key=lambda arm: (arm.startswith("grpo_"), list(SHOWN).index(arm.removeprefix("grpo_")))
    )
    measured = {}
    for arm in every:
        found = {seed: accuracies(Seed(out=out, experiment=experiment, seed=seed), arm) for seed in seed_list}
        if present := {seed: values for seed, values in found.items() if values is not None}:
            measured[arm] = present
    return measured


def main() -> None:
    """Choose pieces, run them, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/rlp_fair"))
    parser.add_argument("--experiment", choices=sorted(SETTINGS), default="rlp_automaton")
    parser.add_argument("--seeds", type=numbers, default=list(range(5)), help="a count, or a list with a comma")
    parser.add_argument("--pieces", type=names, default=[], help="between commas (default: all)")
    parser.add_argument("--table", action="store_true", help="print what is measured, and draw it")
    options = parser.parse_args()
    out = options.out.resolve()
    if options.table:
        measured = measured_arms(out, options.experiment, options.seeds)
        print(table(measured))
        draw(measured, out / options.experiment / "accuracy.png")
        return
    os.environ |= {"OMP_NUM_THREADS": "1"}
    import_once()
    raise SystemExit(1 if run(out, options.experiment, options.seeds, options.pieces) else 0)


if __name__ == "__main__":
    main()
