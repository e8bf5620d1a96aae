"""``verify``: is the answer in a completion the gold answer? And the reward made of it.

The policy, with its reasons, is the table in docs/rewards.md. The rungs run in this process and are bounded
(``verifier.compare``); what they cannot tell goes to math-verify in a killable child process (``verifier.cas``). A gold
is gradeable or not, decided once for all its completions.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from rltrain.config import RewardConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.rewards.format import opens_thinking
from rltrain.rewards.verifier import cas
from rltrain.rewards.verifier.compare import compare, compare_joined, readable
from rltrain.rewards.verifier.extract import EXTRACTORS, OPEN_THINK, extract, gold_of
from rltrain.rewards.verifier.number import parse_number
from rltrain.rewards.verifier.structure import parse_structure
from rltrain.rewards.verifier.text import clean_latex, normalise
from rltrain.rewards.verifier.values import Outcome, has_set_algebra
from rltrain.runtime import dist
from rltrain.types import Context, Group, Max, Mean, Metric, Scores

Status = Literal["ok", "no_answer", "parse_error", "timeout", "gold_error", "infra"]
STATUSES: tuple[Status, ...] = ("ok", "no_answer", "parse_error", "timeout", "gold_error", "infra")
MAX_CHARACTERS, MAX_NESTING, MAX_TEXT_WORDS = 512, 64, 8
CACHE_SIZE = 65536

_POINTER = re.compile(
    r"\b(?:see|refer to|shown|given|as|in the)\b.*\b(?:figure|graph|diagram|solution|above|below|table|picture|image|"
    r"text|explanation|proof|attachment|work)\b|\banswers? (?:may|will|can) vary\b|\bvar(?:y|ies)\b|^\W*(?:proof|"
    r"n/?a|nan|tbd|todo|null|unknown|figure|graph|diagram|omitted|not (?:given|provided|available)|no answer"
    r"(?: given| provided)?|none given|left to the reader|self[- ]explanatory|(?:answer )?not[\s_-]*found|"
    r"no answer (?:was )?found|not applicable|missing|answer)\W*$|^none$|https?://|\[asy\]|\\includegraphics",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_SOMETHING = re.compile(r"\w|\\\{")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``score`` is 1.0, 0.0, or None to abstain: the gold is not gradeable, or the infrastructure failed."""

    score: float | None
    status: Status
    extracted: str | None
    reason: str


def verify(completion: str, gold: str, *, strict: bool = True) -> Verdict:
    """Is the answer in ``completion`` the ``gold``? Strict reads boxes; lenient also answer lines and bold.

    Never raises and never hangs, on any thread, process or input; installs no signal handler.
    """
    return grade(completion, gold, extraction="boxed" if strict else "lenient")


def grade(
    completion: str, gold: str, *, extraction: str = "boxed", inequalities: bool = False, wait_s: float = 60.0
) -> Verdict:
    """``verify`` with a choice of where the answer is (``math_extract.EXTRACTORS``), whether inequalities may stand
    for intervals, and how long to wait for the CAS (at most ``cas.VERDICT_S``)."""
    if not isinstance(gold, str) or not isinstance(completion, str):
        which = "gold" if not isinstance(gold, str) else "completion"
        status: Status = "gold_error" if which == "gold" else "no_answer"
        return Verdict(
            score=None if which == "gold" else 0.0, status=status, extracted=None, reason=f"{which} is not text"
        )
    end = time.monotonic() + min(wait_s, cas.VERDICT_S)
    expected, fault = _read_gold(gold)
    status, fault = ("gold_error", fault) if fault else _gradeable(expected, end)
    if fault:
        return Verdict(score=None, status=status, extracted=None, reason=fault)
    found = extract(completion, extraction)
    if not found.answers:
        return Verdict(score=0.0, status="no_answer", extracted=None, reason=found.reason)
    extracted = ", ".join(found.answers)
    if len(extracted) > MAX_CHARACTERS:
        return Verdict(score=0.0, status="parse_error", extracted=extracted[:MAX_CHARACTERS], reason="answer too long")
    answers, fault = _read_answers(found.answers)
    if fault:
        return Verdict(score=0.0, status="parse_error", extracted=extracted, reason=fault)
    score, status, reason = _decide(expected, answers, inequalities, end)
    return Verdict(score=score, status=status, extracted=extracted, reason=reason)


@lru_cache(maxsize=4096)
def _read_gold(gold: str) -> tuple[str, str]:
    """``(cleaned gold, "")`` or ``("", why it cannot be graded)``."""
    text = gold_of(gold[-65536:])
    if not text:
        return "", "gold is empty"
    if len(text) > MAX_CHARACTERS:
        return "", "gold too long"
    cleaned = clean_latex(normalise(text))
    if "\\" in cleaned and not parse_number(cleaned):
        cas.warm()
    plain = _TEXT.sub(r"\1", cleaned)
    if not _SOMETHING.search(plain):
        return "", "gold holds no answer"
    if _POINTER.search(plain):
        return "", "gold points elsewhere or is a placeholder"
    if len(re.findall(r"[^\W\d_]{2,}", plain)) > MAX_TEXT_WORDS and "\\" not in plain:
        return "", "gold is prose"
    return cleaned, _gate(cleaned)


@lru_cache(maxsize=4096)
def _is_readable(gold: str) -> bool:
    """Can the rungs of this process compare the gold?"""
    try:
        return readable(parse_structure(gold))
    except RecursionError:
        return False


def _gradeable(gold: str, end: float) -> tuple[Status, str]:
    """``("ok", "")`` if this process or the CAS can compare the gold, else the status and why not."""
    if _is_readable(gold):
        return "ok", ""
    match cas.reads(gold, end=end):
        case True:
            return "ok", ""
        case False:
            return "gold_error", Outcome.UNPARSED_GOLD.value
    return "timeout", "CAS: no processor time before the deadline"


@lru_cache(maxsize=CACHE_SIZE)
def _read_answers(answers: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """``(cleaned answers, "")``, or why they must not be parsed. Sixteen samples often give one box."""
    cleaned = tuple(clean_latex(normalise(answer)) for answer in answers)
    return cleaned, _gate(", ".join(cleaned))


def _gate(text: str) -> str:
    """Why a text must not be parsed; empty if it may. Brackets need not match: ``[0, 1)`` is an interval."""
    if len(text) > 2 * MAX_CHARACTERS:
        return "too long"
    if _CONTROL.search(text):
        return "control characters"
    depth = deepest = 0
    for token in re.findall(r"\\.|[{}]", text):
        if len(token) == 1:
            depth += 1 if token == "{" else -1
            deepest = max(deepest, depth)
            if depth < 0:
                return "unbalanced braces"
    if depth:
        return "unbalanced braces"
    nesting = max(deepest, text.count("("), text.count("["))
    return "nested too deep" if nesting > MAX_NESTING else ""


@lru_cache(maxsize=CACHE_SIZE)
def _compared(gold: str, answers: tuple[str, ...], inequalities: bool) -> Outcome:
    try:
        if len(answers) != 1:
            return compare_joined(gold, answers)
        return compare(gold, answers[0], inequalities=inequalities)
    except RecursionError:
        return Outcome.UNPARSED_ANSWER


def _decide(gold: str, answers: tuple[str, ...], inequalities: bool, end: float) -> tuple[float | None, Status, str]:
    outcome = _compared(gold, answers, inequalities)
    if outcome in (Outcome.RIGHT, Outcome.WRONG):
        return float(outcome is Outcome.RIGHT), "ok", outcome.value
    plain = (
        _is_readable(gold)
        and outcome is Outcome.UNPARSED_ANSWER
        and (not has_set_algebra(answers[0]) or parse_number(gold) is not None)
    )
    if len(answers) != 1 or plain:
        return 0.0, "parse_error", outcome.value  # what the parser cannot read is not this value
    fault = cas.gate(gold, answers[0])
    if fault:
        return 0.0, "parse_error", fault
    reply = cas.ask(gold, answers[0], end=end)
    if reply.status == "ok":
        return float(bool(reply.value)), "ok", f"CAS: {'same' if reply.value else 'different'}"
    return _CAS_FAILURES[reply.status]


# An answer that uses up its share is the answer's fault; a child that is stopped, starved or killed is not.
_CAS_FAILURES: dict[str, tuple[float | None, Status, str]] = {
    "error": (0.0, "parse_error", "CAS: cannot read the answer"),
    "memory": (0.0, "parse_error", "CAS: memory limit"),
    "cpu": (0.0, "timeout", "CAS: processor time limit"),
    "timeout": (None, "timeout", "CAS: no processor time before the deadline"),
    "skipped": (None, "timeout", "CAS: no turn before the batch deadline"),
    "died": (None, "infra", "CAS: the child was killed or did not start"),
}


# --- the reward --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MathConfig(RewardConfig):
    """1 for a right final answer, 0 for a wrong one; abstains as :func:`verify` does.

    ``answer``: where the final answer is, a key of ``math_extract.EXTRACTORS``. ``samples_path``: a JSONL file that
    collects verdicts worth a look (time-outs, failures, answers that only a lenient reading finds).
    """

    answer: str = "boxed"
    inequalities: bool = False  # let inequalities stand for intervals
    batch_deadline_s: float = 60.0  # seconds for the batch; what has no verdict by then abstains
    samples_path: str | None = None

    def __post_init__(self) -> None:
        require(self.answer in EXTRACTORS, f"reward.answer={self.answer}: unknown; set one of {', '.join(EXTRACTORS)}")
        require(self.batch_deadline_s > 0, f"reward.batch_deadline_s={self.batch_deadline_s}: must be > 0")


@register("reward", "math", MathConfig)
def math_reward(groups: Sequence[Group], config: MathConfig, context: Context) -> Scores:
    """Grade every completion against its problem's answer, all before the batch deadline."""
    end = time.monotonic() + config.batch_deadline_s
    if any(_needs_cas(group.prompt.problem.answer) for group in groups):
        cas.warm(wait_s=config.batch_deadline_s / 2)
    hits = _compared.cache_info().hits
    scores: list[list[float | None]] = []
    graded: list[tuple[Verdict, float]] = []
    for group in groups:
        gold = group.prompt.problem.answer
        opened = opens_thinking(group.prompt, context.tokenizer)
        scores.append([])
        for completion in group.completions:
            text = f"{OPEN_THINK}{completion.text}" if opened else completion.text
            start = time.monotonic()
            verdict = _before(end, text, gold, config)
            graded.append((verdict, 1000 * (time.monotonic() - start)))
            scores[-1].append(verdict.score)
            if config.samples_path:
                _keep_sample(config.samples_path, context.step, group, completion.text, verdict)
    return Scores(scores=scores, metrics=_metrics(graded, _compared.cache_info().hits - hits))


def _needs_cas(gold: str) -> bool:
    expected, fault = _read_gold(gold)
    return not fault and not _is_readable(expected)


def _before(end: float, text: str, gold: str, config: MathConfig) -> Verdict:
    left_s = end - time.monotonic()
    if left_s <= 0:
        return Verdict(score=None, status="timeout", extracted=None, reason="no turn before the batch deadline")
    return grade(text, gold, extraction=config.answer, inequalities=config.inequalities, wait_s=left_s)


def _metrics(graded: Sequence[tuple[Verdict, float]], hits: int) -> dict[str, Metric]:
    """Rates of each status; accuracy over what was extracted and gradeable; extraction apart; latency; cache."""
    verdicts = [verdict for verdict, _ in graded]
    answered = [verdict.score for verdict in verdicts if verdict.extracted is not None and verdict.score is not None]
    latency_ms = sorted(ms for _, ms in graded) or [0.0]
    metrics: dict[str, Metric] = {
        f"verifier/{status}": Mean.of([float(verdict.status == status) for verdict in verdicts]) for status in STATUSES
    }
    metrics["verifier/extracted"] = Mean.of([float(verdict.extracted is not None) for verdict in verdicts])
    metrics["verifier/accuracy_of_extracted"] = Mean.of(answered)
    metrics["perf/verifier_cache_hits"] = Mean(total=hits, count=len(graded))
    metrics["perf/verifier_p50_ms"] = Max(value=latency_ms[len(latency_ms) // 2])
    metrics["perf/verifier_p99_ms"] = Max(value=latency_ms[int(0.99 * (len(latency_ms) - 1))])
    return metrics


def _keep_sample(path: str, step: int, group: Group, text: str, verdict: Verdict) -> None:
    """Append what a person should look at: failures, and answers that only a lenient reading finds."""
    gold = group.prompt.problem.answer
    missed = verdict.status == "no_answer" and grade(text, gold, extraction="lenient").score == 1.0
    if verdict.status not in ("timeout", "infra", "gold_error") and not missed:
        return
    row = {"step": step, "id": group.prompt.problem.id, "gold": gold, "lenient_is_right": missed, "tail": text[-2000:]}
    file_path = Path(f"{path}.rank{dist.rank()}" if dist.world_size() > 1 else path)
    file_path.parent.mkdir(parents=True, exist_ok=True)
    with file_path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(row | asdict(verdict)) + "\n")
