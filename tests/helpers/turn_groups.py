"""A group whose completions have turns, made by hand."""

import math

import torch

from rltrain.types import Advantages, Completion, Group, Problem, Prompt, Turn

NAN = math.nan


class Letters:
    """A tokenizer of letters: id 1 is ``a``."""

    def decode(self, ids):
        return "".join(chr(96 + token) for token in ids)


def turn(written, observed=0, **facts):
    return Turn(written=written, observed=observed, **facts)


def called():
    """Writes ``ab``, reads ``c``, writes ``d``."""
    return Completion(
        token_ids=(1, 2, 3, 4),
        logprobs=(-0.5, -0.25, NAN, -1.0),
        finish="stop",
        text="d",
        turns=(
            turn(2, 1, called=True, reward=0.5, latency_s=0.25, text="ab", reply="c", state_key="start"),
            turn(1, text="d", state_key="asked"),
        ),
    )


def answered():
    """Writes ``be`` at once."""
    return Completion(
        token_ids=(2, 5), logprobs=(-0.5, -0.5), finish="stop", text="be", turns=(turn(2, text="be", latency_s=0.125),)
    )


def failed():
    """Writes ``a``, reads ``c`` after an error, then ``a`` in a reply that came too late."""
    return Completion(
        token_ids=(1, 3, 1),
        logprobs=(-0.5, NAN, -0.5),
        finish="stop",
        text="a",
        failed="timeout",
        turns=(
            turn(1, 1, called=True, failure="error", reward=-1.0, latency_s=0.5, text="a", reply="c"),
            turn(1, called=True, failure="timeout", latency_s=8.0, text="a"),
        ),
    )


def group(*completions):
    problem = Problem(id="p", prompt="x", answer="d")
    rewards_G = torch.arange(float(len(completions)))
    return Group(
        prompt=Prompt(problem=problem, token_ids=(24,)),
        completions=completions,
        rewards_G=rewards_G,
        reward_parts={"answer": rewards_G},
    )


def advantages(one):
    """1 at each written id and 0 at each observed one."""
    return Advantages(values=[[torch.tensor(c.written_T, dtype=torch.float64) for c in one.completions]])
