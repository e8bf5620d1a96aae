"""What turns cost a rollout per generated token, and how much of an environment's latency other rows' decoding hides.

python scripts/bench/turns.py [--prompts 16 --group 8 --tokens 128 --repeats 3 --sleep 0.02]

The policy is the tiny model with random weights, which writes on and on: no id ends a completion, and of its tokens one
in ``--turn`` ends a turn. Sides alternate, and the least processor time of each counts. Without a tool there are two
sides: as many tokens a completion, all of equal length; and as many completions as there were turns, which end where
those do.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import string
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from rltrain import cli
from rltrain.config import SamplingConfig
from rltrain.environments.custom import CustomEnvironmentConfig
from rltrain.environments.pool import EnvironmentPool
from rltrain.policy.load import load_policy
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.rollout.turns import TurnRollout
from rltrain.types import Environment, Group, Problem, Prompt, Reply


class Answering(Environment):
    """Answers every turn with the same text, ``sleep_s`` late."""

    role = None

    def __init__(self, stop: list[str], reply: str, sleep_s: float) -> None:
        self.stop, self.reply, self.sleep_s = tuple(stop), reply, sleep_s

    def start(self, problem: Problem) -> int:
        return 0

    def respond(self, state: Any, text: str) -> Reply:
        time.sleep(self.sleep_s)
        return Reply(text=self.reply, state=state + 1, called=True)


class WatchedFuture:
    """A reply, and the time that was spent waiting for it."""

    def __init__(self, future: Future[Any], watched: Watched) -> None:
        self.future, self.watched = future, watched

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> Any:
        start = time.perf_counter()
        answer = self.future.result()
        self.watched.waited_s += time.perf_counter() - start
        return answer


class Watched:
    """The pool's answers; ``waited_s`` is how long they were waited for."""

    def __init__(self, pool: EnvironmentPool) -> None:
        self.pool, self.environment, self.waited_s = pool, pool.environment, 0.0

    def start(self, problems: Sequence[Problem]) -> list[Any]:
        return [WatchedFuture(future, self) for future in self.pool.start(problems)]

    def submit(self, requests: Sequence[tuple[Any, str]]) -> list[Any]:
        return [WatchedFuture(future, self) for future in self.pool.submit(requests)]


class Sides:
    """The same engine with and without an environment."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.config = arguments, cli.compose(["+experiment=quickstart"])
        policy = load_policy(self.config.model)
        self.policy = dataclasses.replace(policy, stop_token_ids=(-1,))
        self.sampling = SamplingConfig(max_new_tokens=arguments.tokens, max_prompt_tokens=64)
        self.prompts = [
            Prompt(
                problem=Problem(id=str(index), prompt="", answer=""),
                token_ids=tuple(policy.tokenizer(f"{index}+17*3=", add_special_tokens=False)["input_ids"]),
            )
            for index in range(arguments.prompts)
        ]

        self.ends = self._ends()

    def _ends(self) -> list[str]:
        """Letters that together are one in ``--turn`` of the tokens that the model writes."""
        texts = "".join(one.text for group in self.run(self.engine()) for one in group.completions)
        left, ends = len(texts) / self.arguments.turn, []
        for letter in sorted(string.ascii_letters, key=texts.count, reverse=True):
            if texts.count(letter) <= left:
                left, ends = left - texts.count(letter), [*ends, letter]
        return ends

    def engine(self, reply_steps: int = 0) -> LocalRollout:
        return LocalRollout(LocalRolloutConfig(reply_steps=reply_steps), self.sampling, self.policy, seed=0)

    def talking(self, sleep_s: float, reply_steps: int = 0) -> TurnRollout:
        options = {"stop": self.ends, "reply": self.arguments.reply, "sleep_s": sleep_s}
        config = CustomEnvironmentConfig(
            import_path="turns:Answering",
            options=options,
            max_turns=self.arguments.tokens,
            workers=self.arguments.workers,
            reply_tokens=16,
        )
        pool = EnvironmentPool(config)
        for future in pool.start([prompt.problem for prompt in self.prompts for _ in range(self.arguments.workers)]):
            future.result()  # the workers have started
        return TurnRollout(
            self.engine(reply_steps), Watched(pool), config, self.sampling, self.policy, model=self.config.model, seed=0
        )

    def run(self, rollout: Any) -> list[Group]:
        return rollout.generate(self.prompts, step=0, group_size=self.arguments.group)


def cpu_seconds_of(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least processor time of this process for each side; the first round warms up."""
    least = dict.fromkeys(sides, math.inf)
    for round_ in range(repeats + 1):
        for name, run in sides.items():
            start = time.process_time()
            run()
            if round_:
                least[name] = min(least[name], time.process_time() - start)
    return least


def main() -> None:
    """Run the sides and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 16), ("group", 8), ("tokens", 128), ("repeats", 3), ("turn", 64), ("workers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--reply", default="=51")
    parser.add_argument("--sleep", type=float, default=0.02, help="seconds")
    parser.add_argument("--reply-steps", type=int, default=16, help="rollout.reply_steps of the side that hides more")
    arguments = parser.parse_args()
    sides = Sides(arguments)
    print_cost(sides, arguments)
    for reply_steps in (0, arguments.reply_steps):
        print_hidden(sides, arguments, reply_steps)


def print_cost(sides: Sides, arguments: argparse.Namespace) -> None:
    """Processor time per generated token, with a tool and without."""
    plain, tool = sides.engine(), sides.talking(0.0)
    completions = [one for group in sides.run(tool) for one in group.completions]
    written, turns = sum(one.written_tokens for one in completions), sum(len(one.turns) for one in completions)
    short = SamplingConfig(max_new_tokens=arguments.tokens, stop=sides.ends)
    single = LocalRollout(LocalRolloutConfig(max_rows=len(completions)), short, sides.policy, seed=0)
    group_size = max(1, round(turns / arguments.prompts))

    def singly() -> list[Group]:
        return single.generate(sides.prompts, step=0, group_size=group_size)

    alone = sum(len(one.token_ids) for group in singly() for one in group.completions)
    generated = len(completions) * arguments.tokens
    runs = {"plain": lambda: sides.run(plain), "tool": lambda: sides.run(tool), "single": singly}
    seconds = cpu_seconds_of(runs, arguments.repeats)
    per_token = seconds["tool"] / written
    print(
        f"{len(completions)} completions of {arguments.tokens} tokens, {turns} turns of {written / turns:.1f} written "
        f"tokens, {generated - written} observed"
    )
    print(
        f"per generated token, with a tool / without: {per_token / (seconds['single'] / alone):.2f} of completions "
        f"that end as turns do, {per_token / (seconds['plain'] / generated):.2f} of equal ones"
    )


def print_hidden(sides: Sides, arguments: argparse.Namespace, reply_steps: int) -> None:
    """How long the engine stood still for replies that come late, of all the time that they took."""
    rollout = sides.talking(arguments.sleep, reply_steps)
    watched = rollout.answers
    assert isinstance(watched, Watched)
    watched.waited_s = 0.0
    turns = sum(one.turns[-1].called + len(one.turns) - 1 for group in sides.run(rollout) for one in group.completions)
    slept = turns * arguments.sleep / arguments.workers
    hidden = 1 - min(1.0, watched.waited_s / slept)
    print(
        f"rollout.reply_steps={reply_steps}: {turns} replies of {arguments.sleep:g} s by {arguments.workers} workers, "
        f"{slept:.2f} s; the engine waited {watched.waited_s:.2f} s, {hidden:.0%} hidden"
    )


if __name__ == "__main__":
    main()
