"""Completions of two turns: our loss of them, and a plain autograd loop over the tokens that the model wrote."""

import math
from dataclasses import replace

import torch
from packed_models import tiny

from rltrain import cli
from rltrain.batching.collate import collate
from rltrain.batching.masks import loss_masks
from rltrain.policy.logprobs import LogprobModel, logprobs, micro_batch_loss
from rltrain.runs.metrics import Accumulator
from rltrain.runs.step_metrics import sampler_difference
from rltrain.types import Completion, Group, Problem, Prompt, Turn, among_observed

MAX_NEW_TOKENS, TEMPERATURE = 12, 0.7
EXTRA = ["loss.kl_coef=0.1", "loss.entropy_coef=0.01"]
LOSSES = {
    "grpo": ["algorithm=grpo", *EXTRA],
    "dapo": ["algorithm=dapo", *EXTRA, "loss.importance_correction=sequence_truncate"],
    "gspo": ["algorithm=gspo", *EXTRA],
    "dr_grpo": ["algorithm=dr_grpo", *EXTRA, "loss.mask_truncated=true"],
    "grpo_truncated": ["algorithm=grpo", *EXTRA, "loss.mask_truncated=true"],
    "dapo_truncated": ["algorithm=dapo", *EXTRA, "loss.mask_truncated=true"],
}
# Written and observed ids of each turn of each completion; those of TRUNCATED were cut at the limit.
CONVERSATIONS = [
    [[(3, 2), (2, 0)], [(1, 4), (3, 1)], [(4, 0)]],
    [[(0, 2), (2, 0)], [(2, 1), (1, 3), (2, 0)], [(1, 1), (1, 0)]],
]
TRUNCATED = {(0, 1), (1, 0)}


def models():
    """A policy and a reference in double precision; the second is the first, moved."""
    policy, reference = tiny("Llama").eval(), tiny("Llama").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return policy, reference


def conversations(policy, *, noise=0.3):
    """Groups, and advantages of every id. Sampled log-probs are the policy's, moved: some ratios are clipped."""
    draw, groups, advantages = torch.Generator().manual_seed(7), [], []
    for p, talks in enumerate(CONVERSATIONS):
        prompt = torch.randint(0, 60, (4 + 3 * p,), generator=draw).tolist()
        completions, values = [], []
        for g, talk in enumerate(talks):
            turns = tuple(Turn(written=w, observed=o, text=f"turn {i}") for i, (w, o) in enumerate(talk))
            ids = torch.randint(0, 60, (sum(map(sum, talk)),), generator=draw).tolist()
            own_T = token_logprobs(policy, prompt, ids)[0].detach()
            moved_T = (own_T + noise * torch.randn(len(ids), generator=draw)).float()
            written = [value for value, flag in zip(moved_T.tolist(), written_flags(talk), strict=True) if flag]
            completions.append(
                Completion(
                    token_ids=tuple(ids),
                    logprobs=among_observed(written, turns, math.nan),
                    finish="length" if (p, g) in TRUNCATED else "stop",
                    turns=turns,
                )
            )
            values.append(torch.randn(len(ids), generator=draw))
        problem = Problem(id=f"p{p}", prompt="", answer="")
        rewards_G = torch.arange(len(talks), dtype=torch.float64)
        groups.append(
            Group(
                prompt=Prompt(problem=problem, token_ids=tuple(prompt)),
                completions=tuple(completions),
                rewards_G=rewards_G,
            )
        )
        advantages.append(values)
    return groups, advantages


def written_flags(talk):
    return [flag for written, observed in talk for flag in [True] * written + [False] * observed]


def token_logprobs(model, prompt, ids):
    """Log-probs and entropies of a completion's ids, from one plain forward."""
    logits_TV = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    logprobs_TV = logits_TV.log_softmax(-1)
    return logprobs_TV.gather(-1, torch.tensor(ids)[:, None])[:, 0], -(logprobs_TV.exp() * logprobs_TV).sum(-1)


def plain(policy, reference, groups, advantages, loss):
    """What the loss, its gradient and its metrics are: a loop over completions, and over written tokens in each."""
    policy.zero_grad()
    terms, kls, entropies, apart, clipped = [], [], [], [], 0
    for p, (group, values) in enumerate(zip(groups, advantages, strict=True)):
        for g, (one, advantages_T) in enumerate(zip(group.completions, values, strict=True)):
            if loss.mask_truncated and (p, g) in TRUNCATED:
                terms.append([])
                continue
            new_T, entropy_T = token_logprobs(policy, group.prompt.token_ids, one.token_ids)
            with torch.no_grad():
                reference_T = token_logprobs(reference, group.prompt.token_ids, one.token_ids)[0]
            places = [t for t, flag in enumerate(written_flags(CONVERSATIONS[p][g])) if flag]
            mean = sum(new_T[t] - one.logprobs[t] for t in places) / len(places)
            # The policy before the update is the sampler's, so that the sampler's weight of a sequence is 1.
            term = []
            for t in places:
                ratio = (mean if loss.ratio == "sequence" else new_T[t] - one.logprobs[t]).exp()
                bounded = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
                objective = torch.minimum(ratio * advantages_T[t], bounded * advantages_T[t])
                apart_t = reference_T[t] - new_T[t]
                kl = apart_t.exp() - apart_t - 1
                term.append(-objective + loss.kl_coef * kl - loss.entropy_coef * entropy_T[t])
                clipped += int((ratio > bounded and advantages_T[t] > 0) or (ratio < bounded and advantages_T[t] < 0))
                kls.append(kl.item())
                entropies.append(entropy_T[t].item())
                apart.append(abs(new_T[t].item() - one.logprobs[t]))
            terms.append(term)
    tokens = sum(map(len, terms))
    total = {
        "sequence": lambda: sum(sum(term) / len(term) for term in terms if term) / len(terms),
        "token": lambda: sum(map(sum, terms)) / tokens,
        "constant": lambda: sum(map(sum, terms)) / (len(terms) * MAX_NEW_TOKENS),
    }[loss.aggregation]()
    total.backward()
    values = {
        "loss": total.item(),
        "rows": len(terms),
        "tokens": tokens,
        "policy_tokens": tokens,
        "kl": sum(kls) / tokens,
        "entropy/trained": sum(entropies) / tokens,
        "clip_ratio/region_mean": clipped / tokens,
        "sampling/sampling_logp_difference/mean": sum(apart) / tokens,
        "sampling/sampling_logp_difference/max": max(apart),
    }
    return values, gradients(policy)


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def ours(policy, reference, groups, advantages, loss, *, layout, budget=60):
    """The same from micro-batches; on several ranks the values are of all, the gradient is of this one."""
    policy.zero_grad()
    masks = loss_masks(groups, mask_truncated=loss.mask_truncated)
    batches, denominators = collate(
        groups,
        advantages,
        aggregation=loss.aggregation,
        token_budget=budget,
        max_new_tokens=MAX_NEW_TOKENS,
        masks=masks,
        layouts=(layout,),
        hidden_size=16,
    )
    module, frozen, metrics = (*(LogprobModel(m, temperature=TEMPERATURE) for m in (policy, reference)), Accumulator())
    for batch in batches:
        with torch.no_grad():
            batch = replace(batch, reference_logprobs_N=logprobs(frozen, batch).logprobs_N)
        output = micro_batch_loss(module, batch, loss)
        output.loss.backward()
        metrics.add(output.metrics)
        metrics.add(sampler_difference(output.logprobs_N, batch))
    values = metrics.reduce() | {"rows": denominators.rows, "tokens": denominators.tokens}
    return values, gradients(policy)


def loss_of(name):
    """The loss of a preset."""
    return cli.compose(["data=small_integers", "reward@rewards.answer=random", *LOSSES[name]]).loss
