"""Problems of reasoning_gym: a hundred families of puzzles, made in code, with the library's own scorers.

``data=reasoning_gym reward@rewards.answer=reasoning_gym``. The extra ``rltrain[reasoning_gym]`` brings the library.

Splits. Each split draws from a seed of its own, and a hash of the question says which split a problem belongs to: train
1/2, validation 1/4, test 1/4. A question that a split has drawn before is left out. So no question is in two splits, or
twice in one, whatever the seeds.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rltrain.config import DataConfig
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.types import Problem

QUARTERS = ("train", "train", "validation", "test")
DRAWS = 64  # of a family for each problem that a split wants of it, before it counts as exhausted
ENTRY = "entry"  # in Problem.meta: what a problem is made again from
PROMPT = "{question}\nThink, then write the answer alone between <answer> and </answer>."


@dataclass(kw_only=True)
class ReasoningGymConfig(DataConfig):
    """``families`` are taken in turn. ``options`` are the library's settings: ``+data.options.FAMILY.KEY=VALUE``."""

    families: list[str] = field(default_factory=lambda: ["chain_sum"])  # of the library's, taken in turn
    options: dict[str, Any] = field(default_factory=dict)  # by family, its settings in the library
    train_size: int = 2000  # problems for training
    validation_size: int = 256  # problems for validation
    test_size: int = 256  # problems for the test
    seed: int = 0  # of the problems
    prompt: str = PROMPT  # {question} stands for the question

    def __post_init__(self) -> None:
        require("{question}" in self.prompt, f"data.prompt={self.prompt!r}: lacks the problem; add {{question}}")
        require(bool(self.families), "data.families=[]: names no family; list some, such as [chain_sum]")
        for split in QUARTERS:
            require(self.size(split) >= 1, f"data.{split}_size={self.size(split)}: an empty data set; set at least 1")
        require(
            importlib.util.find_spec("reasoning_gym") is not None,
            "data=reasoning_gym: needs the library reasoning-gym, which is not installed; "
            "pip install 'rltrain[reasoning_gym]'",
        )
        for family in {*self.options} - {*self.families}:
            raise ConfigError(f"data.options.{family}: is not among data.families={list(self.families)}; add it there")
        for family in self.families:
            _procedural(family, 0, 1, json.dumps(self.options.get(family, {})))

    def size(self, split: str) -> int:
        """The number of problems of a split."""
        return int(getattr(self, f"{split}_size"))


@lru_cache(maxsize=256)
def _procedural(family: str, seed: int, size: int, options: str) -> Any:
    """The library's data set; ``ConfigError`` for a family or a setting that it does not know."""
    import reasoning_gym.factory  # pyright: ignore[reportMissingImports]

    known = reasoning_gym.factory.DATASETS
    if family not in known:
        close = difflib.get_close_matches(family, known, n=1)
        meant = f"did you mean {close[0]}?" if close else f"the library has {', '.join(sorted(known)[:5])} and others"
        raise ConfigError(f"data.families: the library has no {family}; {meant}")
    try:
        return reasoning_gym.factory.create_dataset(family, seed=seed, size=size, **json.loads(options))
    except (TypeError, AssertionError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(
            f"data.options.{family}={options}: the library refuses it ({cause}); mend the option"
        ) from None


def split_of_question(question: str) -> str:
    """The split that a question belongs to."""
    return QUARTERS[hashlib.blake2b(question.encode(), digest_size=1).digest()[0] >> 6]


def entry_of(meta: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The library's data set and the entry that a problem was made from, made again."""
    family, seed, size, index, options = meta[ENTRY]
    made = _procedural(family, seed, size, options)
    return made, made[index]


def _problems(config: ReasoningGymConfig, split: str, family: str, count: int) -> Iterator[Problem]:
    """``count`` problems of a family in a split."""
    key = hashlib.blake2b(f"{config.seed}/{split}/{family}".encode(), digest_size=8).digest()
    seed, size, options = int.from_bytes(key, "little") >> 33, DRAWS * count, json.dumps(config.options.get(family, {}))
    made, seen = _procedural(family, seed, size, options), set()
    for index in range(size):
        if len(seen) == count:
            return
        entry = made[index]
        question = str(entry["question"])
        if split_of_question(question) == split and question not in seen:
            seen.add(question)
            yield Problem(
                id=f"{family}/{split}/{index}",
                prompt=config.prompt.replace("{question}", question),
                answer=str(entry["answer"] or ""),
                meta={ENTRY: [family, seed, size, index, options]},
            )
    if len(seen) < count:
        raise ConfigError(
            f"data.{split}_size={config.size(split)}: {family} gave {len(seen)} different questions in {size} draws, "
            f"and {count} are wanted; lower it, or add families"
        )


@register("data", "reasoning_gym", ReasoningGymConfig)
def reasoning_gym_problems(config: ReasoningGymConfig, split: str) -> Sequence[Problem]:
    """The problems of one split: item i is of family ``families[i % len(families)]``."""
    require(split in QUARTERS, f"split={split}: unknown; choose from train, validation, test")
    total, families = config.size(split), len(config.families)
    counts = [len(range(place, total, families)) for place in range(families)]
    columns = [
        list(_problems(config, split, family, count)) for family, count in zip(config.families, counts, strict=True)
    ]
    return [columns[index % families][index // families] for index in range(total)]
