"""Groups and advantages to packed micro-batches. Weights are set over the whole optimiser batch BEFORE packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain import dist
from rltrain.types import Group, Mean, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Row:
    """One completion that carries loss, with its prompt."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    advantages_T: Tensor

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Rows and completion tokens of the optimiser batch, over all ranks."""

    rows: float
    tokens: float


def rows_of(groups: Sequence[Group], advantages: Sequence[Sequence[Tensor]]) -> list[Row]:
    """The completions that count: not empty, and their reward did not abstain."""
    rows = []
    for group, values in zip(groups, advantages, strict=True):
        abstains = [False] * len(values) if group.rewards_G is None else group.rewards_G.isnan().tolist()
        for completion, advantages_T, abstain in zip(group.completions, values, abstains, strict=True):
            if abstain or not completion.token_ids:
                continue
            if len(advantages_T) != len(completion.token_ids):
                raise ValueError(
                    f"advantages of {group.prompt.problem.id}: {len(advantages_T)} values for "
                    f"{len(completion.token_ids)} tokens; an estimator returns one value per completion token"
                )
            rows.append(
                Row(
                    prompt_ids=group.prompt.token_ids,
                    completion_ids=completion.token_ids,
                    sampler_logprobs=completion.logprobs,
                    advantages_T=advantages_T,
                )
            )
    return rows


def denominators_of(rows: Sequence[Row]) -> Denominators:
    """Count rows and tokens over all ranks, in one reduction."""
    local = torch.tensor([len(rows), sum(len(row.completion_ids) for row in rows)], dtype=torch.float64)
    count, tokens = dist.all_sum(local, name="loss denominators").tolist()
    return Denominators(rows=max(count, 1.0), tokens=max(tokens, 1.0))


def token_weight(length: int, denominators: Denominators, *, aggregation: str, max_new_tokens: int) -> float:
    """The weight of each token of a completion of ``length`` tokens.

    token (DAPO): 1/N. sequence (GRPO): 1/(rows·length). constant (Dr.GRPO): 1/(rows·L_max).
    sequence_sum (RLOO): 1/rows.
    """
    return {
        "token": 1 / denominators.tokens,
        "sequence": 1 / (denominators.rows * length),
        "constant": 1 / (denominators.rows * max_new_tokens),
        "sequence_sum": 1 / denominators.rows,
    }[aggregation]


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into bins, longest first; a bin whose rows are padded to its longest holds at most ``budget`` tokens.

    Padding counts, so that the budget bounds memory; sorted lengths keep it small. Ties keep their order.
    """
    order, bins = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    while order:
        longest = lengths[order[0]]
        rows = budget // longest
        if rows == 0:
            raise ValueError(f"a sequence of {longest} tokens exceeds batch.token_budget={budget}; raise the budget")
        bins.append(order[:rows])
        order = order[rows:]
    return bins


def padding_share(batches: Sequence[TokenBatch]) -> Mean:
    """Share of the forwarded tokens that are padding, as (sum, count)."""
    lengths = [batch.boundaries_S1.diff() for batch in batches]
    forwarded = sum(int(lengths_S.max()) * len(lengths_S) for lengths_S in lengths)
    return Mean(total=float(forwarded - sum(int(lengths_S.sum()) for lengths_S in lengths)), count=float(forwarded))


def collate(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[Tensor]],
    *,
    aggregation: str,
    token_budget: int,
    max_new_tokens: int,
    keep_zero_advantages: bool = True,
) -> tuple[list[TokenBatch], Denominators]:
    """Packed micro-batches, the same number on every rank, and the denominators their weights were made with.

    ``keep_zero_advantages=False`` leaves out rows whose advantages are all zero: exact when the loss has no KL and no
    entropy term. They count in the denominators all the same.
    """
    rows = rows_of(groups, advantages)
    denominators = denominators_of(rows)
    if not keep_zero_advantages:
        rows = [row for row in rows if bool((row.advantages_T != 0).any())]
    bins = pack([row.tokens for row in rows], token_budget)
    batches = [_token_batch([rows[i] for i in one], denominators, aggregation, max_new_tokens) for one in bins]
    # At least one, so that a step without any signal is still an optimiser step, with a gradient of zero.
    most = max(1, int(dist.all_max(torch.tensor(len(batches)), name="number of micro-batches")))
    return batches + [empty_batch() for _ in range(most - len(batches))], denominators


def _token_batch(rows: Sequence[Row], denominators: Denominators, aggregation: str, max_new_tokens: int) -> TokenBatch:
    lengths_S = torch.tensor([row.tokens for row in rows])
    boundaries_S1 = torch.cat([torch.zeros(1, dtype=torch.long), lengths_S.cumsum(0)])
    completion_S = torch.tensor([len(row.completion_ids) for row in rows])
    weights = [
        token_weight(len(row.completion_ids), denominators, aggregation=aggregation, max_new_tokens=max_new_tokens)
        for row in rows
    ]
    # The token at position t is predicted by the hidden state at t - 1.
    source = [
        torch.arange(end - len(row.completion_ids) - 1, end - 1)
        for end, row in zip(boundaries_S1[1:].tolist(), rows, strict=True)
    ]
    sampler_logprobs_N = torch.tensor([value for row in rows for value in row.sampler_logprobs], dtype=torch.float32)
    return TokenBatch(
        input_ids_L=torch.tensor([token for row in rows for token in row.prompt_ids + row.completion_ids]),
        positions_L=torch.cat([torch.arange(length) for length in lengths_S.tolist()]),
        boundaries_S1=boundaries_S1,
        source_N=torch.cat(source),
        sequence_N=torch.repeat_interleave(torch.arange(len(rows)), completion_S),
        targets_N=torch.tensor([token for row in rows for token in row.completion_ids]),
        weights_N=torch.repeat_interleave(torch.tensor(weights, dtype=torch.float32), completion_S),
        advantages_N=torch.cat([row.advantages_T for row in rows]).float(),
        old_logprobs_N=sampler_logprobs_N,
        sampler_logprobs_N=sampler_logprobs_N,
    )


def empty_batch() -> TokenBatch:
    """One token of weight 0: this rank takes part in the collectives of a micro-batch it has no rows for."""
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
    )
