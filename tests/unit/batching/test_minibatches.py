"""Which groups make which optimiser step."""

import hashlib
import itertools

import pytest

from rltrain.batching.minibatches import split
from rltrain.config import BatchConfig
from rltrain.errors import ConfigError
from rltrain.runtime import dist


def test_one_minibatch_keeps_the_order():
    assert split(5, 1, seed=3, step=7) == [[0, 1, 2, 3, 4]]


def test_the_order_is_the_hash_of_seed_step_and_index():
    """By hand: sort 0..4 by BLAKE2b-64 of "minibatch/3/7/i", cut at 5·1//2 = 2."""
    digests = {i: hashlib.blake2b(f"minibatch/3/7/{i}".encode(), digest_size=8).hexdigest() for i in range(5)}
    order = sorted(digests, key=digests.get)
    assert split(5, 2, seed=3, step=7) == [sorted(order[:2]), sorted(order[2:])]


def test_every_group_is_in_one_minibatch_and_steps_differ():
    parts = {step: split(12, 4, seed=0, step=step) for step in range(20)}
    assert all(sorted(itertools.chain(*made)) == list(range(12)) for made in parts.values())
    assert all([len(part) for part in made] == [3, 3, 3, 3] for made in parts.values())
    assert len({str(made) for made in parts.values()}) == 20


@pytest.mark.parametrize("counts", [[6, 6], [4, 8], [12, 0], [3, 4, 5]])
def test_ranks_share_the_minibatches_of_one_rank(monkeypatch, counts):
    alone, joined = split(12, 3, seed=1, step=2), [[], [], []]
    for rank, count in enumerate(counts):
        monkeypatch.setattr(dist, "gather_objects", lambda value, name: counts)
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        for part, indices in enumerate(split(count, 3, seed=1, step=2)):
            joined[part] += [sum(counts[:rank]) + index for index in indices]
    assert joined == alone


def test_a_number_that_does_not_divide_the_prompts_is_refused():
    assert BatchConfig(prompts_per_step=8, minibatches=4, update_epochs=3).updates == 12
    with pytest.raises(ConfigError, match="batch.minibatches=3: does not divide batch.prompts_per_step=8"):
        BatchConfig(prompts_per_step=8, minibatches=3)
