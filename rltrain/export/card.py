"""The model card: what was trained on what, held-out numbers before and after, and how to repeat it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rltrain.report.evaluation import Evaluation, evaluation
from rltrain.report.folder import RecordedRun, read_run
from rltrain.report.provenance import origin
from rltrain.report.warnings import all_warnings


def card(run_dir: Path, *, step: int, adapters: bool) -> str:
    """The text of ``README.md`` for the checkpoint of ``step``. What the run folder lacks is left out."""
    whole = read_run(run_dir, label=run_dir.resolve().name)
    run = dataclasses.replace(whole, rows=[row for row in whole.rows if row["step"] <= step])
    sections = [
        front_matter(run.config, adapters=adapters),
        f"# {run.config.get('name') or run.label}",
        _trained(run, step),
        _results(run),
        _use(adapters),
        _origin(run),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(config: Mapping[str, Any], *, adapters: bool) -> str:
    """The card's metadata. ``base_model`` is named where it is a name of the hub."""
    import yaml

    path = (config.get("model") or {}).get("path")
    is_name = isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
    metadata = {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rltrain", "reinforcement-learning", *(["lora"] if adapters else [])],
        **({"base_model": path} if is_name else {}),
    }
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _trained(run: RecordedRun, step: int) -> str:
    rewards = ", ".join(f"`{name}` ({part.get('kind')})" for name, part in run.part("rewards").items())
    facts = {
        "model": run.part("model").get("path") or run.part("model").get("kind"),
        "data": run.part("data").get("path") or run.part("data").get("kind"),
        "rewards": rewards,
        "advantage": run.part("advantage").get("kind"),
        "steps": f"{step} of {run.config.get('steps', '?')}",
        "completions a step": _completions(run.part("batch")),
        "seed": run.config.get("seed"),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value not in (None, "")]
    return "\n".join(["Trained with reinforcement learning by rltrain.", "", "| | |", "|---|---|", *rows])


def _completions(batch: Mapping[str, Any]) -> str:
    prompts, size = batch.get("prompts_per_step"), batch.get("group_size")
    return f"{prompts} prompts, {size} completions each" if prompts and size else ""


def _results(run: RecordedRun) -> str:
    held_out = evaluation(run)
    if held_out is None:
        return "## Results\n\nNo held-out evaluation was run."
    problems = f" of {held_out.problems} problems" if held_out.problems else ""
    sampled = int(run.part("evaluation").get("problems") or 0) * int(run.part("evaluation").get("samples") or 1)
    beware = [f"- {sentence}" for sentence in all_warnings(run.rows, evaluated=sampled)]
    note = "In brackets: 95 % intervals over the problems. Another seed may differ by more."
    parts = [f"## Results\n\nHeld-out{problems}. {note}", table(held_out)]
    return "\n\n".join([*parts, "To beware of:\n\n" + "\n".join(beware)] if beware else parts)


def table(held_out: Evaluation) -> str:
    """Held-out metrics before and after in Markdown."""
    head = f"| metric | step {held_out.first_step} | step {held_out.last_step} | change |\n|---|---|---|---|"
    rows = [
        " | ".join([f"| {change.name}", *map(_cell, (change.before, change.after, change.change))]) + " |"
        for change in held_out.changes
    ]
    return "\n".join([head, *rows])


def _cell(words: tuple[str, str]) -> str:
    return f"{words[0]} ({words[1]})" if words[1] else words[0]


def _use(adapters: bool) -> str:
    kind = "AutoPeftModelForCausalLM" if adapters else "AutoModelForCausalLM"
    library = "peft" if adapters else "transformers"
    return (
        f"## Use\n\n```python\nfrom {library} import {kind}\n\nmodel = {kind}.from_pretrained(FOLDER_OR_NAME)\n```\n\n"
        "Prompts must look as in training: the data set's template is in `config.yaml`, beside this card."
    )


def _origin(run: RecordedRun) -> str:
    made = origin(run)
    if not made.command:
        return ""
    revision = run.provenance.get("git_revision") or "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in (run.provenance.get("packages") or {}).items())
    return f"## How to repeat it\n\n    {made.command}\n\nrltrain's git revision: {revision}. Versions: {versions}."
