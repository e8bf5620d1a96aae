"""Kill -9 at random instants, resume, and compare with the run that nobody killed: metrics and weights, bit for bit.

Two ranks (gloo, CPU), a checkpoint at every step. A kill is aimed at a phase: the parent sees through shared memory
when rank 0 enters it, waits a random part of the phase's usual length, and kills rank 0, rank 1 or both; what counts is
the phase that the killed rank was in at that instant. The ranks that are left must end by themselves. A run that
reaches its last step is checked: every step once in metrics.jsonl, every number as in the unbroken run, every file of
the last checkpoint with the same checksum; then the next run starts.

    OMP_NUM_THREADS=1 python scripts/soak/kill9.py --kills 56 --out kill9.jsonl
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import ranks

from rltrain import trainer
from rltrain.build import Run
from rltrain.engine.deepspeed import Engine
from rltrain.rollout.local import LocalRollout
from rltrain.runs import checkpoint
from rltrain.types import Context, Group

WORLD_SIZE = 2
STEPS = 4
PHASES = ("between", "resume", "rollout", "reward", "backward", "optimiser", "saving")
AIMED = PHASES[1:]
MEASURED = ("timing_s/", "perf/")
SLOT = struct.Struct("<iid")  # phase, how many were entered, seconds of the last one


def reward(groups: list[Group], options: dict[str, Any], context: Context) -> list[list[float]]:
    """A function of the text, slow enough to be killed in."""
    time.sleep(0.1)
    return [[len(set(one.token_ids)) / 10 for one in group.completions] for group in groups]


class Phases:
    """What each rank is doing, in memory that the parent shares."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SLOT.size * WORLD_SIZE)

    def read(self, rank: int) -> tuple[str, int, float]:
        """The phase of a rank, how many it has entered, and how long the last one took."""
        phase, entered, seconds = SLOT.unpack_from(self._memory, rank * SLOT.size)
        return PHASES[phase], entered, seconds

    def clear(self) -> None:
        """Before a run starts."""
        self._memory[:] = bytes(len(self._memory))

    def watched(self, name: str, function: Callable[..., Any], durations: Path | None) -> Callable[..., Any]:
        """``function``, which tells that it runs."""

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            offset = int(os.environ["RANK"]) * SLOT.size
            _, entered, seconds = SLOT.unpack_from(self._memory, offset)
            SLOT.pack_into(self._memory, offset, PHASES.index(name), entered + 1, seconds)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - start
            SLOT.pack_into(self._memory, offset, 0, entered + 1, seconds)
            if durations is not None and offset == 0:
                with durations.open("a") as file:
                    file.write(json.dumps([name, seconds]) + "\n")
            return result

        return inside

    def watch(self, durations: Path | None) -> None:
        """Put the phases around what the trainer calls; in a forked rank, so the parent stays as it is."""
        for owner, attribute, name in (
            (checkpoint, "load", "resume"),
            (LocalRollout, "generate", "rollout"),
            (trainer, "score", "reward"),
            (Engine, "backward", "backward"),
            (Engine, "step", "optimiser"),
            (Run, "maybe_save", "saving"),
        ):
            setattr(owner, attribute, self.watched(name, getattr(owner, attribute), durations))


def run_config(folder: Path, stage: int) -> Any:
    """The run that is killed."""
    overrides = ["reward@rewards.answer=custom", "rewards.answer.import_path=kill9:reward", "evaluation.every_steps=2"]
    saving = ["checkpoint.every_steps=1", "checkpoint.keep_best=false", "evaluation.problems=4"]
    return ranks.config(folder, stage, *overrides, *saving, f"steps={STEPS}", "optimizer.learning_rate=1e-3")


def start(folder: Path, stage: int, phases: Phases, *, log: Path, durations: Path | None = None) -> ranks.Ranks:
    """Start, or resume, the run in ``folder``."""
    config = run_config(folder, stage)
    phases.clear()

    def work() -> None:
        phases.watch(durations)
        trainer.fit(config)

    return ranks.start(work, WORLD_SIZE, log=log)


def refuse_failure(codes: list[int], *, log: Path) -> None:
    """Stop the soak, with what the ranks wrote, if a run that nobody killed failed."""
    if any(codes):
        raise SystemExit(f"a run that nobody killed ended with {codes}:\n{log.read_text()[-4000:]}")


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What two runs must have in common: the metrics but for the clock's, and the checksums of the last checkpoint."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    computed = [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]
    saved = checkpoint.list_checkpoints(folder)[-1]
    assert saved.step == STEPS
    assert checkpoint.find_damage(saved) is None
    return computed, {name: entry["sha256"] for name, entry in saved.manifest["files"].items()}


def kill_once(
    folder: Path, stage: int, phases: Phases, lengths: dict[str, float], rng: random.Random, *, log: Path
) -> dict[str, Any] | None:
    """Start the run, kill ranks in the aimed phase, wait for the others; None if the run ended before."""
    resumes = bool(checkpoint.list_checkpoints(folder))
    aimed = rng.choice([phase for phase in AIMED if resumes or phase != "resume"])
    skipped = rng.randrange(1 if aimed == "resume" else 2)
    victims = rng.choice([[0], [1], [0, 1]])
    group = start(folder, stage, phases, log=log)
    last = 0
    while True:
        phase, entered, _ = phases.read(0)
        if phase == aimed and entered != last:
            last, skipped = entered, skipped - 1
            if skipped < 0:
                break
        if not group.running():
            refuse_failure(group.wait(), log=log)
            return None
        time.sleep(0.001)
    time.sleep(rng.uniform(0, lengths[aimed]))
    hit = phases.read(victims[0])[0]
    steps = [saved.step for saved in checkpoint.list_checkpoints(folder)]
    group.kill(victims)
    began = time.perf_counter()
    codes = group.wait()
    assert all(codes), f"a rank outlived its peer: {codes}"
    return {
        "stage": stage,
        "phase": hit,
        "aimed": aimed,
        "killed": victims,
        "exit_codes": codes,
        "others_ended_after_s": round(time.perf_counter() - began, 2),
        "newest_checkpoint": steps[-1] if steps else None,
    }


def soak(stage: int, kills: int, phases: Phases, root: Path, rng: random.Random, out: Path) -> dict[str, Any]:
    """Kill runs of one stage until ``kills`` have been made and the last run is finished."""
    log, durations = root / f"stage{stage}.log", root / f"stage{stage}.durations"
    unbroken = root / f"stage{stage}_unbroken"
    refuse_failure(start(unbroken, stage, phases, log=log, durations=durations).wait(), log=log)
    expected = outcome(unbroken)
    seen = defaultdict(list)
    for line in durations.read_text().splitlines():
        name, seconds = json.loads(line)
        seen[name].append(seconds)
    lengths = {name: statistics.median(values) for name, values in seen.items()}
    lengths["resume"] = lengths.get("resume", 0.1)
    made, finished = 0, 0
    while True:
        folder = root / f"stage{stage}_run{finished}"
        killed = kill_once(folder, stage, phases, lengths, rng, log=log) if made < kills else None
        if killed is not None:
            made += 1
            with out.open("a") as file:
                file.write(json.dumps(killed) + "\n")
            print(f"stage {stage} kill {made}: {killed['phase']}, ranks {killed['killed']}", flush=True)
            continue
        if not checkpoint.list_checkpoints(folder) or checkpoint.list_checkpoints(folder)[-1].step < STEPS:
            refuse_failure(start(folder, stage, phases, log=log).wait(), log=log)
        metrics, files = outcome(folder)
        assert [line["step"] for line in metrics] == list(range(STEPS + 1)), [line["step"] for line in metrics]
        assert metrics == expected[0], f"{folder}: the metrics differ from those of {unbroken}"
        assert files == expected[1], f"{folder}: the files differ from those of {unbroken}"
        finished += 1
        shutil.rmtree(folder)
        if made >= kills:
            return {"stage": stage, "kills": made, "runs_finished_and_equal": finished}


def table(out: Path, finished: dict[int, int]) -> str:
    """Kills per stage and phase, as Markdown."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    counts = Counter((row["stage"], row["phase"]) for row in rows)
    lines = ["| ZeRO | " + " | ".join(PHASES) + " | all | runs finished, equal |", "|---" * (len(PHASES) + 3) + "|"]
    for stage in sorted(finished):
        cells = [counts[stage, phase] for phase in PHASES]
        lines.append(f"| {stage} | " + " | ".join(map(str, [*cells, sum(cells), finished[stage]])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Soak every stage, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=56, help="in all, shared among the stages")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kill9.jsonl"), help="one line per kill")
    options = parser.parse_args()
    ranks.warm_up()
    options.out.unlink(missing_ok=True)
    options.out.touch()
    finished = {}
    with tempfile.TemporaryDirectory(prefix="kill9_") as root:
        for stage in options.stages:
            rng = random.Random(f"{options.seed}/{stage}")
            kills = options.kills // len(options.stages)
            result = soak(stage, kills, Phases(), Path(root), rng, options.out)
            finished[stage] = result["runs_finished_and_equal"]
            print(result, flush=True)
    print(table(options.out, finished))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # for kill9:reward
    main()
