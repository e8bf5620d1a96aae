"""What an estimator may get wrong: each mistake is one line with the group, the completion and the remedy."""

import functools

import pytest
import torch
from advantage_groups import make_group

from rltrain.advantages.check import EstimatorError, check_advantages
from rltrain.advantages.custom import CustomAdvantageConfig
from rltrain.advantages.estimator import estimator_of
from rltrain.advantages.group import GroupConfig, group_advantages, per_token
from rltrain.advantages.spae import SpaeConfig
from rltrain.advantages.tempo import TempoConfig, tempo_advantages
from rltrain.errors import ConfigError, RunError
from rltrain.types import Advantages, Context, Mean, Need

IDS = [(1, 2, 3), (4,)]


def groups():
    """Two groups of two completions, of lengths 3, 1 and 2, 4."""
    return [
        make_group(IDS, [1.0, 0.0], name="first"),
        make_group([(5, 6), (7, 8, 9, 9)], [0.5, 0.25], name="second"),
    ]


def right(batch):
    return [per_token(group_advantages(group.rewards_G), group.completion_ids) for group in batch]


def replaced(batch, place, value):
    """The right values but for one completion, or one group."""
    values = right(batch)
    if len(place) == 1:
        values[place[0]] = value
    else:
        values[place[0]][place[1]] = value
    return Advantages(values=values)


def yields(batch):
    yield from right(batch)


def shifts_rewards(batch):
    for group in batch:
        group.rewards_G.sub_(group.rewards_G.mean())
    return Advantages(values=[per_token(group.rewards_G, group.completion_ids) for group in batch])


def subtracts_from_rewards(batch):
    for group in batch:
        group.rewards_G -= group.rewards_G.mean()


def naive(batch):
    """NaN rewards go into the mean."""
    return Advantages(values=[per_token(g.rewards_G - g.rewards_G.mean(), g.completion_ids) for g in batch])


FIRST, SECOND = "group 0 (problem first)", "group 1 (problem second)"
SPREAD = "; rltrain.advantages.group.per_token(advantages_G, group.completion_ids) spreads one value per completion"
FORM = "; return Advantages(values=values), where values[p][g] is a tensor with one value per token"
MISTAKES = {
    "None": (
        lambda batch: None,
        "returned None, expected Advantages; end the function with return Advantages(values=values)",
    ),
    "lists of floats": (
        lambda batch: [[[0.0] * len(ids) for ids in group.completion_ids] for group in batch],
        f"returned a list, expected Advantages{FORM}",
    ),
    "a tensor": (
        lambda batch: torch.zeros(2),
        f"returned a tensor of shape (2,), expected Advantages{FORM}",
    ),
    "the type itself": (
        lambda batch: Advantages,
        f"returned a type, expected Advantages{FORM}",
    ),
    "a generator": (
        yields,
        "returned a generator, expected Advantages; collect what it yields in a list and return "
        "Advantages(values=values)",
    ),
    "a generator of values": (
        lambda batch: Advantages(values=(rows for rows in right(batch))),
        "values is a generator, expected a list with one list of tensors per group; build values[p][g], group first",
    ),
    "one group too few": (
        lambda batch: Advantages(values=right(batch)[:1]),
        "values has 1 entries, expected 2, one per group; build values[p][g], group first",
    ),
    "a tensor [G] per group": (
        lambda batch: Advantages(values=[group_advantages(group.rewards_G) for group in batch]),
        f"{FIRST}: has a tensor of shape (2,), expected a list of 2 tensors, one per completion with one "
        f"value per token{SPREAD}",
    ),
    "a generator per group": (
        lambda batch: Advantages(values=[(row for row in rows) for rows in right(batch)]),
        f"{FIRST}: has a generator, expected a list of 2 tensors, one per completion with one value per token{SPREAD}",
    ),
    "a completion too few": (
        lambda batch: replaced(batch, (1,), [torch.zeros(2)]),
        f"{SECOND}: has 1 entries, expected 2, one tensor per completion",
    ),
    "a float per completion": (
        lambda batch: Advantages(values=[group_advantages(group.rewards_G).tolist() for group in batch]),
        f"{FIRST}, completion 0: has a float, expected a tensor of shape (3,), one value per token; "
        "torch.tensor(…) makes one of a list of 3 numbers",
    ),
    "a list of floats": (
        lambda batch: replaced(batch, (1, 0), [0.5, 0.5]),
        f"{SECOND}, completion 0: has a list, expected a tensor of shape (2,), one value per token; "
        "torch.tensor(…) makes one of a list of 2 numbers",
    ),
    "a tensor without axes": (
        lambda batch: Advantages(values=[list(group_advantages(group.rewards_G)) for group in batch]),
        f"{FIRST}, completion 0: has a tensor of shape (), expected a tensor of shape (3,), one value per "
        f"token{SPREAD}",
    ),
    "too long": (
        lambda batch: replaced(batch, (1, 1), torch.zeros(5)),
        f"{SECOND}, completion 1: has a tensor of shape (5,), expected a tensor of shape (4,), one value "
        f"per token{SPREAD}",
    ),
    "integers": (
        lambda batch: replaced(batch, (0, 1), torch.ones(1, dtype=torch.long)),
        f"{FIRST}, completion 1: has dtype torch.int64, expected a floating-point one; call .double() on it",
    ),
    "another device": (
        lambda batch: replaced(batch, (0, 0), torch.zeros(3, device="meta")),
        f"{FIRST}, completion 0: is on the device meta, expected the CPU; call .cpu() on it",
    ),
    "a gradient": (
        lambda batch: replaced(batch, (0, 0), torch.zeros(3, requires_grad=True)),
        f"{FIRST}, completion 0: requires a gradient, expected plain numbers; call .detach() on it",
    ),
    "NaN": (
        lambda batch: replaced(batch, (1, 1), torch.tensor([0.0, 0.0, torch.nan, torch.nan])),
        f"{SECOND}, completion 1: the value of token 2 is nan, expected a finite number (2 of 4 are not)",
    ),
    "infinity": (
        lambda batch: replaced(batch, (0, 1), torch.tensor([-torch.inf])),
        f"{FIRST}, completion 1: the value of token 0 is -inf, expected a finite number (1 of 1 are not)",
    ),
    "rewards changed in place": (
        shifts_rewards,
        f"{FIRST}: changed group.rewards_G in place from [1.0, 0.0] to [0.5, -0.5]; work on group.rewards_G.clone()",
    ),
    "rewards assigned to": (
        subtracts_from_rewards,
        "cannot assign to field 'rewards_G', which is fixed; work on a copy such as group.rewards_G.clone()",
    ),
    "a metric that is a float": (
        lambda batch: Advantages(values=right(batch), metrics={"share": 0.5}),
        "metrics['share'] is a float, expected Mean, Max, Min, Sum or Std; give Mean.of(…)",
    ),
    "metrics that are no dict": (
        lambda batch: Advantages(values=right(batch), metrics=[Mean.of(0.5)]),
        "metrics is a list, expected a dict of names and Mean.of(…)",
    ),
    "notes of one group": (
        lambda batch: Advantages(values=right(batch), notes=[{}]),
        "notes has not one dict per group; give 2 of them, or none at all",
    ),
    "notes of one completion": (
        lambda batch: Advantages(values=right(batch), notes=[{}, {"cuts": [[1.0]]}]),
        "notes[1]['cuts'] has 1 entries, expected 2, one list per completion",
    ),
    "notes of text": (
        lambda batch: Advantages(values=right(batch), notes=[{}, "x"]),  # type: ignore[list-item]
        "notes[1] is a str, expected a dict with one list per completion",
    ),
    "notes of nothing": (
        lambda batch: Advantages(values=right(batch), notes=[None, {}]),  # type: ignore[list-item]
        "notes[0] is None, expected a dict with one list per completion",
    ),
    "a note that is a number": (
        lambda batch: Advantages(values=right(batch), notes=[{"cuts": 3}, {}]),  # type: ignore[dict-item]
        "notes[0]['cuts'] is a int, expected 2 entries in a list, one per completion",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_where_and_what_was_expected(mistake):
    estimate, message = MISTAKES[mistake]

    def users(groups, options, context):
        return estimate(groups)

    with pytest.raises(RunError) as caught:
        estimator_of(users)(groups(), Context())
    name = f"advantage={__name__}:{users.__qualname__}: "
    assert str(caught.value) == name + message


def turned(batch):
    return Advantages(values=[list(rows) for rows in zip(*right(batch), strict=True)])


def test_a_reversed_nesting_is_recognised():
    """By the number of groups where it differs from their size, else by the lengths of the completions."""
    three = [*groups(), make_group([(1,), (2, 2)], [1.0, 0.0], name="third")]
    fewer = "values has 2 entries, expected 3, one per group"
    shape = f"{FIRST}, completion 1: has a tensor of shape (2,), expected a tensor of shape (1,)"
    for batch, begin in ((three, fewer), (groups(), shape)):
        with pytest.raises(EstimatorError) as caught:
            check_advantages(batch, turned(batch), "mine")
        assert str(caught.value).startswith(f"mine: {begin}")
        assert str(caught.value).endswith(
            "; the nesting is reversed: build values[p][g], group first and completion second"
        )


def test_a_completion_that_abstains_may_have_any_value_and_no_other():
    """A mean over a reward that abstains is NaN for the whole group, which the message explains."""
    batch = [make_group(IDS, [1.0, None])]
    check_advantages(batch, Advantages(values=[[torch.zeros(3), torch.tensor([torch.nan])]]), "mine")
    with pytest.raises(EstimatorError) as caught:
        check_advantages(batch, naive(batch), "mine")
    assert str(caught.value) == (
        "mine: group 0 (problem p), completion 0: the value of token 0 is nan, expected a finite number (3 of 3 are "
        "not); a reward of this group is NaN (it abstains): leave it out of mean and std"
    )


def test_what_is_right_passes_unchanged():
    batch = groups()
    expected = [[row_T.tolist() for row_T in rows] for rows in right(batch)]
    for advantage in (GroupConfig(), "group", lambda groups, options, context: Advantages(values=right(groups))):
        values = estimator_of(advantage)(batch, Context()).values
        assert [[row_T.tolist() for row_T in rows] for rows in values] == expected
    empty = [make_group([(), (1,)], [1.0, 0.0])]
    assert estimator_of("group")(empty, Context()).values[0][0].tolist() == []


def test_options_reach_a_name_and_a_function():
    batch = groups()
    expected = tempo_advantages(batch[0].completion_ids, batch[0].rewards_G, normalize_std=False)
    values = estimator_of("tempo", {"normalize_std": False})(batch, Context()).values[0]
    assert [row_T.tolist() for row_T in values] == [row_T.tolist() for row_T in expected]

    def scaled(groups, options, context):
        return Advantages(values=[[torch.full((len(ids),), options["to"]) for ids in g.completion_ids] for g in groups])

    for function in (scaled, functools.partial(scaled)):
        values = estimator_of(function, {"to": 0.5})(batch, Context()).values
        assert values[1][0].tolist() == [0.5, 0.5]


def test_an_estimator_says_what_it_needs():
    assert estimator_of(SpaeConfig()).needs == {Need.PROBES}
    assert estimator_of("tempo").needs == frozenset()
    assert estimator_of(lambda groups, options, context: None).needs == frozenset()


def two_arguments(groups, context):
    return None


@pytest.mark.parametrize(
    ("advantage", "options", "message"),
    [
        ("nonsense", None, "advantage=nonsense: unknown; set one of "),
        ("tempo", {"epsilon": 1}, "advantage=tempo: has no option epsilon; it has eps, normalize_std"),
        (TempoConfig(), {"eps": 1}, "options={'eps': 1}: TempoConfig has its own; set them there"),
        (TempoConfig, None, "neither a config nor a name nor a function; give TempoConfig()"),
        (3, None, "advantage=3: neither a config nor a name nor a function; give a config, a registered name or"),
        (
            two_arguments,
            None,
            f"advantage={__name__}:two_arguments: takes (groups, context); give it the arguments (groups, options, "
            "context)",
        ),
    ],
)
def test_what_is_no_estimator_is_refused_before_it_is_called(advantage, options, message):
    with pytest.raises(ConfigError) as caught:
        estimator_of(advantage, options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_custom_function_is_called_by_its_import_path():
    with pytest.raises(
        ConfigError, match=f"advantage.import_path={__name__}:two_arguments: takes \\(groups, context\\)"
    ):
        CustomAdvantageConfig(import_path=f"{__name__}:two_arguments")
    config = CustomAdvantageConfig(import_path=f"{__name__}:returns_nothing")
    with pytest.raises(EstimatorError, match=f"^advantage.import_path={__name__}:returns_nothing: returned None, "):
        estimator_of(config)(groups(), Context())


def returns_nothing(groups, options, context):
    group_advantages(groups[0].rewards_G)
