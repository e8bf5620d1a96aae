"""Rows of a samples file as groups. Columns that the run did not record are empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rltrain.runs import turn_columns
from rltrain.types import Completion, Group, Notes, Problem, Prompt, UnknownLogprobs

SampleRow = Mapping[str, Any]
NOTE = "note/"


def by_group(rows: Sequence[SampleRow]) -> list[list[SampleRow]]:
    """Rows by prompt, in their order. Sample 0 begins a group."""
    groups: list[list[SampleRow]] = []
    for row in rows:
        fresh = not groups or row.get("sample") == 0 or row.get("problem_id") != groups[-1][-1].get("problem_id")
        if fresh:
            groups.append([])
        groups[-1].append(row)
    return groups


def reward(row: SampleRow) -> float:
    """The row's reward, NaN if it abstained."""
    value = row.get("reward")
    return math.nan if value is None else float(value)


def right_part(row: SampleRow) -> str:
    """The column of the :func:`~rltrain.rewards.scoring.judging` reward: ``answer``, else the first."""
    parts = [key for key in row if key.startswith("reward/")]
    return "reward/answer" if "reward/answer" in parts else next(iter(parts), "reward")


def notes(rows: Sequence[SampleRow]) -> Notes:
    """The notes of the estimator and the rewards on a group."""
    names = sorted({name for row in rows for name in row if name.startswith(NOTE)})
    return {name.removeprefix(NOTE): [row.get(name) or [] for row in rows] for name in names}


def as_group(rows: Sequence[SampleRow]) -> Group:
    """The rows of a group as the record that an estimator takes."""
    first = rows[0]
    problem = Problem(
        id=str(first.get("problem_id", "")), prompt=first.get("prompt") or "", answer=str(first.get("answer") or "")
    )
    return Group(
        prompt=Prompt(problem=problem, token_ids=tuple(first.get("prompt_ids") or ())),
        completions=tuple(_completion(row) for row in rows),
        rewards_G=torch.tensor([reward(row) for row in rows], dtype=torch.float64),
    )


def _completion(row: SampleRow) -> Completion:
    ids = tuple(row.get("token_ids") or ())
    logprobs = tuple(row.get("logprobs") or ())
    known = len(logprobs) == len(ids)
    turns = turn_columns.turns_of(row)
    return Completion(
        token_ids=ids,
        logprobs=logprobs if known else UnknownLogprobs(reason="the samples of this run hold none"),
        finish="length" if row.get("finish") == "length" else "stop",
        text=turns[-1].text if turns else row.get("completion") or "",
        turns=turns,
    )
