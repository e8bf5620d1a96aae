"""Behaviours in the prompt of a tiny model, and fine-tuning on solutions that were written with them.

python scripts/reproduce/handbook.py RUNS --seed N     one seed; goes on where it stopped
python scripts/reproduce/handbook.py RUNS              the tables of the seeds in RUNS, in Markdown

A cold start on problems of one to three operators writes checked solutions by itself, answers at once after the words
"at once", and leaves the checks out after "steps". It is asked held-out problems without a handbook, with a handbook
by tag (the number of operators), and with the handbook's two instructions swapped. Two models are fine-tuned from it on
its right solutions of the same problems, written with and without the handbook. Both are asked without.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from quickstart_seeds import change_cells

from rltrain import cli, evaluate, sft
from rltrain.commands import handbook

AT_ONCE, STEPS = {"name": "at_once", "instruction": "at once"}, {"name": "steps", "instruction": "steps"}
TAGS = {"tags": ["1", "2", "3"]}
FILES = {
    "handbook": [TAGS, AT_ONCE | {"tags": ["1"]}, STEPS | {"tags": ["2", "3"]}],
    "swapped": [TAGS, AT_ONCE | {"tags": ["2", "3"]}, STEPS | {"tags": ["1"]}],
    "at_once": [AT_ONCE],
    "steps": [STEPS],
}
DATA = ["steps=[1,2,3]", "solution=checked", "max_operand=5", "max_value=9", "operators=+-", "handbook_tag=steps"]
DATA += ["handbook_template='{behaviours}: {question}'", "handbook_entry='{instruction}'"]
COMMON = ["data=small_integers", *(f"data.{word}" for word in DATA), "reward@rewards.answer=exact_value"]
COMMON += ["sampling.max_new_tokens=64", "sampling.max_prompt_tokens=48", "evaluation.problems=512"]
LEARNING = ["cold_start.batch_size=32", "cold_start.max_length=128", "cold_start.schedule=linear"]
ARMS = {
    "without": "no handbook",
    "with": "handbook by tag",
    "swapped": "the same, instructions swapped",
    "tuned_with": "fine-tuned on solutions with it",
    "tuned_without": "fine-tuned on solutions without",
}
KEYS = {"accuracy": "eval_accuracy", "tokens": "eval_completions/mean_length", "entries": "eval_handbook/tokens"}
PAIRS = (("with", "without"), ("swapped", "with"), ("tuned_with", "tuned_without"), ("tuned_with", "with"))


class Seed:
    """The models and evaluations of one seed, each made once."""

    def __init__(self, runs: Path, seed: int) -> None:
        self.runs, self.folder, self.seed = runs, runs / f"seed_{seed}", seed

    def compose(self, folder: str, *words: str):
        """A config of this seed."""
        return cli.compose([*COMMON, f"seed={self.seed}", f"run_dir={self.folder / folder}", *words])

    def fine_tune(self, folder: str, *words: str) -> str:
        """The model fine-tuned as the words say."""
        to = self.folder / folder / "cold_start"
        if not to.is_dir():
            to.parent.mkdir(parents=True, exist_ok=True)
            with torch.enable_grad():
                sft.train(self.compose(folder, *LEARNING, *words), to)
        return str(to)

    def evaluate(self, model: str, arm: str, *words: str) -> None:
        """The greedy evaluation of a model."""
        if not (self.folder / arm / "evaluation.json").is_file():
            evaluate.main(self.compose(arm, "model=pretrained", f"model.path={model}", *words))

    def cold_start(self) -> str:
        """The model that knows what the two instructions mean."""
        sources = {
            "plain": [],
            "once": ["solution=answer", f"handbook={self.runs}/at_once.jsonl"],
            "short": ["solution=steps", f"handbook={self.runs}/steps.jsonl"],
        }
        words = ["+data@cold_start_data=mixture"]
        for name, own in sources.items():
            words.append(f"+data@cold_start_data.sources.{name}=small_integers")
            kept = [word for word in DATA if word.partition("=")[0] not in {one.partition("=")[0] for one in own}]
            words += [f"cold_start_data.sources.{name}.{word}" for word in [*kept, *own]]
        learning = ["cold_start.steps=600", "cold_start.learning_rate=2e-3"]
        return self.fine_tune("cold", "model=micro_by_seed", *words, *learning)

    def tuned(self, start: str, arm: str, *words: str) -> None:
        """The cold start fine-tuned on its own right solutions of 1000 problems, evaluated without a handbook."""
        path = self.folder / arm / "sft.jsonl"
        if not path.is_file():
            asked = ["model=pretrained", f"model.path={start}", "handbook.problems=1000", "handbook.batch_size=250"]
            handbook.traces(self.compose(arm, *asked, *words))
        given = ["model=pretrained", f"model.path={start}", "+data@cold_start_data=hub"]
        given += [f"cold_start_data.path={path}", "cold_start_data.id=id", "cold_start_data.prompt='{prompt}'"]
        given += ["cold_start_data.answer=answer", "+cold_start_data.meta.solution=solution", "cold_start.steps=80"]
        given += ["cold_start.learning_rate=5e-4", "cold_start.warmup_steps=5"]
        self.evaluate(self.fine_tune(arm, *given), arm)

    def run(self) -> None:
        """Everything of the seed."""
        for name, rows in FILES.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            self.runs.mkdir(parents=True, exist_ok=True)
            (self.runs / f"{name}.jsonl").write_text(text)
        start, with_it = self.cold_start(), f"data.handbook={self.runs}/handbook.jsonl"
        self.evaluate(start, "without")
        self.evaluate(start, "with", with_it)
        self.evaluate(start, "swapped", f"data.handbook={self.runs}/swapped.jsonl")
        self.tuned(start, "tuned_with", with_it)
        self.tuned(start, "tuned_without")


def values(seeds: Sequence[Path], arm: str, key: str) -> np.ndarray:
    """A metric of an arm's greedy evaluation on every seed, accuracy in percent."""
    found = [json.loads((seed / arm / "evaluation.json").read_text())["greedy"].get(KEYS[key], 0.0) for seed in seeds]
    return np.array(found) * (100 if key == "accuracy" else 1)


def table(seeds: Sequence[Path]) -> str:
    """Means over seeds, and the seeds' accuracies."""
    lines = ["| | accuracy | tokens written | tokens of the entries | accuracy by seed |", "|---|---|---|---|---|"]
    for arm, name in ARMS.items():
        accuracy, tokens, entries = (values(seeds, arm, key) for key in KEYS)
        each = ", ".join(f"{one:.1f}" for one in accuracy)
        lines.append(f"| {name} | {accuracy.mean():.1f} % | {tokens.mean():.1f} | {entries.mean():.1f} | {each} |")
    return "\n".join(lines)


def differences(seeds: Sequence[Path]) -> str:
    """Paired differences with Student's intervals and the effect that is detectable at 80 % power."""
    lines = ["| | points of accuracy | detectable | tokens written | detectable |", "|---|---|---|---|---|"]
    for one, other in PAIRS:
        cells = [change_cells(values(seeds, one, key) - values(seeds, other, key)) for key in ("accuracy", "tokens")]
        lines.append(f"| {ARMS[one]}, less {ARMS[other]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """A seed, or the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    if options.seed is not None:
        cli.setup_logging()
        torch.set_grad_enabled(False)
        Seed(options.runs, options.seed).run()
        return
    seeds = sorted(options.runs.glob("seed_*"), key=lambda path: int(path.name.removeprefix("seed_")))
    seeds = [seed for seed in seeds if all((seed / arm / "evaluation.json").is_file() for arm in ARMS)]
    print(table(seeds), differences(seeds), sep="\n\n")


if __name__ == "__main__":
    main()
