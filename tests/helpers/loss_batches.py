"""Micro-batches of loss tokens alone, in double precision."""

import torch

from rltrain.types import TokenBatch


def batch(advantages, *, weights=None, old=None, sampler=None, reference=None, lengths=None, keys=None) -> TokenBatch:
    """Loss tokens alone: each sequence is one prompt token and its completion."""
    count = len(advantages)
    lengths = lengths or [count]
    boundaries = torch.tensor([0, *[n + 1 for n in lengths]]).cumsum(0)
    zeros = torch.zeros(count, dtype=torch.float64)
    old = zeros if old is None else torch.as_tensor(old, dtype=torch.float64)
    total = int(boundaries[-1])
    return TokenBatch(
        input_ids_L=torch.zeros(total, dtype=torch.long),
        positions_L=torch.zeros(total, dtype=torch.long),
        boundaries_S1=boundaries,
        source_N=torch.zeros(count, dtype=torch.long),
        sequence_N=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        targets_N=torch.zeros(count, dtype=torch.long),
        weights_N=torch.as_tensor(weights or [1 / count] * count, dtype=torch.float64),
        advantages_N=torch.as_tensor(advantages, dtype=torch.float64),
        old_logprobs_N=old,
        sampler_logprobs_N=old if sampler is None else torch.as_tensor(sampler, dtype=torch.float64),
        keys_N=torch.arange(count) if keys is None else torch.as_tensor(keys),
        reference_logprobs_N=None if reference is None else torch.as_tensor(reference, dtype=torch.float64),
    )
