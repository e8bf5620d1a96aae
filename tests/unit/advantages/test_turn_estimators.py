"""MT-GRPO and GiGPO: numbers by hand, the released code's rules as slow references, and what is refused."""

import dataclasses
import math
import re
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turned_groups import alone, group_of, spoken, turn

from rltrain import cli
from rltrain.advantages.estimator import estimator_of
from rltrain.advantages.gigpo import GiGPOConfig, discounted_returns, gigpo_advantages, step_rewards
from rltrain.advantages.group import group_advantages
from rltrain.advantages.mt_grpo import MTGRPOConfig, mt_grpo_advantages
from rltrain.config import EnvironmentConfig
from rltrain.errors import ConfigError, RunError
from rltrain.registry import discover
from rltrain.types import Context

discover()

ROOT3 = math.sqrt(3) / 2  # of [1, 1, 0, 0]: 0.5 over the sample std sqrt(1/3)
ROOT6 = math.sqrt(1.5)  # of [2, 1, 1, 0]: 1 over sqrt(2/3)


def flat(rows):
    return [row_K.tolist() for row_K in rows]


# --- MT-GRPO -----------------------------------------------------------------------------------------------------

# Two turns, the first of which is answered, three times; and a completion that asks nothing.
CALLS = [[turn(reward=reward), turn(observed=0)] for reward in (1.0, 0.0, 1.0)]
TURNS = [*CALLS, [turn(observed=0)]]
OUTCOMES = [1.0, 1.0, 0.0, 0.0]


def test_mt_grpo_by_hand():
    """N(R) = ±0.866. N(r_1) of [1, 0, 1, 0] likewise. The last has N(R + r) of [2, 1, 1, 0]: -1.225."""
    rows = flat(mt_grpo_advantages(TURNS, OUTCOMES, eps=0))
    assert rows[0] == pytest.approx([2 * ROOT3, ROOT3])
    assert rows[1] == pytest.approx([0.0, ROOT3])
    assert rows[2] == pytest.approx([0.0, -ROOT3])
    assert rows[3] == pytest.approx([-ROOT6])


def test_mt_grpo_with_rewards_to_go_by_hand():
    rows = flat(mt_grpo_advantages(TURNS, OUTCOMES, estimate="to_go", eps=0))
    assert rows[0] == pytest.approx([ROOT6, ROOT3])
    assert rows[1] == pytest.approx([0.0, ROOT3])
    assert rows[2] == pytest.approx([0.0, -ROOT3])
    assert rows[3] == pytest.approx([-ROOT6])


def test_lambda_weighs_the_turns_and_0_is_grpo():
    for settings in ({}, {"credited": "all"}, {"estimate": "to_go"}):
        rows = flat(mt_grpo_advantages(TURNS, OUTCOMES, turn_weight=0.0, **settings))
        for row, advantage in zip(rows, group_advantages(OUTCOMES, eps=1e-4).tolist(), strict=True):
            assert row == pytest.approx([advantage] * len(row), abs=1e-12)
    half = flat(mt_grpo_advantages(TURNS, OUTCOMES, turn_weight=0.5, eps=0))
    assert half[0] == pytest.approx([1.5 * ROOT3, ROOT3])
    assert half[3] == pytest.approx([group_advantages([1.5, 1.0, 0.5, 0.0], eps=0).tolist()[3]])


def test_more_than_two_turns_are_compared_with_the_turns_of_their_number():
    """Rewards of second turns: 1, 0 and 0, which are 2/sqrt(3) and twice -1/sqrt(3). Third ones: 0 and 9, ±0.7071."""
    turns = [
        [turn(), turn(reward=1.0), turn(observed=0)],
        [turn(), turn(reward=0.0), turn(observed=0, reward=9.0)],
        [turn(), turn(observed=0)],
    ]
    high, low, root2 = 2 / math.sqrt(3), -1 / math.sqrt(3), math.sqrt(0.5)
    rows = flat(mt_grpo_advantages(turns, [1.0, 1.0, 1.0], eps=0))
    assert rows[0] == pytest.approx([0.0, high, 0.0])
    assert rows[1] == pytest.approx([0.0, low, 0.0])
    assert rows[2] == pytest.approx([0.0, 0.0])  # a last turn is not answered
    every = flat(mt_grpo_advantages(turns, [1.0, 1.0, 1.0], credited="all", eps=0))
    assert every[0] == pytest.approx([0.0, high, -root2])
    assert every[1] == pytest.approx([0.0, low, root2])
    assert every[2] == pytest.approx([0.0, low])
    to_go = flat(mt_grpo_advantages(turns, [1.0, 1.0, 1.0], estimate="to_go", eps=0))
    assert to_go[1][:2] == pytest.approx(group_advantages([2.0, 10.0, 1.0], eps=0)[1].expand(2).tolist())


def released_mt_grpo(turns, outcomes, estimate):
    """The rules of the released code, which knows a single result: before it the turn's advantage counts, too."""

    def normalised(values):
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return [(value - mean) / (std + 1e-4) for value in values]

    rewards = [sum(one.reward for one in row) for row in turns]
    outcome, turned = normalised(outcomes), normalised(rewards)
    both = normalised([r + o for r, o in zip(rewards, outcomes, strict=True)])
    rows = []
    for i, row in enumerate(turns):
        if not row[0].observed:
            rows.append([both[i]])
        elif estimate == "added":
            rows.append([outcome[i] + turned[i], outcome[i]])
        else:
            rows.append([both[i], outcome[i]])
    return rows


CALLER = st.tuples(st.sampled_from([0.0, 0.2, 0.5]), st.booleans(), st.sampled_from([0.0, 1.0]))


@given(st.lists(CALLER, min_size=2, max_size=7), st.sampled_from(["added", "to_go"]))
def test_with_one_result_at_most_it_is_the_released_code(drawn, estimate):
    turns = [
        [turn(reward=reward), turn(observed=0)] if calls else [turn(reward=reward, observed=0)]
        for reward, calls, _ in drawn
    ]
    outcomes = [outcome for _, _, outcome in drawn]
    expected = released_mt_grpo(turns, outcomes, estimate)
    for row, other in zip(flat(mt_grpo_advantages(turns, outcomes, estimate=estimate)), expected, strict=True):
        assert row == pytest.approx(other, abs=1e-9)


def test_who_abstains_is_in_no_statistic_of_turns():
    with_abstainer = [TURNS[0], [turn(reward=7.0), turn(reward=7.0)], *TURNS[1:]]
    for settings in ({}, {"estimate": "to_go"}, {"credited": "all"}):
        rows = flat(mt_grpo_advantages(with_abstainer, [OUTCOMES[0], None, *OUTCOMES[1:]], **settings))
        assert rows[1] == [0.0, 0.0]
        assert [rows[0], *rows[2:]] == flat(mt_grpo_advantages(TURNS, OUTCOMES, **settings))


# --- GiGPO -------------------------------------------------------------------------------------------------------


def keyed(keys, rewards=()):
    rewards = rewards or (0.0,) * len(keys)
    return [turn(key=key, reward=reward) for key, reward in zip(keys, rewards, strict=True)]


STATES = [keyed("ab"), keyed("ac"), keyed("abb")]


def test_gigpo_by_hand():
    """Returns 0.95, 1; 0, 0; 0.9025, 0.95, 1. In a: mean 0.6175. In b, of 1, 0.95 and 1: 59/60. In c it is alone."""
    rows = flat(gigpo_advantages(STATES, [1.0, 0.0, 1.0]))
    episodes = [1 / 3, -2 / 3, 1 / 3]
    assert rows[0] == pytest.approx([episodes[0] + 0.3325, episodes[0] + 1 / 60])
    assert rows[1] == pytest.approx([episodes[1] - 0.6175, episodes[1]])
    assert rows[2] == pytest.approx([episodes[2] + 0.285, episodes[2] - 1 / 30, episodes[2] + 1 / 60])
    weighed = flat(gigpo_advantages(STATES, [1.0, 0.0, 1.0], step_weight=2.0, episodes_over="turns"))
    assert weighed[0] == pytest.approx([2 / 7 + 2 * 0.3325, 2 / 7 + 1 / 30])  # 1 - 5/7: two, two and three turns
    assert weighed[1][1] == pytest.approx(-5 / 7)


def test_omega_0_is_grpo_without_or_with_std():
    for scale in ("none", "std"):
        rows = flat(gigpo_advantages(STATES, [1.0, 0.0, 1.0], step_weight=0.0, scale=scale))
        for row, advantage in zip(rows, group_advantages([1.0, 0.0, 1.0], scale=scale).tolist(), strict=True):
            assert row == pytest.approx([advantage] * len(row), abs=1e-12)


def test_rewards_of_steps_and_their_returns_by_hand():
    turns = keyed("ab", (0.25, 0.5))
    assert step_rewards(turns, 1.0) == [0.25, 1.5]
    assert step_rewards(turns, 1.75, turn_rewards="included") == [0.25, 1.5]  # 0.75 of it are the turns'
    assert step_rewards(turns, 1.0, turn_rewards="ignored") == [0.0, 1.0]
    assert step_rewards((), 1.0) == []
    assert discounted_returns([0.25, 1.5, -1.0], 0.5) == [0.25 + 0.5 * (1.5 - 0.5), 1.0, -1.0]
    added = gigpo_advantages([turns, keyed("ab")], [1.0, 0.0])
    included = gigpo_advantages([turns, keyed("ab")], [1.75, 0.0], turn_rewards="included")
    assert flat(added) == flat(included)


def released_gigpo(turns, rewards, *, discount, over_steps, with_std):
    """The rules of the released code, row by row: a row is a step. Groups of one trajectory are left out."""

    def centred(pairs):
        groups = defaultdict(list)
        for name, value in pairs:
            groups[name].append(value)
        found = []
        for name, value in pairs:
            values = groups[name]
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 1.0
            found.append((value - mean) / (spread + 1e-6) if with_std else value - mean)
        return found

    rows = [(i, k) for i, row in enumerate(turns) for k in range(len(row))]
    totals = {i: rewards[i] + sum(one.reward for one in row) for i, row in enumerate(turns)}
    returns = {}
    for i, row in enumerate(turns):
        running = 0.0
        for k in reversed(range(len(row))):
            running = row[k].reward + (rewards[i] if k == len(row) - 1 else 0.0) + discount * running
            returns[i, k] = running
    if over_steps:
        episodes = dict(zip(rows, centred([("", totals[i]) for i, _ in rows]), strict=True))
    else:
        of_completion = centred([("", totals[i]) for i in range(len(turns))])
        episodes = {(i, k): of_completion[i] for i, k in rows}
    steps = dict(zip(rows, centred([(turns[i][k].state_key, returns[i, k]) for i, k in rows]), strict=True))
    return [[episodes[i, k] + steps[i, k] for k in range(len(row))] for i, row in enumerate(turns)]


TALKS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.5])), min_size=1, max_size=5)


@given(
    st.lists(st.tuples(TALKS, st.sampled_from([0.0, 1.0])), min_size=2, max_size=6),
    st.sampled_from([0.95, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_gigpo_is_the_released_code(drawn, discount, over_steps, with_std):
    turns = [[turn(key=key, reward=reward) for key, reward in talk] for talk, _ in drawn]
    rewards = [reward for _, reward in drawn]
    settings = {"episodes_over": "turns" if over_steps else "completions", "scale": "std" if with_std else "none"}
    found = gigpo_advantages(turns, rewards, discount=discount, **settings)
    expected = released_gigpo(turns, rewards, discount=discount, over_steps=over_steps, with_std=with_std)
    for row, other in zip(flat(found), expected, strict=True):
        assert row == pytest.approx(other, abs=1e-6)


def test_who_abstains_is_in_no_group_of_steps():
    rows = flat(gigpo_advantages([STATES[0], keyed("ab", (9.0, 9.0)), *STATES[1:]], [1.0, None, 0.0, 1.0]))
    assert rows[1] == [0.0, 0.0]
    assert [rows[0], *rows[2:]] == flat(gigpo_advantages(STATES, [1.0, 0.0, 1.0]))


# --- as parts ----------------------------------------------------------------------------------------------------

TALK = [
    spoken([5, 6], [100], [7], rewards=[1.0, 0.0], keys=["a", "b"]),
    spoken([5], [101, 102], [7, 7], rewards=[0.0, 0.0], keys=["a", "b"]),
]


@pytest.mark.parametrize("name", ["mt_grpo", "gigpo"])
def test_a_turns_credit_stands_on_its_written_tokens(name):
    advantages = estimator_of(name)([group_of(TALK, [1.0, 0.0])], Context())
    pure = mt_grpo_advantages if name == "mt_grpo" else gigpo_advantages
    (first, second), (one, two) = flat(pure([talk.turns for talk in TALK], [1.0, 0.0])), advantages.values[0]
    assert one.tolist() == [first[0], first[0], 0.0, first[1]]
    assert two.tolist() == [second[0], 0.0, 0.0, second[1], second[1]]


def test_metrics_of_the_turn_estimators():
    group = group_of(TALK, [1.0, 0.0])
    assert estimator_of("mt_grpo")([group], Context()).metrics["mt_grpo/turn_reward"].total == 1.0
    metrics = estimator_of("gigpo")([group, group_of([TALK[0]], [1.0])], Context()).metrics
    assert (metrics["gigpo/step_group"].total, metrics["gigpo/step_group"].count) == (2 + 2 + 2 + 2 + 1 + 1, 6)
    assert metrics["gigpo/alone_share"].total == 2.0


@pytest.mark.parametrize("name", ["mt_grpo", "gigpo"])
def test_completions_without_turns_are_refused_in_one_line(name):
    plain = group_of([TALK[0], alone(TALK[1])], [1.0, 0.0], name="q7")
    with pytest.raises(RunError) as caught:
        estimator_of(name)([plain], Context())
    assert str(caught.value) == (
        f"advantage={name}: completion 1 of problem q7 has no turns to credit; choose an environment, or "
        "advantage=group"
    )


def test_a_turn_whose_environment_failed_needs_no_key():
    """As after a first state that failed: the completion is wrong, and the run goes on."""
    failed = spoken([5], keys=[None])
    failed = dataclasses.replace(failed, turns=(dataclasses.replace(failed.turns[0], failure="error"),), failed="error")
    values = estimator_of("gigpo")([group_of([*TALK, failed], [1.0, 0.0, 0.0])], Context()).values[0]
    episodes = group_advantages([2.0, 0.0, 0.0], scale="none")
    assert values[2].tolist() == pytest.approx([float(episodes[2])])


def test_states_without_keys_are_refused_in_one_line():
    plain = group_of([spoken([5], [100], [6], keys=["a", None]), TALK[0]], [1.0, 0.0], name="q7")
    with pytest.raises(RunError) as caught:
        estimator_of("gigpo")([plain], Context())
    assert str(caught.value) == (
        "advantage=gigpo: problem q7: turn 1 of completion 0 has no key of its state; give the environment a "
        "key(state) that is no None, or choose advantage=mt_grpo"
    )


RUN = ["+experiment=quickstart"]
TURN_REWARDS = "+reward@rewards.turns=turn_rewards"


@pytest.mark.parametrize("name", ["mt_grpo", "gigpo"])
def test_a_run_without_turns_is_refused(name):
    with pytest.raises(ConfigError) as caught:
        cli.compose([*RUN, f"algorithm={name}"])
    assert str(caught.value) == (
        f"advantage={name}: credits the turns of a completion, and environment=none makes no turns; set environment, "
        "or advantage=group"
    )


def with_environment(advantage, *words):
    return dataclasses.replace(
        cli.compose([*RUN, *words]), environment=EnvironmentConfig(reply_tokens=8), advantage=advantage
    )


REFUSED = {
    "the outcome of mt_grpo holds the turns": (
        (MTGRPOConfig(), TURN_REWARDS),
        "rewards.turns: puts the turns' rewards into the outcome, and advantage=mt_grpo adds them by "
        "advantage.turn_weight=1; remove that reward",
    ),
    "gigpo would count the turns twice": (
        (GiGPOConfig(), TURN_REWARDS),
        "rewards.turns: holds the turns' rewards, which advantage.turn_rewards=added would count otherwise; set "
        "advantage.turn_rewards=included rewards.turns.weight=1, or remove the reward",
    ),
    "gigpo would count half of them": (
        (GiGPOConfig(turn_rewards="included"), TURN_REWARDS, "rewards.turns.weight=0.5"),
        "rewards.turns: holds the turns' rewards, which advantage.turn_rewards=included would count otherwise; set "
        "advantage.turn_rewards=included rewards.turns.weight=1, or remove the reward",
    ),
    "nothing includes the turns": (
        (GiGPOConfig(turn_rewards="included"),),
        "advantage.turn_rewards=included: no reward of the run holds the turns' rewards; add one with "
        "+reward@rewards.turns=turn_rewards, or set added",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rewards_of_turns_are_not_counted_twice(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        with_environment(*arguments)
    assert str(caught.value) == message


TAKEN = [
    (MTGRPOConfig(),),
    (MTGRPOConfig(turn_weight=0.0), TURN_REWARDS),
    (GiGPOConfig(),),
    (GiGPOConfig(turn_rewards="included"), TURN_REWARDS),
]


@pytest.mark.parametrize("arguments", TAKEN, ids=["mt_grpo", "mt_grpo, lambda 0", "gigpo", "gigpo, included"])
def test_turns_and_rewards_that_fit_are_taken(arguments):
    assert with_environment(*arguments).advantage == arguments[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MTGRPOConfig(turn_weight=-1.0), "advantage.turn_weight=-1.0: must be >= 0"),
        (lambda: MTGRPOConfig(estimate="aae"), "advantage.estimate"),
        (lambda: MTGRPOConfig(credited="first"), "advantage.credited"),
        (lambda: GiGPOConfig(discount=1.5), "advantage.discount=1.5: must lie in"),
        (lambda: GiGPOConfig(step_weight=-0.5), "advantage.step_weight=-0.5: must be >= 0"),
        (lambda: GiGPOConfig(episodes_over="steps"), "advantage.episodes_over"),
        (lambda: GiGPOConfig(turn_rewards="both"), "advantage.turn_rewards"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
