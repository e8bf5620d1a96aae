"""The documentation site: every page is in the navigation, links lead somewhere, references and tables are true."""

import ast
import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rltrain import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FROM_TRL = (DOCS / "from_trl.md").read_text(encoding="utf-8")


def test_the_navigation_names_pages_once():
    """What it does not name comes last by a hook; here only what it does."""
    specification = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts/docs_hooks.py")
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = hooks.listed(navigation)
    assert len(set(named)) == len(named)
    assert set(named) <= {str(page.relative_to(DOCS)) for page in PAGES}
    unnamed = named.pop()
    filled = hooks.on_config({"docs_dir": str(DOCS), "nav": list(named)})["nav"]
    assert unnamed in filled[-1]["More"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if not target.startswith(("http", "mailto"))]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_references_name_modules_that_exist():
    names = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)]
    assert len(names) > 30 and len(set(names)) == len(names)
    for name in names:
        importlib.import_module(name)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "group_advantages" in (tmp_path / "site/reference_algorithms.html").read_text()


# --- from TRL ----------------------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    """The table of keys: theirs, its default, ours, its default, remark."""
    lines = [line for line in FROM_TRL.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if len(row) >= 4]


def test_the_defaults_of_trl_are_those_of_the_installed_package():
    from trl import GRPOConfig

    defaults = {
        one.name: one.default if one.default is not dataclasses.MISSING else one.default_factory()
        for one in dataclasses.fields(GRPOConfig)
        if one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING
    }
    stated = {row[0].strip("`"): row[1].strip("`") for row in rows()}
    assert len(stated) > 30
    for key, value in stated.items():
        actual = defaults[key]
        assert ast.literal_eval(value) == getattr(actual, "value", actual), key


def test_our_defaults_are_those_of_the_config():
    config = cli.compose([])
    for row in rows():
        key, value = row[2].strip("`"), row[3].strip("`")
        if key == "-":
            continue
        actual = config
        for name in key.split("."):
            actual = actual[name] if isinstance(actual, dict) else getattr(actual, name)
        assert ast.literal_eval(value) == actual, key


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """The page's file of reward functions, as a module."""
    (block,) = [one for one in re.findall(r"```python\n(.*?)```", FROM_TRL, re.DOTALL) if "# my_rewards.py" in one]
    (tmp_path / "my_rewards.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("my_rewards")
    del sys.modules["my_rewards"]


def test_the_command_composes(my_rewards):
    (block,) = re.findall(r"```bash\n(.*?)```", FROM_TRL, re.DOTALL)
    program, *arguments = shlex.split(block.replace("\\\n", " "))
    assert (program, arguments[:2]) == ("python", ["-m", "rltrain.train"])
    config = cli.compose(arguments[2:])
    assert config.batch.prompts_per_step * config.batch.group_size == 16 * 8
    assert {name: reward.weight for name, reward in config.rewards.items()} == {"answer": 1.0, "short": 0.1}
    assert (config.loss.aggregation, config.steps, config.model.dtype) == ("token", 500, "bfloat16")
    assert config.data.prompt == "{prompt}"


def test_the_reward_functions_give_what_they_say(my_rewards):
    chat = [[{"role": "assistant", "content": "so it is 12 "}], "13"]
    assert my_rewards.correct(prompts=["", ""], completions=chat, answer=["12", "12"]) == [1.0, 0.0]
    assert my_rewards.short(completion_ids=[[1, 2], []], other=None) == [-0.002, 0.0]
