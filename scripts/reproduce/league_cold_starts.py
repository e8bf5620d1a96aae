"""What the league's cold starts sample before RL, exactly: the policy's probabilities of right decisions.

python scripts/reproduce/league_cold_starts.py [OUT] [--tasks forks,mirror] [--seeds 8]

On forks the probability of the right method, over all pairs of digits that are evaluated, after wording of the stated
distribution. On chains that of each right line after the lines of traces, over problems of the test split. Run it after
scripts/reproduce/league.py, whose cold starts it takes. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from league import cell, names, numbers, specification
from league_controls import cold_start_of

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.data.digit_chains import DigitChains, DigitChainsConfig
from rltrain.data.forks import METHODS, Forks, ForksConfig
from rltrain.policy.load import Policy, load_policy

TASKS = ("forks", "mirror", "chains", "sparse", "tail")
VISITS = 8  # of each pair of digits, with fresh wording
PROBLEMS = 128


def ids_of(policy: Policy, text: str) -> list[int]:
    """Token ids, one a character."""
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def next_probs(policy: Policy, texts: Sequence[str]) -> list[torch.Tensor]:
    """For each text the probabilities of the token after each of its characters, (characters, vocabulary)."""
    return [policy.model(input_ids=torch.tensor([ids_of(policy, text)])).logits[0].softmax(-1) for text in texts]


def forks_right(policy: Policy, config: ForksConfig) -> list[torch.Tensor]:
    """The probabilities of the right method, over pairs of digits and ``VISITS`` wordings each: one decision."""
    mixture = dataclasses.replace(config, all_right=0, ramp=0, seed=config.seed + 2)
    data = Forks(mixture, "train")
    items = data[: VISITS * len(data.pairs)]
    characters = 0 if config.decision == "first" else config.lines * (config.letters + 1)
    texts = [str(item.prompt) + item.meta["solution"][:characters] for item in items]
    made = next_probs(policy, texts)
    rights = [METHODS.index(item.meta["method"]) for item in items]
    tokens = ids_of(policy, METHODS)
    return [torch.stack([probs[-1, tokens[right]] for probs, right in zip(made, rights, strict=True)])]


def chains_right(policy: Policy, config: DigitChainsConfig) -> list[torch.Tensor]:
    """The probabilities of the right digit of each line, given a trace's lines before it: ``steps`` decisions."""
    mixture = dataclasses.replace(config, all_right=0, ramp=0, seed=config.seed + 2)
    problems = DigitChains(mixture, "test")[:PROBLEMS]
    rows = []
    made = next_probs(policy, [str(problem.prompt) + problem.meta["solution"] for problem in problems])
    for problem, probs in zip(problems, made, strict=True):
        digits = [int(word) for word in str(problem.prompt).split("+")]
        lines = [int(line) for line in problem.meta["solution"].split("\n")[: config.steps]]
        before = [digits[0], *lines[:-1]]
        start = len(str(problem.prompt)) - 1
        rows.append([
            probs[start + 2 * place, ids_of(policy, str((last + digit) % config.base))[0]]
            for place, (last, digit) in enumerate(zip(before, digits[1:], strict=True))
        ])  # fmt: skip
    return list(torch.tensor(rows).T)


def stated(config: Any) -> float:
    """The probability of a right decision that the data states."""
    return config.right if isinstance(config, ForksConfig) else 1 - config.slip


def measured(config: RunConfig, folder: Path) -> list[torch.Tensor]:
    """Per decision its probabilities of being right."""
    policy = load_policy(dataclasses.replace(config.model, path=str(folder)))
    policy.model.eval()
    if isinstance(config.data, ForksConfig):
        return forks_right(policy, config.data)
    assert isinstance(config.data, DigitChainsConfig)
    return chains_right(policy, config.data)


def row(task: str, stated_right: float, of_seeds: Sequence[Sequence[torch.Tensor]]) -> str:
    """A task's line, in per cent: each seed's worst decision in the mean, the largest standard deviation (ddof 1)."""
    worst = [min(decision.mean().item() for decision in decisions) for decisions in of_seeds]
    spread = [torch.cat(list(decisions)).std().item() for decisions in of_seeds]
    cells = [task, f"{100 * stated_right:.0f}", *(f"{100 * value:.1f}" for value in worst), f"{100 * max(spread):.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/league"))
    parser.add_argument("--tasks", type=names, default=list(TASKS))
    parser.add_argument("--seeds", type=numbers, default=list(range(8)))
    options = parser.parse_args()
    given = specification()
    heads = ["task", "stated", *(f"seed {seed}" for seed in options.seeds), "largest spread"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for task in options.tasks:
        folders = [cold_start_of(options.out, task, seed) for seed in options.seeds]
        configs = [cli.compose([*cell(given, task, "GRPO", seed).words, "run_dir=x"]) for seed in options.seeds]
        of_seeds = [measured(c, f) for c, f in zip(configs, folders, strict=True) if f is not None]
        if len(of_seeds) == len(folders):
            print(row(task, stated(configs[0].data), of_seeds))


if __name__ == "__main__":
    main()
