"""Ask the policy for its answer in mid-completion, at many cuts for little more than one pass over the completion.

The completion is fed once and its KV cache kept. All probes of all its cuts are then fed to that one cache as
branches: through a 4-D attention mask, each new token sees the cache up to its cut, and its own branch. Nothing is
copied per cut: K cuts with N continuations cost K·(suffix + answer) + K·N·L tokens, not K prefills.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rltrain.errors import require
from rltrain.policy.capabilities import SLIDING, layer_kinds
from rltrain.policy.load import Policy
from rltrain.policy.logprobs import inference
from rltrain.rollout import sampling
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings, vocabulary

_NOBODY = -1


class BranchedCache:
    """The KV cache of B sequences, and tokens appended to it as branches.

    A token with (limit, parent, owner) sees the first ``limit`` prefix columns and those appended columns whose owner
    is ``parent`` or ``owner`` and that are not younger than itself. Owner -1 marks columns that nobody sees later.
    """

    def __init__(self, model: Any, sequences: Sequence[Sequence[int]]) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache()
        self.prefix_tokens = max(len(ids) for ids in sequences)
        ids_BT = torch.tensor(
            [[*ids, *[0] * (self.prefix_tokens - len(ids))] for ids in sequences], device=model.device
        )
        # Padding is on the right, where a causal mask hides it from every real token; limits hide it from branches.
        model(input_ids=ids_BT, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._owners_BC = torch.empty(len(sequences), 0, dtype=torch.long, device=model.device)

    def _mask(self, limits_BQ: Tensor, parents_BQ: Tensor, owners_BQ: Tensor) -> Tensor:
        """Additive mask [B, 1, Q, prefix + appended columns]; every token sees itself."""
        old, new = self._owners_BC.shape[1] - owners_BQ.shape[1], owners_BQ.shape[1]
        prefix_BQT = torch.arange(self.prefix_tokens, device=limits_BQ.device) < limits_BQ[..., None]
        columns_B1C = self._owners_BC[:, None, :]
        related_BQC = (columns_B1C == owners_BQ[..., None]) | (columns_B1C == parents_BQ[..., None])
        not_younger_QC = torch.ones(new, old + new, dtype=torch.bool, device=limits_BQ.device).tril(old)
        visible_BQC = torch.cat([prefix_BQT, related_BQC & not_younger_QC], -1)
        dtype = self._model.dtype
        return torch.zeros(visible_BQC.shape, dtype=dtype, device=limits_BQ.device).masked_fill_(
            ~visible_BQC, torch.finfo(dtype).min
        )[:, None]

    def append(
        self,
        ids_BQ: Tensor,
        positions_BQ: Tensor,
        limits_BQ: Tensor,
        parents_BQ: Tensor,
        owners_BQ: Tensor,
        *,
        logits_of: Tensor,
    ) -> Tensor:
        """Logits [B, len(logits_of), V] of the new tokens in the columns ``logits_of``."""
        self._owners_BC = torch.cat([self._owners_BC, owners_BQ], 1)
        return self._model(
            input_ids=ids_BQ,
            attention_mask=self._mask(limits_BQ, parents_BQ, owners_BQ),
            position_ids=positions_BQ,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_of,
        ).logits

    def hide(self, columns_BQ: Tensor) -> None:
        """Take the columns of the last ``append`` that are marked True out of every later token's sight."""
        self._owners_BC[:, -columns_BQ.shape[1] :].masked_fill_(columns_BQ, _NOBODY)


@lru_cache(maxsize=4)
def _brace_counts(texts: tuple[str, ...], vocabulary_size: int) -> tuple[Tensor, Tensor]:
    """Of each text, opened less closed braces, in the end and at the least; kept, since every batch asks for them."""
    net, low = [0] * vocabulary_size, [0] * vocabulary_size
    for index, text in enumerate(texts[:vocabulary_size]):
        for character in text:
            net[index] += (character == "{") - (character == "}")
            low[index] = min(low[index], net[index])
    return torch.tensor(net), torch.tensor(low)


class _Braces:
    """Follows the brace depth of many texts at once, token by token."""

    def __init__(self, texts: tuple[str, ...], vocabulary_size: int, device: torch.device) -> None:
        net_V, low_V = _brace_counts(texts, vocabulary_size)
        self._net_V, self._low_V = net_V.to(device), low_V.to(device)

    def step(self, depth_R: Tensor, tokens_R: Tensor) -> tuple[Tensor, Tensor]:
        """New depth, and whether depth 0 was touched inside the token."""
        return depth_R + self._net_V[tokens_R], depth_R + self._low_V[tokens_R] <= 0


class _ProbeBatch:
    """The probes of several completions: B completions x K cuts x N continuations, padded to the most cuts."""

    def __init__(self, policy: Policy, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> None:
        self._policy, self._requests, self._settings = policy, requests, settings
        device = policy.model.device
        width = max(len(request.cuts) for request in requests)
        self._real_BK = torch.tensor([[k < len(one.cuts) for k in range(width)] for one in requests], device=device)
        self._cuts_BK = torch.tensor([[*one.cuts, *[0] * (width - len(one.cuts))] for one in requests], device=device)
        prompt_tokens_B = torch.tensor([len(one.prompt_ids) for one in requests], device=device)
        self._limits_BK = torch.where(self._real_BK, self._cuts_BK + prompt_tokens_B[:, None], 0)
        self._keys_B = torch.tensor(
            [
                sampling.row_key(
                    settings.seed, settings.step, f"{one.problem_id}/probe", one.sample_index, one.occurrence
                )
                for one in requests
            ],
            device=device,
        )
        self._cache = BranchedCache(
            policy.model,
            [(*one.prompt_ids, *one.completion_ids)[: len(one.prompt_ids) + one.cuts[-1]] for one in requests],
        )

    def results(self) -> list[ProbeResult]:
        """Accuracy from the forced answers, confidence from the continuations."""
        accuracy_BK, first_logits_BKV = self._force_answers()
        confidence_BK = self._continue(first_logits_BKV)
        return [
            ProbeResult(accuracy_K=accuracy_K[real_K].cpu(), confidence_K=confidence_K[real_K].cpu())
            for accuracy_K, confidence_K, real_K in zip(accuracy_BK, confidence_BK, self._real_BK, strict=True)
        ]

    def _force_answers(self) -> tuple[Tensor, Tensor]:
        """Feed suffix + answer at every cut: mean answer-token probability [B, K], and the logits after the suffix."""
        suffix = self._settings.suffix_ids
        answers = [one.answer_ids for one in self._requests]
        longest = max(map(len, answers))
        # The last answer token predicts nothing that is asked for, so it is not fed.
        fed_BS = torch.tensor(
            [[*suffix, *ids, *[0] * (longest - len(ids))][:-1] for ids in answers], device=self._device
        )
        rows, cuts, fed = len(answers), self._limits_BK.shape[1], fed_BS.shape[1]
        offset_S = torch.arange(fed, device=self._device)
        owners_BQ = torch.arange(cuts, device=self._device).repeat_interleave(fed).expand(rows, -1)
        asked_KA = torch.arange(cuts, device=self._device)[:, None] * fed + offset_S[len(suffix) - 1 :]
        logits_BKAV = self._cache.append(
            fed_BS.repeat(1, cuts),
            (self._limits_BK[..., None] + offset_S).flatten(1),
            self._limits_BK.repeat_interleave(fed, 1),
            owners_BQ,
            owners_BQ,
            logits_of=asked_KA.flatten(),
        ).unflatten(1, (cuts, longest))
        self._cache.hide((offset_S >= len(suffix)).repeat(cuts).expand(rows, -1))

        target_BA = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in answers], device=self._device)
        counted_BA = torch.tensor([[a < len(ids) for a in range(longest)] for ids in answers], device=self._device)
        target_BKA1 = target_BA[:, None, :, None].expand(-1, cuts, -1, 1)
        logprob_BKA = logits_BKAV.float().log_softmax(-1).gather(-1, target_BKA1).squeeze(-1)
        probability_BKA = logprob_BKA.double().exp() * counted_BA[:, None]
        return probability_BKA.sum(-1) / counted_BA.sum(-1)[:, None], logits_BKAV[:, :, 0]

    def _continue(self, first_logits_BKV: Tensor) -> Tensor:
        """``mean_n exp(-mean_l H)`` [B, K] over continuations drawn until the box closes, a stop id, or the limit."""
        settings, cuts = self._settings, first_logits_BKV.shape[1]
        shape_BM = (len(self._requests), cuts * settings.continuations)
        braces = _Braces(vocabulary(self._policy.tokenizer), first_logits_BKV.shape[-1], self._device)
        stop_ids = torch.tensor(self._policy.stop_token_ids, device=self._device)
        depth_BM = torch.ones(shape_BM, dtype=torch.long, device=self._device)
        entropy_BM = torch.zeros(shape_BM, dtype=torch.float64, device=self._device)
        length_BM = torch.zeros_like(depth_BM)

        row_R, branch_R = self._real_BK.repeat_interleave(settings.continuations, 1).nonzero(as_tuple=True)
        logits_RV = first_logits_BKV[row_R, branch_R // settings.continuations]
        for index in range(settings.max_tokens):
            tokens_R = self._sample(logits_RV, row_R, branch_R, index)
            entropy_BM[row_R, branch_R] += _entropy(logits_RV)
            length_BM[row_R, branch_R] += 1
            depth_BM[row_R, branch_R], closed_R = braces.step(depth_BM[row_R, branch_R], tokens_R)
            live_R = ~(closed_R | torch.isin(tokens_R, stop_ids))
            row_R, branch_R, tokens_R = row_R[live_R], branch_R[live_R], tokens_R[live_R]
            if index + 1 == settings.max_tokens or not len(row_R):
                break
            logits_RV = self._feed(tokens_R, row_R, branch_R, index)
        confidence_BM = (-entropy_BM / length_BM.clamp(min=1)).exp()
        return confidence_BM.unflatten(1, (cuts, settings.continuations)).mean(-1)

    def _sample(self, logits_RV: Tensor, row_R: Tensor, branch_R: Tensor, index: int) -> Tensor:
        """Keyed by completion, cut, continuation and index: neither batching nor other cuts change a draw."""
        settings = self._settings
        cut_R = self._cuts_BK[row_R, branch_R // settings.continuations]
        stream_R = cut_R * settings.continuations + branch_R % settings.continuations
        uniforms_R = sampling.uniforms(self._keys_B[row_R], stream_R * settings.max_tokens + index)
        return sampling.sample(logits_RV, uniforms_R, temperature=settings.temperature, top_k=0, top_p=1.0)[0]

    def _feed(self, tokens_R: Tensor, row_R: Tensor, branch_R: Tensor, index: int) -> Tensor:
        """Append one token to each live branch and give the logits after it, [R, V]; R is sorted by row."""
        rows, cuts = self._limits_BK.shape
        live_B = torch.bincount(row_R, minlength=rows)
        slot_R = torch.arange(len(row_R), device=self._device) - (live_B.cumsum(0) - live_B)[row_R]
        shape_BQ = (rows, int(live_B.max()))
        cut_R = branch_R // self._settings.continuations
        limit_R = self._limits_BK[row_R, cut_R]

        def laid_out(values_R: Tensor, fill: int) -> Tensor:
            return values_R.new_full(shape_BQ, fill).index_put_((row_R, slot_R), values_R)

        logits_BQV = self._cache.append(
            laid_out(tokens_R, 0),
            laid_out(limit_R + len(self._settings.suffix_ids) + index, 0),
            laid_out(limit_R, 0),
            laid_out(cut_R, _NOBODY),
            laid_out(cuts + branch_R, _NOBODY),
            logits_of=torch.arange(shape_BQ[1], device=self._device),
        )
        return logits_BQV[row_R, slot_R]

    @property
    def _device(self) -> torch.device:
        return self._limits_BK.device


def _entropy(logits_RV: Tensor) -> Tensor:
    """Nats over the whole vocabulary at temperature 1, float64."""
    logprobs_RV = logits_RV.float().log_softmax(-1)
    return -(logprobs_RV.exp() * logprobs_RV).sum(-1).double()


def _tokens(request: ProbeRequest, settings: ProbeSettings) -> int:
    """Cache columns that the request needs at most."""
    per_cut = len(settings.suffix_ids) + len(request.answer_ids) + settings.continuations * settings.max_tokens
    return len(request.prompt_ids) + request.cuts[-1] + len(request.cuts) * per_cut


def _batches(requests: Sequence[ProbeRequest], settings: ProbeSettings) -> Iterator[list[int]]:
    """Indices of requests with cuts, of like size together, within the token budget or alone."""
    order = sorted((i for i, one in enumerate(requests) if one.cuts), key=lambda i: _tokens(requests[i], settings))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * _tokens(requests[i], settings) > settings.tokens_per_pass:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def probe(policy: Policy, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
    r"""SPAE's two numbers at every cut of every completion (arXiv 2601.03823), one result per request.

        accuracy   = mean over the answer's tokens of their probability after cut + suffix, teacher-forced, T = 1
        confidence = mean over N continuations at ``temperature`` of exp(-mean_l H_l)

    H is the full-vocabulary entropy in nats at T = 1 of each sampled token's distribution, up to and including the one
    that closes the box or stops. Works for causal language models of transformers whose attention takes a 4-D mask.
    """
    config = policy.model.config.get_text_config()
    attention = config._attn_implementation
    require(
        attention in ("sdpa", "eager"),
        f"attention {attention!r} takes no 4-D mask, which probes need; set model.attn_implementation=sdpa",
    )
    require(
        SLIDING not in layer_kinds(config),
        "this model has sliding-window layers, which probes cannot branch; choose a model with full attention",
    )
    none = torch.empty(0, dtype=torch.float64)
    results = [ProbeResult(accuracy_K=none, confidence_K=none) for _ in requests]
    with inference(policy.model):
        for batch in _batches(requests, settings):
            found = _ProbeBatch(policy, [requests[i] for i in batch], settings).results()
            for i, result in zip(batch, found, strict=True):
                results[i] = result
    return results


@dataclass(frozen=True, kw_only=True)
class PolicyProber:
    """The service behind ``Need.PROBES`` where there is no rollout engine."""

    policy: Policy

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """One result per request, in order."""
        return probe(self.policy, requests, settings)
