"""wandb's panels: what they name is recorded, and the description of the workspace that the real package makes."""

import importlib.util
import json

import pytest
from tiny_run import config
from turn_groups import called

from rltrain import trainer
from rltrain.errors import RunError
from rltrain.report import panels
from rltrain.report.curves import CURVES
from rltrain.runs.turn_metrics import turn_metrics

PACKAGE = importlib.util.find_spec("wandb_workspaces")


def test_what_the_panels_name_is_recorded(tmp_path):
    trainer.fit(config(tmp_path, "steps=1", "evaluation.every_steps=1", "loss.kl_coef=0.1"))
    recorded = set(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]))
    named = [name for section in panels.SECTIONS.values() for panel in section for name in panel.metrics]
    of_turns = turn_metrics([called()]).keys()
    # The random reward of this run says nothing about accuracy, and there is no environment.
    assert set(named) - recorded - of_turns == {"accuracy"}
    assert len(set(named)) == len(named)


def test_without_the_package_it_says_what_to_install():
    if PACKAGE:
        pytest.skip("wandb-workspaces is installed")
    with pytest.raises(RunError, match="pip install wandb-workspaces"):
        panels.main(["--entity", "me"])


def test_the_workspace_has_the_reports_panels(capsys):
    pytest.importorskip("wandb_workspaces")
    panels.main(["--entity", "me", "--sweep", "credit", "--by", "advantage.kind", "--json"])
    view = json.loads(capsys.readouterr().out)
    assert (view["entity"], view["project"], view["displayName"]) == ("me", "rltrain", "rltrain: credit")
    section = view["spec"]["section"]
    learning, groups, *_ = section["panelBankConfig"]["sections"]
    assert {one["config"]["metrics"][0]: one["config"]["chartTitle"] for one in learning["panels"]} == CURVES
    assert groups["panels"][1]["config"]["plotType"] == "stacked-area"
    (runs,) = section["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "advantage.value.kind"}]
    assert "credit" in json.dumps(runs["filters"])
