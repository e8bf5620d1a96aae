"""The report as one HTML file without external resources."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rltrain.report import charts, curves
from rltrain.report.credit import credit
from rltrain.report.evaluation import Evaluation, evaluation
from rltrain.report.folder import RecordedRun, read_run
from rltrain.report.predictions import Predictions, predictions
from rltrain.report.provenance import Origin, origin
from rltrain.report.signs import Signs, in_percent, signs
from rltrain.report.warnings import all_warnings
from rltrain.runs.summary import MetricRows

# Limits that keep the page below 5 MB.
CREDIT_BYTES, CURVE_POINTS, POINTS_OF_A_LINE = 2_500_000, 30_000, 240
# Metrics shown in other sections.
NOT_CURVES = ("step", "timing_s/")


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The contents of the page for a run."""

    run: RecordedRun
    origin: Origin
    warnings: Sequence[str]
    evaluation: Evaluation | None
    stages: Sequence[charts.StageTime]
    signs: Signs | None
    predictions: Predictions | None
    config_text: str

    @property
    def facts(self) -> dict[str, str]:
        """The rows of the table, without those that are not known."""
        run, provenance = self.run, self.run.provenance
        rewards = run.part("rewards")
        known = {
            "folder": str(run.path),
            "steps": f"{run.steps_done} of {run.config.get('steps', '?')}",
            "model": run.part("model").get("kind"),
            "data": run.part("data").get("kind"),
            "rewards": ", ".join(f"{name}: {_kind(part)}" for name, part in rewards.items()),
            "environment": run.part("environment").get("kind"),
            "advantage": run.part("advantage").get("kind"),
            "seed": run.config.get("seed"),
            "ranks": provenance.get("world_size"),
            "git revision": provenance.get("git_revision"),
            "versions": ", ".join(f"{name} {version}" for name, version in (provenance.get("packages") or {}).items()),
        }
        return {name: str(value) for name, value in known.items() if value not in (None, "")}

    @property
    def judged(self) -> str:
        """What the held-out numbers are means of."""
        held_out, temperature = self.evaluation, self.run.part("evaluation").get("temperature")
        if held_out is None or held_out.problems is None:
            return ""
        each = "1 completion" if held_out.samples == 1 else f"{held_out.samples} completions"
        how = {None: "", 0: ", greedy"}.get(temperature, f", sampled at temperature {temperature}")
        return f"{held_out.problems} held-out problems, {each} each{how}"


def _kind(part: Any) -> str:
    return str(part.get("kind", "?")) if isinstance(part, Mapping) else str(part)


def build(folders: Sequence[Path], *, estimators: Sequence[str] = (), groups: int = 6, step: int | None = None) -> str:
    """The HTML of a report on run folders. What cannot be read becomes a note."""
    runs = [read_run(path, label=label) for path, label in zip(folders, labels(folders), strict=True)]
    budget = CREDIT_BYTES // len(runs)
    sampled = [
        group
        for run in runs
        for group in credit(run, estimators=estimators, groups=groups, step=step, most_bytes=budget)
    ]
    rows = {run.label: run.rows for run in runs}
    views, script = [view_of(run) for run in runs], asset("viewer.js")
    stages = dict.fromkeys(stage.name for view in views for stage in view.stages)
    return template("page.html").render(
        views=views,
        stage_colours={name: index for index, name in enumerate(stages)},
        results=_charts(rows, curves.RESULTS),
        training=_charts(rows, curves.TRAINING | curves.TURNS),
        others=_charts(rows, _others(rows.values())),
        credit=sampled,
        style=asset("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        chart=charts,
        percent=in_percent,
    )


def labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as make them distinct."""
    parts = [path.resolve().parts for path in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(names[-depth:]) for names in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{names[-1]} ({index + 1})" for index, names in enumerate(parts)]


def view_of(run: RecordedRun) -> RunView:
    """What a page says about a run, but its credit."""
    import yaml

    held_out = run.part("evaluation")
    evaluated = int(held_out.get("problems") or 0) * int(held_out.get("samples") or 1)
    return RunView(
        run=run,
        origin=origin(run),
        warnings=all_warnings(run.rows, evaluated=evaluated),
        evaluation=evaluation(run),
        stages=charts.stages(run.rows),
        signs=signs(run),
        predictions=predictions(run),
        config_text=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
    )


def _charts(rows: Mapping[str, MetricRows], chosen: Mapping[str, curves.CurveWords]) -> list[charts.Chart]:
    most_points = max(2, min(POINTS_OF_A_LINE, CURVE_POINTS // max(1, len(chosen) * len(rows))))
    drawn = [charts.line_chart(curve, rows, name, most_points=most_points) for name, curve in chosen.items()]
    return [chart for chart in drawn if chart is not None]


def _others(runs: Iterable[MetricRows]) -> dict[str, curves.CurveWords]:
    names = sorted({name for rows in runs for row in rows for name in row})
    chosen = [name for name in names if name not in curves.CURVES | curves.TURNS and not name.startswith(NOT_CURVES)]
    return {name: curves.CurveWords(title=name, says="") for name in chosen}


def asset(name: str) -> str:
    """The text of a file of this folder."""
    return (files("rltrain.report") / name).read_text(encoding="utf-8")


def template(name: str) -> Any:
    """A template of this folder, whose values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rltrain.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(name)
