"""The report's panels as a wandb workspace: a saved view of a project, or only its description with --json.

python -m rltrain.report.panels --entity ENTITY [--project rltrain] [--sweep GROUP] [--by name] [--json]

Needs the package wandb-workspaces, and for saving a login (``wandb login``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rltrain import cli
from rltrain.config import TrackingConfig
from rltrain.errors import RunError
from rltrain.report.curves import CURVES, TURNS

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace  # pyright: ignore[reportMissingImports]

COLUMNS, WIDTH, HEIGHT = 3, 8, 6  # of wandb's grid of 24 columns


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Metrics against the step, as lines or stacked areas."""

    title: str
    metrics: Sequence[str]
    stacked: bool = False


def _stacked(title: str, prefix: str, *names: str) -> Panel:
    return Panel(title=title, metrics=[f"{prefix}/{name}" for name in names], stacked=True)


SECTIONS = {
    "Learning": [Panel(title=curve.title, metrics=[name]) for name, curve in CURVES.items()],
    "Groups and time": [
        _stacked("groups right, mixed and wrong", "groups", "all_right", "mixed", "all_wrong"),
        _stacked("seconds per stage", "timing_s", "data", "rollout", "reward", "advantage", "collate", "train", "sync"),
        Panel(title="seconds per step", metrics=["timing_s/step"]),
    ],
    "Health": [
        Panel(title="share of tokens clipped", metrics=["clip_ratio/region_mean"]),
        Panel(title="sampler to trainer, log-probs", metrics=["sampling/sampling_logp_difference/mean"]),
        Panel(title="grader failures", metrics=["rewards/answer/errors", "rewards/answer/timeouts"]),
        Panel(title="learning rate", metrics=["learning_rate"]),
        Panel(title="completion tokens a second", metrics=["perf/throughput"]),
    ],
    "Turns": [
        *(Panel(title=curve.title, metrics=[name]) for name, curve in TURNS.items()),
        Panel(title="environment failures", metrics=["environment/errors", "environment/timeouts"]),
        Panel(title="slowest replies, seconds", metrics=["environment/latency_p99_s"]),
    ],
}


def workspace(*, entity: str, project: str, sweep: str | None = None, by: str = "name") -> Workspace:
    """The view. Runs are grouped by the config key ``by``. A line is their mean, a band their minimum and maximum.

    Metrics that no panel names, such as an estimator's own, follow in sections that wandb makes by prefix.
    """
    ws, wr = _packages()
    sections = {name: [_line_plot(wr, panel) for panel in panels] for name, panels in SECTIONS.items()}
    sections["Completions"] = [wr.WeavePanelSummaryTable(table_name="completions")]
    for panels in sections.values():
        for index, panel in enumerate(panels):
            panel.layout = wr.Layout(x=index % COLUMNS * WIDTH, y=index // COLUMNS * HEIGHT, w=WIDTH, h=HEIGHT)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"rltrain: {sweep}" if sweep else "rltrain",
        sections=[ws.Section(name=name, is_open=True, panels=panels) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(group_by_prefix="first", max_runs=30),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config(by)], filters=ws.And(ws.Metric("Group") == sweep) if sweep else ""
        ),
        auto_generate_panels=True,
    )


def _line_plot(wr: Any, panel: Panel) -> Any:
    return wr.LinePlot(
        title=panel.title,
        x="Step",
        y=list(panel.metrics),
        plot_type="stacked-area" if panel.stacked else "line",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
    )


def _packages() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr  # pyright: ignore[reportMissingImports]
        import wandb_workspaces.workspaces as ws  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise RunError(f"panels: no module named {error.name}; pip install wandb-workspaces") from None
    return ws, wr


def described(view: Workspace) -> Mapping[str, Any]:
    """The description that wandb would get, as plain data."""
    return json.loads(view._to_model().model_dump_json(by_alias=True, exclude_none=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Save the view and print its address, or print its description."""
    parser = argparse.ArgumentParser(
        prog="python -m rltrain.report.panels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--entity", required=True, help="the user or team that owns the project")
    parser.add_argument("--project", default=TrackingConfig().project)
    parser.add_argument("--sweep", help="the runs of this group alone (tracking.group)")
    parser.add_argument("--by", default="name", help="config key to group runs by (default: name)")
    parser.add_argument("--json", action="store_true", help="print the description; nothing is sent")
    options = parser.parse_args(arguments)
    view = workspace(entity=options.entity, project=options.project, sweep=options.sweep, by=options.by)
    if options.json:
        print(json.dumps(described(view), indent=1))
        return
    print(view.save().url)


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()
