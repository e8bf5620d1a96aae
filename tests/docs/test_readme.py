"""The README's example, as a reader would try it: its file, and its command cut to one short step."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tiny_run import OVERRIDES, metrics

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


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


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
