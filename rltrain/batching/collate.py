"""Groups and advantages to packed micro-batches. Weights are set over the whole optimiser batch BEFORE packing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rltrain.batching.bins import (
    Costs,
    Layout,
    Segment,
    costs_of,
    equal_shares,
    first_fit_decreasing,
    fitting,
    packed_work,
    padded_bins,
    padded_work,
)
from rltrain.batching.masks import Masks
from rltrain.runtime import dist
from rltrain.types import Group, Mean, Prompt, TokenBatch

GroupLengths = tuple[int, tuple[int, ...]]  # tokens of a prompt, and fed tokens of each of its completions
Unit = tuple["LossRow", ...]  # completions of one prompt that are forwarded together, and share it if they are several


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One completion with its prompt. ``places`` are those of the ids that carry loss, ascending; None: all of them."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    advantages_T: Tensor
    key: int = 0
    places: tuple[int, ...] | None = None
    reward: float = math.nan

    @property
    def loss_places(self) -> Sequence[int]:
        """The places of the ids that carry loss."""
        return range(len(self.completion_ids)) if self.places is None else self.places

    @property
    def loss_advantages_N(self) -> Tensor:
        """The advantages of the ids that carry loss."""
        return self.advantages_T if self.places is None else self.advantages_T[list(self.places)]

    @property
    def fed_ids(self) -> tuple[int, ...]:
        """The completion as an input: up to its last loss token, which predicts nothing that is wanted."""
        places = self.loss_places
        return self.completion_ids[: places[-1]] if places else ()


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Completions and loss tokens of the optimiser batch, over all ranks.

    A completion none of whose tokens carries loss, such as a truncated one that is masked, still counts as a row.
    """

    rows: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """The weight of a completion's tokens under ``LossConfig.aggregation``."""

    aggregation: str
    denominators: Denominators
    max_new_tokens: int

    def of(self, row: LossRow) -> float:
        return token_weight(
            len(row.loss_places),
            self.denominators,
            aggregation=self.aggregation,
            max_new_tokens=self.max_new_tokens,
        )


NO_WEIGHTING = Weighting(aggregation="token", denominators=Denominators(rows=1, tokens=1), max_new_tokens=1)
"""For micro-batches that give log-probs alone: every token weighs 1."""


def rows_of(groups: Sequence[Group], advantages: Sequence[Sequence[Tensor]], masks: Masks = ()) -> list[LossRow]:
    """The completions that count: the model wrote some of them, and their reward did not abstain."""
    rows = []
    for index, (group, values) in enumerate(zip(groups, advantages, strict=True)):
        abstains = [False] * len(values) if group.rewards_G is None else group.rewards_G.isnan().tolist()
        for sample, (completion, advantages_T, abstain) in enumerate(
            zip(group.completions, values, abstains, strict=True)
        ):
            if abstain or completion.abstains or not completion.written_tokens:
                continue
            if len(advantages_T) != len(completion.token_ids):
                raise ValueError(
                    f"advantages of {group.prompt.problem.id}: {len(advantages_T)} values for "
                    f"{len(completion.token_ids)} tokens; an estimator returns one value per completion token"
                )
            rows.append(
                LossRow(
                    key=row_key(group.prompt, sample),
                    prompt_ids=group.prompt.token_ids,
                    completion_ids=completion.token_ids,
                    sampler_logprobs=tuple(completion.logprobs),
                    advantages_T=advantages_T,
                    places=_places(masks[index][sample]) if masks else None,
                    reward=math.nan if group.rewards_G is None else float(group.rewards_G[sample]),
                )
            )
    return rows


def _places(mask_T: Tensor) -> tuple[int, ...] | None:
    return None if bool(mask_T.all()) else tuple(mask_T.nonzero().flatten().tolist())


def row_key(prompt: Prompt, sample: int) -> int:
    """A signed 64-bit name of a completion within its step, the same on every machine and number of ranks."""
    name = f"{prompt.occurrence:d}/{sample:d}/{prompt.problem.id}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def denominators_of(rows: Sequence[LossRow]) -> Denominators:
    """Count rows and loss tokens over all ranks, in one reduction."""
    local = torch.tensor([len(rows), sum(len(row.loss_places) for row in rows)], dtype=torch.float64)
    count, tokens = dist.all_sum(local, name="loss denominators").tolist()
    return Denominators(rows=max(count, 1.0), tokens=max(tokens, 1.0))


def token_weight(length: int, denominators: Denominators, *, aggregation: str, max_new_tokens: int) -> float:
    """The weight of each loss token of a completion that has ``length`` of them.

    token (DAPO): 1/N. sequence (GRPO): 1/(rows·length). constant (Dr.GRPO): 1/(rows·L_max).
    sequence_sum (RLOO): 1/rows.
    """
    return {
        "token": 1 / denominators.tokens,
        "sequence": 1 / (denominators.rows * length),
        "constant": 1 / (denominators.rows * max_new_tokens),
        "sequence_sum": 1 / denominators.rows,
    }[aggregation]


def padding_share(batches: Sequence[TokenBatch]) -> Mean:
    """Share of the forwarded tokens that are padding, as (sum, count). Packed tokens have none."""
    padding, forwarded = 0, 0
    for batch in batches:
        lengths_S = batch.boundaries_S1.diff()
        real = int(lengths_S.sum())
        rows = real if batch.prefix_S is not None else int(lengths_S.max()) * len(lengths_S)
        padding, forwarded = padding + rows - real, forwarded + rows
    return Mean(total=float(padding), count=float(forwarded))


def collate(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[Tensor]],
    *,
    aggregation: str,
    token_budget: int,
    max_new_tokens: int,
    keep_zero_advantages: bool = True,
    masks: Masks = (),
    layouts: Sequence[Layout] = ("padded",),
    hidden_size: int = 1024,
) -> tuple[list[TokenBatch], Denominators]:
    """Packed micro-batches, the same number on every rank, and the denominators of their weights.

    Of the ``layouts`` the one of the least work over the rows of all ranks is taken, for a model of ``hidden_size``.
    Then the ranks are given equal work. No micro-batch feeds more than ``token_budget`` tokens, padding included.
    ``keep_zero_advantages=False`` leaves out rows whose advantages are all zero: exact when the loss has no KL and no
    entropy term. They still count in the denominators. ``masks`` say which ids carry loss
    (:func:`~rltrain.batching.masks.loss_masks`). The others are fed, as what later ids depend on, and appear nowhere
    else: not among the loss tokens, nor in the denominators.
    """
    rows = rows_of(groups, advantages, masks)
    weighting = Weighting(aggregation=aggregation, denominators=denominators_of(rows), max_new_tokens=max_new_tokens)
    rows = [row for row in rows if row.loss_places]
    if not keep_zero_advantages:
        rows = [row for row in rows if bool((row.loss_advantages_N != 0).any())]
    layout, arranged = arrange(rows, layouts, token_budget=token_budget, hidden_size=hidden_size)
    units = _in_equal_shares([tuple(rows[i] for i in unit) for unit in arranged], hidden_size)
    bins = bins_of([unit_segments(unit) for unit in units], layout, token_budget)
    batches = [token_batch([units[i] for i in indices], weighting, layout) for indices in bins]
    # At least one, so that a step of zero-variance groups alone is still an optimiser step, with a gradient of zero.
    most = max(1, int(dist.all_max(torch.tensor(len(batches)), name="number of micro-batches")))
    return batches + [empty_batch() for _ in range(most - len(batches))], weighting.denominators


def arrange(
    rows: Sequence[LossRow], layouts: Sequence[Layout], *, token_budget: int, hidden_size: int
) -> tuple[Layout, list[list[int]]]:
    """The layout of the least work over the rows of all ranks, and the indices of this rank's rows in each unit."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(row.prompt_ids, []).append(index)
    lengths = [(len(ids), tuple(len(rows[i].fed_ids) for i in members)) for ids, members in by_prompt.items()]
    ranks = dist.gather_objects(lengths, name="lengths of the rows")
    on_all_ranks = [group for rank in ranks for group in rank]
    costs = costs_of(dist.device().type)
    layout = min(layouts, key=lambda layout: work_of(on_all_ranks, layout, token_budget, hidden_size, costs))
    return layout, [
        [members[i] for i in indices]
        for members, group in zip(by_prompt.values(), lengths, strict=True)
        for indices in units_of(group, layout, token_budget)
    ]


def units_of(lengths: GroupLengths, layout: Layout, budget: int) -> list[list[int]]:
    """Which completions of a prompt are forwarded together. Where they share it: as many as the budget allows."""
    prompt, fed = lengths
    if layout != "shared":
        return [[i] for i in range(len(fed))]
    fitting(prompt + max(fed), budget)
    return first_fit_decreasing(fed, budget - prompt)


def segments_of(lengths: GroupLengths) -> list[Segment]:
    """The segments of a unit. A prompt that several completions share is a segment of its own."""
    prompt, fed = lengths
    return [(prompt + fed[0], 0)] if len(fed) == 1 else [(prompt, 0), *((tokens, prompt) for tokens in fed)]


def unit_segments(unit: Unit) -> list[Segment]:
    """The segments that a unit feeds."""
    return segments_of((len(unit[0].prompt_ids), tuple(len(row.fed_ids) for row in unit)))


def bins_of(units: Sequence[Sequence[Segment]], layout: Layout, budget: int) -> list[list[int]]:
    """Indices of the units of each micro-batch."""
    tokens = [sum(length for length, _ in unit) for unit in units]
    return padded_bins(tokens, budget) if layout == "padded" else first_fit_decreasing(tokens, budget)


def work_of(groups: Sequence[GroupLengths], layout: Layout, budget: int, hidden_size: int, costs: Costs) -> float:
    """Work of the micro-batches that these prompts and completions would become (:mod:`rltrain.batching.bins`)."""
    units = [
        segments_of((prompt, tuple(fed[i] for i in indices)))
        for prompt, fed in groups
        for indices in units_of((prompt, fed), layout, budget)
    ]
    bins = [[segment for i in indices for segment in units[i]] for indices in bins_of(units, layout, budget)]
    if layout == "padded":
        return sum(padded_work([length for length, _ in segments], hidden_size, costs) for segments in bins)
    return sum(packed_work(segments, hidden_size, costs) for segments in bins)


def _in_equal_shares(units: Sequence[Unit], hidden_size: int) -> Sequence[Unit]:
    """This rank's units after an exchange that gives all ranks about the same work."""
    costs = costs_of(dist.device().type)
    work = [packed_work(unit_segments(unit), hidden_size, costs) for unit in units]
    work_of_ranks = dist.gather_objects(work, name="work of the ranks")
    if len(work_of_ranks) == 1:
        return units
    owner = [rank for rank, units_work in enumerate(work_of_ranks) for _ in units_work]
    target = equal_shares([value for units_work in work_of_ranks for value in units_work], owner, len(work_of_ranks))
    here = [part for part, rank in zip(target, owner, strict=True) if rank == dist.rank()]
    outgoing: list[list[Unit]] = [[] for _ in work_of_ranks]
    for unit, part in zip(units, here, strict=True):
        outgoing[part].append(compact(unit))
    return dist.exchange_objects(outgoing, name="rows for ranks of equal work")


def compact(unit: Unit) -> Unit:
    """The rows with advantages of their own, to be pickled: a slice would take its whole tensor along."""
    return tuple(replace(row, advantages_T=row.advantages_T.clone()) for row in unit)


def token_batch(units: Sequence[Unit], weighting: Weighting, layout: Layout) -> TokenBatch:
    """A micro-batch. Loss tokens are in the order of the units' rows."""
    ids: list[int] = []
    positions: list[int] = []
    boundaries, prefix, source, sequence = [0], [], [], []

    def add(tokens: Sequence[int], first_position: int, after: int) -> None:
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        boundaries.append(len(ids))
        prefix.append(after)

    for unit in units:
        prompt_ids = unit[0].prompt_ids
        shared = len(unit) > 1
        if shared:
            add(prompt_ids, 0, -1)
        prompt_segment, prompt_end = len(prefix) - 1, len(ids)
        for row in unit:
            # The token at position t is predicted by the hidden state at t - 1.
            first = len(ids) if shared else len(ids) + len(prompt_ids)
            before = prompt_end - 1 if shared else first - 1
            source += [first + place - 1 if place else before for place in row.loss_places]
            if shared:
                add(row.fed_ids, len(prompt_ids), prompt_segment)
            else:
                add(prompt_ids + row.fed_ids, 0, -1)
            sequence += [len(prefix) - 1] * len(row.loss_places)
    rows = [row for unit in units for row in unit]
    loss_tokens_S = torch.tensor([len(row.loss_places) for row in rows])
    weights_S = torch.tensor([weighting.of(row) for row in rows], dtype=torch.float32)
    keys_S = torch.tensor([row.key for row in rows])
    rewards_S = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    lengths_S = torch.tensor([len(row.completion_ids) for row in rows])
    places_N = torch.tensor([place for row in rows for place in row.loss_places])
    sampler_logprobs_N = torch.tensor(
        [row.sampler_logprobs[place] for row in rows for place in row.loss_places], dtype=torch.float32
    )
    return TokenBatch(
        input_ids_L=torch.tensor(ids),
        positions_L=torch.tensor(positions),
        boundaries_S1=torch.tensor(boundaries),
        prefix_S=None if layout == "padded" else torch.tensor(prefix),
        source_N=torch.tensor(source),
        sequence_N=torch.tensor(sequence),
        targets_N=torch.tensor([row.completion_ids[place] for row in rows for place in row.loss_places]),
        weights_N=torch.repeat_interleave(weights_S, loss_tokens_S),
        advantages_N=torch.cat([row.loss_advantages_N for row in rows]).float(),
        old_logprobs_N=sampler_logprobs_N,
        sampler_logprobs_N=sampler_logprobs_N,
        keys_N=torch.repeat_interleave(keys_S, loss_tokens_S) + places_N,
        rewards_N=torch.repeat_interleave(rewards_S, loss_tokens_S),
        remaining_N=torch.repeat_interleave(lengths_S, loss_tokens_S) - places_N,
    )


def empty_batch() -> TokenBatch:
    """One token of weight 0, for a rank that has no rows left but must join the collectives of a micro-batch."""
    zero_N = torch.zeros(1)
    return TokenBatch(
        input_ids_L=torch.zeros(2, dtype=torch.long),
        positions_L=torch.arange(2),
        boundaries_S1=torch.tensor([0, 2]),
        source_N=torch.zeros(1, dtype=torch.long),
        sequence_N=torch.zeros(1, dtype=torch.long),
        targets_N=torch.zeros(1, dtype=torch.long),
        weights_N=zero_N,
        advantages_N=zero_N,
        old_logprobs_N=zero_N,
        sampler_logprobs_N=zero_N,
        keys_N=torch.zeros(1, dtype=torch.long),
        rewards_N=zero_N.double(),
        remaining_N=torch.ones(1, dtype=torch.long),
    )
