"""Checks of a data set: golds, duplicates, overlap of the splits, and signs that a model has seen it.

python -m rltrain.audit data=NAME reward@rewards.answer=NAME [--probe N model=… model.path=…]
python -m rltrain.audit … --probe N audit.date_field=ENTRY audit.cutoff=2024-07-26

Writes ``audit.json`` into ``run_dir`` and prints the counts. Exit code 1 if a gold fails or a split leaks.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from rltrain import cli
from rltrain.config import RewardConfig, RunConfig
from rltrain.data.hub import HubProblems
from rltrain.errors import ConfigError, require
from rltrain.registry import part_of
from rltrain.report import by_date as dates
from rltrain.rewards.math import MathConfig, grade
from rltrain.rewards.scoring import score
from rltrain.rewards.verifier.extract import gold_of
from rltrain.rewards.verifier.labels import name_of
from rltrain.rewards.verifier.number import parse_number
from rltrain.rewards.verifier.structure import Equation, parse_structure
from rltrain.rewards.verifier.text import clean_latex, normalise
from rltrain.rewards.verifier.unit import Quantity
from rltrain.types import Completion, Context, Group, Problem, Prompt, is_right, user_text

NGRAM = 13
PROBE_SHARES = (0.4, 0.6, 0.8)
SPLITS = ("train", "validation", "test")
_PLACES = {"gsm8k": "#### {}", "minerva": "Answer: {}"}
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
_WORD = re.compile(r"\w+|[^\w\s.,!?;:'\"`$]")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A row that fails, by split and id, and the reason."""

    split: str
    id: str
    why: str


# --- golds -------------------------------------------------------------------------------------------------------


def neighbour(problems: Sequence[Problem], index: int) -> str | None:
    """A wrong answer next to the gold: the number plus one, else the next different gold, else None."""
    gold = gold_of(problems[index].answer)
    number = parse_number(gold)
    if number is not None:
        value = number.value + 1
        return str(value) if value.denominator > 1 else str(value.numerator)
    golds = (gold_of(problems[(index + step) % len(problems)].answer) for step in range(1, min(len(problems), 50)))
    return next((candidate for candidate in golds if candidate.casefold() != gold.casefold()), None)


def simplified(gold: str) -> list[str]:
    """Wrong answers that leave out a part of the gold: its last variable, or one side of an equation."""
    cleaned = clean_latex(normalise(gold))
    structure = parse_structure(cleaned)
    if isinstance(structure, Equation) and not any(map(name_of, structure.sides)):
        return list(dict.fromkeys(structure.sides))
    letters = list(_VARIABLE.finditer(cleaned)) if isinstance(structure, Quantity) and not structure.unit else []
    shorter = f"{cleaned[: letters[-1].start()]}{cleaned[letters[-1].end() :]}".strip() if letters else ""
    return [shorter] if shorter else []


def check_golds(problems: Sequence[Problem], rewards: Mapping[str, RewardConfig], *, split: str) -> list[Finding]:
    """Golds that the first reward does not grade 1, or with which it grades a neighbour 1."""
    name, config = next(iter(rewards.items()))
    place = _PLACES.get(config.answer, r"\boxed{{{}}}") if isinstance(config, MathConfig) else r"\boxed{{{}}}"
    groups = []
    for index, problem in enumerate(problems):
        gold = gold_of(problem.answer)
        answers = [gold, neighbour(problems, index), *simplified(gold)]
        texts = ["" if answer is None else place.format(answer) for answer in answers]
        completions = [Completion(token_ids=(), logprobs=(), finish="stop", text=text) for text in texts]
        groups.append(Group(prompt=Prompt(problem=problem, token_ids=()), completions=tuple(completions)))
    findings = []
    for group in score(groups, {name: config}, Context())[0]:
        of_gold, *of_neighbours = group.reward_parts[name].tolist()
        problem = group.prompt.problem
        if of_gold != 1:
            why = f"abstains: {_fault(problem, config)}" if math.isnan(of_gold) else f"the gold grades itself {of_gold}"
            findings.append(Finding(split=split, id=problem.id, why=why))
        elif 1 in of_neighbours:
            text = group.completions[1 + of_neighbours.index(1)].text
            findings.append(Finding(split=split, id=problem.id, why=f"a neighbour grades 1: {text[:80]}"))
    return findings


def _fault(problem: Problem, config: RewardConfig) -> str:
    """Why the verifier does not grade a gold."""
    return grade("", problem.answer).reason if isinstance(config, MathConfig) else "the gold is not gradeable"


# --- duplicates and overlap --------------------------------------------------------------------------------------


def normal_words(text: str) -> list[str]:
    """Lower-case words and mathematical signs without punctuation, for comparing texts."""
    return _WORD.findall(text.casefold())


def check_duplicates(splits: Mapping[str, Sequence[Problem]]) -> list[Finding]:
    """Problems with the prompt of an earlier problem, in the same or an earlier split."""
    seen: dict[str, tuple[str, str]] = {}
    findings = []
    for split, problems in splits.items():
        for problem in problems:
            key = " ".join(normal_words(user_text(problem.prompt)))
            first = seen.setdefault(key, (split, problem.id))
            if first != (split, problem.id):
                findings.append(Finding(split=split, id=problem.id, why=f"same prompt as {first[0]} {first[1]}"))
    return findings


def ngrams(words: Sequence[str], size: int = NGRAM) -> set[int]:
    """Hashes of all runs of ``size`` words, or of the whole text if it is shorter."""
    return {hash(tuple(words[start : start + size])) for start in range(max(1, len(words) - size + 1))}


def check_overlap(train: Sequence[Problem], test: Sequence[Problem], *, split: str, size: int = NGRAM) -> list[Finding]:
    """Test problems that share a run of ``size`` words with a training prompt.

    Runs common to several test prompts belong to the template, not to the question, and do not count.
    """
    rows = [ngrams(normal_words(user_text(problem.prompt)), size) for problem in test]
    counts: dict[int, int] = {}
    for row in rows:
        for gram in row:
            counts[gram] = counts.get(gram, 0) + 1
    trained = set().union(*(ngrams(normal_words(user_text(problem.prompt)), size) for problem in train))
    shared = [sum(counts[gram] == 1 and gram in trained for gram in row) for row in rows]
    return [
        Finding(split=split, id=problem.id, why=f"{number} runs of {size} words also in train")
        for problem, number in zip(test, shared, strict=True)
        if number
    ]


# --- contamination probes (arXiv 2507.10532) ---------------------------------------------------------------------


def cut(text: str, share: float) -> tuple[str, str]:
    """``text`` cut at ``share`` of its characters, moved right to the next blank: (shown, hidden)."""
    position = int(share * len(text))
    while position < len(text) and not text[position].isspace():
        position += 1
    return text[:position], text[position:]


def rouge_l(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, 0 if either is empty."""
    lengths = [0] * (len(reference) + 1)
    for word in candidate:
        diagonal = 0
        for index, reference_word in enumerate(reference, start=1):
            diagonal, lengths[index] = (
                lengths[index],
                (diagonal + 1 if word == reference_word else max(lengths[index], lengths[index - 1])),
            )
    return 2 * lengths[-1] / (len(candidate) + len(reference)) if candidate and reference else 0.0


def probe(
    problems: Sequence[Problem], complete: Callable[[Sequence[str]], Sequence[str]], share: float
) -> dict[str, float]:
    """The means of :func:`probe_each`."""
    return {name: sum(each) / max(1, len(each)) for name, each in probe_each(problems, complete, share).items()}


def probe_each(
    problems: Sequence[Problem], complete: Callable[[Sequence[str]], Sequence[str]], share: float
) -> dict[str, list[float]]:
    """How well greedy continuations of cut questions restore the rest, and answer the whole question, by problem.

    ``exact`` compares the continuation with the rest, word by word, up to the length of the rest.
    """
    pairs = [cut(user_text(problem.prompt), share) for problem in problems]
    texts = complete([shown for shown, _ in pairs])
    scores: list[float] = []
    exact: list[float] = []
    right: list[float] = []
    for problem, (_, hidden), text in zip(problems, pairs, texts, strict=True):
        expected = normal_words(hidden)
        restored = normal_words(text)[: len(expected)]
        scores.append(rouge_l(restored, expected))
        exact.append(float(bool(expected) and restored == expected))
        right.append(float(is_right(grade(text, problem.answer, extraction="lenient").score or 0.0)))
    return {"rouge_l": scores, "exact": exact, "answered": right}


class GreedyModel:
    """The configured model and rollout engine, greedy."""

    def __init__(self, config: RunConfig) -> None:
        from rltrain.policy.load import load_policy
        from rltrain.runtime import dist

        self._config, self._policy = config, load_policy(config.model, device=dist.device())
        self._policy.model.to(dist.device())
        engine: Any = part_of(config.rollout).function
        self._rollout = engine(config.rollout, config.sampling, self._policy, seed=config.seed)
        self._greedy = replace(config.sampling, temperature=0.0, top_p=1.0, top_k=0)

    def complete(self, texts: Sequence[str]) -> list[str]:
        """Continuations of plain texts, without a template."""
        from rltrain.policy.tokenizer import text_ids

        prompts = [
            Prompt(
                problem=Problem(id=str(index), prompt=text, answer=""),
                token_ids=text_ids(self._policy.tokenizer, text),
            )
            for index, text in enumerate(texts)
        ]
        return [group.completions[0].text for group in self._drawn(prompts)]

    def right(self, problems: Sequence[Problem]) -> list[float]:
        """1 where the answer to the whole question is right by the run's rewards; NaN where it cannot be judged."""
        from rltrain.policy.encode import encode_all, prompt_limit

        config, tokenizer = self._config, self._policy.tokenizer
        limit = prompt_limit(self._policy, config.sampling)
        prompts, _ = encode_all(self._policy, problems, config.model, max_prompt_tokens=limit)
        context = Context(seed=config.seed, tokenizer=tokenizer, max_new_tokens=config.sampling.max_new_tokens)
        groups, _ = score(self._drawn(prompts), config.rewards, context)
        judged = {group.prompt.problem.id: float(group.right_G[0]) for group in groups if group.right_G is not None}
        return [judged.get(problem.id, math.nan) for problem in problems]

    def _drawn(self, prompts: Sequence[Prompt]) -> list[Group]:
        return self._rollout.generate(prompts, step=0, group_size=1, sampling=self._greedy)


# --- the report --------------------------------------------------------------------------------------------------


def audit(splits: Mapping[str, Sequence[Problem]], rewards: Mapping[str, RewardConfig]) -> dict[str, list[Finding]]:
    """All findings by check. The first split is that of training."""
    train = next(iter(splits))
    golds = [gold for split, problems in splits.items() for gold in check_golds(problems, rewards, split=split)]
    others = [split for split in splits if split != train]
    overlap = [shared for split in others for shared in check_overlap(splits[train], splits[split], split=split)]
    duplicates = check_duplicates(splits)
    across = [row for row in duplicates if not row.why.startswith(f"same prompt as {row.split} ")]
    inside = [row for row in duplicates if row not in across]
    return {"golds": golds, "duplicates_inside": inside, "duplicates_across": across, "overlap_13gram": overlap}


def passing(problems: Sequence[Problem], findings: Sequence[Finding], *, split: str) -> list[Problem]:
    """The problems of ``split`` without the rows that failed a check."""
    faulty = {finding.id for finding in findings if finding.split == split}
    return [problem for problem in problems if problem.id not in faulty]


def open_splits(config: RunConfig) -> dict[str, Sequence[Problem]]:
    """Every split that the data set has.

    A small file may leave a split without a row; the others are audited. ConfigError if none has one.
    """
    source = part_of(config.data).function
    loaded: dict[str, Sequence[Problem]] = {}
    errors: list[ConfigError] = []
    for split in SPLITS:
        try:
            loaded[split] = source(config.data, split)
        except ConfigError as error:
            if split != "train" and vars(config.data).get(f"{split}_split"):
                raise  # a split that the configuration names must be there
            errors.append(error)
    if not loaded:
        raise errors[0]
    return loaded


def by_date(config: RunConfig, test: Sequence[Problem], model: GreedyModel, probes: int) -> dict[str, Any]:
    """Accuracy and probes of the first ``probes`` problems on each side of ``audit.cutoff``, and the undated rows."""
    field, cutoff = config.audit.date_field or "", date.fromisoformat(config.audit.cutoff or "")
    found = dates.sorted_by_date(test, field, cutoff)
    empty = f"empty {vars(config.data).get('meta', {}).get(field)}"
    left_out = [row.id for row in test.left_out if row.reason == empty] if isinstance(test, HubProblems) else []
    dates.require_both(found, field)
    values: dict[str, dict[str, list[float]]] = {}
    for side in dates.SIDES:
        some = found[side][:probes]
        values[side] = {"accuracy": model.right(some)}
        for share in PROBE_SHARES:
            each = probe_each(some, model.complete, share)
            values[side] |= {f"{name} at {share:.0%}": numbers for name, numbers in each.items()}
    counts = {side: len(found[side]) for side in dates.SIDES}
    settings = {"field": field, "cutoff": str(cutoff), "problems": counts}
    return settings | {"undated": dates.undated(found, left_out), "measures": dates.compared(values)}


def main(config: RunConfig, *, limit: int, probes: int) -> int:
    """Audit, write the report and print the counts. Returns the exit code."""
    dated = config.audit.date_field is not None
    require(not dated or probes > 0, "audit.date_field: compares what a model scores; add --probe N and model=…")
    sources = open_splits(config)
    splits = {
        split: [problems[index] for index in range(min(limit, len(problems)))] for split, problems in sources.items()
    }
    findings = audit(splits, config.rewards)
    report: dict[str, Any] = {
        "problems": {split: len(problems) for split, problems in splits.items()},
        "abstaining": sum(row.why.startswith("abstains") for row in findings["golds"]),
        "counts": {check: len(rows) for check, rows in findings.items()},
        "findings": {check: [asdict(row) for row in rows] for check, rows in findings.items()},
    }
    if probes:
        require("test" in splits, "--probe: the data set has no test split; name data.test_split")
        model, some = GreedyModel(config), splits["test"][:probes]
        report["probes"] = {f"{share:.0%}": probe(some, model.complete, share) for share in PROBE_SHARES}
        if dated:
            report["by_date"] = by_date(config, sources["test"], model, probes)
    path = Path(config.run_dir) / "audit.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False))
    _print(report, path)
    return int(any(findings[check] for check in ("golds", "duplicates_across", "overlap_13gram")))


def _print(report: Mapping[str, Any], path: Path) -> None:
    for split, count in report["problems"].items():
        print(f"{split:20s} {count} problems")
    print(f"{'abstaining golds':20s} {report['abstaining']}")
    for check, count in report["counts"].items():
        first = report["findings"][check][:1]
        print(
            f"{check:20s} {count}"
            + (f"   first: {first[0]['split']} {first[0]['id']}: {first[0]['why']}" if first else "")
        )
    for share, values in report.get("probes", {}).items():
        print(f"probe at {share:11s} " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
    if "by_date" in report:
        _print_dates(report["by_date"])
    print(f"written to {path}")


def _print_dates(found: Mapping[str, Any]) -> None:
    print(f"\n{found['field']}: {found['problems']['before']} problems from before {found['cutoff']}, ", end="")
    print(f"{found['problems']['after']} from then on")
    for reason, rows in found["undated"].items():
        print(f"{reason}: {rows['count']} problems ({', '.join(rows['ids'][:5])})")
    print(dates.table(found["measures"]))


def command_line() -> None:
    """Take the audit's flags off the command line and leave the rest to Hydra."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--probe", type=int, default=0, metavar="N")
    parser.add_argument("--limit", type=int, default=20_000, metavar="N")
    flags, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    codes: list[int] = []
    cli.run(lambda config: codes.append(main(config, limit=flags.limit, probes=flags.probe)))
    sys.exit(max(codes, default=0))


if __name__ == "__main__":
    command_line()
