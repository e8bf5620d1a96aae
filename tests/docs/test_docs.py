"""The documentation: every page is in the navigation; links, commands, paths and keys that a page names exist."""

import ast
import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rltrain import cli, config
from rltrain.options import described
from rltrain.registry import discover, parts

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READ = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm/README.md"]
INDEX, LOG = DOCS / "results/index.md", DOCS / "log.md"
SECTIONS = {field.name for field in dataclasses.fields(config.RunConfig)}
WRITTEN_BY_THE_READER = {"rltrain/advantages/discounted.py"}
FROM_TRL = (DOCS / "from_trl.md").read_text(encoding="utf-8")

discover()


@pytest.fixture(scope="module")
def hooks():
    specification = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts/docs_hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def page_of_the_site(hooks, path: Path) -> str:
    """The Markdown that the site makes of a page."""
    page = SimpleNamespace(file=SimpleNamespace(src_uri=path.relative_to(DOCS).as_posix()))
    return hooks.on_page_markdown(path.read_text(encoding="utf-8"), page=page, config={"docs_dir": str(DOCS)})


def test_every_page_is_in_the_navigation_once(hooks):
    named = hooks.listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_a_page_that_the_navigation_does_not_name_comes_last(hooks):
    named = [page.relative_to(DOCS).as_posix() for page in PAGES]
    unnamed = named.pop()
    filled = hooks.on_config({"docs_dir": str(DOCS), "nav": list(named)})["nav"]
    assert filled[-1] == {"More": [unnamed]}


def relative_links(text: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)#\s]+)", text) if not target.startswith(("http", "mailto"))]


@pytest.mark.parametrize("page", READ, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert [target for target in relative_links(page.read_text()) if not (page.parent / target).exists()] == []


def test_index_holds_the_head_of_the_readme(hooks):
    text = page_of_the_site(hooks, DOCS / "index.md")
    assert "<!-- include" not in text
    readme = (ROOT / "README.md").read_text()
    first = readme.split("\n\n")[1].splitlines()[0]
    assert first in text and "make quickstart " in text and "](images/quickstart.png)" in text
    assert "## Layout" in readme and "## Layout" not in text
    assert [target for target in relative_links(text) if not is_on_the_site(target)] == []
    assert "[`train()`](source/rltrain/trainer.py.md)" in text


def is_on_the_site(target: str) -> bool:
    """A page below ``source/`` is made from a file of the checkout."""
    made = re.fullmatch(r"source/(.+)\.md", target)
    return (ROOT / made[1] if made else DOCS / target).exists()


def test_the_page_on_slurm_is_the_folders_readme(hooks):
    text = page_of_the_site(hooks, DOCS / "slurm.md")
    assert "train.sbatch" in text and "](results/slurm.md)" in text
    assert [target for target in relative_links(text) if not is_on_the_site(target)] == []


def test_paths_in_code_become_links_outside_fenced_blocks(hooks):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="results/x.md"))
    text = "see `rltrain/loss.py`, `rltrain/gone.py`\n```\n`rltrain/loss.py`\n```\n[a](../../scripts/sweep.sh)"
    assert hooks.on_page_markdown(text, page=page, config={"docs_dir": str(DOCS)}) == (
        "see [`rltrain/loss.py`](../source/rltrain/loss.py.md), `rltrain/gone.py`\n```\n`rltrain/loss.py`\n```\n"
        "[a](../source/scripts/sweep.sh.md)"
    )
    assert {Path("rltrain/trainer.py"), Path("scripts/sweep.sh")} <= hooks.linked_sources(DOCS)


def test_an_include_takes_the_named_sections(hooks):
    text = "# A\nfirst\n```\n# no heading\n```\n## B\nsecond\n## C\nthird"
    assert hooks.chosen(text, "A, C") == "# A\nfirst\n```\n# no heading\n```\n## C\nthird"
    with pytest.raises(KeyError):
        hooks.chosen(text, "D")


def test_links_of_an_include_are_moved_to_its_page(hooks):
    text = "[a](docs/x/a.md#there) ![b](docs/b.png) [c](https://c.d) [d](#here)"
    moved = hooks.relinked(text, Path("/r"), Path("/r/docs/x"))
    assert moved == "[a](a.md#there) ![b](../b.png) [c](https://c.d) [d](#here)"


UNCHECKED = re.compile(r"untested|never (been )?run|not been (run|tested|checked|tried|timed)", re.IGNORECASE)


@pytest.mark.parametrize("page", [p for p in READ if p not in (DOCS / "checked.md", LOG)], ids=lambda page: page.name)
def test_what_was_not_run_stands_in_checked_alone(page):
    """Another page may say so beside a link to the list."""
    paragraphs = [paragraph for paragraph in page.read_text().split("\n\n") if UNCHECKED.search(paragraph)]
    assert [paragraph for paragraph in paragraphs if "checked.md" not in paragraph] == []


def code_of(text: str) -> str:
    """Blocks and inline code of a page."""
    return "\n".join(re.findall(r"```.*?```|^    .*$|`[^`\n]+`", text, flags=re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", READ, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_paths_that_a_page_names_exist(page):
    code = code_of(page.read_text())
    modules = set(re.findall(r"-m (rltrain(?:\.[a-z_]\w*)+)", code))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    places = r"(?<![\w/.])((?:rltrain|scripts|tests|configs|slurm|docs)/[\w./-]*\w)"
    missing += [path for path in re.findall(places, code) if not exists(path)]
    assert missing == []


def exists(path: str) -> bool:
    """A placeholder in capitals, such as ``rltrain/rewards/NAME.py``, is no path; the tutorial writes a file."""
    return bool(re.search(r"[A-Z]{4}", Path(path).stem)) or (ROOT / path).exists() or path in WRITTEN_BY_THE_READER


@pytest.mark.parametrize("page", sorted(set((DOCS / "results").glob("*.md")) - {INDEX}), ids=lambda page: page.stem)
def test_a_result_has_its_answer_command_and_revision(page):
    text = page.read_text()
    assert text.startswith("# ") and re.search(r"^# .*\?$", text, re.M)
    assert "**Answer.**" in text
    assert re.search(r"^    .*(scripts/|-m (rltrain|pytest)|sbatch)", text, re.M)
    assert re.search(r"\b[0-9a-f]{7}\b", text)


def trainings(text: str) -> list[str]:
    """The overrides of a page's ``rltrain.train`` commands, but those left open (…) or with a file of the reader's."""
    lines = re.findall(r"-m rltrain\.train (.*)", text.replace("\\\n", " "))
    return [line for line in lines if not re.search(r"…|--help|import_path|`", line)]


TRAININGS = sorted({line for page in READ for line in trainings(page.read_text())})


@pytest.mark.parametrize("overrides", TRAININGS)
def test_training_commands_compose(overrides):
    cli.compose(shlex.split(overrides.replace("=NAME", "=quickstart"), comments=True))


def test_training_commands_were_seen():
    assert len(TRAININGS) > 20
    assert trainings("    python -m rltrain.train a=1 \\\n        b=2\n") == ["a=1          b=2"]


def keys_of(text: str) -> set[str]:
    """The keys of a page's tables: the first column, where it holds dotted names in code."""
    firsts = [line.split("|")[1] for line in text.splitlines() if re.match(r"\| `[a-z_]+\.[a-z_]+", line)]
    names = {name for cell in firsts for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", cell)}
    return {name for name in names if name.split(".")[0] in SECTIONS and not name.endswith(".py")}


@pytest.mark.parametrize("page", READ, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_keys_that_a_table_names_are_in_the_config(page):
    unknown = [key for key in keys_of(page.read_text()) if not known(key)]
    assert unknown == []


def known(key: str) -> bool:
    """Whether the config, or a registered part of its group, has the key."""
    section, *rest = key.split(".")
    group = {"rewards": "reward"}.get(section, section)
    roots = [part.config for part in parts(group)] or [core_class(section)]
    rest = rest[1:] if section == "rewards" else rest
    return any(has_path(root, rest) for root in roots)


def core_class(section: str) -> type:
    return typing.get_type_hints(config.RunConfig)[section]


def has_path(root: type, path: list[str]) -> bool:
    """Whether a dataclass has the field, and where that is a dataclass the rest of the path."""
    hints = typing.get_type_hints(root)
    if path[0] not in hints:
        return False
    return len(path) == 1 or not dataclasses.is_dataclass(hints[path[0]]) or has_path(hints[path[0]], path[1:])


def test_an_unknown_key_is_noticed():
    assert known("batch.group_size") and known("rewards.answer.beta") and known("model.lora.rank")
    assert known("rollout.max_rows") and known("advantage.xi")
    assert not known("batch.groups") and not known("rewards.answer.gamma_ray") and not known("model.lora.ranks")


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


def test_every_key_and_section_is_described():
    """``rltrain help`` shows the comment behind a key's field, or above it, or its sentence in the docstring."""
    found = described.described()
    assert [key.path for key in found.keys.values() if not key.text] == []
    assert [section.name for section in found.sections if not section.doc] == []
    assert [name for name, entry in described.all_fields("RunConfig").items() if not entry.text] == []


def test_the_map_of_estimators_lists_every_registered_one():
    firsts = [line.split("|")[1] for line in (DOCS / "estimators.md").read_text().splitlines() if line[:3] == "| `"]
    listed = {name for first in firsts for name in re.findall(r"`(\w+)`", first)}
    assert {part.name for part in parts("advantage")} - listed == set()


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
    defaults = cli.compose([])
    for row in rows():
        key, value = row[2].strip("`"), row[3].strip("`")
        if key == "-":
            continue
        actual = defaults
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
    composed = cli.compose(arguments[2:])
    assert composed.batch.prompts_per_step * composed.batch.group_size == 16 * 8
    assert {name: reward.weight for name, reward in composed.rewards.items()} == {"answer": 1.0, "short": 0.1}
    assert (composed.loss.aggregation, composed.steps, composed.model.dtype) == ("token", 500, "bfloat16")
    assert composed.data.prompt == "{prompt}"


def test_the_reward_functions_give_what_they_say(my_rewards):
    chat = [[{"role": "assistant", "content": "so it is 12 "}], "13"]
    assert my_rewards.correct(prompts=["", ""], completions=chat, answer=["12", "12"]) == [1.0, 0.0]
    assert my_rewards.short(completion_ids=[[1, 2], []], other=None) == [-0.002, 0.0]
