"""Probing the end of every step: branches of one KV cache against feeding every step's prefix again.

The peer is kind: per completion one left-padded batch of all prefixes, the forced answer and the N continuations share
that prefill, finished rows leave. Both give the same numbers (the largest difference is printed). Tokens are those that
enter the model, padding apart; seconds are medians over rounds in turn.

    python scripts/bench/probes.py [--steps 16] [--step-tokens 64] [--completions 4] [--rounds 3] [--short]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rltrain.policy.load import Policy, load_policy
from rltrain.policy.tiny import TinyConfig
from rltrain.rollout import probes, sampling
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings, vocabulary

Probe = Callable[[Policy, Sequence[ProbeRequest], ProbeSettings], list[ProbeResult]]


def closes_box(text: str) -> bool:
    """Whether the brace that the suffix opened closes in ``text``."""
    depth = 1
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return True
    return False


def stems_of(one: ProbeRequest, settings: ProbeSettings) -> tuple[Tensor, Tensor]:
    """Left-padded prefixes with the suffix [K, T], and their mask."""
    stems = [(*one.prompt_ids, *one.completion_ids[:cut], *settings.suffix_ids) for cut in one.cuts]
    width = max(map(len, stems))
    ids_KT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in stems])
    return ids_KT, torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in stems])


def continuation_entropies(
    policy: Policy, one: ProbeRequest, settings: ProbeSettings, cache: Any, mask_BT: Tensor, logits_BV: Tensor
) -> list[list[float]]:
    """Entropies of the tokens of each of the K·N continuations."""
    texts, entropies = vocabulary(policy.tokenizer), [[] for _ in logits_BV]
    drawn: list[list[int]] = [[] for _ in logits_BV]
    key = sampling.row_key(settings.seed, settings.step, f"{one.problem_id}/probe", one.sample_index)
    streams_B = torch.tensor(
        [cut * settings.continuations + n for cut in one.cuts for n in range(settings.continuations)]
    )
    live_B = torch.arange(len(logits_BV))
    for index in range(settings.max_tokens):
        uniforms_B = sampling.uniforms(torch.tensor(key), streams_B[live_B] * settings.max_tokens + index)
        tokens_B, _ = sampling.sample(logits_BV, uniforms_B, temperature=settings.temperature, top_k=0, top_p=1.0)
        entropy_B = torch.distributions.Categorical(logits=logits_BV).entropy()
        for row, token, entropy in zip(live_B.tolist(), tokens_B.tolist(), entropy_B.tolist(), strict=True):
            entropies[row].append(entropy)
            drawn[row].append(token)
        ended = [
            drawn[row][-1] in policy.stop_token_ids or closes_box("".join(texts[token] for token in drawn[row]))
            for row in live_B.tolist()
        ]
        keep = torch.tensor([slot for slot, end in enumerate(ended) if not end], dtype=torch.long)
        if index + 1 == settings.max_tokens or not len(keep):
            break
        live_B = live_B[keep]
        cache.batch_select_indices(keep)
        mask_BT = torch.nn.functional.pad(mask_BT[keep], (0, 1), value=1)
        logits_BV = policy.model(
            input_ids=tokens_B[keep, None],
            attention_mask=mask_BT,
            position_ids=mask_BT.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return entropies


@torch.no_grad()
def feed_every_step_again(
    policy: Policy, requests: Sequence[ProbeRequest], settings: ProbeSettings
) -> list[ProbeResult]:
    """The peer."""
    results = []
    for one in requests:
        stems_KT, mask_KT = stems_of(one, settings)
        answer_A = torch.tensor(one.answer_ids)
        mask_KF = torch.nn.functional.pad(mask_KT, (0, len(answer_A) - 1), value=1)
        cache = DynamicCache()
        logits_KAV = policy.model(
            input_ids=torch.cat([stems_KT, answer_A[:-1].expand(len(stems_KT), -1)], 1),
            attention_mask=mask_KF,
            position_ids=(mask_KF.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=len(answer_A),
        ).logits
        answer_KA1 = answer_A.expand(len(stems_KT), -1)[..., None]
        accuracy_K = logits_KAV.softmax(-1).gather(-1, answer_KA1).squeeze(-1).double().mean(-1)
        cache.crop(1 - len(answer_A))
        cache.batch_repeat_interleave(settings.continuations)
        entropies = continuation_entropies(
            policy,
            one,
            settings,
            cache,
            mask_KT.repeat_interleave(settings.continuations, 0),
            logits_KAV[:, 0].repeat_interleave(settings.continuations, 0),
        )
        confidence_B = torch.tensor([-statistics.fmean(row) for row in entropies], dtype=torch.float64).exp()
        confidence_K = confidence_B.unflatten(0, (len(stems_KT), -1)).mean(-1)
        results.append(ProbeResult(accuracy_K=accuracy_K, confidence_K=confidence_K))
    return results


def count_tokens(policy: Policy, probe: Callable[[], Any]) -> int:
    """Tokens that enter the model during ``probe``, padding apart."""
    counts = []

    def count(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        new = kwargs["input_ids"].shape[1]
        padding = int((mask[:, -new:] == 0).sum()) if mask is not None and mask.ndim == 2 else 0
        counts.append(kwargs["input_ids"].numel() - padding)

    hook = policy.model.register_forward_pre_hook(count, with_kwargs=True)
    probe()
    hook.remove()
    return sum(counts)


def requests_of(policy: Policy, arguments: argparse.Namespace) -> list[ProbeRequest]:
    """Completions of random characters, cut after every step."""
    length = arguments.steps * arguments.step_tokens
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(
        5, len(policy.tokenizer), (arguments.completions, arguments.prompt_tokens + length), generator=draw
    )
    return [
        ProbeRequest(
            problem_id=str(index),
            sample_index=0,
            prompt_ids=tuple(row[: arguments.prompt_tokens]),
            completion_ids=tuple(row[arguments.prompt_tokens :]),
            cuts=tuple(range(arguments.step_tokens, length + 1, arguments.step_tokens)),
            answer_ids=tuple(policy.tokenizer("17")["input_ids"]),
        )
        for index, row in enumerate(ids.tolist())
    ]


def median_seconds(probe: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Each in turn, ``rounds`` times."""
    seconds: dict[str, list[float]] = {name: [] for name in probe}
    for _ in range(rounds):
        for name, run in probe.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Print one line per way, and the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--step-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="two completions, one round")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.completions, arguments.rounds = 2, 1

    length = arguments.prompt_tokens + arguments.steps * arguments.step_tokens
    policy = load_policy(TinyConfig(max_positions=length + 64))
    requests = requests_of(policy, arguments)
    suffix_ids = tuple(policy.tokenizer("\\boxed{")["input_ids"])
    settings = ProbeSettings(seed=0, step=0, suffix_ids=suffix_ids)
    ways: dict[str, Probe] = {"branches of one cache": probes.probe, "every step fed again": feed_every_step_again}
    runs = {name: lambda probe=probe: probe(policy, requests, settings) for name, probe in ways.items()}

    ours, peer = (run() for run in runs.values())
    difference = max(
        float((getattr(a, field) - getattr(b, field)).abs().max())
        for a, b in zip(ours, peer, strict=True)
        for field in ("accuracy_K", "confidence_K")
    )
    tokens = {name: count_tokens(policy, run) for name, run in runs.items()}
    seconds = median_seconds(runs, arguments.rounds)
    print(f"{arguments.completions} completions of {arguments.steps} steps x {arguments.step_tokens} tokens,")
    print(
        f"{settings.continuations} continuations of at most {settings.max_tokens}; largest difference {difference:.1e}"
    )
    for name in runs:
        print(f"{name:24} {tokens[name]:9,} tokens {seconds[name]:8.2f} s")
    token_ratio, time_ratio = (one["every step fed again"] / one["branches of one cache"] for one in (tokens, seconds))
    print(f"{'ratio':24} {token_ratio:9.2f} x     {time_ratio:8.2f} x")


if __name__ == "__main__":
    main()
