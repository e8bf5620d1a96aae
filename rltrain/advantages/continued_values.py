"""Values of states inside completions by continuations, and the credit of the segments between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards
from rltrain.advantages.whitening import whiten_where
from rltrain.config import AdvantageConfig
from rltrain.errors import require
from rltrain.rollout.continuation_types import ContinuationRequest, ContinuationSampling
from rltrain.types import Advantages, Completion, Context, Group, Mean

STARTS = ("others", "continuations")
WHITENING_EPS = 1e-8


@dataclass(kw_only=True)
class ContinuedValuesConfig(AdvantageConfig):
    """How values are estimated: the mean reward of ``draws`` continuations, at most ``max_states`` a completion.

    ``start=others`` takes the mean reward of the group's other completions for the value of the prompt, and
    ``continuations`` asks for it too. ``temperature`` and ``top_p`` null are the run's own sampling; another one
    estimates the values of another policy.
    """

    draws: int = 9
    max_states: int = 20
    start: str = "others"
    temperature: float | None = None
    top_p: float | None = None
    whiten: bool = True

    def __post_init__(self) -> None:
        require(self.draws >= 1, f"advantage.draws={self.draws}: set at least 1 continuation a state")
        require(self.max_states >= 1, f"advantage.max_states={self.max_states}: set at least 1")
        require(self.start in STARTS, f"advantage.start={self.start}: unknown; set one of {', '.join(STARTS)}")
        require(
            self.temperature is not None or self.top_p is None,
            f"advantage.top_p={self.top_p} without advantage.temperature: set both, or neither for the run's sampling",
        )
        self.sampling()

    def learns_from_equal_rewards(self) -> bool:
        return True  # the values of states differ where the rewards do not

    def sampling(self) -> ContinuationSampling | None:
        """What continuations are sampled with; None is the run's own."""
        if self.temperature is None:
            return None
        top_p = 1.0 if self.top_p is None else self.top_p
        require(
            self.temperature >= 0 and 0 < top_p <= 1,
            f"advantage.temperature={self.temperature}, top_p={top_p}: must be >= 0, and lie in (0, 1]",
        )
        return ContinuationSampling(temperature=self.temperature, top_p=top_p)


def spaced(states: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the states, evenly spaced, the last one kept."""
    count = min(len(states), most)
    return [states[(j + 1) * len(states) // count - 1] for j in range(count)]


def segment_advantages(reward: float | Tensor, values_K: Sequence[float] | Tensor) -> Tensor:
    """``A_k = V_{k+1} - V_k``, of the last segment ``r - V``; float64 [K].

    ``values_K`` are those of the states before each segment, the first that of the prompt. NaN is not estimated and
    takes the next estimated value; behind the last of these, the last one. Hence A sums to ``r - V_0``.
    """
    values = torch.as_tensor(values_K, dtype=torch.float64)
    known = (~values.isnan()).nonzero().flatten()
    if not len(known):
        return torch.full_like(values, torch.nan)
    following = torch.searchsorted(known, torch.arange(len(values))).clamp(max=len(known) - 1)
    last = torch.as_tensor(reward, dtype=torch.float64).reshape(1)
    return torch.cat([values[known[following]], last]).diff()


def leave_one_out(rewards_G: Sequence[float | None] | Tensor) -> Tensor:
    """The mean of the other rewards that count, float64 [G]; NaN where there is none."""
    rewards = as_rewards(rewards_G)
    counts_G = (~rewards.isnan()).double()
    others_G = counts_G.sum() - counts_G
    means_G = (rewards.nansum() - rewards.nan_to_num(0.0)) / others_G
    return torch.where(others_G > 0, means_G, torch.nan)


def continued_values(
    groups: Sequence[Group], states: Sequence[Sequence[Sequence[int]]], config: ContinuedValuesConfig, context: Context
) -> list[list[Tensor]]:
    """The mean reward of the continuations of every state, float64 ``[p][g][state]``; NaN where all of them abstain.

    State t of completion g of group p is its first t ids. Completions of a group that begin alike share the value.
    """
    requests, place = [], {}
    for p, (group, rows) in enumerate(zip(groups, states, strict=True)):
        for g, (ids, cuts) in enumerate(zip(group.completion_ids, rows, strict=True)):
            for cut in cuts:
                if (p, ids[:cut]) not in place:
                    place[p, ids[:cut]] = len(requests)
                    requests.append(_request(group, g, cut, config, context))
    values = _mean_rewards(groups, requests, [p for p, _ in place], config.draws, context)
    return [
        [
            torch.tensor([values[place[p, ids[:cut]]] for cut in cuts], dtype=torch.float64)
            for ids, cuts in zip(group.completion_ids, rows, strict=True)
        ]
        for p, (group, rows) in enumerate(zip(groups, states, strict=True))
    ]


def _request(group: Group, g: int, cut: int, config: ContinuedValuesConfig, context: Context) -> ContinuationRequest:
    return ContinuationRequest(
        problem_id=group.prompt.problem.id,
        sample_index=g,
        prompt_ids=group.prompt.token_ids,
        completion_ids=group.completion_ids[g][:cut],
        draws=config.draws,
        max_new_tokens=context.max_new_tokens - cut,
        occurrence=group.prompt.occurrence,
        sampling=config.sampling(),
        problem=group.prompt.problem,
        turns=group.completions[g].turns,
    )


def _mean_rewards(
    groups: Sequence[Group],
    requests: Sequence[ContinuationRequest],
    group_of: Sequence[int],
    draws: int,
    context: Context,
) -> list[float]:
    """Of each request the mean reward of its continuations; all ranks call this together.

    Those of a group are graded as one group: a reward that abstains on all of it does not apply to the problem.
    """
    joined: dict[int, list[Completion]] = {}
    for p, request, drawn in zip(group_of, requests, context.rollout.continue_(requests), strict=True):
        begun = groups[p].completions[request.sample_index]
        joined.setdefault(p, []).extend(begun.continued(request.position, new) for new in drawn)
    graded = context.grade([Group(prompt=groups[p].prompt, completions=tuple(ones)) for p, ones in joined.items()])
    rewards = [reward for group in graded for reward in as_rewards(group.rewards_G).split(draws)]
    return [float(rewards_K.nanmean()) for rewards_K in rewards]


def segment_values(
    groups: Sequence[Group], borders: Sequence[Sequence[Sequence[int]]], config: ContinuedValuesConfig, context: Context
) -> list[list[Tensor]]:
    """Values before each segment of each completion, float64 ``[p][g][segment]``, NaN where not estimated.

    ``borders`` are the places between the segments of a completion: ``borders[p][g]`` ascend inside it.
    """
    asks_start = config.start == "continuations"
    states = [[[*([0] if asks_start else []), *spaced(inner, config.max_states)] for inner in rows] for rows in borders]
    states = [_of_counted(group, rows, asks_start) for group, rows in zip(groups, states, strict=True)]
    values = continued_values(groups, states, config, context)
    found = []
    for group, rows, asked, known in zip(groups, borders, states, values, strict=True):
        starts_G = leave_one_out(as_rewards(group.rewards_G))
        found.append([])
        for inner, cuts, values_K, start in zip(rows, asked, known, starts_G, strict=True):
            by_cut = {0: float(start)} | dict(zip(cuts, values_K.tolist(), strict=True))
            found[-1].append(torch.tensor([by_cut.get(cut, torch.nan) for cut in (0, *inner)], dtype=torch.float64))
    return found


def _of_counted(group: Group, states: Sequence[list[int]], asks_start: bool) -> list[list[int]]:
    """Nothing is asked for a completion that abstains, nor for one that has no value to start from."""
    rewards_G = as_rewards(group.rewards_G)
    without = rewards_G.isnan() if asks_start else rewards_G.isnan() | leave_one_out(rewards_G).isnan()
    return [[] if out else cuts for cuts, out in zip(states, without.tolist(), strict=True)]


def segment_tokens(length: int, borders: Sequence[int]) -> Tensor:
    """How many tokens each segment has."""
    return torch.tensor([0, *borders, length]).diff()


def spread(
    rewards: Sequence[Sequence[float | None] | Tensor],
    values: Sequence[Sequence[Sequence[float] | Tensor]],
    tokens: Sequence[Sequence[Sequence[int] | Tensor]],
) -> list[list[Tensor]]:
    """:func:`segment_advantages` on every token of its segment, float64 ``[p][g][T]``; NaN for abstentions.

    A completion abstains if its reward does, or if the value of its prompt is unknown.
    """
    found = []
    for rewards_G, of_group, counts in zip(rewards, values, tokens, strict=True):
        rows = []
        for reward, values_K, tokens_K in zip(as_rewards(rewards_G), of_group, counts, strict=True):
            credit_K = segment_advantages(reward, values_K)
            if bool(reward.isnan()) or math.isnan(float(values_K[0])):
                credit_K = torch.full_like(credit_K, torch.nan)
            rows.append(credit_K.repeat_interleave(torch.as_tensor(tokens_K)))
        found.append(rows)
    return found


def finished(
    rows: Sequence[Sequence[Tensor]], counted: Sequence[Sequence[Tensor]], *, whiten: bool, name: str
) -> list[list[Tensor]]:
    """Values of the tokens that count, whitened or not; 0 on all others and on abstentions."""
    masks = [
        [mask_T & ~row_T.isnan() for row_T, mask_T in zip(group, of_group, strict=True)]
        for group, of_group in zip(rows, counted, strict=True)
    ]
    if whiten:
        return whiten_where(rows, masks, eps=WHITENING_EPS, name=name)
    return [
        [torch.where(mask_T, row_T, 0.0) for row_T, mask_T in zip(group, of_group, strict=True)]
        for group, of_group in zip(rows, masks, strict=True)
    ]


def estimate(
    rows: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    tokens: Sequence[Sequence[Tensor]],
    *,
    name: str,
) -> Advantages:
    """The rows as ``Advantages``, with the segments and their values in metrics and notes."""
    known = [values_K[~values_K.isnan()] for of_group in values for values_K in of_group]
    spans = [(values_K.max() - values_K.min()) for values_K in known if len(values_K)]
    metrics = {
        f"{name}/segments": Mean.of([len(values_K) for of_group in values for values_K in of_group]),
        f"{name}/values": Mean.of(torch.cat([torch.zeros(0, dtype=torch.float64), *known])),
        f"{name}/value_range": Mean.of([float(span) for span in spans]),
    }
    notes = [
        {
            "segment_tokens": [tokens_K.tolist() for tokens_K in counts],
            "segment_value": [values_K.nan_to_num(-1.0).tolist() for values_K in of_group],
        }
        for of_group, counts in zip(values, tokens, strict=True)
    ]
    return Advantages(values=rows, metrics=metrics, notes=notes)
