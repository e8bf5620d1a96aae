"""What the metrics of a run are called, what they show, and which of them are shares, given in percent."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CurveWords:
    """A learning curve's title, and a sentence on what it shows."""

    title: str
    says: str


RESULTS = {
    "eval_accuracy": CurveWords(title="held-out accuracy", says="Share of held-out completions that are right."),
    "reward": CurveWords(title="reward", says="Mean reward of the step's completions, what training raises."),
}
TRAINING = {
    "accuracy": CurveWords(title="training accuracy", says="Share of the step's completions that are right."),
    "completions/mean_length": CurveWords(title="length, tokens", says="Mean tokens of the step's completions."),
    "entropy/sampled": CurveWords(
        title="entropy, nats a token",
        says="How undecided the policy is at its tokens: mean of -log p of all samples.",
    ),
    "entropy/trained": CurveWords(
        title="entropy where it is trained", says="The same, exactly, over the completions that have an advantage."
    ),
    "kl": CurveWords(title="KL to the reference", says="Distance from the reference policy, nats a token."),
    "grad_norm": CurveWords(title="gradient norm", says="L2 norm of the gradient before clipping."),
    "frac_reward_zero_std": CurveWords(
        title="zero-variance groups", says="Share of groups whose rewards are all equal: they teach nothing."
    ),
    "completions/repeat_share": CurveWords(
        title="repeated tokens", says="Mean share of tokens in runs of ten and more that stood before."
    ),
    "completions/clipped_ratio": CurveWords(
        title="completions cut off", says="Share of completions that ran into sampling.max_new_tokens."
    ),
}
TURNS = {  # of runs with an environment
    "turns/mean": CurveWords(title="turns", says="Mean turns of the step's completions."),
    "environment/call_ratio": CurveWords(
        title="completions with a call", says="Share of completions that ask the environment for something."
    ),
    "turns/reward": CurveWords(title="turn reward", says="Mean over completions of the sum of their turns' rewards."),
}
CURVES = RESULTS | TRAINING

SHARE = re.compile(
    r"accuracy|(^|_)(pass|maj|avg)@|(^|/)(clipped_ratio|repeat_share|think_answer_mismatch|failed_step_fraction)|clip_ratio/|(^|_)frac_|_share$|^groups/|^answered$"
    r"|^rewards/.*/(errors|timeouts|abstained)$|(^|_)environment/(errors|timeouts|(call|failed)_ratio)$"
)


def is_share(name: str) -> bool:
    """Whether a metric of this name is a part of a whole."""
    return bool(SHARE.search(name))


def shown(value: float, *, share: bool, signed: bool = False) -> str:
    """A value for a reader: four digits, or percent to a tenth."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} %" if share else f"{value:{sign}.4g}"


def difference(value: float, *, share: bool) -> str:
    """A difference with its sign: of shares in points."""
    return f"{100 * value:+.1f} points" if share else f"{value:+.3g}"
