"""Estimators as users write them, wrong in ways that a run must name."""

import torch

from rltrain.advantages.group import group_advantages, per_token
from rltrain.types import Advantages, Need, SpanRequest


def one_value_per_completion(groups, options, context):
    return Advantages(values=[group_advantages(group.rewards_G) for group in groups])


def not_finite_later(groups, options, context):
    """Right at step 0; then a division of zero by zero at the last token of one completion."""
    values = [per_token(group_advantages(group.rewards_G), group.completion_ids) for group in groups]
    if context.step:
        values[1][2] = torch.cat([torch.zeros(len(values[1][2]) - 1), torch.zeros(1) / 0])
    return Advantages(values=values)


def in_place(groups, options, context):
    for group in groups:
        group.rewards_G.sub_(10)
    return Advantages(values=[per_token(group.rewards_G, group.completion_ids) for group in groups])


def two_arguments(groups, context):
    return None


def at_high_entropy(groups, options, context):
    """The group's advantage on the fifth of each completion's tokens where the policy's entropy is highest."""
    requests = []
    for group in groups:
        start = len(group.prompt.token_ids)
        for completion in group.completions:
            ids = group.prompt.token_ids + completion.token_ids
            requests.append(SpanRequest(token_ids=ids, spans=((start, len(ids)),), prompt_tokens=start))
    entropies, values = iter(context.scorer.entropies(requests)), []
    for group in groups:
        rows = per_token(group_advantages(group.rewards_G), group.completion_ids)
        kept = [(e := next(entropies)[0]) >= e.quantile(0.8) for _ in rows]
        values.append([row_T * kept_T for row_T, kept_T in zip(rows, kept, strict=True)])
    return Advantages(values=values)


at_high_entropy.needs = {Need.SCORER}
