"""Step bundles: one file with everything an optimiser step consumed and produced, to be run again by scripts/replay.py.

``run_dir/bundles/step_000003.safetensors``: tensors under ``rankR/…`` and, where asked, ``weights/…``; the header holds
JSON (config, seed, versions, layout, texts). Nothing is pickled. Steps count as in ``metrics.jsonl``, from 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rltrain.config import RunConfig
from rltrain.engine.deepspeed import NonFiniteError
from rltrain.errors import ConfigError
from rltrain.runs import run_folder
from rltrain.runtime import dist
from rltrain.types import Completion, Group, Problem, Prompt, TokenBatch

VERSION = 1
HEADER = "rltrain_bundle"


@dataclass
class StepRecord:
    """One optimiser step of one rank, filled as it goes on; ``epoch`` counts the updates on the same completions.

    ``generator_state`` is torch's at the first micro-batch, for dropout.
    """

    step: int
    epoch: int
    groups: Sequence[Group]
    advantages: Sequence[Sequence[Tensor]]
    batches: Sequence[TokenBatch]
    generator_state: Tensor = field(default_factory=torch.get_rng_state)
    logprobs: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    grad_norm: float | None = None

    def add(self, loss: Tensor, logprobs_N: Tensor) -> None:
        """Keep what came of the next micro-batch."""
        self.losses.append(loss.detach())
        self.logprobs.append(logprobs_N.detach())


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The trainable weights before the optimiser moved: their hash, and themselves if they are to be kept."""

    sha256: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepDump:
    """A bundle as read from a file: the records by rank, kept weights (else empty), and the facts of its header."""

    records: Sequence[StepRecord]
    weights: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def weights_of(parameters: Iterable[tuple[str, Tensor]], *, keep: bool) -> Weights:
    """SHA-256 over name, type, shape and bytes of each parameter in order; ``keep`` also copies them."""
    digest, kept = hashlib.sha256(), {}
    for name, parameter in parameters:
        value = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
        if keep:
            kept[name] = value.clone()
    return Weights(sha256=digest.hexdigest(), tensors=kept)


@contextmanager
def kept(
    config: RunConfig, record: StepRecord, parameters: Callable[[], Iterable[tuple[str, Tensor]]]
) -> Iterator[None]:
    """Around the optimiser: write the bundle where one is asked for, or where the block finds a value not finite.

    ``parameters`` gives the trainable weights. All ranks come here together, and a NonFiniteError is raised on all.
    """
    asked = record.epoch == 0 and record.step in config.debug.bundle_steps
    before = weights_of(parameters(), keep=config.debug.bundle_weights) if asked else None
    try:
        yield
    except NonFiniteError as error:
        path = write(config, record, before or weights_of(parameters(), keep=config.debug.bundle_weights))
        raise NonFiniteError(f"{error}; all of the step is in {path}, for scripts/replay.py") from error
    if before is not None:
        write(config, record, before)


def write(config: RunConfig, record: StepRecord, weights: Weights) -> Path:
    """Gather the records of all ranks into one file, which rank 0 writes; all ranks call this together."""
    path = Path(config.run_dir) / "bundles" / f"step_{record.step:06d}.safetensors"
    records = dist.gather_objects(_on_cpu(record), name=f"bundle of step {record.step}")
    if dist.is_main():
        _save(path, config, records, weights)
    return path


def write_alone(config: RunConfig, record: StepRecord) -> Path:
    """What this rank has of a step that hangs; other ranks are not asked, weights are not looked at."""
    path = Path(config.run_dir) / "bundles" / f"step_{record.step:06d}_hung_rank{dist.rank()}.safetensors"
    _save(path, config, [_on_cpu(record)], Weights(sha256="", tensors={}))
    return path


def _on_cpu(record: StepRecord) -> StepRecord:
    def moved(batch: TokenBatch) -> TokenBatch:
        values = {name: value.cpu() for name, value in vars(batch).items() if isinstance(value, Tensor)}
        return dataclasses.replace(batch, **values)

    return dataclasses.replace(
        record,
        batches=[moved(batch) for batch in record.batches],
        logprobs=[value.cpu() for value in record.logprobs],
        losses=[value.cpu() for value in record.losses],
    )


def _save(path: Path, config: RunConfig, records: Sequence[StepRecord], weights: Weights) -> None:
    tensors = {f"weights/{name}": value for name, value in weights.tensors.items()}
    for rank, record in enumerate(records):
        tensors |= {f"rank{rank}/{name}": value for name, value in _tensors(record).items()}
    first = records[0]
    facts = {
        "version": VERSION,
        "step": first.step,
        "epoch": first.epoch,
        "grad_norm": first.grad_norm,
        "weights_sha256": weights.sha256,
        "config": run_folder.resolved(config),
        "machine": machine(),
        "git_revision": run_folder.git_revision(),
        "packages": run_folder.package_versions(),
        "ranks": [{"groups": _texts(record), "micro_batches": len(record.batches)} for record in records],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".writing_{path.name}")
    # Cloned, because old and sampler log-probs may be one tensor, which safetensors refuses.
    owned = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(owned, writing, metadata={HEADER: json.dumps(facts, default=str)})
    writing.replace(path)


def machine() -> dict[str, Any]:
    """What the last bits of a result may depend on."""
    return {
        "device": dist.device().type,
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _tensors(record: StepRecord) -> dict[str, Tensor]:
    completions = [one for group in record.groups for one in group.completions]
    rewards = [group.rewards_G for group in record.groups if group.rewards_G is not None]
    names = sorted({name for group in record.groups for name in group.reward_parts})
    flat = {
        "prompt_ids": torch.tensor([t for group in record.groups for t in group.prompt.token_ids], dtype=torch.long),
        "completion_ids": torch.tensor([t for one in completions for t in one.token_ids], dtype=torch.long),
        "sampler_logprobs": torch.tensor([v for one in completions for v in one.logprobs], dtype=torch.float32),
        "advantages": _joined([values for group in record.advantages for values in group]),
        "rewards": _joined(rewards),
        **{f"reward/{name}": _joined([group.reward_parts[name] for group in record.groups]) for name in names},
        "generator_state": record.generator_state,
        "losses": torch.stack(record.losses) if record.losses else torch.zeros(0),
    }
    for index, batch in enumerate(record.batches):
        flat |= {f"batch{index}/{name}": v for name, v in vars(batch).items() if isinstance(v, Tensor)}
    return flat | {f"logprobs{index}": value for index, value in enumerate(record.logprobs)}


def _joined(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)) if values else torch.zeros(0, dtype=torch.float64)


def _texts(record: StepRecord) -> list[dict[str, Any]]:
    return [
        {
            "problem": vars(group.prompt.problem),
            "prompt_tokens": len(group.prompt.token_ids),
            "completions": [
                {"tokens": len(one.token_ids), "finish": one.finish, "text": one.text} for one in group.completions
            ],
        }
        for group in record.groups
    ]


def read(path: Path) -> StepDump:
    """A bundle from its file."""
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(HEADER)
        if header is None or json.loads(header)["version"] != VERSION:
            raise ConfigError(f"{path}: not a step bundle of version {VERSION}; give a file of a run's bundles folder")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    facts = json.loads(header)
    records = [
        _record(facts, entry, {n.split("/", 1)[1]: v for n, v in tensors.items() if n.startswith(f"rank{rank}/")})
        for rank, entry in enumerate(facts["ranks"])
    ]
    weights = {name.removeprefix("weights/"): v for name, v in tensors.items() if name.startswith("weights/")}
    return StepDump(records=records, weights=weights, facts=facts)


def _record(facts: Mapping[str, Any], entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StepRecord:
    groups = _groups(entry["groups"], tensors)
    counts = [len(one.token_ids) for group in groups for one in group.completions]
    values = iter(tensors["advantages"].split(counts))
    logprobs = [tensors[f"logprobs{i}"] for i in range(entry["micro_batches"]) if f"logprobs{i}" in tensors]
    return StepRecord(
        step=facts["step"],
        epoch=facts["epoch"],
        grad_norm=facts["grad_norm"],
        groups=groups,
        advantages=[[next(values) for _ in group.completions] for group in groups],
        batches=[_batch(tensors, f"batch{index}/") for index in range(entry["micro_batches"])],
        generator_state=tensors["generator_state"],
        logprobs=logprobs,
        losses=list(tensors["losses"]),
    )


def _batch(tensors: Mapping[str, Tensor], prefix: str) -> TokenBatch:
    return TokenBatch(**{name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)})


def _groups(entries: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> list[Group]:
    """The groups of a rank; problems come back as plain ones, whatever made their prompts."""
    prompts = iter(tensors["prompt_ids"].split([entry["prompt_tokens"] for entry in entries]))
    sizes = [len(entry["completions"]) for entry in entries]
    tokens = [one["tokens"] for entry in entries for one in entry["completions"]]
    ids, logprobs = iter(tensors["completion_ids"].split(tokens)), iter(tensors["sampler_logprobs"].split(tokens))
    parts = {n.removeprefix("reward/"): iter(v.split(sizes)) for n, v in tensors.items() if n.startswith("reward/")}
    rewards = iter(tensors["rewards"].split(sizes))
    return [
        Group(
            prompt=Prompt(
                problem=Problem(**{f.name: entry["problem"][f.name] for f in dataclasses.fields(Problem)}),
                token_ids=tuple(next(prompts).tolist()),
            ),
            completions=tuple(
                Completion(
                    token_ids=tuple(next(ids).tolist()),
                    logprobs=tuple(next(logprobs).tolist()),
                    finish=one["finish"],
                    text=one["text"],
                )
                for one in entry["completions"]
            ),
            rewards_G=next(rewards),
            reward_parts={name: next(values) for name, values in parts.items()},
        )
        for entry in entries
    ]
