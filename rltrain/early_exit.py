"""Leaving completions early, with a conformal guarantee (after LYNX, 2512.05325): what it saves, and what it costs.

A cue is a token after which the policy may be asked for its answer, such as the end of a line. A linear probe on the
last hidden state at a cue predicts whether the answer given there is right. Of the completions that have a cue where it
is wrong,

    s_i = largest score of completion i over its cues where the answer is wrong,   i = 1..n
    threshold = the ceil((n + 1)(1 - delta))-th smallest s_i

A further such completion is left at a cue of a wrong answer with probability at most delta (split conformal
prediction), if it is drawn like those of the calibration: one completion a problem. Fit, calibration and trial read
problems of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.config import RewardConfig, SamplingConfig
from rltrain.errors import ConfigError, RunError
from rltrain.policy.load import Policy
from rltrain.rewards.scoring import score
from rltrain.rollout import Rollout
from rltrain.rollout.continuation_types import ContinuationRequest, ContinuationSampling
from rltrain.rollout.probe_types import vocabulary
from rltrain.runs.metrics import wilson
from rltrain.runtime.records import EarlyExitConfig
from rltrain.types import Completion, Context, Group, Prompt, UnknownLogprobs

ROWS_OF_A_FORWARD = 16
NOT_KEPT = UnknownLogprobs(reason="an early exit asks for its answer and keeps none")


@dataclass(frozen=True, kw_only=True, eq=False)
class CuedCompletion:
    """A completion, whether it ends right, and at each of its K cues the tokens before it, the state, the answer."""

    tokens: int
    right: bool
    positions: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    early_right_K: Tensor
    states_KD: Tensor


def conformal_threshold(scores: Sequence[float], delta: float) -> float:
    """The ceil((n + 1)(1 - delta))-th smallest of n scores. ``RunError`` where there is none: n < 1/delta - 1."""
    rank = math.ceil((len(scores) + 1) * (1 - delta) - 1e-9)
    if rank > len(scores):
        least = math.ceil(1 / delta - 1 - 1e-9)
        raise RunError(
            f"evaluation.early_exit.delta={delta:g}: calibration has {len(scores)} completions with a cue of a wrong "
            f"answer, and the guarantee needs {least}; raise evaluation.early_exit.problems, or delta"
        )
    return sorted(scores)[rank - 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Logistic regression on standardised states: the log-odds that the answer at a cue is right."""

    mean_D: Tensor
    scale_D: Tensor
    weights_D: Tensor
    bias: Tensor

    @classmethod
    def fitted(cls, states_ND: Tensor, right_N: Tensor, *, l2: float) -> Probe:
        """Minimum of mean binary cross-entropy + l2/2·|w|², by L-BFGS in float64; constants count for nothing."""
        states_ND, right_N = states_ND.double(), right_N.double()
        mean_D, std_D = states_ND.mean(0), states_ND.std(0, correction=0)
        scale_D = torch.where(std_D > 1e-12, std_D, torch.inf)
        features_ND = (states_ND - mean_D) / scale_D
        parameters = torch.zeros(states_ND.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [parameters], max_iter=1000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            logits_N = features_ND @ parameters[:-1] + parameters[-1]
            value = torch.nn.functional.binary_cross_entropy_with_logits(logits_N, right_N)
            value = value + l2 / 2 * parameters[:-1].square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(loss)
        fitted = parameters.detach()
        return cls(mean_D=mean_D, scale_D=scale_D, weights_D=fitted[:-1], bias=fitted[-1])

    def scores(self, states_KD: Tensor) -> Tensor:
        """Log-odds [K]."""
        return (states_KD.double() - self.mean_D) / self.scale_D @ self.weights_D + self.bias


def cue_positions(texts: Sequence[str], cues: Iterable[str], *, most: int) -> tuple[int, ...]:
    """Tokens up to the end of each cue, the completion's last token excepted; the first ``most``.

    A cue of letters is a whole word, upper or lower case. ``texts`` are those of the tokens.
    """
    found, text, wanted = [], "", [cue.lower() for cue in cues]
    for position, piece in enumerate(texts[:-1], start=1):
        text += piece.lower()
        if any(_ends_in(text, cue, len(piece)) for cue in wanted):
            found.append(position)
    return tuple(found[:most])


def _ends_in(text: str, cue: str, new: int) -> bool:
    """Whether the cue ends in the last ``new`` characters, as a whole word where it is one."""
    for end in range(len(text) - new + 1, len(text) + 1):
        if text.endswith(cue, 0, end):
            before = text[end - len(cue) - 1 : end - len(cue)]
            behind = text[end : end + 1]
            if not cue.isalpha() or not (before.isalpha() or behind.isalpha()):
                return True
    return False


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How completions and the answers at their cues are made."""

    rollout: Rollout
    policy: Policy
    rewards: Mapping[str, RewardConfig]
    context: Context
    config: EarlyExitConfig
    step: int
    sampling: SamplingConfig

    def cued(self, prompts: Sequence[Prompt]) -> list[CuedCompletion]:
        """A completion of each prompt. Those without a cue have K = 0."""
        groups = self.rollout.generate(prompts, step=self.step, group_size=1, sampling=self.sampling)
        scored, _ = score(groups, self.rewards, self.context)
        cuts = [self._cuts(group.completions[0]) for group in scored]
        asked = list(zip(scored, cuts, strict=True))
        answers = iter(self._answers([(group, cut) for group, some in asked for cut in some]))
        states = iter(self._states(asked))
        return [_cued(group, some, [next(answers) for _ in some], next(states)) for group, some in asked]

    def _cuts(self, completion: Completion) -> tuple[int, ...]:
        """Those that leave room for an answer within ``sampling.max_new_tokens``."""
        texts = vocabulary(self.policy.tokenizer)
        pieces = [texts[token] for token in completion.token_ids]
        room = self.sampling.max_new_tokens - len(self._ask_ids) - self.config.answer_tokens
        return tuple(cut for cut in cue_positions(pieces, self.config.cues, most=self.config.max_cues) if cut <= room)

    @property
    def _ask_ids(self) -> tuple[int, ...]:
        return tuple(self.policy.tokenizer(self.config.ask, add_special_tokens=False)["input_ids"])

    def _answers(self, asked: Sequence[tuple[Group, int]]) -> list[tuple[int, bool]]:
        """Of each group and cut: tokens of question and answer, and whether the greedy answer there is right."""
        requests = [
            ContinuationRequest(
                problem_id=group.prompt.problem.id,
                sample_index=0,
                prompt_ids=group.prompt.token_ids,
                completion_ids=group.completions[0].token_ids[:cut] + self._ask_ids,
                draws=1,
                max_new_tokens=self.config.answer_tokens,
                occurrence=group.prompt.occurrence,
                sampling=ContinuationSampling(temperature=0.0),
            )
            for group, cut in asked
        ]
        drawn = self.rollout.continue_(requests, step=self.step)
        left = [self._left(group, cut, new) for (group, cut), (new,) in zip(asked, drawn, strict=True)]
        groups = score(left, self.rewards, self.context)[0] if left else []
        return [
            (len(group.completions[0].token_ids) - cut, _is_right(group))
            for (_, cut), group in zip(asked, groups, strict=True)
        ]

    def _left(self, group: Group, cut: int, new: Completion) -> Group:
        """The completion as it is if it is left at the cut."""
        before_ids = group.completions[0].token_ids[:cut]
        before = self.policy.tokenizer.decode(before_ids, clean_up_tokenization_spaces=False)
        ids = before_ids + self._ask_ids + new.token_ids
        text = before + self.config.ask + closed(self.config.ask, new.text)
        left = Completion(token_ids=ids, logprobs=NOT_KEPT, finish="stop", text=text)
        return Group(prompt=group.prompt, completions=(left,))

    def _states(self, asked: Sequence[tuple[Group, tuple[int, ...]]]) -> list[Tensor]:
        """The last hidden state [K, D] at the last token before each cut, as the head reads it."""
        rows = [(group.prompt.token_ids, group.completions[0].token_ids, cuts) for group, cuts in asked]
        batches = [rows[start : start + ROWS_OF_A_FORWARD] for start in range(0, len(rows), ROWS_OF_A_FORWARD)]
        return [states_KD for batch in batches for states_KD in self._states_of(batch)]

    @torch.no_grad()
    def _states_of(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]) -> list[Tensor]:
        model, pad_id = self.policy.model, self.policy.pad_token_id
        width = max(len(prompt) + len(ids) for prompt, ids, _ in rows)
        padded = [[*prompt, *ids, *[pad_id] * (width - len(prompt) - len(ids))] for prompt, ids, _ in rows]
        ids_BT = torch.tensor(padded, device=model.device)  # padding on the right, which a causal mask hides
        states_BTD = model(input_ids=ids_BT, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        return [
            states_TD[[len(prompt) + cut - 1 for cut in cuts]].float().cpu()
            for states_TD, (prompt, _, cuts) in zip(states_BTD, rows, strict=True)
        ]


def _cued(
    group: Group, cuts: tuple[int, ...], answers: Sequence[tuple[int, bool]], states_KD: Tensor
) -> CuedCompletion:
    return CuedCompletion(
        tokens=len(group.completions[0].token_ids),
        right=_is_right(group),
        positions=cuts,
        answer_tokens=tuple(tokens for tokens, _ in answers),
        early_right_K=torch.tensor([right for _, right in answers], dtype=torch.bool),
        states_KD=states_KD,
    )


def _is_right(group: Group) -> bool:
    assert group.right_G is not None
    return bool(group.right_G[0] == 1)  # an abstention is not right


def closed(ask: str, answer: str) -> str:
    """The answer up to the brace that closes the last one that ``ask`` opened; all of it where none is open."""
    depth = ask.count("{") - ask.count("}")
    if depth < 1:
        return answer
    for place, character in enumerate(answer):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return answer[: place + 1]
    return answer


def fit_and_calibrate(
    fit: Sequence[CuedCompletion], held: Sequence[CuedCompletion], config: EarlyExitConfig
) -> tuple[Probe, float]:
    """The probe from the one half, the threshold from the other. ``RunError`` where either says nothing."""
    right_N = torch.cat([torch.zeros(0, dtype=torch.bool), *(one.early_right_K for one in fit)])
    if not len(right_N) or right_N.all() or not right_N.any():
        raise RunError(
            f"evaluation.early_exit: of {len(right_N)} cues for the probe {int(right_N.sum())} have a right answer, "
            "and it needs right and wrong ones; see evaluation.early_exit.cues and ask"
        )
    probe = Probe.fitted(torch.cat([one.states_KD for one in fit]), right_N, l2=config.l2)
    wrong = [probe.scores(one.states_KD)[~one.early_right_K] for one in held]
    return probe, conformal_threshold([float(scores.max()) for scores in wrong if len(scores)], config.delta)


def exit_metrics(held_out: Sequence[CuedCompletion], probe: Probe, threshold: float, delta: float) -> dict[str, float]:
    """What leaving at the first cue above the threshold does to held-out completions.

    ``wrong_exit_share`` is of the completions that have a cue whose answer is wrong: those with such a cue above the
    threshold, which the guarantee bounds by delta in the mean over calibrations. Its interval is Wilson's, at 95 %.
    """
    left = [_exit(one, probe, threshold) for one in held_out]
    tokens = sum(one.tokens for one in held_out)
    used = sum(used for used, _, _ in left)
    wrong = [(probe.scores(one.states_KD) > threshold)[~one.early_right_K] for one in held_out]
    exposed = [bool(above.any()) for above in wrong if len(above)]
    share = sum(exposed) / len(exposed) if exposed else math.nan
    low, high = wilson(share, len(exposed)) if exposed else (math.nan, math.nan)
    count = max(1, len(held_out))
    return {
        "delta": delta,
        "threshold": threshold,
        "accuracy_whole": sum(one.right for one in held_out) / count,
        "accuracy": sum(right for _, right, _ in left) / count,
        "exits": sum(exited for _, _, exited in left) / count,
        "tokens_saved": 1 - used / max(1, tokens),
        "wrong_exit_share": share,
        "wrong_exit_low": low,
        "wrong_exit_high": high,
        "completions_with_wrong_cues": float(len(exposed)),
    }


def _exit(one: CuedCompletion, probe: Probe, threshold: float) -> tuple[int, bool, bool]:
    """Tokens, whether the answer is right, and whether the completion was left."""
    above = (probe.scores(one.states_KD) > threshold).nonzero().flatten().tolist()
    if not above:
        return one.tokens, one.right, False
    return one.positions[above[0]] + one.answer_tokens[above[0]], bool(one.early_right_K[above[0]]), True


def measure(asking: Asking, training: Sequence[Prompt], held_out: Sequence[Prompt]) -> dict[str, float]:
    """:func:`exit_metrics`, the probe and the threshold from the halves of ``training``, tried on ``held_out``."""
    if len(training) < 2:
        raise ConfigError(
            f"evaluation.early_exit.problems: {len(training)} make a prompt; one half fits and the other "
            "calibrates, so give at least 2"
        )
    cued, middle = asking.cued(training), len(training) // 2
    probe, threshold = fit_and_calibrate(cued[:middle], cued[middle:], asking.config)
    return exit_metrics(asking.cued(held_out), probe, threshold, asking.config.delta)
