"""The data of the credit viewer: tokens with their credit, the prefix tree, step potentials, gains."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rltrain.advantages.prefix_tree import prefix_values
from rltrain.report import labels
from rltrain.report.charts import thinned
from rltrain.report.estimators import Estimate, SampledStep
from rltrain.report.folder import RecordedRun
from rltrain.report.samples import NOTE, SampleRow, as_group, by_group, notes, reward
from rltrain.report.tree import branches
from rltrain.types import Completion

PREVIEW_CHARACTERS = 80
BYTES_PER_NUMBER = 10
MOST_GAINS = 1000


def credit(
    run: RecordedRun, *, estimators: Sequence[str], groups: int, step: int | None, most_bytes: int
) -> list[dict[str, Any]]:
    """The viewer's data for a run: up to ``groups`` sampled groups of a step (default: the last), within the bytes."""
    step, rows = _sampled(run, step)
    sampled_groups = by_group(rows)
    if not sampled_groups:
        return []
    sampled = SampledStep(run, step, sampled_groups)
    estimates = [sampled.under(name) for name in estimators]
    if not any(estimate.is_recorded for estimate in estimates):
        estimates = [sampled.recorded(), *estimates]
    gains = thinned([point for group in sampled_groups for point in _gains(group)], MOST_GAINS)
    previews = labels.shortened([str(rows[0].get("prompt") or "") for rows in sampled_groups])
    shown, spent = [], 0
    for index in _by_spread(sampled_groups)[:groups]:
        most_tokens = most_bytes // (BYTES_PER_NUMBER * (3 + len(estimates)) * len(sampled_groups[index]))
        title = f"step {step} · {labels.outcome(sampled_groups[index])} · {previews[index]}"
        group = _group(f"{run.label} · {title}", sampled_groups[index], estimates, index, most_tokens)
        spent += len(json.dumps(group))
        if spent > most_bytes and shown:
            run.notes.append(f"{len(shown)} sampled groups are shown, more do not fit into the page")
            break
        shown.append(group | {"all_gains": gains})
    return shown


def _sampled(run: RecordedRun, step: int | None) -> tuple[int, list[SampleRow]]:
    """The rows of the step, or of the newest step that can be read."""
    steps = run.sampled_steps()
    if step is not None and step not in steps:
        run.notes.append(f"step {step} has no samples; the recorded ones are {', '.join(map(str, steps)) or 'none'}")
    candidates = [step] if step in steps else steps[::-1]
    for candidate in candidates:
        if rows := run.samples(candidate):
            return candidate, list(rows)
    return 0, []


def _by_spread(groups: Sequence[Sequence[SampleRow]]) -> list[int]:
    """Indices of the groups, those of the largest spread of rewards first, zero-variance groups last."""

    def spread(index: int) -> float:
        counted = [value for value in map(reward, groups[index]) if not math.isnan(value)]
        return statistics.pstdev(counted) if counted else 0.0

    return sorted(range(len(groups)), key=spread, reverse=True)


def _group(
    title: str, rows: Sequence[SampleRow], estimates: Sequence[Estimate], index: int, most_tokens: int
) -> dict[str, Any]:
    """A group, with at most ``most_tokens`` of each completion."""
    group = as_group(rows)
    tokens = [_tokens(row) for row in rows]
    has_ids = all(len(ids) == len(texts) for ids, texts in zip(group.completion_ids, tokens, strict=True))
    rewards = [reward(row) for row in rows]
    values = prefix_values(group.completion_ids, rewards) if has_ids else []
    return {
        "title": title,
        "problem": group.prompt.problem.id,
        "prompt": group.prompt.problem.prompt,
        "answer": group.prompt.problem.answer,
        "completions": [
            {
                "reward": _short(reward(row)),
                "parts": {key.replace("/", ".", 1): _short(row[key]) for key in row if key.startswith("reward/")},
                "finish": row.get("finish") or "",
                "length": len(texts),
                "tokens": texts[:most_tokens],
                "logprobs": _row((row.get("logprobs") or [])[:most_tokens]),
                "values": _row(values[i].tolist()[: most_tokens + 1]) if has_ids else [],
                **_turns(group.completions[i]),
            }
            for i, (row, texts) in enumerate(zip(rows, tokens, strict=True))
        ],
        "estimates": [
            _estimate(estimate, index, group.completions, [len(texts) for texts in tokens], most_tokens)
            for estimate in estimates
        ],
        "tree": _tree(group.completion_ids, rewards, tokens) if has_ids else [],
        "gain": _target_gain(rows),
    }


def _turns(completion: Completion) -> dict[str, list[dict[str, Any]]]:
    """What the viewer says of each turn; nothing for a completion without turns."""
    shown = [
        {
            "written": turn.written,
            "observed": turn.observed,
            "reward": _short(turn.reward),
            "called": turn.called,
            "failure": turn.failure,
        }
        for turn in completion.turns
    ]
    return {"turns": shown} if shown else {}


def _tokens(row: SampleRow) -> list[str]:
    """The text of each token, or the whole completion where token texts were not recorded."""
    return list(row.get("tokens") or [row.get("completion") or ""])


def _estimate(
    estimate: Estimate, index: int, completions: Sequence[Completion], lengths: Sequence[int], most_tokens: int
) -> dict[str, Any]:
    """One estimator's credit for a group, empty for completions with another number of tokens; of observed ids none."""
    plain = {"name": estimate.name, "remark": estimate.remark, "advantages": None, "steps": []}
    if estimate.values is None:
        return plain
    advantages = [
        _row(_written(values[:most_tokens], completion)) if len(values) == length else []
        for values, completion, length in zip(estimate.values[index], completions, lengths, strict=True)
    ]
    noted = estimate.notes[index]
    if "step_potential" in noted:
        plain["steps"] = [
            {"tokens": list(tokens), "potential": _row(potential)}
            for tokens, potential in zip(noted["step_tokens"], noted["step_potential"], strict=True)
        ]
    return plain | {"advantages": advantages}


def _written(values: Sequence[float], completion: Completion) -> Sequence[float | None]:
    if not completion.turns:
        return values
    return [value if written else None for value, written in zip(values, completion.written_T, strict=False)]


def _tree(
    ids: Sequence[Sequence[int]], rewards: Sequence[float], tokens: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    return [
        {
            "level": branch.level,
            "start": branch.start,
            "stop": branch.stop,
            "members": branch.members,
            "value": _short(branch.value),
            "leaf": branch.leaf,
            "text": "".join(tokens[branch.members[0]][branch.start : branch.stop])[:PREVIEW_CHARACTERS],
        }
        for branch in branches(ids, rewards)
    ]


def _target_gain(rows: Sequence[SampleRow]) -> dict[str, Any] | None:
    """What each thought adds to the log-prob of each token of the text that follows it."""
    noted = notes(rows)
    if not {"position", "target_tokens", "target_gain"} <= noted.keys() or not noted["position"][0]:
        return None
    return {
        "position": noted["position"][0][0],
        "targets": list(noted["target_tokens"][0]),
        "gains": [_row(gain) for gain in noted["target_gain"]],
    }


def _gains(rows: Sequence[SampleRow]) -> list[tuple[int, float | None]]:
    """(Position in the document, gain over all targets) of every thought of a group."""
    return [
        (row[f"{NOTE}position"][0], _short(sum(row[f"{NOTE}target_gain"])))
        for row in rows
        if row.get(f"{NOTE}position") and row.get(f"{NOTE}target_gain")
    ]


def _row(values: Iterable[Any]) -> list[float | None]:
    return [_short(value) for value in values]


def _short(value: Any) -> float | None:
    """Rounded to five digits, None for what is no finite number."""
    return float(f"{value:.5g}") if isinstance(value, (int, float)) and math.isfinite(value) else None
