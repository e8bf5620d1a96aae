"""Reasoning traces to compress (ConMax, arXiv 2601.04973): a question, a verbose trace that ends right, its answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rltrain.config import MISSING, DataConfig
from rltrain.data.columns import BadRow, text_of
from rltrain.data.hub import HubConfig, hub
from rltrain.errors import ConfigError, require
from rltrain.registry import Part, parts, register
from rltrain.types import Completion, Context, Group, Problem, Prompt, TokenProblem, is_right

log = logging.getLogger(__name__)

INSTRUCTION = """\
Here are a question and a correct but wordy solution. Rewrite the solution as briefly as you can: keep every step that
the answer depends on, drop repetition, detours and checks, and add nothing. Write the short solution between <think>
and </think>, and nothing else.

Question: {question}

Solution: {trace}
"""
TRACES_PER_BATCH = 256


@dataclass(kw_only=True)
class CompressionConfig(DataConfig):
    """How a compressor is asked, and how the model that is asked the question itself is fed.

    The compressor sees ``instruction`` with ``{question}`` and ``{trace}`` filled in, and writes between ``opening``
    and ``closing`` (``prefill`` is forced on it). The other model sees ``ask`` with ``{question}``, ``before_trace``,
    a trace, ``after_trace``, and ``before_answer`` where an answer is scored rather than written.
    """

    instruction: str = INSTRUCTION
    prefill: str = ""
    opening: str = "<think>"
    closing: str = "</think>"
    ask: str = "{question}"
    before_trace: str = "<think>\n"
    after_trace: str = "\n</think>\n\n"
    before_answer: str = "\\boxed{"

    def __post_init__(self) -> None:
        for name in ("{question}", "{trace}"):
            require(name in self.instruction, f"data.instruction: lacks {name}; add it")
        require("{question}" in self.ask, "data.ask: lacks {question}; add it")
        require(bool(self.opening and self.closing), "data.opening and data.closing: tags; neither may be empty")


@dataclass(frozen=True, kw_only=True)
class TracePrompt(Prompt):
    """The compressor's prompt, and the ids that scoring and answering put around a compressed trace.

    ``bare_ids`` is the trace without its redundant lines, () where the data does not know them.
    """

    config: CompressionConfig
    question_ids: tuple[int, ...]
    trace_ids: tuple[int, ...]
    bare_ids: tuple[int, ...] = ()
    after_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    before_answer_ids: tuple[int, ...]

    def with_trace(self, trace_ids: Sequence[int]) -> tuple[int, ...]:
        """Question and compressed trace, as the other model goes on from them."""
        return self.question_ids + tuple(trace_ids) + self.after_ids


@dataclass(frozen=True, kw_only=True)
class Trace(TokenProblem):
    """A trace to compress; one whose answer has no tokens has no prompt.

    ``bare`` is the trace without its redundant lines, "" where the data does not know them.
    """

    config: CompressionConfig
    question: str
    trace: str
    bare: str = ""

    def encode(self, tokenizer: Any, render: Callable[[str], tuple[int, ...]]) -> TracePrompt:
        """The compressor's prompt goes through the chat template, and so does the bare question."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        assert isinstance(self.prompt, str)
        config, answer_ids = self.config, ids(self.answer)
        return TracePrompt(
            problem=self,
            token_ids=render(self.prompt) + ids(config.prefill) if answer_ids else (),
            config=config,
            question_ids=render(config.ask.replace("{question}", self.question)) + ids(config.before_trace),
            trace_ids=ids(self.trace),
            bare_ids=ids(self.bare),
            after_ids=ids(config.after_trace),
            answer_ids=answer_ids,
            before_answer_ids=ids(config.before_answer),
        )


def trace_problem(source: Problem, *, question: str, trace: str, config: CompressionConfig, bare: str = "") -> Trace:
    """The compression task made from a solved problem."""
    prompt = config.instruction.replace("{question}", question).replace("{trace}", trace)
    return Trace(
        id=source.id,
        prompt=prompt,
        answer=source.answer,
        meta=source.meta,
        config=config,
        question=question,
        trace=trace,
        bare=bare,
    )


@dataclass(kw_only=True)
class TracesConfig(CompressionConfig):
    """Traces through ``datasets``: a hub name or folder, JSONL or parquet. Keys as for :class:`HubConfig`.

    ``verifier`` names a reward that must give 1 to column ``verified`` (the trace where null) against the answer;
    ``verifier_options`` are that reward's keys.
    """

    path: str = MISSING  # hub name, folder, JSONL or parquet
    subset: str | None = None  # configuration of the data set
    train_split: str = "train"  # name of the training split
    validation_split: str | None = None  # null: a fixed share of the training rows
    test_split: str | None = None  # null: a fixed share of the training rows
    holdout: float = 0.05  # share of the rows held out where a split has no name
    question_column: str = "question"  # that holds the question
    trace_column: str = "trace"  # that holds the trace to shorten
    answer_column: str = "answer"  # that holds the reference answer
    verified: str | None = None
    id: str | None = None  # column of ids; null: numbers
    limit: int | None = None  # rows that are taken; null: all
    verifier: str = MISSING
    verifier_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verifier != MISSING:
            known = [part.name for part in parts("reward")]
            require(
                self.verifier in known,
                f"data.verifier={self.verifier}: no such reward; choose from {', '.join(sorted(known))}",
            )
            self.grader().config(**self.verifier_options)

    def grader(self) -> Part:
        """The reward that judges traces."""
        return next(part for part in parts("reward") if part.name == self.verifier)

    def rows(self) -> HubConfig:
        """The columns as ``datasets`` gives them."""
        return HubConfig(
            path=self.path,
            subset=self.subset,
            train_split=self.train_split,
            validation_split=self.validation_split,
            test_split=self.test_split,
            holdout=self.holdout,
            prompt=f"{{{self.question_column}}}",
            answer=self.answer_column,
            id=self.id,
            meta={"trace": self.trace_column, "verified": self.verified or self.trace_column},
            limit=self.limit,
        )


def grades(solved: Sequence[Problem], config: TracesConfig) -> list[float | None]:
    """The verifier's score of each problem's ``meta["verified"]``; None where it cannot tell."""
    grader, found = config.grader(), []
    for start in range(0, len(solved), TRACES_PER_BATCH):
        groups = [
            Group(
                prompt=Prompt(problem=one, token_ids=()),
                completions=(Completion(token_ids=(), logprobs=(), finish="stop", text=one.meta["verified"]),),
            )
            for one in solved[start : start + TRACES_PER_BATCH]
        ]
        found += grader.function(groups, grader.config(**config.verifier_options), Context()).scores
    return [score for (score,) in found]


def with_texts(solved: Sequence[Problem], columns: Mapping[str, str]) -> list[Problem]:
    """The problems whose columns of ``meta`` are text; the others are logged with the reason and left out."""
    found, reasons = [], []
    for problem in solved:
        try:
            texts = {name: text_of(problem.meta[name], path) for name, path in columns.items()}
        except BadRow as error:
            reasons.append(f"{problem.id}: {error}")
        else:
            found.append(replace(problem, meta={**problem.meta, **texts}))
    if reasons:
        require(bool(found), f"data.trace_column: no row has a trace, the first is {reasons[0]}")
        log.warning("%d rows have no text for a trace and are left out, the first is %s", len(reasons), reasons[0])
    return found


@register("data", "traces", TracesConfig)
def traces(config: TracesConfig, split: str) -> list[Trace]:
    """The right traces of ``split``; wrong ones, and those the verifier cannot judge, are counted and left out."""
    rows = config.rows()
    solved = with_texts(list(hub(rows, split)), rows.meta)
    scores = grades(solved, config)
    right = [one for one, score in zip(solved, scores, strict=True) if score is not None and is_right(score)]
    abstained = sum(score is None for score in scores)
    log.info(
        "%s %s: %d traces kept, left out: %d wrong, %d not gradeable",
        config.path, split, len(right), len(solved) - len(right) - abstained, abstained,
    )  # fmt: skip
    if not right:
        raise ConfigError(
            f"data.path={config.path}: none of {len(solved)} traces of {split} is right by data.verifier="
            f"{config.verifier}; check data.answer_column, or choose another verifier"
        )
    return [trace_problem(one, question=str(one.prompt), trace=one.meta["trace"], config=config) for one in right]
