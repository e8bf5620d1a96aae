"""Reward functions as users write them, wrong in every way that counts."""

import time


def raises(groups, options, context):
    raise RuntimeError("the grader's server is down")


def hangs(groups, options, context):
    time.sleep(600)


def one_short(groups, options, context):
    return [[1.0] * (len(group.completions) - 1) for group in groups]


def not_numbers(groups, options, context):
    return [[float("nan"), None, *[float(i % 2) for i in range(len(group.completions) - 2)]] for group in groups]


def leaves(groups, options, context):
    raise SystemExit(3)


def later(function):
    """Right at step 0, then the function."""

    def reward(groups, options, context):
        if context.step == 0:
            return [[float(i % 2) for i in range(len(group.completions))] for group in groups]
        return function(groups, options, context)

    return reward


raises_later, one_short_later, leaves_later = later(raises), later(one_short), later(leaves)
