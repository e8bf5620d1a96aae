"""What an estimator returned, checked against the groups it was given: the first fault is one line that says where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import isgenerator
from typing import Any

import torch
from torch import Tensor

from rltrain.errors import RunError
from rltrain.types import Advantages, Group, Max, Mean, Min, Std, Sum

SPREAD = "rltrain.advantages.group.per_token(advantages_G, group.completion_ids) spreads one value per completion"


class EstimatorError(RunError):
    """An estimator broke its contract; the message names it, the group and completion, and what was expected."""


def check_advantages(groups: Sequence[Group], advantages: Any, name: str) -> None:
    """``EstimatorError`` unless ``advantages`` holds one finite floating-point value per completion token, on the CPU.

    No loss reads the values of a completion that abstains (its reward is NaN), nor those at ids that an environment
    wrote: they need not be finite.
    """
    if not isinstance(advantages, Advantages):
        raise EstimatorError(f"{name}: returned {_what(advantages)}, expected Advantages; {_return_hint(advantages)}")
    _check_nesting(groups, advantages.values, name)
    for index, (group, rows) in enumerate(zip(groups, advantages.values, strict=True)):
        place = f"{name}: group {index} (problem {group.prompt.problem.id})"
        _check_group(group, rows, place, turned=_is_turned(groups, advantages.values))
    _check_metrics(advantages.metrics, name)
    _check_notes(groups, advantages.notes, name)
    _check_masks(groups, advantages.masks, name)


def without_observed(groups: Sequence[Group], advantages: Advantages) -> Advantages:
    """The same with 0 at the ids that an environment wrote."""
    if not any(one.turns for group in groups for one in group.completions):
        return advantages
    values = [
        [row_T.where(torch.tensor(one.written_T), 0.0) for one, row_T in zip(group.completions, rows, strict=True)]
        for group, rows in zip(groups, advantages.values, strict=True)
    ]
    return replace(advantages, values=values)


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _return_hint(returned: Any) -> str:
    if returned is None:
        return "end the function with return Advantages(values=values)"
    if isgenerator(returned):
        return "collect what it yields in a list and return Advantages(values=values)"
    return "return Advantages(values=values), where values[p][g] is a tensor with one value per token"


def _check_nesting(groups: Sequence[Group], values: Any, name: str) -> None:
    if not isinstance(values, Sequence):
        raise EstimatorError(
            f"{name}: values is {_what(values)}, expected a list with one list of tensors per group; "
            "build values[p][g], group first"
        )
    if len(values) != len(groups):
        raise EstimatorError(
            f"{name}: values has {len(values)} entries, expected {len(groups)}, one per group"
            + (_TURNED if _is_turned(groups, values) else "; build values[p][g], group first")
        )


_TURNED = "; the nesting is reversed: build values[p][g], group first and completion second"


def _is_turned(groups: Sequence[Group], values: Sequence[Any]) -> bool:
    """Whether ``values[g][p]`` is what fits."""
    sizes = {len(group.completions) for group in groups}
    if sizes != {len(values)} or not all(isinstance(rows, Sequence) and len(rows) == len(groups) for rows in values):
        return False
    return all(
        isinstance(row_T, Tensor) and row_T.shape == (len(ids),)
        for group, rows in zip(groups, zip(*values, strict=True), strict=True)
        for ids, row_T in zip(group.completion_ids, rows, strict=True)
    )


def _check_group(group: Group, rows: Any, place: str, *, turned: bool) -> None:
    if not isinstance(rows, Sequence):
        raise EstimatorError(
            f"{place}: has {_what(rows)}, expected a list of {len(group.completions)} tensors, one per completion "
            f"with one value per token; {SPREAD}"
        )
    if len(rows) != len(group.completions):
        raise EstimatorError(
            f"{place}: has {len(rows)} entries, expected {len(group.completions)}, one tensor per completion"
        )
    for index, (ids, row_T) in enumerate(zip(group.completion_ids, rows, strict=True)):
        fault = _row_fault(row_T, len(ids))
        if fault:
            hint = _TURNED if turned else ""
            raise EstimatorError(f"{place}, completion {index}: {fault}{hint}")
    _check_finite(group, rows, place)


def _row_fault(row_T: Any, tokens: int) -> str:
    """What is wrong with the values of a completion of that many tokens; nothing: an empty text."""
    expected = f"a tensor of shape ({tokens},), one value per token"
    if not isinstance(row_T, Tensor):
        return f"has {_what(row_T)}, expected {expected}; torch.tensor(…) makes one of a list of {tokens} numbers"
    if row_T.shape != (tokens,):
        return f"has {_what(row_T)}, expected {expected}; {SPREAD}"
    if not row_T.is_floating_point():
        return f"has dtype {row_T.dtype}, expected a floating-point one; call .double() on it"
    if row_T.device.type != "cpu":
        return f"is on the device {row_T.device}, expected the CPU; call .cpu() on it"
    return "requires a gradient, expected plain numbers; call .detach() on it" if row_T.requires_grad else ""


def _check_finite(group: Group, rows: Sequence[Tensor], place: str) -> None:
    if not rows or bool(torch.cat(list(rows)).isfinite().all()):
        return
    written = [torch.tensor(one.written_T, dtype=torch.bool) for one in group.completions]
    rewards_G = group.rewards_G
    abstains = [False] * len(rows) if rewards_G is None else rewards_G.isnan().tolist()
    for index, (row_T, abstain) in enumerate(zip(rows, abstains, strict=True)):
        bad = (~row_T.isfinite() & written[index]).nonzero().flatten().tolist()
        if bad and not abstain:
            hint = (
                "; a reward of this group is NaN (it abstains): leave it out of mean and std" if any(abstains) else ""
            )
            raise EstimatorError(
                f"{place}, completion {index}: the value of token {bad[0]} is {float(row_T[bad[0]])}, "
                f"expected a finite number ({len(bad)} of {len(row_T)} are not){hint}"
            )


def _check_metrics(metrics: Any, name: str) -> None:
    if not isinstance(metrics, Mapping):
        raise EstimatorError(f"{name}: metrics is {_what(metrics)}, expected a dict of names and Mean.of(…)")
    for key, metric in metrics.items():
        if not isinstance(metric, Mean | Max | Min | Sum | Std):
            raise EstimatorError(
                f"{name}: metrics[{key!r}] is {_what(metric)}, expected Mean, Max, Min, Sum or Std; give Mean.of(…)"
            )


def _check_notes(groups: Sequence[Group], notes: Any, name: str) -> None:
    if not isinstance(notes, Sequence) or len(notes) not in (0, len(groups)):
        raise EstimatorError(f"{name}: notes has not one dict per group; give {len(groups)} of them, or none at all")
    for index, (group, named) in enumerate(zip(groups, notes, strict=False)):
        if not isinstance(named, Mapping):
            raise EstimatorError(
                f"{name}: notes[{index}] is {_what(named)}, expected a dict with one list per completion"
            )
        for key, rows in named.items():
            if not isinstance(rows, Sequence | Tensor) or isinstance(rows, str):
                raise EstimatorError(
                    f"{name}: notes[{index}][{key!r}] is {_what(rows)}, expected {len(group.completions)} entries in a "
                    "list, one per completion"
                )
            if len(rows) != len(group.completions):
                raise EstimatorError(
                    f"{name}: notes[{index}][{key!r}] has {len(rows)} entries, expected {len(group.completions)}, one "
                    "list per completion"
                )


def _check_masks(groups: Sequence[Group], masks: Any, name: str) -> None:
    if not isinstance(masks, Sequence) or len(masks) not in (0, len(groups)):
        raise EstimatorError(f"{name}: masks has not one list per group; give {len(groups)} of them, or none at all")
    for index, (group, rows) in enumerate(zip(groups, masks, strict=False)):
        sizes = [len(ids) for ids in group.completion_ids]
        if not isinstance(rows, Sequence) or [_mask_tokens(mask_T) for mask_T in rows] != sizes:
            raise EstimatorError(
                f"{name}: masks[{index}] does not fit; give a bool tensor per completion, of {sizes} tokens, on the CPU"
            )


def _mask_tokens(mask_T: Any) -> int:
    """The length of a mask; -1 for what is none."""
    fits = isinstance(mask_T, Tensor) and mask_T.dtype == torch.bool and mask_T.dim() == 1
    return len(mask_T) if fits and mask_T.device.type == "cpu" else -1


def copied_rewards(groups: Sequence[Group]) -> list[dict[str, Tensor]]:
    """The rewards of each group by name, to be compared with after a call."""
    return [{key: values_G.clone() for key, values_G in _rewards(group).items()} for group in groups]


def check_unchanged(groups: Sequence[Group], before: Sequence[Mapping[str, Tensor]], name: str) -> None:
    """``EstimatorError`` where the rewards of a group differ from their copies ``before`` the call."""
    for index, (group, copies) in enumerate(zip(groups, before, strict=True)):
        for key, values_G in _rewards(group).items():
            was_G = copies[key]
            if bool(((values_G != was_G) & ~(values_G.isnan() & was_G.isnan())).any()):
                raise EstimatorError(
                    f"{name}: group {index} (problem {group.prompt.problem.id}): changed group.{key} in place from "
                    f"{was_G.tolist()} to {values_G.tolist()}; work on group.{key}.clone()"
                )


def _rewards(group: Group) -> dict[str, Tensor]:
    named = {f"reward_parts[{key!r}]": values_G for key, values_G in group.reward_parts.items()}
    return named if group.rewards_G is None else {"rewards_G": group.rewards_G, **named}
