"""Warnings: pure functions from the rows of ``metrics.jsonl`` to a sentence, or None.

"First" and "last" are means over the first and the last fifth of the training steps. A difference is "beyond noise"
when it exceeds twice its standard error, that is sqrt(s1²/n1 + s2²/n2) with sample variances (ddof 1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rltrain.runs.summary import MetricRows, series

FEWEST_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A metric's first and last fifth. ``noise`` is the standard error of their difference."""

    first: float
    last: float
    noise: float

    @property
    def change(self) -> float:
        return self.last - self.first

    @property
    def rises(self) -> bool:
        return self.change > 2 * self.noise

    @property
    def falls(self) -> bool:
        return self.change < -2 * self.noise


def trend(rows: MetricRows, name: str) -> Trend | None:
    """The trend of a metric, None with fewer than ten values."""
    values = series(rows, name)[1]
    if len(values) < FEWEST_STEPS:
        return None
    fifth = len(values) // 5
    ends = values[:fifth], values[-fifth:]
    noise = math.sqrt(sum(statistics.variance(end) / fifth for end in ends))
    return Trend(first=statistics.fmean(ends[0]), last=statistics.fmean(ends[1]), noise=noise)


def _held_out(rows: MetricRows) -> tuple[float, float] | None:
    """Held-out accuracy at the first and the last evaluation."""
    values = series(rows, "eval_accuracy")[1]
    return (values[0], values[-1]) if len(values) > 1 else None


def _share_noise(first: float, last: float, count: int) -> float:
    """Standard error of the difference of two shares of ``count`` each."""
    return math.sqrt((first * (1 - first) + last * (1 - last)) / count) if count else 0.0


def no_learning(rows: MetricRows, *, evaluated: int) -> str | None:
    """Neither the training reward nor the held-out accuracy rose beyond noise."""
    reward, accuracy = trend(rows, "reward"), _held_out(rows)
    if reward is None or reward.rises:
        return None
    if accuracy and accuracy[1] - accuracy[0] > 2 * _share_noise(*accuracy, evaluated):
        return None
    return f"no learning seen: reward {reward.first:.3g} → {reward.last:.3g}, noise ±{2 * reward.noise:.2g}"


def accuracy_fell(rows: MetricRows, *, evaluated: int) -> str | None:
    """Held-out accuracy is below its start by more than noise."""
    accuracy = _held_out(rows)
    if accuracy is None or accuracy[0] - accuracy[1] <= 2 * _share_noise(*accuracy, evaluated):
        return None
    return f"held-out accuracy fell: {accuracy[0]:.3g} → {accuracy[1]:.3g}"


def reward_without_accuracy(rows: MetricRows, *, evaluated: int) -> str | None:
    """Reward rose beyond noise, accuracy did not: the usual sign of a hacked reward.

    Held-out accuracy where it was measured (one standard error counts as a rise), else the accuracy of the training
    samples. None where no sample was ever right, as with rewards that are likelihoods.
    """
    reward, held_out, training = trend(rows, "reward"), _held_out(rows), trend(rows, "accuracy")
    if reward is None or not reward.rises:
        return None
    if held_out:
        accuracy, risen = held_out, held_out[1] - held_out[0] > _share_noise(*held_out, evaluated)
    elif training:
        accuracy, risen = (training.first, training.last), training.rises
    else:
        return None
    if risen or max(accuracy) == 0:
        return None
    return (
        f"reward rose ({reward.first:.3g} → {reward.last:.3g}) but accuracy did not "
        f"({accuracy[0]:.3g} → {accuracy[1]:.3g}): the reward may be hacked"
    )


def entropy_collapse(rows: MetricRows, *, kept: float = 0.2) -> str | None:
    """Entropy fell to less than a fifth of its start."""
    entropy = trend(rows, "entropy/sampled") or trend(rows, "entropy/trained")
    if entropy is None or entropy.first <= 0 or entropy.last >= kept * entropy.first:
        return None
    return f"entropy collapsed: {entropy.first:.3g} → {entropy.last:.3g} nats a token"


def length_explosion(rows: MetricRows, *, growth: float = 1.5) -> str | None:
    """Completions are half as long again as at the start."""
    length = trend(rows, "completions/mean_length")
    if length is None or length.last < growth * length.first:
        return None
    return f"completions grew from {length.first:.0f} to {length.last:.0f} tokens"


def truncated(rows: MetricRows, *, most: float = 0.1) -> str | None:
    """More than a tenth of the completions of the last fifth of the steps ran into the length limit."""
    share = _last_fifth(rows, "completions/clipped_ratio")
    if share is None or share <= most:
        return None
    return f"{share:.0%} of the completions ran into sampling.max_new_tokens, their answers cut off"


def zero_variance_groups(rows: MetricRows, *, most: float = 0.7) -> str | None:
    """In the last fifth of the steps, more than ``most`` of the groups were zero-variance groups."""
    share = _last_fifth(rows, "frac_reward_zero_std")
    if share is None or share <= most:
        return None
    return f"{share:.0%} of the groups were zero-variance groups, which teach nothing: problems too easy or too hard"


def verifier_trouble(rows: MetricRows) -> str | None:
    """Time-outs, errors or a failing infrastructure of any reward, at any step."""
    endings = ("/timeouts", "/errors", "verifier/timeout", "verifier/infra")
    bad = _shares_above_zero(rows, lambda name: name.endswith(endings) and "environment/" not in name)
    return f"rewards failed on some completions: {bad}" if bad else None


def environment_trouble(rows: MetricRows) -> str | None:
    """Time-outs or errors of the environment, at any step."""
    bad = _shares_above_zero(rows, lambda name: name.endswith(("environment/timeouts", "environment/errors")))
    return f"the environment failed on some turns: {bad}" if bad else None


def _shares_above_zero(rows: MetricRows, is_meant: Callable[[str], bool]) -> str:
    names = sorted({name for row in rows for name in row if is_meant(name)})
    shares = {name: statistics.fmean(values) for name in names if (values := series(rows, name)[1])}
    return ", ".join(f"{name} {share:.2%}" for name, share in shares.items() if share > 0)


def _last_fifth(rows: MetricRows, name: str) -> float | None:
    values = series(rows, name)[1]
    return statistics.fmean(values[-max(1, len(values) // 5) :]) if values else None


def all_warnings(rows: MetricRows, *, evaluated: int) -> Sequence[str]:
    """The sentences that apply, the gravest first. ``evaluated`` counts the held-out completions of an evaluation."""
    sentences = [
        reward_without_accuracy(rows, evaluated=evaluated),
        accuracy_fell(rows, evaluated=evaluated),
        no_learning(rows, evaluated=evaluated),
        entropy_collapse(rows),
        length_explosion(rows),
        truncated(rows),
        zero_variance_groups(rows),
        verifier_trouble(rows),
        environment_trouble(rows),
    ]
    return [sentence for sentence in sentences if sentence]
