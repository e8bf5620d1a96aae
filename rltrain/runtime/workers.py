"""The limits of the processes that compute an environment's replies. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from rltrain.errors import require


@dataclass(kw_only=True)
class WorkersConfig:
    """Deadlines and limits of replies; what exceeds them costs one reply."""

    reply_timeout_s: float = 10.0  # of one reply
    batch_timeout_s: float = 120.0  # of a reply with its wait for a worker
    memory_mib: int = 1024  # address space of a worker
    workers: int = 2  # processes of a rank that compute replies
    network: bool = False  # let workers reach the network, with the run's environment variables

    def __post_init__(self) -> None:
        for key in ("reply_timeout_s", "batch_timeout_s"):
            require(getattr(self, key) > 0, f"environment.{key}={getattr(self, key)}: must be > 0 seconds")
        for key in ("memory_mib", "workers"):
            require(getattr(self, key) >= 1, f"environment.{key}={getattr(self, key)}: set at least 1")

    def replies_here(self) -> bool:
        """Whether threads of the run compute the replies, because the environment has processes of its own."""
        return False

    def check_wait(self, deadline_s: float) -> None:
        """``ConfigError`` where other ranks would give up waiting before a reply's own deadlines."""
        waits_s = self.batch_timeout_s + self.reply_timeout_s
        require(
            waits_s <= deadline_s / 2,
            f"environment.batch_timeout_s + reply_timeout_s = {waits_s:g}: other ranks wait for at most "
            f"deadline_s={deadline_s:g}; set them to half of that or less",
        )
