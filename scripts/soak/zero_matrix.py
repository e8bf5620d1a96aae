"""ZeRO 0-3 x 1, 2 ranks x fp32, bf16: the same losses and weights after five steps, and what each rank holds.

Every cell is compared with stage 0 on one rank: the losses of the steps, and the fp32 weights at the end. Then every
fp32 cell is resumed from its third step in the layout of the next cell, another stage or number of ranks, and compared
again. Bytes are those of the tensors that a rank keeps between steps.

    OMP_NUM_THREADS=1 python scripts/soak/zero_matrix.py                                        # all; prints a table
    OMP_NUM_THREADS=1 python scripts/soak/zero_matrix.py --stages 0 3 --dtypes float32          # what the tests run
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ranks
import torch

from rltrain import build, trainer
from rltrain.engine.deepspeed import Engine
from rltrain.engine.zero_shards import Archive
from rltrain.runs import checkpoint
from rltrain.runtime import dist

STEPS, HALFWAY = 5, 3
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A layout of a run."""

    dtype: str
    stage: int
    world_size: int

    @property
    def name(self) -> str:
        return f"{self.dtype}, ZeRO {self.stage}, {self.world_size} rank{'s' * (self.world_size > 1)}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run computed, and the bytes of each rank."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    bytes_per_rank: list[dict[str, int]]

    def difference(self, other: Result) -> tuple[float, float]:
        """The largest absolute difference of a loss, and of a weight."""
        losses = max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))
        weights = max(float((self.weights[name] - value).abs().max()) for name, value in other.weights.items())
        return losses, weights


class Measured(Engine):
    """An engine that leaves what it holds beside the run."""

    def save_state(self, folder: Path) -> Path:
        """Save, and note the bytes."""
        run_dir = folder.parent.parent.parent
        (run_dir / f"bytes_{dist.rank()}.json").write_text(json.dumps(self.bytes_held()))
        return super().save_state(folder)

    def bytes_held(self) -> dict[str, int]:
        """Of this rank between steps: the weights that the model computes with, fp32 copies, moments."""
        weights = [getattr(p, "ds_tensor", p) for p in self.module.parameters()]
        there = {weight.untyped_storage().data_ptr() for weight in weights}
        held = self.held()
        copies = [s.tensors["weight"] for s in held if s.tensors["weight"].untyped_storage().data_ptr() not in there]
        states = self.deepspeed.basic_optimizer.state.values()
        moments = [value for state in states for value in state.values() if value.dim()]
        groups = {"parameters": weights, "fp32 copies": copies, "optimiser": moments}
        return {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in groups.items()}


def run(cell: Cell, folder: Path) -> Result:
    """Train, or finish, the run in ``folder``."""
    config = ranks.config(
        folder,
        cell.stage,
        f"model.dtype={cell.dtype}",
        "reward@rewards.answer=random",
        "optimizer.learning_rate=1e-4",
        f"checkpoint.every_steps={HALFWAY}",
        "checkpoint.keep_best=false",
        f"steps={STEPS}",
    )

    def work() -> None:
        build.Engine = Measured  # type: ignore[misc] - in the forked process alone
        trainer.fit(config)

    log = folder.with_suffix(".log")
    codes = ranks.start(work, cell.world_size, log=log).wait()
    if any(codes):
        raise SystemExit(f"{cell.name}: exit codes {codes}\n{log.read_text()[-4000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    archive = Archive(checkpoint.list_checkpoints(folder)[-1].path / "optimizer")
    return Result(
        losses=[line["loss"] for line in lines if line["step"]],
        weights={name: archive.weight(name) for name in archive.names()},
        bytes_per_rank=[json.loads((folder / f"bytes_{r}.json").read_text()) for r in range(cell.world_size)],
    )


def resumed(cell: Cell, folder: Path, source: Path) -> Result:
    """The second half in the layout of ``cell`` of a run whose first half was made in another one."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:06d}")
    return run(cell, folder)


def report(name: str, dtype: str, result: Result, reference: Result) -> dict[str, Any]:
    """A row: differences from the reference, bytes of the ranks, and whether they are within the tolerance."""
    loss, weight = result.difference(reference)
    row = {"run": name, "loss": loss, "weight": weight, "ok": max(loss, weight) <= TOLERANCE[dtype]}
    row |= {key: [held[key] for held in result.bytes_per_rank] for key in result.bytes_per_rank[0]}
    print(json.dumps(row), flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    keys = ("parameters", "fp32 copies", "optimiser")
    lines = ["| run | loss differs by | weights differ by | " + " | ".join(f"{k}, bytes per rank" for k in keys) + " |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = [" / ".join(f"{count:,}" for count in row[key]) for key in keys]
        lines.append(f"| {row['run']} | {row['loss']:.1e} | {row['weight']:.1e} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells, print the table, and fail if a cell differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=sorted(TOLERANCE))
    options = parser.parse_args()
    ranks.warm_up()
    rows = []
    with tempfile.TemporaryDirectory(prefix="zero_matrix_") as root:
        for dtype in options.dtypes:
            layouts = itertools.product(options.stages, options.ranks)
            cells = [Cell(dtype=dtype, stage=stage, world_size=world_size) for stage, world_size in layouts]
            folders = [Path(root) / cell.name.replace(", ", "_").replace(" ", "") for cell in cells]
            results = [run(cell, folder) for cell, folder in zip(cells, folders, strict=True)]
            rows += [report(c.name, dtype, result, results[0]) for c, result in zip(cells, results, strict=True)]
            if dtype != "float32":
                continue
            for source, folder, cell in zip(cells, folders, [*cells[1:], cells[0]], strict=True):
                result = resumed(cell, folder.with_name(f"{folder.name}_moved"), folder)
                rows.append(report(f"{source.name} -> {cell.name}", dtype, result, results[0]))
    print(table(rows))
    raise SystemExit(0 if all(row["ok"] for row in rows) else "some cells differ by more than the tolerance")


if __name__ == "__main__":
    main()
