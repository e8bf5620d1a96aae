"""Problems per second of RandomCalculation, beside a plain recursive generator, in one process.

The plain one draws the same kind of tree with ``random`` and ``fractions.Fraction`` and prints it fully parenthesised:
no splits, no decimal, no worked solution. The ratio is what those cost.

    python scripts/bench/random_calculation.py [--steps 5] [--count 2000] [--rounds 7]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial

from rltrain.data.random_calculation import generate


def plain_atom(draw: random.Random) -> tuple[str, Fraction]:
    """A number as printed, and its value."""
    kind = draw.randrange(4)
    if kind == 0:
        value = draw.randint(0, 100)
        return str(value), Fraction(value)
    if kind == 1:
        over, under = draw.randint(1, 99), draw.randint(2, 9)
        return f"\\frac{{{over}}}{{{under}}}", Fraction(over, under)
    base = draw.randint(2, 99)
    return f"{base}^{{{kind}}}", Fraction(base**kind)


def plain(steps: int, draw: random.Random) -> tuple[str, Fraction]:
    """An expression as printed, and its value."""
    if steps == 0:
        return plain_atom(draw)
    left_steps = draw.randrange(steps)
    (left, a), (right, b) = plain(left_steps, draw), plain(steps - 1 - left_steps, draw)
    while (operator := draw.choice("+-*/")) == "/" and b == 0:
        pass
    value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[operator]()
    return f"({left} {operator} {right})", value


def per_second(make: Callable[[int], object], count: int, rounds: int) -> float:
    """Median over rounds, by CPU time of this process; every round makes other problems."""
    rates = []
    for seed in range(rounds):
        start = time.process_time()
        make(seed)
        rates.append(count / (time.process_time() - start))
    return statistics.median(rates)


def generate_seeded(steps: int, count: int, split: str, preset: str, seed: int) -> object:
    """The function under test, with the seed as its last argument."""
    return generate(steps, count, seed=seed, split=split, preset=preset)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    steps, count, rounds = options.steps, options.count, options.rounds

    def plainly(seed: int) -> object:
        draw = random.Random(seed)
        return [plain(steps, draw) for _ in range(count)]

    baseline = per_second(plainly, count, rounds)
    print(f"{steps} steps, {count} problems, median of {rounds} rounds, CPU time of one thread")
    print(f"{'generator':<26}{'problems/s':>12}{'ratio':>8}")
    print(f"{'plain recursion':<26}{baseline:>12,.0f}{1:>8.2f}")
    for preset in ("paper", "integers"):
        for split in ("train", "test"):
            make = partial(generate_seeded, steps, count, split, preset)
            rate = per_second(make, count, rounds)
            print(f"{f'{preset} {split}':<26}{rate:>12,.0f}{rate / baseline:>8.2f}")


if __name__ == "__main__":
    main()
