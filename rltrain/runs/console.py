"""Progress of a run for a person: the stages of :mod:`rltrain.runtime.progress` with a run's numbers. Rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rltrain.config import RunConfig
from rltrain.runtime import dist, progress
from rltrain.types import Group

# Metrics of a step under short names, the most important first: a terminal shows those that fit.
SHOWN = {
    "reward": "reward",
    "eval_accuracy": "acc",
    "completions/mean_length": "len",
    "entropy/sampled": "ent",
    "grad_norm": "grad",
    "perf/throughput": "tok/s",
}
SAMPLES, SAMPLE_COLUMNS = 3, 100  # completions that are shown, and their length in characters


class Console:
    """Call ``update`` once a step and ``close`` at the end."""

    def __init__(self, config: RunConfig, *, first_step: int) -> None:
        self._config, self._first_step = config, first_step
        self._accuracy: float | None = None  # of the newest evaluation
        self._evaluation_start_s = self._evaluation_s = 0.0
        self._bar: progress.Bar | None = None

    def announce_evaluation(self, step: int, problems: int) -> None:
        """An evaluation begins; it takes about as long as the one before."""
        if dist.is_main():
            self._evaluation_start_s = time.monotonic()
            about = f", about {progress.clock(self._evaluation_s)}" if self._evaluation_s else ""
            config = self._config.evaluation
            drawn = "greedy" if config.temperature == 0 else f"{config.samples} samples each"
            progress.say("evaluation", f"after step {step}: {problems} held-out problems, {drawn}{about}")

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics after ``step`` steps are done."""
        if not dist.is_main():
            return
        if "eval_accuracy" in values:
            self._accuracy = values["eval_accuracy"]
            self._evaluation_s = time.monotonic() - self._evaluation_start_s
            error = values.get("eval_accuracy_se")
            spread = "" if error is None else f" ± {error:.3f}"
            took = f"{progress.clock(self._evaluation_s)}"
            progress.say("evaluation", f"after step {step}: accuracy {self._accuracy:.3f}{spread}, took {took}")
        if self._bar is None:
            self.begin()
        if step > self._first_step and self._bar is not None:
            self._bar.update(step, self._fields(values))

    def begin(self) -> None:
        """Announce the training: once the evaluation before it is done, or at once where a run is resumed."""
        batch, steps = self._config.batch, self._config.steps
        if steps > self._first_step:
            size = f"{batch.prompts_per_step} problems x {batch.group_size} completions"
            since = f" from step {self._first_step} on" if self._first_step else ""
            progress.say("rl", f"{steps - self._first_step} steps of {size}{since}")
            self._bar = progress.Bar("rl", steps, done=self._first_step)

    def _fields(self, values: Mapping[str, float]) -> list[str]:
        known = dict(values)
        if self._accuracy is not None:
            known["eval_accuracy"] = self._accuracy
        return [f"{short} {known[name]:.4g}" for name, short in SHOWN.items() if name in known]

    def show_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Some completions of the step's first problem with their rewards, where ``tracking.print_samples`` is due."""
        every = self._config.tracking.print_samples
        if dist.is_main() and every and step % every == 0 and groups:
            progress.say("sample", f"step {step}: {sampled(groups[0])}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def sampled(group: Group) -> str:
    """A group's problem, and its first completions behind their rewards, a line each."""
    assert group.rewards_G is not None
    prompt = group.prompt.problem.prompt
    asked = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    rewards = group.rewards_G.tolist()
    shown = zip(rewards[:SAMPLES], group.completions[:SAMPLES], strict=True)
    return "\n".join([shortened(asked), *(f"{reward:6.3g}  {shortened(each.transcript)}" for reward, each in shown)])


def shortened(text: str) -> str:
    """A text in one line of at most ``SAMPLE_COLUMNS`` characters, its middle left out."""
    flat = text.strip().replace("\n", "\\n")
    half = (SAMPLE_COLUMNS - 3) // 2
    return flat if len(flat) <= SAMPLE_COLUMNS else f"{flat[:half]} … {flat[-half:]}"
