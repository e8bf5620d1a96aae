"""A user's estimator that asks for continuations, grades them, and keeps a state."""

import os
import zlib
from dataclasses import replace

import torch

from rltrain.rollout.continuation_types import ContinuationRequest
from rltrain.runtime import dist
from rltrain.types import Advantages, Mean, Need, Sum


def halves(groups, options, context):
    """The value of the state in the middle of a completion divides its reward between its two halves.

    The values are moved by a running mean of all rewards, which the state keeps. With ``bit`` a problem without that
    bit in its id's checksum asks for nothing and keeps its rewards.
    """
    bit = options.get("bit")
    asking = [bit is None or zlib.crc32(group.prompt.problem.id.encode()) >> bit & 1 == 1 for group in groups]
    requests = [
        ContinuationRequest(
            problem_id=group.prompt.problem.id,
            sample_index=g,
            prompt_ids=group.prompt.token_ids,
            completion_ids=ids[: len(ids) // 2],
            draws=options["draws"],
            max_new_tokens=context.max_new_tokens - len(ids) // 2,
            occurrence=group.prompt.occurrence,
        )
        for group, asks in zip(groups, asking, strict=True)
        if asks
        for g, ids in enumerate(group.completion_ids)
    ]
    continued = iter(context.rollout.continue_(requests))
    if os.environ.get("LOST_IN_STEP") == str(context.step + 1):
        raise SystemExit("lost in the middle of a step")
    values, asked = [], 0
    for group, asks in zip(groups, asking, strict=True):
        if not asks:
            rewards = zip(group.rewards_G, group.completion_ids, strict=True)
            values.append([reward.expand(len(ids)) for reward, ids in rewards])
            continue
        rows = []
        for completion, reward in zip(group.completions, group.rewards_G, strict=True):
            cut = len(completion.token_ids) // 2
            (graded,) = context.grade([_as_group(group, [completion.continued(cut, new) for new in next(continued)])])
            asked += len(graded.completions)
            middle = graded.rewards_G.nanmean()
            second = (reward - middle).expand(len(completion.token_ids) - cut)
            rows.append(torch.cat([(middle - reward).expand(cut), second]))
        values.append(rows)
    total = dist.all_sum(sum(group.rewards_G.sum() for group in groups), name="rewards of all")
    before = context.state.get("total", torch.zeros((), dtype=torch.float64))
    context.state["total"] = before + total
    shifted = [[row_T + 1e-3 * context.state["total"] for row_T in rows] for rows in values]
    return Advantages(values=shifted, metrics={"asked": Sum(value=asked), "total": Mean.of(context.state["total"])})


def _as_group(group, completions):
    return replace(group, completions=tuple(completions), rewards_G=None, reward_parts={}, notes={})


halves.needs = {Need.CONTINUATIONS, Need.STATE}
