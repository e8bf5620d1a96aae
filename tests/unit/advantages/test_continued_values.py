"""VinePPO and SPO by hand: fills, identities, what is asked, whom abstentions concern."""

import math

import pytest
import torch
from continuation_table import Table
from probe_models import TOKENIZER

from rltrain import cli
from rltrain.advantages.continued_values import leave_one_out, segment_advantages, segment_tokens, spaced
from rltrain.advantages.estimator import estimator_of
from rltrain.advantages.spo import SPOConfig, segment_borders, spo_advantages
from rltrain.advantages.vineppo import VinePPOConfig, vineppo_advantages
from rltrain.errors import ConfigError
from rltrain.types import Completion, Group, Problem, Prompt

NAN = math.nan


def group(texts, rewards, logprobs=None):
    ids = [tuple(TOKENIZER(text)["input_ids"]) for text in texts]
    logprobs = logprobs or [(0.0,) * len(one) for one in ids]
    completions = [
        Completion(token_ids=one, logprobs=tuple(row), finish="stop") for one, row in zip(ids, logprobs, strict=True)
    ]
    prompt = Prompt(problem=Problem(id="p", prompt="", answer=""), token_ids=(5, 6))
    return Group(prompt=prompt, completions=tuple(completions), rewards_G=torch.tensor(rewards, dtype=torch.float64))


def ids(text):
    return tuple(TOKENIZER(text)["input_ids"])


def test_a_value_that_is_not_estimated_takes_the_next_estimated_one_never_that_of_the_end():
    """V = .5, (.25), .25, (.25 from before): A = -.25, 0, 0, 1 - .25."""
    assert segment_advantages(1.0, [0.5, NAN, 0.25, NAN]).tolist() == [-0.25, 0.0, 0.0, 0.75]
    assert segment_advantages(0.0, [0.5, 0.75]).tolist() == [0.25, -0.75]
    assert segment_advantages(1.0, [NAN, NAN]).isnan().all()


def test_one_advantage_per_segment_sums_to_the_reward_less_the_value_of_the_prompt():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(8, generator=generator, dtype=torch.float64)
        values[1:][torch.rand(7, generator=generator) < 0.5] = NAN
        assert float(segment_advantages(0.7, values).sum()) == pytest.approx(0.7 - float(values[0]))


def test_vineppo_by_hand():
    """Rows .5 .5 .5 and -1: mean 1/8, variance (3·(3/8)² + (9/8)²)/4 = 27/64, so 1/sqrt(3) and -sqrt(3)."""
    given = [[1.0, 0.0]], [[[0.0, 0.5], [1.0]]], [[[2, 1], [1]]]
    plain = vineppo_advantages(*given, whiten=False)
    assert [row.tolist() for row in plain[0]] == [[0.5, 0.5, 0.5], [-1.0]]
    (rows,) = vineppo_advantages(*given)
    assert rows[0].tolist() == pytest.approx([1 / math.sqrt(3)] * 3) and rows[1].tolist() == pytest.approx(
        [-math.sqrt(3)]
    )


def test_spo_by_hand():
    """A = .25 on the first segment, .5 on the second; the tokens of p >= .9 get 0, and are in no statistic."""
    given = [[1.0]], [[[0.25, 0.5]]], [[[2, 2]]], [[[0.5, 0.95, 0.8, 0.89]]]
    assert spo_advantages(*given, whiten=False)[0][0].tolist() == [0.25, 0.0, 0.5, 0.5]
    # Of .25, .5, .5: mean 5/12, deviations -1/6, 1/12, 1/12, variance 1/72.
    expected = [-math.sqrt(2), 0.0, math.sqrt(0.5), math.sqrt(0.5)]
    assert spo_advantages(*given)[0][0].tolist() == pytest.approx(expected, rel=1e-6)
    assert spo_advantages(*given, threshold=0.7, whiten=False)[0][0].tolist() == [0.25, 0.0, 0.0, 0.0]


def test_what_abstains_is_in_no_statistic():
    rewards, values = [[1.0, 0.0, NAN, 1.0]], [[[0.0, 0.5], [1.0], [0.5, 0.5], [NAN, 0.5]]]
    (rows,) = vineppo_advantages(rewards, values, [[[2, 1], [1], [1, 1], [1, 2]]])
    (without,) = vineppo_advantages([[1.0, 0.0]], [[[0.0, 0.5], [1.0]]], [[[2, 1], [1]]])
    assert [row.tolist() for row in rows] == [*[row.tolist() for row in without], [0.0, 0.0], [0.0, 0.0, 0.0]]


def test_leave_one_out():
    torch.testing.assert_close(
        leave_one_out([1.0, 0.0, None, 0.5]), torch.tensor([0.25, 0.75, 0.5, 0.5]).double(), equal_nan=True
    )
    assert leave_one_out([1.0, None]).isnan().tolist() == [True, False]


def test_states_are_evenly_spaced_and_the_last_is_kept():
    assert spaced([1, 2, 3], 20) == [1, 2, 3]
    assert spaced(list(range(1, 11)), 4) == [2, 5, 7, 10]
    assert spaced([], 4) == []
    assert segment_tokens(7, [2, 5]).tolist() == [2, 3, 2]


def test_spo_cuts_before_every_nth_uncertain_token():
    p = [0.5, 0.95, 0.6, 0.99, 0.7, 0.8, 0.9]  # uncertain: 0, 2, 4, 5
    assert segment_borders(p, threshold=0.9, interval=1) == [2, 4, 5]  # before token 0 begins the first segment
    assert segment_borders(p, threshold=0.9, interval=2) == [2, 5]
    assert segment_borders(p, threshold=0.9, interval=5) == []


def test_vineppo_asks_each_state_once_and_no_end():
    """Steps 1\\n | 2\\n | 3 and 1\\n | 4: the state behind 1\\n is both completions'."""
    table = Table({ids("1\n"): 0.5, ids("1\n2\n"): 1.0}, TOKENIZER)
    config = VinePPOConfig(draws=4, whiten=False)
    advantages = estimator_of(config)([group(["1\n2\n3", "1\n4", "x"], [1.0, 0.0, NAN])], table.context())
    assert [request.completion_ids for request in table.asked] == [ids("1\n"), ids("1\n2\n")]
    assert [request.max_new_tokens for request in table.asked] == [14, 12]
    # V_0 is the other's reward: 0 and 1. A = .5, .5, 0 and -.5, -.5; the third abstains.
    assert [row.tolist() for row in advantages.values[0]] == [
        [0.5, 0.5, 0.5, 0.5, 0.0],
        [-0.5, -0.5, -0.5],
        [0.0],
    ]
    assert advantages.notes[0]["segment_tokens"] == [[2, 2, 1], [2, 1], [1]]


@pytest.mark.parametrize("name", ["vineppo", "spo"])
def test_equal_rewards_carry_credit_so_that_their_groups_are_not_dropped(name):
    """The second of two right answers went through a state of value 0: A = V - V_0 = -1 before it, r - V = 1 behind."""
    logprobs = [[math.log(0.5)] * 3] * 2
    table = Table({ids("1\n"): 1.0, ids("2\n"): 0.0}, TOKENIZER)
    options = {"vineppo": {}, "spo": {"start": "others", "interval": 3}}[name]
    estimator = estimator_of(name, {"draws": 2, "whiten": False, **options})
    (rows,) = estimator([group(["1\n4", "2\n5"], [1.0, 1.0], logprobs)], table.context()).values
    assert [row_T.tolist() for row_T in rows] == [[0.0, 0.0, 0.0], [-1.0, -1.0, 1.0]]
    with pytest.raises(ConfigError, match="dynamic_sampling=true: drops groups that this estimator learns from"):
        cli.compose(["+experiment=quickstart", f"algorithm={name}", "batch.dynamic_sampling=true"])


def test_vineppo_with_fewer_states_and_a_start_by_continuations():
    """Of the borders behind a, b, c and d the second and fourth are asked; all draws behind the second abstain."""
    table = Table({(): 0.25, ids("1\n2\n"): None, ids("1\n2\n3\n4\n"): 0.75}, TOKENIZER)
    config = VinePPOConfig(draws=4, max_states=2, start="continuations", whiten=False, temperature=0.6, top_p=0.9)
    advantages = estimator_of(config)([group(["1\n2\n3\n4\n5"], [1.0])], table.context())
    assert [len(request.completion_ids) for request in table.asked] == [0, 4, 8]
    assert (table.asked[0].sampling.temperature, table.asked[0].sampling.top_p) == (0.6, 0.9)
    # The values before the five steps are .25, then .75 four times.
    assert advantages.values[0][0].tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0, 0.25]


def test_spo_asks_at_its_cuts():
    low, sure = math.log(0.5), math.log(0.99)
    table = Table({(): 0.5, ids("12"): 1.0}, TOKENIZER)
    config = SPOConfig(draws=2, interval=2, whiten=False)
    advantages = estimator_of(config)([group(["123"], [1.0], [[low, sure, low]])], table.context())
    assert [request.completion_ids for request in table.asked] == [(), ids("12")]
    assert advantages.values[0][0].tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (VinePPOConfig, {"draws": 0}, "advantage.draws=0: set at least 1 continuation a state"),
        (VinePPOConfig, {"start": "mean"}, "advantage.start=mean: unknown; set one of others, continuations"),
        (VinePPOConfig, {"top_p": 0.9}, "advantage.top_p=0.9 without advantage.temperature"),
        (VinePPOConfig, {"temperature": 0.6, "top_p": 2.0}, "advantage.temperature=0.6, top_p=2.0: must be"),
        (VinePPOConfig, {"delimiter": ""}, "advantage.delimiter is empty"),
        (SPOConfig, {"threshold": 0.0}, "advantage.threshold=0.0: must lie in"),
        (SPOConfig, {"interval": 0}, "advantage.interval=0: set at least 1"),
        (SPOConfig, {"max_states": 0}, "advantage.max_states=0: set at least 1"),
    ],
)
def test_settings_are_checked(config, fields, message):
    with pytest.raises(ConfigError) as caught:
        config(**fields)
    assert str(caught.value).startswith(message)
