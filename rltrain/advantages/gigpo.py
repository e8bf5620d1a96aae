"""GiGPO: turns that a group wrote in one state of the environment are compared with each other (arXiv 2505.10978)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, group_advantages
from rltrain.advantages.turn_credit import on_tokens, require_environment, turns_of
from rltrain.config import AdvantageConfig, RunConfig
from rltrain.errors import RunError, require, require_one_of
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Max, Mean, Turn

Place = tuple[int, int]  # a completion and its turn, both from 0


@dataclass(kw_only=True)
class GiGPOConfig(AdvantageConfig):
    """See :func:`gigpo_advantages`."""

    step_weight: float = 1.0  # omega, the weight of the advantage among turns of one state; 0 leaves the episode's
    discount: float = 0.95  # of rewards, per turn
    scale: str = "none"  # std divides both advantages by their std + eps, none centres alone
    episodes_over: str = "completions"  # mean and std of episodes count a completion once, or once per turn (turns)
    turn_rewards: str = "added"  # to rewards.*, or included in them by reward turn_rewards (weight 1), or ignored
    eps: float = 1e-6  # added to the std

    def __post_init__(self) -> None:
        require(self.step_weight >= 0, f"advantage.step_weight={self.step_weight}: must be >= 0; 1 is the paper's")
        require(0 <= self.discount <= 1, f"advantage.discount={self.discount}: must lie in [0, 1]; 0.95 is the paper's")
        require_one_of(("none", "std"), "advantage.scale", self.scale)
        require_one_of(("completions", "turns"), "advantage.episodes_over", self.episodes_over)
        require_one_of(("added", "included", "ignored"), "advantage.turn_rewards", self.turn_rewards)
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")

    def learns_from_equal_rewards(self) -> bool:
        return True  # completions of one reward differ in the turns that they took

    def check_run(self, run: RunConfig) -> None:
        require_environment(run, "gigpo")
        weights = {name: reward.weight for name, reward in run.rewards.items() if reward.sums_turns()}
        for name, weight in weights.items():
            require(
                self.turn_rewards == "included" and weight == 1,
                f"rewards.{name}: holds the turns' rewards, which advantage.turn_rewards={self.turn_rewards} would "
                f"count otherwise; set advantage.turn_rewards=included rewards.{name}.weight=1, or remove the reward",
            )
        require(
            self.turn_rewards != "included" or bool(weights),
            "advantage.turn_rewards=included: no reward of the run holds the turns' rewards; add one with "
            "+reward@rewards.turns=turn_rewards, or set added",
        )


def step_rewards(turns: Sequence[Turn], reward: float, *, turn_rewards: str = "added") -> list[float]:
    """The rewards of a completion's turns: ``Turn.reward``, and at the last turn what the completion's reward adds.

    ``turn_rewards="added"``: all of it. ``"included"``: the rest of it, of which ``Turn.reward`` are a part, so that
    the turns' rewards sum to it. ``"ignored"``: all of it, and no turn has a reward of its own.
    """
    rewards = [0.0 if turn_rewards == "ignored" else turn.reward for turn in turns]
    if rewards:
        rewards[-1] += reward - (sum(rewards) if turn_rewards == "included" else 0.0)
    return rewards


def discounted_returns(rewards: Sequence[float], discount: float) -> list[float]:
    """``G_k = sum_{l>=k} discount^(l-k)·rewards_l``."""
    returns, value = [], 0.0
    for reward in reversed(rewards):
        value = reward + discount * value
        returns.append(value)
    return returns[::-1]


def gigpo_advantages(
    turns: Sequence[Sequence[Turn]],
    rewards: Sequence[float | None] | Tensor,
    *,
    step_weight: float = 1.0,
    discount: float = 0.95,
    scale: str = "none",
    episodes_over: str = "completions",
    turn_rewards: str = "added",
    eps: float = 1e-6,
) -> list[Tensor]:
    r"""One float64 tensor [K] per completion: the advantage of each of its K turns.

        A_{i,k} = F(E)_i + omega·F_s(G)_{i,k}        E_i the sum of the step rewards of i (:func:`step_rewards`)
        G_{i,k} = sum_{l>=k} discount^(l-k)·r_{i,l}  r the step rewards, s the state key of turn k
        F(x) = x - mean(x), with scale "std" divided by std(x) + eps;  sample std (ddof 1)

    F runs over the group's completions, F_s over its turns with the key s, several of one completion included. F is 0
    where fewer than two are compared, or all are equal; the released code gives a group of one completion its reward.
    It also counts a completion once per turn in F: ``episodes_over="turns"``. Its other modes are the two of ``scale``.

    NaN or None rewards abstain: their turns are compared with none and get 0.
    ``ValueError`` for a turn without a key whose environment did not fail.
    """
    rewards_G = as_rewards(rewards)
    counted = (~rewards_G.isnan()).nonzero().flatten().tolist()
    rows = [torch.zeros(len(row), dtype=torch.float64) for row in turns]
    steps = {i: step_rewards(turns[i], float(rewards_G[i]), turn_rewards=turn_rewards) for i in counted}
    episodes = {i: sum(steps[i]) if turns[i] else float(rewards_G[i]) for i in counted}
    listed = [episodes[i] for i in counted for _ in (turns[i] if episodes_over == "turns" else "1")]
    compared = dict(zip(listed, group_advantages(listed, scale=scale, eps=eps), strict=True))
    for i in counted:
        rows[i] += compared.get(episodes[i], 0.0)  # an empty completion may be in no list
    returns = {i: discounted_returns(steps[i], discount) for i in counted}
    for places in step_groups(turns, counted).values():
        among = group_advantages([returns[i][k] for i, k in places], scale=scale, eps=eps)
        for (i, k), advantage in zip(places, among, strict=True):
            rows[i][k] += step_weight * advantage
    return rows


def step_groups(turns: Sequence[Sequence[Turn]], counted: Sequence[int]) -> dict[str, list[Place]]:
    """The turns of the counted completions by the key of the state that they were written in.

    A turn whose environment failed may have no state, as where the first state failed. It is compared with none.
    """
    places: dict[str, list[Place]] = defaultdict(list)
    for i in counted:
        for k, turn in enumerate(turns[i]):
            if turn.state_key is not None:
                places[turn.state_key].append((i, k))
            elif not turn.failure:
                raise ValueError(f"turn {k} of completion {i} has no key of its state")
    return places


@register("advantage", "gigpo", GiGPOConfig)
def gigpo(groups: Sequence[Group], config: GiGPOConfig, context: Context) -> Advantages:
    """:func:`gigpo_advantages` on the tokens that each turn wrote.

    ``RunError`` for a completion without turns, and for an environment without keys of its states. ``gigpo/step_group``
    is the mean number of turns that a turn is compared with, itself included, ``gigpo/alone_share`` the share of turns
    that are alone in their state.
    """
    values, sizes = [], []
    for group in groups:
        turns = turns_of(group, "gigpo")
        try:
            rows, groups_of_steps = _of_group(turns, as_rewards(group.rewards_G), config)
        except ValueError as error:
            raise RunError(
                f"advantage=gigpo: problem {group.prompt.problem.id}: {error}; give the environment a key(state) that "
                "is no None, or choose advantage=mt_grpo"
            ) from error
        values.append([on_tokens(*pair) for pair in zip(rows, group.completions, strict=True)])
        sizes += [len(places) for places in groups_of_steps.values() for _ in places]
    metrics = {
        "gigpo/step_group": Mean.of([float(size) for size in sizes]),
        "gigpo/alone_share": Mean.of([float(size == 1) for size in sizes]),
        "gigpo/largest_step_group": Max(value=float(max(sizes, default=0))),
    }
    return Advantages(values=values, metrics=metrics)


def _of_group(
    turns: Sequence[Sequence[Turn]], rewards_G: Tensor, config: GiGPOConfig
) -> tuple[list[Tensor], dict[str, list[Place]]]:
    rows = gigpo_advantages(
        turns,
        rewards_G,
        step_weight=config.step_weight,
        discount=config.discount,
        scale=config.scale,
        episodes_over=config.episodes_over,
        turn_rewards=config.turn_rewards,
        eps=config.eps,
    )
    return rows, step_groups(turns, (~rewards_G.isnan()).nonzero().flatten().tolist())
