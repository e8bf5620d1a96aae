"""What a release names must agree: the version, the files that containers copy, the commands that hosted CI calls."""

import re
import tomllib
from pathlib import Path

import yaml

import rltrain

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == rltrain.__version__
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()


def test_hosted_ci_calls_what_runs_here():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == ["make check docs", "bash .ci/run"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in ("check", "docs"))
    assert (ROOT / ".ci/run").exists()


def test_containers_copy_what_the_environment_is_made_from():
    """The stamp of `make venv` depends on these files; the Dockerfile copies them before it runs."""
    rule = re.search(r"^\$\(installed\): (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    docker = (ROOT / "containers/Dockerfile").read_text()
    before = docker[: docker.index("make venv\n\n")]
    assert [path for path in rule if path not in before] == []
    copied = re.findall(r"^COPY (.+) \S+$", docker, re.M)
    assert all((ROOT / path).exists() for line in copied for path in line.split())
    for name in ("Dockerfile", "rltrain.def"):
        text = (ROOT / "containers" / name).read_text()
        lock = (ROOT / "requirements.lock").read_text()
        assert re.findall(r"torch===([\d.]+)", text) == re.findall(r"^torch==([\d.]+)", lock, re.M)
