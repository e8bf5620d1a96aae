"""What the console says of a run's steps."""

from rltrain import cli
from rltrain.runs.console import Console


def test_a_resumed_run_announces_its_steps_once_and_before_the_first(capsys):
    config = cli.compose(["+experiment=quickstart", "steps=5", "batch.prompts_per_step=4", "batch.group_size=2"])
    console = Console(config, first_step=3)
    console.begin()
    assert capsys.readouterr().err.endswith("  rl          2 steps of 4 problems x 2 completions from step 3 on\n")
    console.update(4, {"reward": 0.5})
    console.close()
    assert "steps of" not in (told := capsys.readouterr().err) and "step 4/5  reward 0.5" in told
