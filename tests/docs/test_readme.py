"""README as a reader would try it: its commands compose, its example trains, its numbers are those of the pages."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import OVERRIDES, metrics

from rltrain import cli
from rltrain.registry import discover, parts

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs/results"


discover()


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


def indented_commands() -> list[str]:
    lines = [line.strip().split(" #")[0].strip() for line in README.splitlines() if line.startswith("    ")]
    return [line for line in lines if re.match(r"(make|python|torchrun|sbatch) ", line)]


def composes(overrides: list[str]) -> None:
    cli.compose([one.replace("=NAME", "=quickstart") for one in overrides])


@pytest.mark.parametrize("command", indented_commands())
def test_the_commands_exist(command):
    program, *arguments = shlex.split(command)
    if program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in arguments)
    elif program == "sbatch":
        (script,) = [one for one in arguments if one.endswith(".sbatch")]
        assert (ROOT / script).exists()
        composes(arguments[arguments.index(script) + 1 :])
    elif "rltrain.train" not in arguments:
        assert importlib.util.find_spec(arguments[arguments.index("-m") + 1])
    else:
        composes(arguments[arguments.index("rltrain.train") + 1 :])


def test_commands_were_seen():
    assert len(indented_commands()) >= 5


@pytest.mark.parametrize("choice", re.findall(r"^\| `(algorithm=\w+|\+experiment=\w+)`", README, re.M))
def test_the_choices_of_the_table_compose(choice):
    cli.compose([choice] if choice.startswith("+") else ["+experiment=quickstart", choice])


def test_every_estimator_and_every_loss_has_a_row_on_the_page_that_the_readme_links():
    pages = {"advantage": "estimators.md", "loss": "algorithms/losses.md"}
    for kind, page in pages.items():
        assert f"](docs/{page}" in README
        rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| `")]
        named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
        assert {part.name for part in parts(kind)} - named == set()


def test_every_preset_is_in_the_table_or_on_a_page_of_algorithms():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/algorithms").glob("*.md"))
    named = set(re.findall(r"^\| `algorithm=(\w+)`", README, re.M)) | set(re.findall(r"algorithm=(\w+)", pages))
    experiments = [path.read_text() for path in (ROOT / "configs/experiment").glob("*.yaml")]
    named |= {preset for text in experiments for preset in re.findall(r"override /algorithm: (\w+)", text)}
    assert {path.stem for path in (ROOT / "configs/algorithm").glob("*.yaml")} - named == set()


EXPERIMENTS = ["vineppo", "spo", "otb", "entropy_mask", "ktae", "sdpo", "opd", "tree", "rlp", "conmax"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_algorithm_with_an_experiment_has_its_command_in_the_table(name):
    assert f"\n| `+experiment={name}` |" in README
    assert (ROOT / f"configs/experiment/{name}.yaml").exists()


def test_the_estimator_and_reward_of_the_readme_train(tmp_path):
    code = block("python", "# my_ideas.py")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "my_ideas.py").write_text(code)
    program, *arguments = shlex.split(block("bash", "my_ideas:last_tokens").replace("\\\n", " "))
    assert program == "python"
    small = [one for one in OVERRIDES if not one.startswith(("data=", "reward@", "steps="))]
    reward = ["reward@rewards.answer=random", "cold_start.steps=0", "steps=1", f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run(
        [sys.executable, *arguments, *small, *reward], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (line,) = [one for one in metrics(tmp_path / "run") if one["step"] == 1]
    assert 0 < line["rewards/brevity/mean"] < 1
    assert line["reward"] == line["rewards/answer/mean"] + 0.1 * line["rewards/brevity/mean"]


def test_the_reward_of_contributing_is_a_file_that_works(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = [one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "BrevityConfig" in one]
    override = re.search(r"`(\+reward@rewards\.brief=brevity [^`]*)`", text)[1].split()
    (tmp_path / "brevity_reward.py").write_text(code)
    (tmp_path / "main.py").write_text(
        "import brevity_reward\n"
        "from advantage_groups import make_group\n"
        "from rltrain import cli\n"
        "from rltrain.types import Context\n"
        f"config = cli.compose(['+experiment=quickstart', *{override!r}]).rewards['brief']\n"
        "assert (config.tokens, config.weight) == (16, 0.1)\n"
        "scores = brevity_reward.brevity([make_group([[1] * 8, [1] * 32], [0.0, 1.0])], config, Context()).scores\n"
        "assert scores == [[1.0, 0.5]], scores\n"
    )
    paths = f"{tmp_path}:{ROOT}:{ROOT / 'tests/helpers'}"
    result = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_pictures_numbers_are_those_of_its_table():
    pattern = r"^\| \d \| ([\d.]+) % \| ([\d.]+) % \| \S+ \| [\d.]+ % \| (\S+) \|"
    rows = [[float(cell) for cell in row] for row in re.findall(pattern, (RESULTS / "quickstart.md").read_text(), re.M)]
    before, after, control = zip(*rows, strict=True)
    assert len(rows) == 5
    text = " ".join(README.split())
    assert f"{min(before):.0f}-{max(before):.0f} % after the cold start to {min(after):.0f}-{max(after):.0f} %" in text
    assert f"more supervised training changes it by {min(control):+.1f} to {max(control):+.1f} points" in text


@pytest.mark.parametrize("row", re.findall(r"^\| [^|]*\|.*\(docs/results/\w+\.md\) \|$", README, re.M))
def test_results_stand_on_the_page_they_name(row):
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    page = (ROOT / re.search(r"\((docs/results/\w+\.md)\)", cells[-1])[1]).read_text()
    if cells[3].startswith("-"):
        assert re.sub(r" (points|tokens)$", "", cells[2]) in page and cells[3] in page
        return
    stated = [abs(float(number)) for number in re.findall(r"\d+(?:\.\d+)?", page)]
    for number in re.findall(r"\d+(?:\.\d+)?", cells[2]):
        rounding = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
        assert any(abs(value - float(number)) <= rounding for value in stated), number
