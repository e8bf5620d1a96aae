"""Which completion to go on with, by what the introspection head predicts (after ZIP-RC, 2512.01457).

Completions of a problem are drawn one stretch of tokens at a time. Before each stretch the utility of finishing
completion i, started or not, is

    u_i = E[max(r_i, r_F)] - E[max r_F] - price·E[L_i],      F the finished ones, all rewards independent

with the head's p(r) at the last state of a finished completion and at the present state of another. The best i is
drawn on if u_i > 0, or if nothing is finished. Else sampling ends. The paper's utility has a term for latency, too:
here a single completion is drawn at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rltrain.errors import RunError

LEAST_PRICE, MOST_PRICE, HALVINGS = 1e-6, 1.0, 14


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted:
    """A whole completion, whether it is right, and what the head predicted at the state before each of its T tokens.

    ``chances`` are p(reward bin), T rows; ``left`` the expected remaining tokens.
    """

    chances: Sequence[Sequence[float]]
    left: Sequence[float]
    right: float
    text: str

    @classmethod
    def of(cls, joint_TBR: Tensor, middles_B: Tensor, *, right: float, text: str) -> Predicted:
        """From the joint p(length bin, reward bin)."""
        return cls(
            chances=joint_TBR.sum(1).tolist(), left=(joint_TBR.sum(2) @ middles_B).tolist(), right=right, text=text
        )

    @property
    def tokens(self) -> int:
        return len(self.left)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn of a problem's completions: tokens in all, and the finished ones with their predicted rewards."""

    tokens: int
    finished: Sequence[int]
    values: Sequence[float]


def expected_max(chances: Sequence[Sequence[float]], rewards: Sequence[float]) -> float:
    """E[max of independent rewards]: ``Σ_k r_k·(F_k - F_{k-1})`` with F the product of their distribution functions."""
    total, before = 0.0, 0.0
    running = [0.0] * len(chances)
    for k, reward in enumerate(rewards):
        product = 1.0
        for i, row in enumerate(chances):
            running[i] += row[k]
            product *= running[i]
        total, before = total + reward * (product - before), product
    return total


def draw(completions: Sequence[Predicted], rewards: Sequence[float], *, price: float, stretch: int) -> Drawn:
    """Draw a problem's completions as the utility says. They stand for what a sampler would draw of them.

    A token is a function of its completion's key and place, so that whole completions that were drawn before give what
    a sampler that stops would have drawn.
    """
    places, done, tokens = [0] * len(completions), [], 0
    while len(done) < len(completions):
        known = [completions[i].chances[-1] for i in done]
        base = expected_max(known, rewards) if known else rewards[0]
        best, gain = -1, 0.0
        for i, one in enumerate(completions):
            if places[i] == one.tokens:
                continue
            utility = expected_max([*known, one.chances[places[i]]], rewards) - base - price * one.left[places[i]]
            if best < 0 or utility > gain:
                best, gain = i, utility
            if places[i] == 0:
                break  # those behind it are not started either, and are as good
        if gain <= 0 and done:
            break
        step = min(stretch, completions[best].tokens - places[best])
        places[best], tokens = places[best] + step, tokens + step
        if places[best] == completions[best].tokens:
            done.append(best)
    values = [sum(p * r for p, r in zip(completions[i].chances[-1], rewards, strict=True)) for i in done]
    return Drawn(tokens=tokens, finished=done, values=values)


def price_of(tokens_at: Callable[[float], float], budget: float) -> float:
    """The least price of a token at which ``tokens_at(price)`` is within the budget, to a factor of 1.001.

    ``RunError`` where even the highest price, a whole reward, takes more: every problem has an answer. That may be more
    than a completion, as the search goes to what is predicted to end soonest.
    """
    low, high = LEAST_PRICE, MOST_PRICE
    least = tokens_at(high)
    if least > budget:
        raise RunError(
            f"evaluation.adaptive.budgets={budget:g}: even at a price of 1 a problem takes {least:.1f}; raise it"
        )
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if tokens_at(middle) <= budget else (middle, high)
    return high


def vote(answers: Sequence[object], right: Sequence[float], weights: Sequence[float]) -> float:
    """The share of right completions among those of the answer of most weight; of equal ones the mean.

    None as an answer does not vote. Without votes it is 0.
    """
    sums: dict[object, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + weight
    most = max(sums.values(), default=0.0)
    shares = []
    for chosen in (answer for answer, weight in sums.items() if weight == most):
        rights = [is_one for answer, is_one in zip(answers, right, strict=True) if answer == chosen]
        shares.append(sum(rights) / len(rights))
    return sum(shares) / len(shares) if shares else 0.0


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """What voting over the first m completions of each problem costs and gives, m = 1..n."""

    tokens: Sequence[float]
    accuracy: Sequence[Sequence[float]]

    def at(self, tokens: float) -> list[float]:
        """Each problem's accuracy at a mean number of tokens: m or m + 1 completions, by chance, so that they are met.

        ``RunError`` where all n completions take fewer.
        """
        if tokens > self.tokens[-1]:
            raise RunError(
                f"evaluation.adaptive.samples={len(self.tokens)}: voting over all takes {self.tokens[-1]:.1f} tokens, "
                f"fewer than the {tokens:.1f} to compare with; raise it"
            )
        m = next((m for m, cost in enumerate(self.tokens) if cost >= tokens), 0)
        if m == 0:
            return list(self.accuracy[0])
        share = (tokens - self.tokens[m - 1]) / (self.tokens[m] - self.tokens[m - 1])
        pairs = zip(self.accuracy[m - 1], self.accuracy[m], strict=True)
        return [(1 - share) * before + share * after for before, after in pairs]


def prefixes(problems: Sequence[Sequence[Predicted]], accuracy: Callable[[Sequence[Predicted]], float]) -> Prefixes:
    """Every problem's accuracy over its first m completions, and the mean tokens of these."""
    count = min(len(completions) for completions in problems)
    tokens = [
        sum(sum(one.tokens for one in completions[:m]) for completions in problems) / len(problems)
        for m in range(1, count + 1)
    ]
    rows = [[accuracy(completions[:m]) for completions in problems] for m in range(1, count + 1)]
    return Prefixes(tokens=tokens, accuracy=rows)


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The completions of a set of problems, read once: what voting over the first m gives."""

    completions: Sequence[Sequence[Predicted]]
    rewards: Sequence[float]
    answer: Callable[[str], object]
    stretch: int

    def drawn(self, price: float) -> list[Drawn]:
        """Each problem at a price of a token."""
        return [draw(some, self.rewards, price=price, stretch=self.stretch) for some in self.completions]

    def tokens(self, price: float) -> float:
        """Mean tokens of a problem."""
        return sum(one.tokens for one in self.drawn(price)) / len(self.completions)

    def voted(self, some: Sequence[Predicted], weights: Sequence[float]) -> float:
        """Whether the answer of most weight is right."""
        return vote([self.answer(one.text) for one in some], [one.right for one in some], weights)

    def majority(self) -> Prefixes:
        """Plain votes."""
        return prefixes(self.completions, lambda some: self.voted(some, [1.0] * len(some)))

    def weighted(self) -> Prefixes:
        """Votes that weigh the predicted reward: the head's judgement without its choice of what to draw."""
        return prefixes(self.completions, lambda some: self.voted(some, [self._value(one) for one in some]))

    def _value(self, one: Predicted) -> float:
        return sum(p * r for p, r in zip(one.chances[-1], self.rewards, strict=True))

    def chosen(self, drawn: Sequence[Drawn]) -> list[float]:
        """Each problem's accuracy: the vote of the finished completions by predicted reward."""
        return [
            self.voted([some[i] for i in one.finished], one.values)
            for some, one in zip(self.completions, drawn, strict=True)
        ]


def measure(training: Problems, held_out: Problems, budgets: Sequence[float]) -> list[dict[str, float]]:
    """For each budget, accuracy at the price that meets it on ``training``, beside votes at as many tokens.

    The votes are over the first completions of each problem, plain and weighted by predicted reward. Differences are
    paired by problem, with their standard errors (std with ddof 1 over sqrt(n)).
    """
    plain, weighted = held_out.majority(), held_out.weighted()
    found = []
    for budget in budgets:
        price = price_of(training.tokens, budget)
        drawn = held_out.drawn(price)
        tokens = sum(one.tokens for one in drawn) / len(drawn)
        rows = {"accuracy": held_out.chosen(drawn), "majority": plain.at(tokens), "weighted_vote": weighted.at(tokens)}
        row = {"budget": budget, "price": price, "tokens": tokens, "problems": float(len(drawn))}
        row["completions"] = sum(len(one.finished) for one in drawn) / len(drawn)
        for name, values in rows.items():
            row[name], row[f"{name}_se"] = mean_and_error(values)
        for name in ("majority", "weighted_vote"):
            gains = [a - b for a, b in zip(rows["accuracy"], rows[name], strict=True)]
            row[f"gain_over_{name}"], row[f"gain_over_{name}_se"] = mean_and_error(gains)
        found.append(row)
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, 0 of a single value."""
    count, mean = len(values), sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, (squares / max(1, count - 1) / count) ** 0.5


def table(rows: Sequence[dict[str, float]]) -> str:
    """A line per figure, a column per budget; means with their standard errors."""
    names = [name for name in rows[0] if not name.endswith("_se")]

    def cell(row: dict[str, float], name: str) -> str:
        error = row.get(f"{name}_se")
        return f"{row[name]:.4g}" if error is None else f"{row[name]:.4f} ± {error:.4f}"

    return "\n".join(f"{name:28s}" + "".join(f"{cell(row, name):>20s}" for row in rows) for name in names)
