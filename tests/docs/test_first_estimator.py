"""The tutorial as a reader follows it: its files, blocks and commands, with trainings cut to two short steps."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import OVERRIDES, metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/first_estimator.md").read_text(encoding="utf-8")
# What makes the quickstart short; the model's sizes, the reward and the number of steps come from here as well.
SHORT = [one for one in OVERRIDES if not one.startswith(("data=", "reward@", "steps="))]
SHORT += ["reward@rewards.answer=random", "cold_start.steps=0", "steps=2", "tracking.samples_every_steps=1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def file_of(block: str) -> str | None:
    named = re.match(r"# (\S+\.(?:py|txt))\n", block)
    return named[1] if named else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the page tells the reader to write, beside links to the checkout's own folders."""
    folder = tmp_path_factory.mktemp("tutorial")
    for language in ("python", "text"):
        for block in blocks(language):
            if (name := file_of(block)) and "/" not in name:
                (folder / name).write_text(block)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "PYTHON": sys.executable,
        "JOBS": "1",
        "COLD_START": "own",
    }
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def shortened(command: list[str]) -> list[str]:
    """The command with this interpreter, a training as short as can be, a sweep of one seed."""
    program, *arguments = [sys.executable if word == "python" else word for word in command]
    if "rltrain.train" in arguments:
        return [program, *arguments, *SHORT]
    if program.endswith("sweep.sh"):
        return ["bash", program, arguments[0], "1", *SHORT]
    return [program, *arguments]


def test_the_page_from_top_to_bottom(folder):
    outputs = {}
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.DOTALL):
        if language == "bash":
            for command in commands(block):
                outputs[" ".join(command[:3])] = run(folder, *shortened(command))
        elif file_of(block) is None:
            outputs["script"] = run(folder, sys.executable, "-c", block)
    assert "2 passed" in outputs["python -m pytest"]
    assert "discounted" in outputs["python -m rltrain.compare.gradients"]
    assert "report.html" in outputs["python -m rltrain.report"]
    assert "discounted - grpo" in outputs["python -m rltrain.compare"]
    assert "1 shared seeds give no interval" in outputs["python -m rltrain.compare"]
    # gamma 0.9 over at most ten tokens: a row's mean is between 1 and (1 - 0.9^10)/(10·0.1) of its largest value.
    shares = [line["discounted/share_kept"] for line in metrics(folder / "runs/discounted")[1:]]
    assert len(shares) == 2 and all(0.651 < share <= 1 for share in shares)
    printed = [
        float(line.split()[0]) for line in outputs["script"].splitlines() if re.match(r"[+-]\d\.\d{3}  ['\"]", line)
    ]
    ratios = [one / following for one, following in itertools.pairwise(printed)]
    assert ratios == pytest.approx([0.9] * len(ratios), abs=0.01)
    for line in metrics(folder / "runs/halves")[1:]:
        assert line["continuations/requests"] == 4 * 4 and line["grad_norm"] > 0
        assert 0 <= line["halves/middle"] <= 1


def test_the_registered_form_gives_the_same_numbers(folder):
    (block,) = [one for one in blocks("python") if file_of(one) == "rltrain/advantages/discounted.py"]
    (folder / "registered.py").write_text(block)
    (folder / "same.py").write_text(
        "import torch\n"
        "from discounted import discounted\n"
        "from registered import DiscountedConfig, discounted as registered\n"
        "from rltrain.registry import part_of\n"
        "from rltrain.types import Context\n"
        "from test_discounted import group\n"
        "groups = [group([1.0, 0.0, 0.5], [3, 1, 4]), group([1.0, 1.0], [2, 2])]\n"
        "config = DiscountedConfig(gamma=0.7)\n"
        "mine = part_of(config).function(groups, config, Context()).values\n"
        "other = discounted(groups, {'gamma': 0.7}, Context()).values\n"
        "assert part_of(config).name == 'discounted'\n"
        "assert all(torch.equal(a, b) for m, o in zip(mine, other) for a, b in zip(m, o))\n"
    )
    run(folder, sys.executable, "same.py")
