"""Verdicts per second against math-verify in the same process, and the latency of every hostile case.

    python scripts/bench/verifier.py [--repeats 5]

The mix: 120 golds of 16 samples each, about half of them right; 80 % plain numbers, 12 % LaTeX, 8 % junk, after 250 to
2,500 characters of reasoning. One core; after one run to warm up, our caches are cold at the start of each repeat.
math-verify is used as its README shows, without time-outs (a favour to it).
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import time
from pathlib import Path

from rltrain.rewards import math as verifier
from rltrain.rewards.verifier import cas

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
import verifier_hostile

LATEX = [
    (r"\frac{3}{4}", [r"\frac{3}{4}", r"\dfrac34", "0.75", r"\frac{3}{5}"]),
    (r"2\sqrt{3}", [r"2\sqrt{3}", r"\sqrt{12}", r"3\sqrt{2}", r"2\sqrt3"]),
    (r"x^2+2x+1", [r"(x+1)^2", "x^2+2x+1", "x^2-2x+1", "1+2x+x^2"]),
    (r"(1,2)", ["(1,2)", "(1, 2)", "(2,1)", "[1,2]"]),
    (r"\frac{\pi}{4}", [r"\frac{\pi}{4}", r"\pi/4", r"\frac{\pi}{3}", "0.785"]),
]
STEPS = [
    "First we simplify the left side, which gives $3x + 7 = 22$ and so $x = 5$. ",
    "Let me check this: 12 * 4 = 48, and 48 + 9 = 57. ",
    r"By the formula, $\frac{n(n+1)}{2} = 55$ for $n = 10$. ",
    "Wait, I should look at the second condition again before going on. ",
    "There are 24 ways to choose the first pair and 6 ways to choose the second. ",
]
JUNK = ["", "I am not sure.", r"\boxed{", r"\boxed{\text{no idea}}", "so " * 300, r"\boxed{5 \text{ or } 6}", "Hm"]


def mix(seed: int) -> list[tuple[str, str]]:
    """(completion, gold) pairs, sixteen in a row for each gold, with some reasoning before the box."""
    draw = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    for _ in range(120):
        kind = draw.random()
        gold, answers = draw.choice(LATEX) if kind > 0.88 else _number(draw)
        for _ in range(16):
            answer = draw.choice(JUNK) if kind < 0.08 else rf"\boxed{{{draw.choice(answers)}}}"
            pairs.append((f"{''.join(draw.choices(STEPS, k=draw.randrange(4, 40)))}So the answer is {answer}", gold))
    return pairs


def _number(draw: random.Random) -> tuple[str, list[str]]:
    value = draw.randrange(-5000, 100_000)
    if draw.random() < 0.2:
        decimal = f"{value / 100:.2f}"
        return decimal, [decimal, decimal, f"{value / 100 + 1:.2f}", rf"\frac{{{value}}}{{100}}"]
    return str(value), [str(value), f"{value:,}", str(value + 1), str(value * 10)]


def ours(pairs: list[tuple[str, str]]) -> list[float]:
    """Seconds of each verdict, caches cold at the start."""
    for cache in (verifier._compared, verifier._read_gold, verifier._is_readable, verifier._read_answers, cas._known):
        cache.cache_clear()
    return [_timed(lambda c=completion, g=gold: verifier.verify(c, g)) for completion, gold in pairs]


def theirs(pairs: list[tuple[str, str]]) -> list[float]:
    """Seconds of each math-verify verdict; the gold is parsed once for its sixteen samples."""
    import math_verify

    logging.disable(logging.WARNING)  # it warns once that the time-outs are off
    golds: dict[str, list] = {}

    def one(completion: str, gold: str) -> bool:
        if gold not in golds:
            golds[gold] = math_verify.parse(f"${gold}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        answer = math_verify.parse(completion, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        return math_verify.verify(golds[gold], answer, timeout_seconds=None)

    return [_timed(lambda c=completion, g=gold: one(c, g)) for completion, gold in pairs]


def _timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def quantile_ms(seconds: list[float], share: float) -> float:
    """The value that ``share`` of the verdicts stay under, in milliseconds."""
    return 1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def hostile() -> list[tuple[float, str, str]]:
    """(seconds, status, answer) of every hostile case, slowest first; the CAS child is running already."""
    verifier.verify(r"\boxed{\mathbb{R}\setminus\{0\}}", r"(-\infty,0)\cup(0,\infty)")
    rows = []
    cases = [(gold, rf"\boxed{{{answer}}}") for gold, answer, _ in verifier_hostile.HOSTILE]
    for gold, completion in cases + [(gold, output) for gold, output, _ in verifier_hostile.OUTPUTS]:
        start = time.perf_counter()
        verdict = verifier.verify(completion, gold)
        rows.append((time.perf_counter() - start, verdict.status, completion[:50].encode("ascii", "replace").decode()))
    return sorted(rows, reverse=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    ratios = []
    ours(mix(repeats)), theirs(mix(repeats))  # imports, the child process, math-verify's own caches
    for seed in range(repeats):
        pairs = mix(seed)
        mine, peer = ours(pairs), theirs(pairs)
        ratios.append(sum(peer) / sum(mine))
        print(
            f"run {seed}: rltrain {len(pairs) / sum(mine):7.0f} verdicts/s (p50 {quantile_ms(mine, 0.5):.3f} ms, "
            f"p99 {quantile_ms(mine, 0.99):.3f} ms)   math-verify {len(pairs) / sum(peer):6.0f}/s "
            f"(p50 {quantile_ms(peer, 0.5):.2f} ms, p99 {quantile_ms(peer, 0.99):.2f} ms)   ratio {ratios[-1]:.1f}x"
        )
    print(f"median ratio {statistics.median(ratios):.1f}x")
    rows = hostile()
    print(f"\n{len(rows)} hostile cases, slowest first (seconds, status, answer)")
    for seconds, status, answer in rows[:10]:
        print(f"{seconds:8.4f}  {status:12s} {answer!r}")


if __name__ == "__main__":
    main()
