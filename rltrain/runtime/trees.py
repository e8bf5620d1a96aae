"""The config of a group that is sampled as trees."""

from __future__ import annotations

from dataclasses import dataclass

from rltrain.errors import require


@dataclass(kw_only=True)
class TreeConfig:
    """A group as trees, with any engine: see :mod:`rltrain.rollout.tree`."""

    rounds: int = 0  # of branching after the chains; 0 samples no tree
    chains: int = 6  # completions of a prompt that are sampled from its start, a tree each
    places: int = 2  # cuts of each tree in a round, before its tokens of the largest -log p
    branches: int = 2  # continuations from each cut

    def __post_init__(self) -> None:
        require(self.rounds >= 0, f"rollout.tree.rounds={self.rounds}: must be >= 0; 0 samples no tree")
        for key in ("chains", "places", "branches"):
            require(getattr(self, key) >= 1, f"rollout.tree.{key}={getattr(self, key)}: set at least 1")

    @property
    def leaves(self) -> int:
        """The completions of a group."""
        return self.chains * (1 + self.rounds * self.places * self.branches)

    def check(self, group_size: int) -> None:
        """``ConfigError`` unless a group has as many completions as there are leaves."""
        require(
            self.rounds == 0 or group_size == self.leaves,
            f"batch.group_size={group_size}: rollout.tree makes chains·(1 + rounds·places·branches) = {self.leaves} "
            f"completions of a prompt; set batch.group_size={self.leaves}, or rollout.tree.rounds=0",
        )
