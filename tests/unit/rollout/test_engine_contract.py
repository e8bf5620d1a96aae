"""What an engine from outside the package must have, and when it is looked at."""

from dataclasses import dataclass

import pytest

from rltrain.config import RolloutConfig, SamplingConfig
from rltrain.errors import ConfigError
from rltrain.registry import register
from rltrain.rollout import build_engine, engine_of


@dataclass(kw_only=True)
class UserRolloutConfig(RolloutConfig):
    """With ``says`` the engine says in ``__init__`` whether its log-probs are the trainer's."""

    says: bool = True


@register("rollout", "from_outside", UserRolloutConfig)
class UserRollout:
    uses_policy = False

    def __init__(self, config, sampling, policy, *, seed):
        if config.says:
            self.same_distribution = seed == 3

    def generate(self, prompts, *, step, group_size, sampling=None):
        raise NotImplementedError

    def sync(self, policy):
        raise NotImplementedError

    def probe(self, requests, settings):
        raise NotImplementedError

    def continue_(self, requests, *, step):
        raise NotImplementedError


@pytest.mark.parametrize(("seed", "same"), [(3, True), (4, False)])
def test_an_engine_may_decide_on_same_distribution_when_it_is_built(seed, same):
    assert engine_of(UserRolloutConfig()) is UserRollout
    assert build_engine(UserRolloutConfig(), SamplingConfig(), None, seed=seed).same_distribution is same


def test_an_engine_without_same_distribution_is_refused():
    message = "rollout=from_outside: its class has no same_distribution; see rltrain.rollout.Rollout"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        build_engine(UserRolloutConfig(says=False), SamplingConfig(), None, seed=3)
