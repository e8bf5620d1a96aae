"""Seconds of a run's rollout with guesses for its last rows (``rollout.speculate_tokens``) beside one without.

Words that do not begin with ``--`` are the run's overrides; the first prompts of its training data are sampled. A round
times each side once, ratios are medians over rounds, and the sides must sample the same tokens. ``steps`` are forwards
of the decoder.

    python scripts/bench/speculation.py data=small_integers model.path=runs/quickstart/cold_start
    python scripts/bench/speculation.py +experiment=smollm2_randomcalc batch.prompts_per_step=2 --rounds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import paired

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.data.prompts import PromptSource
from rltrain.policy.load import Policy, load_policy
from rltrain.rollout.local import LocalRollout
from rltrain.rollout.shared_prompt_decoder import SharedDecoder


class Side:
    """A rollout with its settings, its tokens, and the decoder's forwards in it."""

    def __init__(self, config: RunConfig, policy: Policy, prompts: list[Any], settings: dict[str, Any]) -> None:
        rollout: Any = dataclasses.replace(config.rollout, **settings)
        engine = LocalRollout(rollout, config.sampling, policy, seed=config.seed)
        self._sample = lambda: engine.generate(prompts, step=0, group_size=config.batch.group_size)
        self.tokens: list[Any] = []
        self.steps = 0

    def __call__(self) -> None:
        """Sample, and count."""
        originals = {name: getattr(SharedDecoder, name) for name in ("step", "verify")}
        self.steps = 0
        for name, original in originals.items():
            setattr(SharedDecoder, name, self._counted(original))
        try:
            self.tokens = [group.completion_ids for group in self._sample()]
        finally:
            for name, original in originals.items():
                setattr(SharedDecoder, name, original)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(decoder: SharedDecoder, tokens: Any) -> Any:
            self.steps += 1
            return original(decoder, tokens)

        return method


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 4, 8], help="guesses of a row")
    parser.add_argument("--sources", nargs="+", default=["prompt"], help="speculate_from: prompt, recycling")
    parser.add_argument("--rows", type=int, default=8, help="guess once so few rows are left")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options, overrides = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    config = cli.compose(overrides)
    policy = load_policy(config.model)
    prompts = PromptSource(config, policy).next(0)[0]
    settings: dict[str, dict[str, Any]] = {"0": {"speculate_tokens": 0}}
    for source in options.sources:
        chosen = {"speculate_rows": options.rows, "speculate_from": source}
        settings |= {f"{n} {source}": {"speculate_tokens": n} | chosen for n in options.tokens}
    sides = {count: Side(config, policy, prompts, chosen) for count, chosen in settings.items()}
    times = paired(sides, options.rounds, time.perf_counter)
    without = sides["0"].tokens
    lengths = sorted(len(ids) for group in without for ids in group)
    print(f"{len(lengths)} completions of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")
    print("| guesses | steps | s | / without |")
    print("|---|---|---|---|")
    for count, side in sides.items():
        assert side.tokens == without, f"{count} guesses: other tokens"
        ratio = statistics.median(own / none for own, none in zip(times[count], times["0"], strict=True))
        print(f"| {count} | {side.steps} | {statistics.median(times[count]):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
