"""Show that a refactoring changes no number: short seeded runs in two checkouts, compared bit for bit.

    python scripts/same_runs.py BEFORE AFTER                           # two folders, a git checkout in each
    python scripts/same_runs.py BEFORE AFTER --runs quickstart tempo   # some of the runs
    python scripts/same_runs.py BEFORE AFTER --keep FOLDER             # a commit's results are kept: BEFORE runs once

A run is started as a user starts it, in the checkout and with its code, on one thread, with this interpreter. Compared
are all values of ``metrics.jsonl`` but ``timing_s/*`` and ``perf/*``, as they are written, and the SHA-256 of the files
of tensors and samples: the cold start, policy, optimiser state and what else is in checkpoints, completions with their
log-probs and advantages. A run that fails, or in which no gradient moved the policy, shows nothing and counts as a
difference. Exit code 0: all the same; 1: not.

BEFORE twice, without ``--keep``, shows whether the runs are deterministic here at all. ``--keep`` goes by commit, holds
nothing of a checkout with changes, and knows nothing of machine and packages: empty the folder when these change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

MEASURED = ("timing_s/", "perf/")  # what the clock says
COMPARED = ("cold_start", "checkpoints", "samples")  # of a run's folder; weights on their way to a server are not
LIMIT_S = 600.0
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
SMALL = (
    "deadline_s=300",  # a run that hangs ends itself and says where
    "tracking.wandb=disabled",
    "tracking.samples_every_steps=1",
    "sampling.max_new_tokens=24",
    "batch.prompts_per_step=8",
    "batch.token_budget=512",
    "optimizer.learning_rate=3e-4",
    "optimizer.warmup_steps=2",
    "evaluation.every_steps=2",
    "evaluation.problems=16",
    "checkpoint.every_steps=3",
    "cold_start.batch_size=32",
    "cold_start.learning_rate=3e-3",
)
# Easy enough that after so short a cold start a group is right in part: only then is there a gradient.
EASY = ("data.steps=[1,2]", "data.max_operand=9", "cold_start.steps=120")
OF_EXPERIMENT = {
    "quickstart": EASY,
    "tempo": EASY,
    "spae": EASY,
    "rlp": ("batch.group_size=8", "cold_start.steps=20"),
    "conmax": ("batch.token_budget=1024", "cold_start.steps=20"),
}
SERVER = """
import sys, torch, transformers
from vllm_stand_in import StandIn
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    for weight in model.parameters():
        weight.zero_()  # a run that does not push its weights shows
server = StandIn(model)
print(server.url, flush=True)
sys.stdin.read()
"""


class Failed(Exception):
    """A run that did not end as it should."""


@dataclass(frozen=True)
class Case:
    """A run: ``steps`` are where each start of the command ends; without ``cold_start`` it begins with another's."""

    overrides: tuple[str, ...] = ()
    experiment: str = "quickstart"
    steps: tuple[int, ...] = (4,)
    ranks: int = 1
    cold_start: bool = False
    server: bool = False


TWICE, KL = "batch.update_epochs=2", "loss.kl_coef=0.05"  # the second update has ratios beside 1
FEW = ("batch.prompts_per_step=4", "batch.group_size=4", "evaluation.problems=4")
CUT = ("stage3_param_persistence_threshold", "stage3_model_persistence_threshold")  # 0: weights this small, too
ZERO_3 = ("deepspeed.zero_stage=3", *(f"+deepspeed.extra.zero_optimization.{key}=0" for key in CUT))
RUNS = {
    "quickstart": Case(steps=(10,), cold_start=True),
    "tempo": Case((TWICE, "loss.dual_clip=1.05"), experiment="tempo"),  # bounds so near that some tokens reach them
    "spae": Case(experiment="spae"),
    "rlp": Case(("scorer.decay=0.9",), experiment="rlp", cold_start=True),
    "conmax": Case(experiment="conmax", cold_start=True),
    "dynamic_sampling": Case(("batch.dynamic_sampling=true", "batch.group_size=2")),
    "two_ranks_zero_2": Case(("deepspeed.zero_stage=2",), ranks=2),
    "lora": Case(("model.lora.rank=4", "model.lora.dropout=0.1", KL)),
    "vllm": Case(("rollout=vllm", "rollout.mode=server", TWICE, *FEW), server=True),
    "ahead": Case(("rollout.ahead=true", "loss.importance_cap=1.01")),
    "gspo_kl": Case(("algorithm=gspo", KL, TWICE)),
    "dapo_kl": Case(("algorithm=dapo", KL, TWICE)),
    "cispo": Case(("algorithm=cispo", TWICE)),
    "gradient_checkpointing": Case(("model.gradient_checkpointing=true",)),
    "padded": Case(("batch.packing=padded",)),
    "packed": Case(("batch.packing=packed",)),
    "shared": Case(("batch.packing=shared",)),
    "stop_and_resume": Case(("optimizer.schedule=constant", "rollout.ahead=true"), steps=(3, 5)),
    "policy_scores": Case(("scorer.kind=policy",), experiment="rlp"),
    "two_ranks_zero_3": Case(ZERO_3, ranks=2),
    "speculation": Case(("rollout.speculate_tokens=4",)),
    "top_p": Case(("sampling.top_p=0.9", TWICE)),
    "bfloat16": Case(("model.dtype=bfloat16",)),
    "dr_grpo_entropy": Case(("algorithm=dr_grpo", "loss.entropy_coef=0.01")),
    "rloo": Case(("algorithm=rloo",)),
    "reinforce_pp": Case(("algorithm=reinforce_pp_baseline", KL)),
}


@dataclass(frozen=True)
class Checkout:
    """A folder with the code, and one for its runs."""

    root: Path
    scratch: Path
    keep: Path | None  # where the results of this commit are kept

    @property
    def weights(self) -> Path:
        """The cold start that runs without their own begin with."""
        return self.scratch / "quickstart" / "cold_start"


def git(root: Path, *arguments: str) -> str:
    """What git prints in ``root``."""
    return subprocess.check_output(["git", "-C", str(root), *arguments], text=True).strip()


def opened(root: Path, scratch: Path, keep: Path | None) -> Checkout:
    """The checkout at ``root``; its commit's results are kept where nothing in it is changed."""
    root = root.resolve()
    if keep is not None:
        keep = None if git(root, "status", "--porcelain") else keep / git(root, "rev-parse", "HEAD")
    checkout = Checkout(root=root, scratch=scratch, keep=keep)
    where = start(checkout, "-c", "import rltrain; print(rltrain.__file__)").strip()
    if not Path(where).is_relative_to(root):
        raise SystemExit(f"{root}: python there imports {where}; give a checkout's top folder")
    return checkout


def environment(checkout: Checkout, *folders: str) -> dict[str, str]:
    """One thread, no network, and the checkout's code before any that is installed."""
    paths = [checkout.root, *(checkout.root / folder for folder in folders)]
    return os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def start(checkout: Checkout, *arguments: str) -> str:
    """Run python in the checkout; what it printed."""
    command, options = [sys.executable, *arguments], {"cwd": checkout.root, "env": environment(checkout)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, **options)
    except subprocess.TimeoutExpired:
        raise Failed(f"not done after {LIMIT_S:g} s") from None
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise Failed(f"exit code {done.returncode}")
    return done.stdout


@contextmanager
def serving(checkout: Checkout) -> Iterator[list[str]]:
    """The tests' stand-in for vLLM, from the checkout; the override that says where it is."""
    command = [sys.executable, "-c", SERVER, str(checkout.weights)]
    options = {"cwd": checkout.root, "env": environment(checkout, "tests", "tests/helpers"), "text": True}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:
        try:
            if not (url := process.stdout.readline().strip()):
                raise Failed("the stand-in for vLLM did not start")
            yield [f"rollout.urls=[{url}]"]
        finally:
            process.kill()


def overrides(case: Case, folder: Path, weights: Path) -> list[str]:
    """The command line of a run, but for the number of its steps."""
    begin = () if case.cold_start else ("cold_start.steps=0", f"model.path={weights}")
    experiment = (f"+experiment={case.experiment}", f"run_dir={folder}")
    return [*experiment, *SMALL, *OF_EXPERIMENT[case.experiment], *begin, *case.overrides]


def unshared(checkout: Checkout) -> tuple[str, ...]:
    """Each run trains its cold start anew; a commit from before cold starts were shared has no key for it."""
    homes = (checkout.root / name for name in ("rltrain/config.py", "rltrain/runtime/cold_starts.py"))
    config = "".join(path.read_text(encoding="utf-8") for path in homes if path.exists())
    return ("cold_start.share=false",) if "\n    share: bool" in config else ()


def train(checkout: Checkout, name: str, case: Case) -> Path:
    """The finished run's folder."""
    folder, anew = checkout.scratch / name, unshared(checkout)
    if not case.cold_start and not checkout.weights.exists():
        quickstart = overrides(RUNS["quickstart"], checkout.weights.parent, checkout.weights)
        start(checkout, "-m", "rltrain.sft", *quickstart, *anew)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    command = [*(launcher if case.ranks > 1 else []), "-m", "rltrain.train"]
    with serving(checkout) if case.server else nullcontext([]) as urls:
        for steps in case.steps:
            start(checkout, *command, *overrides(case, folder, checkout.weights), *anew, *urls, f"steps={steps}")
    return folder


def read(folder: Path) -> dict[str, Any]:
    """What is compared of a run, numbers as they are written."""
    as_written = {"parse_float": str, "parse_int": str, "parse_constant": str}
    lines = [json.loads(line, **as_written) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]
    found = [path for part in COMPARED for path in (folder / part).rglob("*")]
    paths = sorted(path for path in found if path.suffix in (".safetensors", ".parquet"))
    files = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return {"metrics": metrics, "files": files}


def run(checkout: Checkout, name: str) -> dict[str, Any]:
    """What is compared of a run, or why it failed, and how long it took."""
    begin_s = time.monotonic()
    try:
        found = read(train(checkout, name, RUNS[name]))
    except Failed as error:
        found = {"failed": str(error), "metrics": [], "files": {}}
    return found | {"seconds": time.monotonic() - begin_s}


def result(checkout: Checkout, name: str) -> dict[str, Any]:
    """What is compared of a run, from the kept results where it is there."""
    made_by = repr((RUNS[name], SMALL, OF_EXPERIMENT[RUNS[name].experiment], EASY))
    kept = checkout.keep and checkout.keep / f"{name}-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}.json"
    if kept and kept.exists():
        return json.loads(kept.read_text())
    found = run(checkout, name)
    if kept and "failed" not in found:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return found


def first_difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Where two results differ first, in words; empty where they do not."""
    for step, (old, new) in enumerate(zip_longest(before["metrics"], after["metrics"], fillvalue={})):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"step {step}, {key}: {old.get(key)} -> {new.get(key)}"
    names = sorted(before["files"].keys() | after["files"].keys())
    return next((name for name in names if before["files"].get(name) != after["files"].get(name)), "")


def verdict(before: dict[str, Any], after: dict[str, Any]) -> str:
    """``same``, or what is wrong."""
    for side, found in (("before", before), ("after", after)):
        if "failed" in found:
            return f"FAILED {side}: {found['failed']}"
        if not any(float(line.get("grad_norm", 0)) > 0 for line in found["metrics"]):
            return f"SHOWS NOTHING {side}: no step has a gradient"
    where = first_difference(before, after)
    return f"DIFFERS: {where}" if where else "same"


def row(name: str, *results: dict[str, Any]) -> list[str]:
    """The cells of a line of the table."""
    hashes = [hashlib.sha256(json.dumps(one["files"], sort_keys=True).encode()).hexdigest()[:12] for one in results]
    metrics, files = results[-1]["metrics"], results[-1]["files"]
    counts = [max(0, len(metrics) - 1), sum(map(len, metrics)), len(files)]
    return [name, *map(str, counts), *hashes, *(f"{one['seconds']:.0f}" for one in results), verdict(*results)]


def show(cells: Sequence[str]) -> None:
    """Print a line of the table, at once."""
    widths = (23, 6, 7, 6, 13, 13, 9, 8, 0)
    print("".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)


def main() -> int:
    """Run, compare, print a line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in ("before", "after"):
        parser.add_argument(side, type=Path)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--keep", type=Path, help="folder for the results of commits")
    asked = parser.parse_args()
    show(["run", "steps", "values", "files", "before", "after", "before_s", "after_s", ""])
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="same_runs_") as scratch:
        sides = [opened(getattr(asked, one), Path(scratch) / one, asked.keep) for one in ("before", "after")]
        for name in asked.runs:
            cells = row(name, *(result(side, name) for side in sides))
            show(cells)
            verdicts.append(cells[-1])
    return int(any(one != "same" for one in verdicts))


if __name__ == "__main__":
    sys.exit(main())
