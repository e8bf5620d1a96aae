"""What a rank handles at once: a micro-batch, and the completions in flight."""

from __future__ import annotations

from dataclasses import dataclass

from rltrain.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """The largest amounts that a rank handles at once: a micro-batch, and the completions in flight.

    A micro-batch is ``rows`` of ``tokens``, the longest. ``packed_tokens`` is what it holds without padding, and
    ``gathered_tokens`` the keys that packed attention copies into rows, a shared prompt once for each completion.
    """

    rows: int
    tokens: int
    packed_tokens: int
    gathered_tokens: int
    loss_tokens: int
    micro_batches: int
    prompts: int
    prompt_tokens: int
    completions: int
    new_tokens: int


def rank_load(config: RunConfig, ranks: int) -> RankLoad:
    """The load of full-length prompts and completions, the largest that the limits allow."""
    sampling, batch = config.sampling, config.batch
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    prompts = -(-batch.prompts_per_step // ranks)
    completions = prompts * batch.group_size
    rows = min(completions, batch.token_budget // longest)
    packed, gathered, loss_tokens = _packed_load(config, rows, completions)
    evaluation = config.evaluation
    held_out = -(-evaluation.problems // ranks) * evaluation.samples if evaluation.every_steps else 0
    in_flight = config.rollout.rows_in_flight(max(completions, held_out))
    share = batch.group_size if completions >= held_out else evaluation.samples
    return RankLoad(
        rows=rows,
        tokens=longest,
        packed_tokens=packed,
        gathered_tokens=gathered,
        loss_tokens=loss_tokens,
        micro_batches=-(-completions // rows),
        prompts=-(-in_flight // share),
        prompt_tokens=sampling.max_prompt_tokens,
        completions=in_flight,
        new_tokens=sampling.max_new_tokens,
    )


def _packed_load(config: RunConfig, rows: int, completions: int) -> tuple[int, int, int]:
    """Tokens of a micro-batch, keys that its attention gathers, and tokens with a loss, in the largest layout allowed.

    Padded: ``rows`` of the longest. Packed: rows that fill the budget. Shared: a prompt, and as many of its completions
    as fit beside it, each of which attends to a copy of the prompt's keys.
    """
    sampling, batch = config.sampling, config.batch
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    padded = rows * longest, 0, rows * sampling.max_new_tokens
    if batch.packing in ("padded", "auto"):
        return padded
    if batch.packing == "packed":
        tokens = min(batch.token_budget, completions * longest)
        return tokens, tokens, max(padded[2], tokens - rows * sampling.max_prompt_tokens)
    beside = max(1, min(batch.group_size, (batch.token_budget - sampling.max_prompt_tokens) // sampling.max_new_tokens))
    loss_tokens = beside * sampling.max_new_tokens
    return sampling.max_prompt_tokens + loss_tokens, sampling.max_prompt_tokens + beside * longest, loss_tokens
