"""The same sampled groups under other estimators, recomputed from ids, rewards and, where needed, probes.

An estimator is named by an ``algorithm=`` preset or an ``advantage=`` node, and has its settings. Estimators that probe
the policy get the checkpoint nearest to the samples. An estimate that cannot be computed is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rltrain import cli
from rltrain.advantages.estimator import estimator_of
from rltrain.errors import ConfigError, RunError
from rltrain.registry import needs_of, part_of, parts
from rltrain.report.folder import RecordedRun
from rltrain.report.samples import SampleRow, as_group, notes
from rltrain.types import Context, Need, Notes, RolloutServices


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """``values[p][g]`` per token of every group of a step, or None with the reason in ``remark``.

    ``is_recorded``: the run recorded these values, they were not computed here.
    """

    name: str
    values: Sequence[Sequence[Sequence[float]]] | None
    notes: Sequence[Notes]
    remark: str
    is_recorded: bool = False


def check(names: Sequence[str]) -> None:
    """ConfigError for a name that is neither a preset nor an estimator."""
    cli.store_nodes()
    known = sorted({*_presets(), *(part.name for part in parts("advantage"))})
    for name in names:
        if name not in known:
            raise ConfigError(f"--estimators {name}: unknown; choose among {', '.join(known)}")


def _presets() -> list[str]:
    return sorted(path.stem for path in (cli.config_folder() / "algorithm").glob("*.yaml"))


def candidates(name: str) -> list[str]:
    """The overrides to try in turn: the preset of that name and its variants ``NAME_…``, else the node."""
    if name not in _presets():
        return [f"advantage={name}"]
    return [f"algorithm={preset}" for preset in _presets() if preset == name or preset.startswith(f"{name}_")]


class SampledStep:
    """The sampled groups of one step of a run, and the checkpoint to probe for them."""

    def __init__(self, run: RecordedRun, step: int, groups: Sequence[Sequence[SampleRow]]) -> None:
        self._run, self._rows = run, groups
        self._drawn_after = step - 1  # samples are numbered by the step that trains on them

    def recorded(self, name: str = "") -> Estimate:
        """The advantages that the run trained on."""
        return Estimate(
            name=name or f"{self._run.part('advantage').get('kind', 'advantage')} (as trained)",
            values=[[row.get("advantages") or [] for row in rows] for rows in self._rows],
            notes=[notes(rows) for rows in self._rows],
            remark="as the run recorded it, with the run's settings",
            is_recorded=True,
        )

    def under(self, name: str) -> Estimate:
        """The estimate of another estimator, whose batch statistics are those of these groups."""
        reasons, trained_with = [], self._run.part("advantage")
        if trained_with.get("kind") == name:
            return self.recorded(name)
        for override in candidates(name):
            try:
                config = cli.compose_advantage([override])
                part, needs = part_of(config), needs_of(config)
                # Probes of a checkpoint would differ from those that the run made with the same estimator.
                is_same = trained_with == {"kind": part.name} | vars(config)
                if trained_with.get("kind") == part.name and (needs or is_same):
                    return self.recorded(name)
                context, source = self._context(needs)
                estimated = estimator_of(config)(self._groups, context)
            except (ConfigError, RunError) as error:
                reasons.append(str(error))
                continue
            return Estimate(
                name=name,
                values=[[values_T.tolist() for values_T in group] for group in estimated.values],
                notes=estimated.notes or [{}] * len(self._rows),
                remark=f"settings of {override}; {source}",
            )
        return Estimate(name=name, values=None, notes=[], remark=f"not shown: {reasons[0]}")

    @cached_property
    def _groups(self) -> list[Any]:
        return [as_group(rows) for rows in self._rows]

    def _context(self, needs: frozenset[Need]) -> tuple[Context, str]:
        """The context of an estimator, and in words the source of its numbers."""
        if not all(ids for group in self._groups for ids in group.completion_ids):
            raise ConfigError("the samples hold completions without token ids")
        seed, needs = self._run.config.get("seed", 0), needs - {Need.STATE}  # each call has a state of its own
        if not needs:
            return Context(step=self._drawn_after, seed=seed), "recomputed from token ids and rewards"
        if unmet := needs - {Need.PROBES}:
            raise ConfigError(f"it needs {', '.join(need.value for need in unmet)}, which a run folder does not hold")
        if not all(group.prompt.token_ids for group in self._groups):
            raise ConfigError("it probes the policy after the prompt, and these samples hold no prompt ids (older run)")
        saved_step, prober, tokenizer = self._checkpoint
        services = RolloutServices(prober=prober)
        source = f"probes of the checkpoint of step {saved_step} on samples drawn after step {self._drawn_after}"
        return Context(step=self._drawn_after, seed=seed, tokenizer=tokenizer, rollout=services), source

    @cached_property
    def _checkpoint(self) -> tuple[int, Any, Any]:
        """Step, prober and tokenizer of the checkpoint nearest to the samples. No rollout engine is started."""
        from safetensors import SafetensorError

        from rltrain.policy.load import load_frozen
        from rltrain.rollout.probes import PolicyProber
        from rltrain.runs import checkpoint

        saved = checkpoint.list_checkpoints(self._run.path)
        if not saved:
            raise ConfigError("it probes the policy, and the run folder holds no finished checkpoint")
        nearest = min(saved, key=lambda candidate: abs(candidate.step - self._drawn_after))
        config = self._run.config
        try:
            policy = load_frozen(_part_config("model", config["model"]), path=str(nearest.policy))
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"it probes the policy, and {nearest.path.name} cannot be loaded ({reason})") from error
        return nearest.step, PolicyProber(policy=policy), policy.tokenizer


def _part_config(group: str, resolved: Mapping[str, Any]) -> Any:
    """The typed settings of a part from a resolved config."""
    from omegaconf import OmegaConf

    (part,) = [part for part in parts(group) if part.name == resolved["kind"]]
    values = {key: value for key, value in resolved.items() if key != "kind"}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(part.config), values))
