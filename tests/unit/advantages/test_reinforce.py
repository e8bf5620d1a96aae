import multiprocessing
import statistics

import pytest
import torch
from advantage_groups import make_group

from rltrain.advantages.reinforce_pp_baseline import ReinforcePPBaselineConfig, reinforce_pp_baseline
from rltrain.errors import ConfigError
from rltrain.types import Context

GROUPS = [
    ([[1, 2, 3], [1], [2, 2]], [1.0, 0.0, 0.0]),
    ([[4], [5, 5, 5, 5]], [1.0, 0.0]),
    ([[6, 6], [7]], [0.5, 0.5]),
    ([[8], [9], [9, 9, 9]], [1.0, 0.0, None]),
]


def whitened(specifications):
    groups = [make_group(ids, rewards) for ids, rewards in specifications]
    values = reinforce_pp_baseline(groups, ReinforcePPBaselineConfig(), Context()).values
    return [[row.tolist() for row in rows] for rows in values]


def test_hand_computed():
    centred = [[2 / 3] * 3, [-1 / 3], [-1 / 3] * 2, [0.5], [-0.5] * 4, [0.0] * 2, [0.0], [0.5], [-0.5]]
    tokens = [value for row in centred for value in row]
    mean, std = statistics.fmean(tokens), statistics.pstdev(tokens)
    expected = [[(value - mean) / (std + 1e-8) for value in row] for row in centred] + [[0.0] * 3]  # the abstainer
    found = [row for rows in whitened(GROUPS) for row in rows]
    for row, reference in zip(found, expected, strict=True):
        assert row == pytest.approx(reference, abs=1e-12)


def test_equal_rewards_everywhere_give_exact_zeros():
    assert whitened([([[1, 2], [3]], [0.1, 0.1]), ([[1], [3]], [0.7, 0.7])]) == [[[0.0, 0.0], [0.0]], [[0.0], [0.0]]]


def test_no_groups_and_nobody_who_counts():
    assert whitened([]) == []
    assert whitened([([[1, 2], [3]], [None, None])]) == [[[0.0, 0.0], [0.0]]]


def _one_rank(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results.put((rank, whitened(GROUPS[:3] if rank == 0 else GROUPS[3:])))
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
    found = [row for rank in (0, 1) for rows in by_rank[rank] for row in rows]
    for row, reference in zip(found, [row for rows in whitened(GROUPS) for row in rows], strict=True):
        assert row == pytest.approx(reference, abs=1e-12)


def test_eps_zero_is_refused():
    with pytest.raises(ConfigError, match=r"advantage\.eps=0"):
        ReinforcePPBaselineConfig(eps=0)
