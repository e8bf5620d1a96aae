"""Mutated golds: what differs is never right, and what a gold may be written as is.

The whole run has 3,000 golds and about 30,000 mutants; from the root of the checkout:
RLTRAIN_MUTATIONS=3000 pytest tests/unit/rewards/test_verifier_mutations.py -s
"""

import os
import random
from collections import Counter

import mutated_golds as golds
import pytest

from rltrain.rewards.math import verify

GOLDS = int(os.environ.get("RLTRAIN_MUTATIONS", 150))


def run(count, seed):
    """``(mutants by kind, wrong acceptances, golds that do not grade themselves or another spelling 1)``."""
    draw = random.Random(seed)
    tried, wrong, lost = Counter(), [], []
    for _ in range(count):
        gold = golds.draw_gold(draw)
        text = golds.latex(gold, draw)
        spellings = (text, golds.latex(gold, draw))
        lost += [(text, other) for other in spellings if verify(rf"\boxed{{{other}}}", text).score != 1.0]
        for kind, mutant in golds.mutants(gold, draw):
            answer = golds.latex(mutant, draw)
            verdict = verify(rf"\boxed{{{answer}}}", text)
            tried[kind] += 1
            if verdict.score is None or (verdict.score == 1.0 and not golds.same(gold, mutant)):
                wrong.append((kind, text, answer, verdict))
    return tried, wrong, lost


def test_mutants_are_wrong_and_spellings_right():
    tried, wrong, lost = run(GOLDS, seed=20)
    print(f"{GOLDS} golds, {sum(tried.values())} mutants {dict(tried)}: {len(wrong)} wrong, {len(lost)} lost")
    assert set(tried) == {"drop", "swap", "sign", "exponent", "index", "number", "side"}
    assert len(wrong) * 5000 < sum(tried.values()), wrong[:10]
    assert lost == []


def tree(kind, *parts, value=None):
    return golds.Tree(kind, value, parts)


def test_the_oracle_is_exact():
    x, one, two = golds.symbol("x"), golds.number(1), golds.number(2)
    square = tree("power", tree("add", x, one), two)
    expanded = tree("add", tree("power", x, two), tree("multiply", two, x), one)
    assert golds.same(golds.Gold("expression", (square,)), golds.Gold("expression", (expanded,)))
    assert not golds.same(golds.Gold("expression", (square,)), golds.Gold("expression", (tree("power", x, two),)))
    line, double = golds.Gold("equation", (x, one)), golds.Gold("equation", (tree("multiply", two, x), two))
    assert golds.same(line, double) and not golds.same(line, golds.Gold("equation", (x, two)))
    assert golds.same(golds.Gold("list", (one, two)), golds.Gold("list", (two, one)))
    assert not golds.same(golds.Gold("tuple", (one, two)), golds.Gold("tuple", (two, one)))
    assert not golds.same(golds.Gold("list", (one, one, two)), golds.Gold("list", (one, two, two)))


@pytest.mark.parametrize("kind", ["drop", "sign", "exponent", "index", "number"])
def test_a_change_changes_the_tree(kind):
    draw = random.Random(1)
    for _ in range(50):
        gold = golds.draw_gold(draw)
        for name, mutant in golds.mutants(gold, draw):
            assert name != kind or mutant != gold
