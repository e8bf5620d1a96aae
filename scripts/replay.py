"""Run a dumped step again on this CPU, and say which quantity differs first.

python scripts/replay.py RUN/bundles/step_000003.safetensors [--policy FOLDER]

Recomputed, in this order: advantages (where the estimator needs nothing but the groups), the micro-batches' share of
them, the hash of the weights, log-probs, losses, gradient norm. The weights are those in the dump, of ``--policy``,
or of the checkpoint before the step. On one rank of a CPU like the one it was made on all must be equal bit for bit.
Exit code 0: equal; 1: something differs or is not finite; 2: the dump cannot be replayed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rltrain import cli
from rltrain.advantages.check import without_observed
from rltrain.errors import ConfigError
from rltrain.policy.load import load_policy
from rltrain.policy.logprobs import HeadTraining, LogprobModel, micro_batch_loss
from rltrain.registry import Part, needs_of, parts
from rltrain.runs import step_dump
from rltrain.runs.step_dump import StepDump, StepRecord
from rltrain.types import Context

# Relative, where the order of sums differs: another machine, number of ranks or ZeRO stage.
ROUNDING = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One recomputed quantity: the largest difference and where it is; ``None`` for what was not recomputed."""

    name: str
    difference: float | None
    where: str = ""
    equal: bool = True


def compare(name: str, pairs: Iterator[tuple[str, Tensor, Tensor]], rounding: float) -> Check:
    """The largest difference over (place, stored, recomputed); NaN equals NaN."""
    worst, place, equal = 0.0, "", True
    for where, stored, recomputed in pairs:
        stored, recomputed = stored.double(), recomputed.double()
        if stored.shape != recomputed.shape:
            return Check(name=name, difference=math.inf, where=f"{where}: another shape", equal=False)
        same = (stored == recomputed) | (stored.isnan() & recomputed.isnan())
        gap = torch.where(same, 0.0, (stored - recomputed).abs().nan_to_num(nan=math.inf))
        if gap.numel() and float(gap.max()) > worst:
            index = int(gap.argmax())
            worst = float(gap.max())
            place = f"{where}[{index}]: stored {stored.flatten()[index]:.9g}, now {recomputed.flatten()[index]:.9g}"
        equal &= bool(torch.allclose(stored, recomputed, rtol=rounding, atol=rounding, equal_nan=True))
    return Check(name=name, difference=worst, where=place, equal=equal if rounding else worst == 0)


def typed(cls: type, plain: Mapping[str, Any]) -> Any:
    """A config dataclass from plain data."""
    from omegaconf import OmegaConf

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), dict(plain)))


def part_config(group: str, plain: Mapping[str, Any]) -> tuple[Part, Any]:
    """The part that a resolved config names by its kind, and its config."""
    fields = dict(plain)
    kind = fields.pop("kind")
    found = [part for part in parts(group) if part.name == kind]
    if not found:
        raise ConfigError(f"{group}={kind}: not registered here; import the file that registers it, or replay there")
    return found[0], typed(found[0].config, fields)


def rounding_of(made: StepDump) -> float:
    """0 where the replay must be equal bit for bit."""
    config = made.facts["config"]
    alike = made.facts["machine"] == step_dump.machine() and len(made.records) == 1
    exact = alike and config["deepspeed"]["zero_stage"] == 0 and config["model"]["dtype"] == "float32"
    return 0.0 if exact else ROUNDING[config["model"]["dtype"]]


def not_finite(records: Sequence[StepRecord]) -> list[str]:
    """Where values are not finite, in the order in which a step computes them. A NaN reward abstains; it is shown."""
    quantities: dict[str, Callable[[StepRecord], list[tuple[str, Tensor]]]] = {
        "sampler log-probs": lambda r: [(p, torch.tensor(one.written_logprobs)) for p, one in completions(r)],
        "rewards": lambda r: [(f"group {i}", g.rewards_G) for i, g in enumerate(r.groups) if g.rewards_G is not None],
        "advantages": lambda r: [(place, value) for (place, _), value in zip(completions(r), flat(r), strict=True)],
        "old log-probs": lambda r: [
            (f"micro-batch {i}", b.old_logprobs_N) for i, b in enumerate(r.batches) if b.old_logprobs_N is not None
        ],
        "log-probs": lambda r: [(f"micro-batch {i}", value) for i, value in enumerate(r.logprobs)],
        "losses": lambda r: [(f"micro-batch {i}", value) for i, value in enumerate(r.losses)],
        "gradient norm": lambda r: [] if r.grad_norm is None else [("", torch.tensor(r.grad_norm))],
    }
    found = []
    for name, values in quantities.items():
        bad = [
            (f"rank {rank} {place}", int((~value.isfinite()).sum()))
            for rank, record in enumerate(records)
            for place, value in values(record)
            if not bool(value.isfinite().all())
        ]
        if bad:
            found.append(f"{name}: {sum(count for _, count in bad)} values, the first in {bad[0][0]}")
    return found


def completions(record: StepRecord) -> list[tuple[str, Any]]:
    """Every completion and its place."""
    return [
        (f"group {p} sample {g}", one)
        for p, group in enumerate(record.groups)
        for g, one in enumerate(group.completions)
    ]


def flat(record: StepRecord) -> list[Tensor]:
    """The advantages of every completion, in the order of :func:`completions`."""
    return [values for group in record.advantages for values in group]


def masks(record: StepRecord) -> list[Tensor]:
    """Which ids of every completion carry loss, in the order of :func:`completions`."""
    if not record.masks:
        return [torch.ones(len(one.token_ids), dtype=torch.bool) for _, one in completions(record)]
    return [mask_T for group in record.masks for mask_T in group]


def check_advantages(made: StepDump, rounding: float) -> Check:
    """Run the estimator again on the groups of each rank."""
    facts = made.facts
    part, config = part_config("advantage", facts["config"]["advantage"])
    if needs_of(config) or len(made.records) > 1 or facts["config"]["batch"].get("minibatches", 1) > 1:
        return Check(name="advantages", difference=None, where="not recomputed: needs more than these groups")
    sampling = facts["config"]["sampling"]
    context = Context(step=facts["step"] - 1, seed=facts["config"]["seed"], max_new_tokens=sampling["max_new_tokens"])
    (record,) = made.records
    again = without_observed(record.groups, part.function(record.groups, config, context)).values
    recomputed = [values for group in again for values in group]
    places = [place for place, _ in completions(record)]
    return compare("advantages", zip(places, flat(record), recomputed, strict=True), rounding)


def check_micro_batches(made: StepDump) -> Check:
    """Each completion of a micro-batch carries the advantages that the groups have for it."""
    known: dict[tuple[Any, ...], list[Tensor]] = {}
    for record in made.records:
        rows = zip(completions(record), flat(record), masks(record), strict=True)
        for (_, one), values, mask_T in rows:
            logprobs = torch.tensor(one.logprobs, dtype=torch.float32)
            key = (tuple(torch.tensor(one.token_ids)[mask_T].tolist()), tuple(logprobs[mask_T].tolist()))
            known.setdefault(key, []).append(values[mask_T].float())

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for rank, record in enumerate(made.records):
            for index, batch in enumerate(record.batches):
                for sequence in batch.sequence_N.unique_consecutive().tolist():
                    mine_N = (batch.sequence_N == sequence) & (batch.weights_N > 0)
                    if not bool(mine_N.any()):
                        continue
                    key = (tuple(batch.targets_N[mine_N].tolist()), tuple(batch.sampler_logprobs_N[mine_N].tolist()))
                    stored, place = batch.advantages_N[mine_N], f"rank {rank} micro-batch {index} sequence {sequence}"
                    choices = known.get(key, [torch.full_like(stored, math.nan)])
                    yield place, stored, min(choices, key=lambda one: float((one - stored).abs().sum()))

    return compare("advantages in the micro-batches", pairs(), 0.0)


def load_weights(made: StepDump, folder: str | None) -> tuple[nn.Module, str]:
    """The policy of the step as it is forwarded, and where its weights are from."""
    config = made.facts["config"]
    _, model = part_config("model", config["model"])
    run_dir = Path(config["run_dir"])
    before = run_dir / "checkpoints" / f"step_{made.facts['step'] - 1:06d}" / "policy"
    first = made.facts["step"] == 1
    chosen = folder
    if chosen is None and not made.weights:
        candidates = (before, run_dir / "cold_start") if first else (before,)
        chosen = next((str(path) for path in candidates if path.is_dir()), None)
        if chosen is None and not first:
            raise ConfigError(f"weights before step {made.facts['step']}: no {before}; give --policy FOLDER")
    policy = LogprobModel(load_policy(model, path=chosen).model, temperature=config["sampling"]["temperature"])
    if not made.weights or folder is not None:
        return policy, chosen or "the config's initial weights"
    with torch.no_grad():
        named = dict(policy.named_parameters())
        for name, value in made.weights.items():
            named[name].copy_(value)
    return policy, "the dump"


def trainable(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the optimiser moves, by name."""
    return ((name, value) for name, value in policy.named_parameters() if value.requires_grad)


def head_training(made: StepDump) -> HeadTraining | None:
    """How the step trained the introspection head, where it had one. Its tokens are those of all ranks."""
    _, model = part_config("model", made.facts["config"]["model"])
    if not model.introspection.is_trained:
        return None
    tokens = sum(int((batch.weights_N > 0).sum()) for record in made.records for batch in record.batches)
    return HeadTraining(config=model.introspection, tokens=max(float(tokens), 1.0))


def check_step(made: StepDump, policy: nn.Module, rounding: float) -> list[Check]:
    """Forward and backward over the micro-batches of all ranks: log-probs, losses, gradient norm."""
    _, loss_config = part_config("loss", {"kind": "surrogate"} | made.facts["config"]["loss"])  # files of 0.1 name none
    head, logprobs, losses = head_training(made), [], []
    for rank, record in enumerate(made.records):
        torch.set_rng_state(record.generator_state)
        for index, batch in enumerate(record.batches):
            output = micro_batch_loss(policy, batch, loss_config, head)
            output.loss.backward()
            place = f"rank {rank} micro-batch {index}"
            if index < len(record.losses):
                logprobs.append((place, record.logprobs[index], output.logprobs_N))
                losses.append((place, record.losses[index], output.loss.detach()))
    checks = [compare("log-probs", iter(logprobs), rounding), compare("losses", iter(losses), rounding)]
    stored = made.records[0].grad_norm
    if stored is None:
        return [*checks, Check(name="gradient norm", difference=None, where="not reached")]
    norm = nn.utils.get_total_norm([value.grad for _, value in trainable(policy) if value.grad is not None])
    return [*checks, compare("gradient norm", iter([("all ranks", torch.tensor(stored), norm)]), rounding)]


def replay(path: Path, folder: str | None) -> int:
    """Print what was found; returns the exit code."""
    made = step_dump.read(path)
    facts = made.facts
    torch.set_num_threads(facts["machine"]["threads"])
    rounding = rounding_of(made)
    print(f"step {facts['step']}, update {facts['epoch'] + 1}, {len(made.records)} ranks, {facts['git_revision']}")
    found = not_finite(made.records)
    for line in found:
        print(f"not finite: {line}")
    checks = [check_advantages(made, rounding), check_micro_batches(made)]
    policy, source = load_weights(made, folder)
    digest = step_dump.weights_of(trainable(policy), keep=False).sha256
    if facts["weights_sha256"] and digest != facts["weights_sha256"]:
        where = f"{source}: sha256 {digest[:12]}, the dump's is {facts['weights_sha256'][:12]}"
        checks.append(Check(name="weights", difference=math.inf, where=where, equal=False))
    else:
        checks += [Check(name="weights", difference=0.0, where=source), *check_step(made, policy, rounding)]
    for check in checks:
        size = "" if check.difference is None else f"{check.difference:.3g}"
        print(f"{'equal' if check.equal else 'DIFFERS':8s}{check.name:34s}{size:10s}{check.where}")
    different = [check for check in checks if not check.equal]
    if different:
        print(f"first difference: {different[0].name} ({different[0].where})")
    else:
        print("equal bit for bit" if rounding == 0 else f"equal within a relative rounding of {rounding:g}")
    return 1 if different or [line for line in found if not line.startswith("rewards")] else 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="RUN/bundles/step_….safetensors")
    parser.add_argument("--policy", help="a folder with the weights of the step")
    arguments = parser.parse_args()
    cli.setup_logging()
    cli.discover()
    with cli.errors_in_one_line():
        sys.exit(replay(arguments.dump, arguments.policy))


if __name__ == "__main__":
    main()
