"""Reverse speculative decoding (2509.22230): a teacher proposes each token, a student vetoes what it finds unlikely.

A token is drawn from the teacher's sampling distribution and kept if the student's probability of it, at temperature 1,
is at least ``threshold``. After ``tries`` vetoes the student's own draw is taken. Both models read what was taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rltrain.config import SamplingConfig
from rltrain.rollout.decoder_check import Decoder
from rltrain.rollout.sampling import distribution, inverse_cdf, uniforms
from rltrain.rollout.stopping import StopRule

FIRST, LATER, STUDENT = "teacher_first", "teacher_later", "student"


@dataclass(frozen=True, kw_only=True)
class Veto:
    """``sampling`` is of both models' draws."""

    threshold: float
    tries: int
    sampling: SamplingConfig

    def choose(self, teacher_BV: Tensor, student_BV: Tensor, uniforms_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] and the number of the try [B] that gave each; ``tries``: the student's draw. K = tries + 1.

        Columns beyond the narrower of the two sets of logits are padding, and are never drawn.
        """
        width = min(teacher_BV.shape[-1], student_BV.shape[-1])
        teacher_BV, student_BV = teacher_BV[:, :width].float(), student_BV[:, :width].float()
        offered_BV = self._drawn_from(teacher_BV)
        draws = [inverse_cdf(offered_BV, uniforms_B) for uniforms_B in uniforms_BK.T[:-1]]
        likely_BK = student_BV.softmax(-1).gather(-1, torch.stack(draws, dim=-1)) >= self.threshold
        draws.append(inverse_cdf(self._drawn_from(student_BV), uniforms_BK[:, -1]))
        taken_BK = torch.cat([likely_BK, torch.ones_like(likely_BK[:, :1])], dim=-1)
        tries_B = taken_BK.int().argmax(-1)  # the first that is true
        return torch.stack(draws, dim=-1).gather(-1, tries_B[:, None]).squeeze(-1), tries_B

    def _drawn_from(self, logits_BV: Tensor) -> Tensor:
        chosen = self.sampling
        return distribution(logits_BV, temperature=chosen.temperature, top_k=chosen.top_k, top_p=chosen.top_p)


@dataclass(kw_only=True)
class FriendlyTrace:
    """A completion while it is written, and how many of its tokens came from where."""

    prompt_ids: Sequence[int]
    key: int
    token_ids: list[int] = field(default_factory=list)
    origins: Counter[str] = field(default_factory=Counter)

    def add(self, token: int, tries: int, veto: Veto) -> None:
        """Append the token of this try."""
        self.token_ids.append(token)
        self.origins[FIRST if tries == 0 else LATER if tries < veto.tries else STUDENT] += 1


@torch.no_grad()
def write(traces: Sequence[FriendlyTrace], teacher: Decoder, student: Decoder, veto: Veto, rule: StopRule) -> None:
    """Write every trace to its end, one token of all at a time."""
    live = list(traces)
    prompts = [trace.prompt_ids for trace in live]
    teacher_BV, student_BV = teacher.admit(prompts, 1), student.admit(prompts, 1)
    device = student_BV.device
    keys_B = torch.tensor([trace.key for trace in live], device=device)
    draws_K = torch.arange(veto.tries + 1, device=device)
    for position in range(rule.max_new_tokens):
        uniforms_BK = uniforms(keys_B[:, None], position * (veto.tries + 1) + draws_K)
        tokens_B, tries_B = veto.choose(teacher_BV, student_BV, uniforms_BK)
        for trace, token, tries in zip(live, tokens_B.tolist(), tries_B.tolist(), strict=True):
            trace.add(token, tries, veto)
        kept = [i for i, trace in enumerate(live) if rule.end(trace.token_ids, position) is None]
        if not kept:
            return
        if len(kept) < len(live):
            live = [live[i] for i in kept]
            index_B = torch.tensor(kept, device=device)
            keys_B, tokens_B = keys_B[index_B], tokens_B[index_B]
            for decoder in (teacher, student):
                decoder.keep(kept)
        teacher_BV, student_BV = teacher.step(tokens_B), student.step(tokens_B)
