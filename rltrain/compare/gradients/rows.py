"""The rows of the table: registered estimators under the settings of ``rows.json``, and estimators from outside."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.advantages.custom import UserEstimatorConfig
from rltrain.advantages.estimator import Estimator, estimator_of
from rltrain.errors import require
from rltrain.registry import parts

ROWS = Path(__file__).with_name("rows.json")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An estimator and what the table calls it; ``part`` is its registered name."""

    label: str
    part: str
    estimator: Estimator


def settings() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """What ``rows.json`` says of a part: a label and the settings that differ from the defaults, for each row."""
    named = defaultdict(list)
    for row in json.loads(ROWS.read_text(encoding="utf-8")):
        named[row["estimator"]].append((row["label"], row["options"]))
    return named


def contenders(outside: Sequence[UserEstimatorConfig], only: Sequence[str] = ()) -> list[Contender]:
    """Registered estimators, of these ``only`` those of a label or a name, then the ones from ``outside``.

    An estimator without a row in ``rows.json`` appears under its name with its defaults.
    """
    named = settings()
    registered = [
        Contender(label=label, part=part.name, estimator=estimator_of(part.config(**options)))
        for part in parts("advantage")
        if not issubclass(part.config, UserEstimatorConfig)
        for label, options in named.get(part.name, [(part.name, {})])
    ]
    known = {name for row in registered for name in (row.label, row.part)}
    unknown = sorted(set(only) - known)
    require(not unknown, f"--only {', '.join(unknown)}: unknown; choose among {', '.join(sorted(known))}")
    kept = [row for row in registered if not only or {row.label, row.part} & set(only)]
    return kept + [
        Contender(label=config.import_path, part=config.import_path, estimator=estimator_of(config))
        for config in outside
    ]
