"""Score groups: call every reward, check what it returned, sum by weight, and measure.

A reward that fails is counted. A user's function that raises, hangs, or returns the wrong number of scores makes the
batch abstain, since that says nothing about the answers. A NaN or infinite score makes its completion abstain. Failures
are logged with the reward's name, and a traceback once. Only a reward that fails on all of the first step ends a run
(:func:`~rltrain.rewards.failures.refuse_broken`).
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rltrain.batching.zero_variance import is_zero_variance
from rltrain.config import RewardConfig
from rltrain.errors import ConfigError
from rltrain.registry import needs_of, part_of
from rltrain.rewards import failures
from rltrain.rewards.custom import UserRewardConfig, is_list_of_scores
from rltrain.runtime import dist, watchdog
from rltrain.runtime.weight_schedule import is_schedule
from rltrain.types import Context, Group, Mean, Metric, Metrics, Notes, Scores, Std, is_right

log = logging.getLogger(__name__)

RIGHT_ABOVE = 0.5  # for the metrics groups/*, of rewards that also give values between 0 and 1
_busy: dict[str, Future[Scores]] = {}


@dataclass(frozen=True, kw_only=True)
class ScoredReward:
    """The scores of a reward, by group: NaN abstains, and ``failed`` marks abstentions that are failures."""

    scores: Sequence[Tensor]
    failed: Sequence[Tensor]
    metrics: Metrics = field(default_factory=dict)
    notes: Sequence[Notes] = ()
    right: Sequence[Sequence[bool]] = ()


class RaisedInThread(Exception):
    """Carries what a user's function raised out of its thread, ``SystemExit`` included."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def score(
    groups: Sequence[Group], rewards: Mapping[str, RewardConfig], context: Context
) -> tuple[list[Group], Metrics]:
    """Groups with ``rewards_G`` (float64, the weighted sum) and ``reward_parts`` (unweighted, by name), and metrics.

    A reward that abstains on a whole group does not apply to it and is left out of the sum. Where a reward abstains on
    some completions of a group, or fails, these completions get NaN. So do completions that abstain themselves
    (``Completion.abstains``), from every reward. Without any reward the groups stay as they are.
    """
    if not rewards:
        return list(groups), {}
    parts = {name: _scored(name, config, groups, context) for name, config in rewards.items()}
    weights = {name: config.weight_at(context.step) for name, config in rewards.items()}
    scored = [
        replace(
            group,
            rewards_G=_total([(parts[name], weights[name]) for name in rewards], index),
            reward_parts={name: part.scores[index] for name, part in parts.items()},
            notes={key: rows for part in parts.values() if part.notes for key, rows in part.notes[index].items()},
            right_G=_right(parts, index),
        )
        for index, group in enumerate(groups)
    ]
    changing = {name: weights[name] for name, config in rewards.items() if is_schedule(config.weight)}
    return scored, _metrics(scored, parts) | {f"rewards/{name}/weight": Mean.of(at) for name, at in changing.items()}


ANSWER = "answer"  # the name of the reward that judges answers, where there are several


def judging(names: Mapping[str, Any]) -> str | None:
    """The reward that says what is right: the one named ``answer``, else the first; None where there is none."""
    return ANSWER if ANSWER in names else next(iter(names), None)


def answers_differ(group: Group) -> bool:
    """Whether dynamic sampling keeps the group: the scores of the :func:`judging` reward are not all equal.

    Other rewards, such as a length penalty, do not count: DAPO keeps a group for its right and wrong answers. Where the
    judging reward abstains on all, or there is none, the total decides.
    """
    assert group.rewards_G is not None
    name = judging(group.reward_parts)
    scores_G = group.rewards_G if name is None else group.reward_parts[name]
    counted_G = scores_G.where(~group.rewards_G.isnan(), math.nan)
    return not is_zero_variance(group.rewards_G if bool(counted_G.isnan().all()) else counted_G)


def _right(parts: Mapping[str, ScoredReward], index: int) -> Tensor | None:
    """1 right, 0 wrong, NaN where the judging reward abstains [G]; None where there is no reward."""
    name = judging(parts)
    if name is None:
        return None
    part = parts[name]
    scores_G = part.scores[index]
    right_G = torch.tensor(part.right[index], dtype=torch.float64) if part.right else is_right(scores_G).double()
    return right_G.where(~scores_G.isnan(), math.nan)


def _total(parts: Sequence[tuple[ScoredReward, float]], index: int) -> Tensor:
    """Weighted sum over the rewards that apply to group ``index``, all NaN if none does."""
    total_G = torch.zeros_like(parts[0][0].scores[index])
    applied = False
    for part, weight in parts:
        scores_G, failed_G = part.scores[index], part.failed[index]
        if bool(scores_G.isnan().all()) and not bool(failed_G.any()):
            continue
        applied = True
        total_G = total_G + weight * scores_G
    return total_G if applied else torch.full_like(total_G, math.nan)


def _scored(name: str, config: RewardConfig, groups: Sequence[Group], context: Context) -> ScoredReward:
    """Call a reward and turn its result, or its failure, into scores."""
    sizes = [len(group.completions) for group in groups]
    failure, timed_out, result = "", False, Scores(scores=[])
    try:
        with watchdog.waiting(f"reward {name}"):
            result = _call(name, config, groups, context)
        failure = _length_fault(result.scores, sizes) or _notes_fault(result.notes, sizes) or _metrics_fault(result)
        if result.right and not failure:
            failure = _length_fault(result.right, sizes).replace("returned", "returned right as", 1)
    except TimeoutError as error:
        failure, timed_out = str(error), True
    except ConfigError:  # a wrong setting, not a failure of this batch
        raise
    except Exception as error:
        raised = error.error if isinstance(error, RaisedInThread) else error
        if needs_of(config) and dist.world_size() > 1:  # the other ranks wait in its service
            raise failures.RewardError(f"reward {name}: raised {raised!r} where all ranks score together") from raised
        failures.show_once(name, raised)
        failure = f"{type(raised).__name__}: {raised}"
    failures.note(name, "" if timed_out else failure)
    if failure:
        log.warning("reward %s failed on a batch of %d groups, which abstain: %s", name, len(groups), failure)
        scores = [torch.full((size,), math.nan, dtype=torch.float64) for size in sizes]
        failed = [torch.ones(size, dtype=torch.bool) for size in sizes]
        return ScoredReward(scores=scores, failed=failed, metrics=_failures(name, failed, timed_out))
    rows = [[_number(value) for value in row] for row in result.scores]
    scores = [_judged([value for value, _ in row], group) for row, group in zip(rows, groups, strict=True)]
    failed = [torch.tensor([bad for _, bad in row], dtype=torch.bool) for row in rows]
    metrics = {**result.metrics, **_failures(name, failed, False)}
    return ScoredReward(scores=scores, failed=failed, metrics=metrics, notes=result.notes, right=result.right)


def _judged(scores: Sequence[float], group: Group) -> Tensor:
    """The scores [G], NaN where the completion itself abstains."""
    pairs = zip(scores, group.completions, strict=True)
    return torch.tensor([math.nan if one.abstains else value for value, one in pairs], dtype=torch.float64)


def _number(value: Any) -> tuple[float, bool]:
    """``(score, failed)``: None abstains. What is not a finite number is a failure and abstains too."""
    if value is None:
        return math.nan, False
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, ArithmeticError):
        return math.nan, True
    return (number, False) if math.isfinite(number) else (math.nan, True)


def _length_fault(scores: Any, sizes: Sequence[int]) -> str:
    if not is_list_of_scores(scores):
        return f"returned {_what(scores)}; give one list of scores per group"
    for index, row in enumerate(scores):
        if not is_list_of_scores(row):
            return f"returned {_what(scores)} whose entry {index} is {_what(row)}; give one list of scores per group"
    returned = [len(row) for row in scores]
    return "" if returned == list(sizes) else f"returned {returned} scores per group, expected {list(sizes)}"


def _what(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _metrics_fault(result: Scores) -> str:
    for key, metric in result.metrics.items():
        if not isinstance(metric, Metric):
            return f"returned metrics[{key!r}] as {_what(metric)}; give Mean.of(…)"
    return ""


def _notes_fault(notes: Sequence[Notes], sizes: Sequence[int]) -> str:
    fitting = len(notes) in (0, len(sizes)) and all(
        len(rows) == size for by_name, size in zip(notes, sizes, strict=False) for rows in by_name.values()
    )
    return "" if fitting else "returned notes that do not fit; give one list per completion of every group, or none"


def _call(name: str, config: RewardConfig, groups: Sequence[Group], context: Context) -> Scores:
    """Call a reward of this package directly, a user's function in a thread with ``deadline_s``.

    A user's function that needs a service is called directly, too: all ranks use services together.

    A thread cannot be stopped. After the deadline its result is dropped, and its reward abstains until it ends, so that
    a reward has at most one such thread.
    """
    function, context = part_of(config).function, context.of_part(f"rewards/{name}", needs_of(config))
    if not isinstance(config, UserRewardConfig) or needs_of(config):  # services are collective: in the main thread
        return function(groups, config, context)
    if name in _busy and not _busy[name].done():
        raise TimeoutError("still busy with an earlier batch")
    future: Future[Scores] = Future()

    def work() -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(dist.device())  # the current device is a property of the thread
            future.set_result(function(groups, config, context))
        except BaseException as error:  # also SystemExit, which would look like a hang
            future.set_exception(RaisedInThread(error))

    _busy[name] = future
    threading.Thread(target=work, name=f"reward-{name}", daemon=True).start()
    try:
        return future.result(config.deadline_s)
    except TimeoutError:
        raise TimeoutError(f"rank {dist.rank()} waited {config.deadline_s:g} s for it (reward.deadline_s)") from None


def _failures(name: str, failed: Sequence[Tensor], timed_out: bool) -> dict[str, Metric]:
    """Shares of completions on which the reward failed, by cause."""
    share = Mean.of(torch.cat([torch.zeros(0), *(row.double() for row in failed)]))
    nothing = Mean(total=0.0, count=share.count)
    return {
        f"rewards/{name}/errors": nothing if timed_out else share,
        f"rewards/{name}/timeouts": share if timed_out else nothing,
    }


def _counted(values: Tensor) -> Tensor:
    return values[~values.isnan()]


def _std(values: Tensor) -> Tensor:
    """Sample standard deviation (ddof 1), 0 for one value."""
    return values.std(correction=1) if len(values) > 1 else torch.zeros((), dtype=torch.float64)


def _metrics(groups: Sequence[Group], parts: Mapping[str, ScoredReward]) -> dict[str, Metric]:
    """Metrics under TRL's names. Standard deviations have ddof 1, and ``reward_std`` is their mean over groups.

    ``groups/*`` are shares of groups by the first reward, where more than 0.5 counts as right.
    """
    metrics: dict[str, Metric] = {}
    for name, part in parts.items():
        metrics |= part.metrics
        values = torch.cat([torch.zeros(0, dtype=torch.float64), *part.scores])
        metrics[f"rewards/{name}/mean"] = Mean.of(_counted(values))
        metrics[f"rewards/{name}/abstained"] = Mean.of(values.isnan())
        metrics[f"rewards/{name}/std"] = Std.of(_counted(values))
    totals = [_counted(group.rewards_G) for group in groups if group.rewards_G is not None]
    totals = [total for total in totals if len(total)]
    metrics["reward"] = Mean.of([float(value) for total in totals for value in total])
    metrics["reward_std"] = Mean.of([float(_std(total)) for total in totals])
    metrics["frac_reward_zero_std"] = Mean.of([float(total.min() == total.max()) for total in totals])
    first = next(iter(parts.values()))
    right = [is_right(counted, above=RIGHT_ABOVE) for row in first.scores if len(counted := _counted(row))]
    all_right, all_wrong = [bool(row.all()) for row in right], [not bool(row.any()) for row in right]
    metrics["groups/all_right"], metrics["groups/all_wrong"] = Mean.of(all_right), Mean.of(all_wrong)
    metrics["groups/mixed"] = Mean.of([not (a or b) for a, b in zip(all_right, all_wrong, strict=True)])
    return metrics
