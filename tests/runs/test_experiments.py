"""Each method as a user runs it, cut to a step or two on the very small model."""

import pytest
from tiny_run import OVERRIDES, metrics

from rltrain import cli, trainer

SMALL = [one for one in OVERRIDES if not one.startswith(("data=", "reward@", "steps="))]


@pytest.mark.parametrize("algorithm", [
    "grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "dapo", "gspo", "cispo", "tempo", "spae_lines",
    "vineppo_paper", "spo",
    "ktae", "entropy_mask", "optimal_token_baseline", "regression", "introspection",
])  # fmt: skip
def test_every_algorithm_trains(algorithm, tmp_path):
    overrides = [*SMALL, "data=small_integers", "reward@rewards.answer=random", f"algorithm={algorithm}", "steps=2"]
    trainer.fit(cli.compose([*overrides, f"run_dir={tmp_path / 'run'}"]))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["grad_norm"] > 0 for line in lines[1:])


def test_methods_share_their_first_rollout(tmp_path):
    """Sampling does not depend on the estimator: paired comparisons start from the same completions."""
    first = {}
    for algorithm in ("grpo", "tempo"):
        overrides = [*SMALL, "data=small_integers", "reward@rewards.answer=random", f"algorithm={algorithm}", "steps=1"]
        trainer.fit(cli.compose([*overrides, f"run_dir={tmp_path / algorithm}"]))
        first[algorithm] = metrics(tmp_path / algorithm)[1]
    for name in ("reward", "completions/mean_length", "num_tokens"):
        assert first["grpo"][name] == first["tempo"][name]
    assert first["grpo"]["grad_norm"] != first["tempo"]["grad_norm"]
