"""What surrounds the work of a step: stage names, times, deadlines, whole weights, a checkpoint before a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rltrain.runs.metrics import Accumulator
from rltrain.runtime import dist
from rltrain.runtime.interrupts import RolloutLost


@dataclass(frozen=True, kw_only=True)
class Scope:
    """One step, which counts from 0. Its metrics gather in ``metrics``.

    ``deadline_s`` gives the seconds of a key of ``watchdog``. ``weights`` holds the policy's weights whole where the
    step asks the policy itself. ``save`` writes a checkpoint of so many steps, and returns its folder, or None where
    there is nothing new to save.
    """

    step: int
    metrics: Accumulator
    deadline_s: Callable[[str], float]
    weights: Callable[[], AbstractContextManager[None]]
    save: Callable[[int], Path | None]

    @contextmanager
    def stage(self, name: str, deadline: str) -> Iterator[None]:
        """Time a stage as ``timing_s/<name>``, name it for whoever waits in it, and give it a deadline."""
        with self.metrics.timed(name), self.named(name, deadline):
            yield

    def named(self, name: str, deadline: str) -> AbstractContextManager[None]:
        """The same without the time."""
        return dist.stage(f"{name} of step {self.step + 1}", self.deadline_s(deadline))

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Around all that asks the rollout engine or the policy before the optimiser moves."""
        with self.saved_if_lost(self.step), self.whole_weights():
            yield

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Gather the policy's weights (ZeRO 3) for as long as the block takes."""
        with ExitStack() as held:
            with dist.stage("gathering the weights", self.deadline_s("collective")):
                held.enter_context(self.weights())
            yield

    @contextmanager
    def saved_if_lost(self, steps: int) -> Iterator[None]:
        """Where no rollout engine is left, save what ``steps`` steps have taught before the error ends the run."""
        try:
            yield
        except RolloutLost as error:
            if (path := self.save(steps)) is None:
                raise
            raise RolloutLost(f"{error}; saved to {path}, the same command resumes it") from error
