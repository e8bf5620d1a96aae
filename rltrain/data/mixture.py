"""Several data sets in one, drawn by weight.

+data@data.sources.NAME=CHOICE for each, and data.weights.NAME=NUMBER. A problem is called NAME/its own id.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

from rltrain.config import DataConfig
from rltrain.data.sampler import Permutation, epochs, replacements
from rltrain.errors import require
from rltrain.registry import part_of, register
from rltrain.types import Group, Mean, Metrics, Problem, Std, Sum

BLOCK = 1000  # positions that hold every source exactly by its weight
SOURCE = "mixture_source"  # entry of problem.meta with the source's name
ACCURACY, SPREAD, COUNT = "accuracy/", "accuracy_std/", "problems/"  # metrics by source
Place = tuple[int, int]  # number of the source, and of the problem in it


@dataclass(kw_only=True)
class MixtureConfig(DataConfig):
    """Data sets by name, and their weights. Without weights all sources have the same."""

    sources: dict[str, DataConfig] = field(default_factory=dict)  # the data sets by a name of yours
    weights: dict[str, float] = field(default_factory=dict)  # share of each source in what is drawn, over their sum

    def __post_init__(self) -> None:
        require(bool(self.sources), "data.sources: is empty; add data sets, +data@data.sources.NAME=CHOICE")
        require(
            self.pass_rate is None and self.pass_rate_file is None,
            "data.pass_rate: belongs to a source of a mixture; set data.sources.NAME.pass_rate and its file",
        )
        require(
            self.handbook is None, "data.handbook: belongs to a source of a mixture; set data.sources.NAME.handbook"
        )
        for name, source in self.sources.items():
            require(
                not isinstance(source, MixtureConfig),
                f"data.sources.{name}: is a mixture itself; name its sources here, with weights multiplied out",
            )
            require("/" not in name, f"data.sources.{name}: a slash ends the name in ids; take it out")
            source.check_pass_rate(f"data.sources.{name}")
            source.check_handbook(f"data.sources.{name}")
        for name, weight in self.weights.items():
            require(name in self.sources, f"data.weights.{name}: no source has this name; choose of {self._names()}")
            require(
                math.isfinite(weight) and weight > 0,
                f"data.weights.{name}={weight}: must be > 0 and finite; leave the source out to draw none of it",
            )
        for name in self.sources if self.weights else ():
            require(name in self.weights, f"data.weights.{name}: has no value; set one for each of {self._names()}")
        self.slots()

    def slots(self) -> tuple[int, ...]:
        """Of BLOCK positions those of each source, see :func:`slots`."""
        return slots([self.weights.get(name, 1.0) for name in self.sources], list(self.sources))

    def _names(self) -> str:
        return ", ".join(self.sources)


def slots(weights: Sequence[float], names: Sequence[str]) -> tuple[int, ...]:
    """Of BLOCK positions those of each source: floor(BLOCK·w/Σw), the rest to the largest remainders, earlier first.

    ConfigError for a source that gets none.
    """
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    counts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: BLOCK - sum(counts)]:
        counts[source] += 1
    for name, count in zip(names, counts, strict=True):
        require(count > 0, f"data.weights.{name}: below 1/{BLOCK} of the sum; raise it, or leave the source out")
    return tuple(counts)


@functools.lru_cache(maxsize=8)
def sources_of(block: int, counts: tuple[int, ...], *key: int) -> tuple[int, ...]:
    """The source of each position of a block: a keyed permutation of ``counts[j]`` positions of each source j."""
    ends = list(itertools.accumulate(counts))
    permutation = Permutation(ends[-1], *key, block)
    return tuple(bisect.bisect_right(ends, permutation[position]) for position in range(ends[-1]))


def source_and_turn(position: int, counts: tuple[int, ...], *key: int) -> tuple[int, int]:
    """The source of a position of the endless order, and how often that source came before."""
    block, within = divmod(position, sum(counts))
    order = sources_of(block, counts, *key)
    return order[within], block * counts[order[within]] + order[:within].count(order[within])


class Mixture(Sequence[Problem]):
    """As a sequence: problems in turn by weight, each at most once, up to where the first source is used up.

    :meth:`draw` goes on without an end: each source gives every problem once per epoch of its own.
    """

    def __init__(self, sources: Mapping[str, Sequence[Problem]], config: MixtureConfig) -> None:
        self.names, self.sources, self.configs = tuple(sources), tuple(sources.values()), config.sources
        self._config, self.counts = config, config.slots()
        for name, source in sources.items():
            require(len(source) > 0, f"data.sources.{name}: holds no problem; give another data set or split")
        self._length = min(map(self._used_up, range(len(self.sources))))

    def _used_up(self, source: int) -> int:
        """The number of positions before a source would have to begin again."""
        size, count = len(self.sources[source]), self.counts[source]
        block, within = divmod(size, count)
        order = sources_of(block, self.counts, 0)
        turns = [position for position, chosen in enumerate(order) if chosen == source]
        return block * sum(self.counts) + turns[within]

    def mapped(self, change: Callable[[str, Sequence[Problem]], Sequence[Problem]]) -> Mixture:
        """The same mixture of changed sources."""
        pairs = zip(self.names, self.sources, strict=True)
        return Mixture({name: change(name, source) for name, source in pairs}, self._config)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.at(source_and_turn(range(len(self))[index], self.counts, 0))

    def at(self, place: Place) -> Problem:
        """The problem of a place under the name of its source, which ``meta`` holds, too."""
        name, problem = self.names[place[0]], self.sources[place[0]][place[1]]
        return replace(problem, id=f"{name}/{problem.id}", meta={**problem.meta, SOURCE: name})

    def draw(self, count: int, *, seed: int, step: int, attempt: int = 0) -> list[Place]:
        """The places of a step's problems, as :func:`~rltrain.data.sampler.problem_indices` is without sources.

        A pure function of (seed, step, attempt). Replacements (``attempt`` > 0) are of the sources that the step drew.
        """
        turns = [source_and_turn(step * count + each, self.counts, seed) for each in range(count)]
        drawn = {source: self._of_source(source, turns, seed, step, attempt) for source in {each for each, _ in turns}}
        return [(source, next(drawn[source])) for source, _ in turns]

    def _of_source(
        self, source: int, turns: Sequence[tuple[int, int]], seed: int, step: int, attempt: int
    ) -> Iterator[int]:
        """A source's problems of a step in order; its turns follow each other."""
        its = [turn for chosen, turn in turns if chosen == source]
        size = len(self.sources[source])
        regular = list(epochs(size, its[0], len(its), seed, source))
        if attempt == 0:
            return iter(regular)
        others = replacements(size, set(regular), seed, source, step)
        return itertools.islice(others, (attempt - 1) * len(its), attempt * len(its))


@register("data", "mixture", MixtureConfig)
def mixture(config: MixtureConfig, split: str) -> Mixture:
    """The same split of every source."""
    sources = {name: part_of(source).function(source, split) for name, source in config.sources.items()}
    return Mixture(sources, config)


def source_metrics(group: Group) -> Metrics:
    """A judged group's accuracy under the name of its source; none where problems have no source."""
    name = group.prompt.problem.meta.get(SOURCE)
    if name is None or group.right_G is None:
        return {}
    judged_G = group.right_G[~group.right_G.isnan()]
    return {
        f"{ACCURACY}{name}": Mean.of(judged_G),
        f"{SPREAD}{name}": Std.of(judged_G.mean()[None] if len(judged_G) else judged_G),
        f"{COUNT}{name}": Sum(value=float(len(judged_G) > 0)),
    }


def with_source_errors(values: Mapping[str, float]) -> dict[str, float]:
    """The reduced metrics, with ``accuracy/NAME_se`` in place of each source's spread: std (ddof 1) over sqrt(n)."""
    errors = {
        f"{ACCURACY}{name.removeprefix(SPREAD)}_se": spread / math.sqrt(values[f"{COUNT}{name.removeprefix(SPREAD)}"])
        for name, spread in values.items()
        if name.startswith(SPREAD)
    }
    return {name: value for name, value in values.items() if not name.startswith(SPREAD)} | errors
