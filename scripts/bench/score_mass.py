"""How many tokens TEMPO credits otherwise than GRPO, and how much of the gradient's size lies on them, per run.

The size of a token is (1 - p)², p its sampled probability: the squared score of its own logit. Groups of equal rewards
are left out. The figures are of the samples of training steps that the runs recorded.

    python scripts/bench/score_mass.py runs/quickstart …
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from rltrain.advantages.group import group_advantages
from rltrain.advantages.tempo import tempo_advantages

ROUNDING = 1e-9


def of_group(rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Of a group: tokens and size where the two differ, then of all tokens."""
    rewards = [row["reward"] for row in rows]
    trees, shared = tempo_advantages([row["token_ids"] for row in rows], rewards), group_advantages(rewards)
    total = torch.zeros(4, dtype=torch.float64)
    for row, tree_T, alike in zip(rows, trees, shared, strict=True):
        size_T = (1 - torch.tensor(row["logprobs"], dtype=torch.float64).exp()) ** 2
        differs_T = (tree_T - alike).abs() > ROUNDING
        total += torch.stack(
            [differs_T.sum().double(), size_T[differs_T].sum(), torch.tensor(len(size_T)).double(), size_T.sum()]
        )
    return total


def of_run(run: Path) -> tuple[float, float]:
    """Share of the tokens, and of their size, over all groups of unequal rewards."""
    total = torch.zeros(4, dtype=torch.float64)
    for file in sorted((run / "samples").glob("step_*.parquet")):
        groups = defaultdict(list)
        for row in pq.read_table(file).to_pylist():
            groups[row["problem_id"]].append(row)
        for rows in groups.values():
            if len({row["reward"] for row in rows}) > 1:
                total += of_group(rows)
    return float(total[0] / total[2]), float(total[1] / total[3])


def main() -> None:
    """A line per run."""
    for run in map(Path, sys.argv[1:]):
        tokens, size = of_run(run)
        print(f"{run}: {100 * tokens:.1f} % of the tokens, {100 * size:.1f} % of their size")


if __name__ == "__main__":
    main()
