"""Step dumps: one file with everything that an optimiser step consumed and produced, for scripts/replay.py.

``run_dir/bundles/step_000003.safetensors`` holds tensors under ``rankR/…``, the weights under ``weights/…`` where
``debug.bundle_weights`` is set, and JSON in its header (config, versions, texts). Nothing is pickled. Steps count from
1, as in ``metrics.jsonl``. The folder, the header and the config keys say bundle, so that older files stay readable.
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

from rltrain.batching.masks import Masks
from rltrain.config import RunConfig
from rltrain.engine.deepspeed import NonFiniteError
from rltrain.errors import ConfigError
from rltrain.runs import completions, run_folder
from rltrain.runtime import dist
from rltrain.types import Group, Problem, Prompt, TokenBatch

VERSION = 1
HEADER = "rltrain_bundle"


@dataclass
class StepRecord:
    """One optimiser step of one rank, filled micro-batch by micro-batch.

    ``epoch`` and ``minibatch`` count from 0 which update of the step it is. ``generator_state`` is torch's at the first
    micro-batch, from which dropout follows. ``masks`` are those of :func:`~rltrain.batching.masks.loss_masks`.
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
    minibatch: int = 0
    masks: Masks = ()

    @property
    def is_first(self) -> bool:
        """Whether no weight has moved since the completions' old log-probs were taken."""
        return self.epoch == 0 and self.minibatch == 0

    def add(self, loss: Tensor, logprobs_N: Tensor) -> None:
        """Add the results of the next micro-batch."""
        self.losses.append(loss.detach())
        self.logprobs.append(logprobs_N.detach())


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The trainable weights before the optimiser step: their hash, and copies of them (else empty)."""

    sha256: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepDump:
    """A file as read: the records by rank, the weights (empty if they were not kept), and the facts of the header."""

    records: Sequence[StepRecord]
    weights: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def weights_of(parameters: Iterable[tuple[str, Tensor]], *, keep: bool) -> Weights:
    """SHA-256 over name, type, shape and bytes of each parameter in order. ``keep`` also copies them."""
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
    """Around the optimiser step: write its dump if ``debug.bundle_steps`` names it, or on a NonFiniteError.

    ``parameters`` gives the trainable weights. All ranks enter together, and a NonFiniteError is raised on all.
    """
    is_requested = record.is_first and record.step in config.debug.bundle_steps
    before = weights_of(parameters(), keep=config.debug.bundle_weights) if is_requested else None
    try:
        yield
    except NonFiniteError as error:
        path = write(config, record, before or weights_of(parameters(), keep=config.debug.bundle_weights))
        raise NonFiniteError(f"{error}; all of the step is in {path}, for scripts/replay.py") from error
    if before is not None:
        write(config, record, before)


def write(config: RunConfig, record: StepRecord, weights: Weights) -> Path:
    """Gather the records of all ranks into one file, which rank 0 writes. All ranks call this together."""
    path = Path(config.run_dir) / "bundles" / f"step_{record.step:06d}.safetensors"
    records = dist.gather_objects(_on_cpu(record), name=f"dump of step {record.step}")
    if dist.is_main():
        _save(path, config, records, weights)
    return path


def write_alone(config: RunConfig, record: StepRecord) -> Path:
    """Write this rank's part of a step that hangs, without collectives and without the weights."""
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
        "minibatch": first.minibatch,
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
    sampled = [completion for group in record.groups for completion in group.completions]
    rewards = [group.rewards_G for group in record.groups if group.rewards_G is not None]
    names = sorted({name for group in record.groups for name in group.reward_parts})
    flat = {
        "prompt_ids": torch.tensor([t for group in record.groups for t in group.prompt.token_ids], dtype=torch.long),
        "completion_ids": completions.flat_ids(sampled, torch.long),
        "sampler_logprobs": completions.flat_logprobs(sampled, torch.float32),
        "advantages": _joined([values for group in record.advantages for values in group]),
        "rewards": _joined(rewards),
        **{f"reward/{name}": _joined([group.reward_parts[name] for group in record.groups]) for name in names},
        "generator_state": record.generator_state,
        "losses": torch.stack(record.losses) if record.losses else torch.zeros(0),
    }
    if record.masks:
        flat["loss_masks"] = _joined([mask_T for rows in record.masks for mask_T in rows])
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
            "completions": [completions.facts_of(completion) for completion in group.completions],
        }
        for group in record.groups
    ]


def read(path: Path) -> StepDump:
    """A step dump from its file."""
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(HEADER)
        if header is None or json.loads(header)["version"] != VERSION:
            raise ConfigError(f"{path}: not a step dump of version {VERSION}; give a file of a run's bundles folder")
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
    counts = [len(ids) for group in groups for ids in group.completion_ids]
    logprobs = [tensors[f"logprobs{i}"] for i in range(entry["micro_batches"]) if f"logprobs{i}" in tensors]
    return StepRecord(
        step=facts["step"],
        epoch=facts["epoch"],
        minibatch=facts.get("minibatch", 0),  # files of 0.1 have none
        grad_norm=facts["grad_norm"],
        groups=groups,
        advantages=_by_group(tensors["advantages"].split(counts), groups),
        batches=[_batch(tensors, f"batch{index}/") for index in range(entry["micro_batches"])],
        generator_state=tensors["generator_state"],
        logprobs=logprobs,
        losses=list(tensors["losses"]),
        masks=_by_group(tensors["loss_masks"].split(counts), groups) if "loss_masks" in tensors else (),
    )


def _by_group(rows: Iterable[Tensor], groups: Sequence[Group]) -> list[list[Tensor]]:
    """One row per completion of each group."""
    values = iter(rows)
    return [[next(values) for _ in group.completions] for group in groups]


def _batch(tensors: Mapping[str, Tensor], prefix: str) -> TokenBatch:
    return TokenBatch(**{name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)})


def _groups(entries: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> list[Group]:
    """The groups of a rank. Every problem is read as a plain ``Problem``, also one that made its own prompt."""
    prompts = iter(tensors["prompt_ids"].split([entry["prompt_tokens"] for entry in entries]))
    sizes = [len(entry["completions"]) for entry in entries]
    facts = [fact for entry in entries for fact in entry["completions"]]
    sampled = iter(completions.restored(facts, tensors["completion_ids"], tensors["sampler_logprobs"]))
    parts = {n.removeprefix("reward/"): iter(v.split(sizes)) for n, v in tensors.items() if n.startswith("reward/")}
    rewarded = iter(tensors["rewards"].split(sizes) if len(tensors["rewards"]) else [None] * len(sizes))
    return [
        Group(
            prompt=Prompt(
                problem=Problem(**{f.name: entry["problem"][f.name] for f in dataclasses.fields(Problem)}),
                token_ids=tuple(next(prompts).tolist()),
            ),
            completions=tuple(next(sampled) for _ in entry["completions"]),
            rewards_G=next(rewarded),
            reward_parts={name: next(values) for name, values in parts.items()},
        )
        for entry in entries
    ]
