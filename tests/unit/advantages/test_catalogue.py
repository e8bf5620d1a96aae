"""What every estimator of the catalogue keeps to: abstentions, equal rewards, small groups, order, ranks."""

import dataclasses
import multiprocessing

import pytest
import torch
from advantage_groups import make_group
from continuation_table import Table
from entropy_tables import by_place

from rltrain.advantages.estimator import estimator_of
from rltrain.policy.tiny import character_tokenizer
from rltrain.registry import discover, parts

discover()

TOKENIZER = character_tokenizer()
SIX = TOKENIZER.decode([6])


class ValuesOfIds(dict):
    """A value for every state: what its ids add up to, modulo 5, in quarters."""

    def __missing__(self, ids):
        return sum(ids) % 5 / 4


CASES = {
    "maxrl": ("maxrl", {}),
    "gdpo": ("gdpo", {}),
    "ktae": ("ktae", {}),
    "hicra": ("hicra", {"phrases": ["a"]}),
    "entropy_mask": ("entropy_mask", {"share": 0.4}),
    "gtpo": ("gtpo", {}),
    "gtpo, batch": ("gtpo", {"mean_over": "batch"}),
    "optimal_token_baseline": ("optimal_token_baseline", {}),
    "optimal_token_baseline, loo": ("optimal_token_baseline", {"leave_one_out": True}),
    "leave_one_out_tree": ("leave_one_out_tree", {}),
    "regression": ("regression", {}),
    "regression, std": ("regression", {"scale": "std"}),
    "tree_po": ("tree_po", {}),
    "tree_rl": ("tree_rl", {}),
    "vineppo": ("vineppo", {"draws": 4, "delimiter": SIX}),
    "spo": ("spo", {"draws": 4, "start": "others", "interval": 1, "threshold": 0.8}),
    "prefix_scale": ("group", {"baseline": "leave_one_out", "scale": "none", "prefix_scale": True}),
}
OVER_THE_BATCH = (
    "gdpo", "entropy_mask", "gtpo, batch", "regression", "regression, std", "tree_po", "vineppo", "spo",
)  # fmt: skip
SPECIFICATIONS = [
    ([[5, 6, 7], [5, 6], [8]], [1.0, 0.0, 0.25]),
    ([[9], [6, 6, 7, 8]], [1.0, 0.0]),
    ([[5, 6], [6, 5, 5], [7, 7], [5]], [0.0, 1.0, 1.0, 0.0]),
    ([[7, 8], [7, 9]], [0.5, 0.5]),
]


def scored(ids, rewards, name="p"):
    group = make_group(ids, rewards, name=name)
    completions = tuple(
        dataclasses.replace(one, logprobs=tuple(-0.2 - 0.1 * (token % 3) for token in one.token_ids))
        for one in group.completions
    )
    return dataclasses.replace(group, completions=completions, reward_parts={"answer": group.rewards_G})


def estimated(case, specifications):
    name, options = CASES[case]
    state = {}
    context = Table(ValuesOfIds(), TOKENIZER).context(entropy=by_place, state_of=lambda part: state)
    groups, estimator = [scored(*one, name=str(i)) for i, one in enumerate(specifications)], estimator_of(name, options)
    estimator(groups, context)  # what keeps state has learnt from this batch by the second call
    return [[row_T.tolist() for row_T in rows] for rows in estimator(groups, context).values]


def close(found, expected):
    for rows, other_rows in zip(found, expected, strict=True):
        for row, other in zip(rows, other_rows, strict=True):
            assert row == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_who_abstains_gets_zero_and_changes_nobody(case):
    ids, rewards = SPECIFICATIONS[0]
    with_abstainer = [([*ids[:1], [5, 6, 9], *ids[1:]], [rewards[0], None, *rewards[1:]]), *SPECIFICATIONS[1:]]
    (first, *rest), expected = estimated(case, with_abstainer), estimated(case, SPECIFICATIONS)
    assert first[1] == [0.0, 0.0, 0.0]
    close([[first[0], *first[2:]], *rest], expected)


@pytest.mark.parametrize("case", CASES)
def test_equal_rewards_give_exact_zeros_or_it_is_said(case):
    name, options = CASES[case]
    (config,) = [part.config(**options) for part in parts("advantage") if part.name == name]
    specifications = [*SPECIFICATIONS[:3], ([[7, 8, 8], [7]], [0.5, 0.5])]
    rows = estimated(case, specifications)[3]
    assert rows == [[0.0] * 3, [0.0]] or config.learns_from_equal_rewards()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rewards", [[None] * 3, [None, 0.7, None]])
def test_a_group_in_which_nobody_or_one_counts(case, rewards):
    """Nothing to compare with: zeros, but for the optimal token baseline, which is 0 then, so that A = r."""
    (rows, _) = estimated(case, [([[5, 6], [7], [8, 8]], rewards), SPECIFICATIONS[1]])
    alone = 0.7 if case.startswith("optimal_token_baseline") and rewards[1] else 0.0
    assert rows == [[0.0, 0.0], [pytest.approx(alone, abs=1e-7)], [0.0, 0.0]]


@pytest.mark.parametrize("case", CASES)
def test_permuting_a_group_permutes_its_rows(case):
    order = [2, 0, 3, 1]
    ids, rewards = SPECIFICATIONS[2]
    permuted = [*SPECIFICATIONS[:2], ([ids[i] for i in order], [rewards[i] for i in order]), SPECIFICATIONS[3]]
    expected, found = estimated(case, SPECIFICATIONS), estimated(case, permuted)
    close(found, [*expected[:2], [expected[2][i] for i in order], expected[3]])


@pytest.mark.parametrize("case", CASES)
def test_groups_are_independent_unless_the_statistics_are_the_batchs(case):
    alone = [rows for one in SPECIFICATIONS for rows in estimated(case, [one])]
    together = estimated(case, SPECIFICATIONS)
    if case in OVER_THE_BATCH:
        assert alone != together
    else:
        close(together, alone)


def _one_rank(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    here = SPECIFICATIONS[:3] if rank == 0 else SPECIFICATIONS[3:]
    results.put((rank, {case: estimated(case, here) for case in OVER_THE_BATCH}))
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_advantages_of_one(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    ranks = [spawn.Process(target=_one_rank, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in ranks:
        process.start()
    by_rank = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    for case in OVER_THE_BATCH:
        close(by_rank[0][case] + by_rank[1][case], estimated(case, SPECIFICATIONS))
