"""Every YAML composes; every mistake is one line with its remedy, before a model is loaded."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.registry import part_of, parts
from rltrain.types import Need

CONFIGS = cli.config_folder()
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
PRESETS = sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml"))


def overrides_for(group: str, name: str) -> list[str]:
    if group == "experiment":
        return [f"+experiment={name}"]
    return [f"reward@rewards.answer={name}" if group == "reward" else f"{group}={name}"]


# What a preset must be told, or refuses of some experiments.
MORE = {
    "opd": ["scorer.kind=frozen", "scorer.path=teacher", "scorer.cold_start.steps=0", "sampling.temperature=1"],
    "sdpo": ["scorer.cold_start.steps=0", "sampling.temperature=1"],
    "sdpo_lines": ["scorer.cold_start.steps=0", "sampling.temperature=1"],
    "implicit_reward": ["scorer.kind=ema", "scorer.cold_start.steps=0"],
    "mt_grpo": ["environment=calculator", "environment.reply_tokens=8"],
    "gigpo": ["environment=calculator", "environment.reply_tokens=8"],
}


@pytest.mark.parametrize(("group", "name"), PRESETS, ids=[f"{group}-{name}" for group, name in PRESETS])
def test_every_yaml_composes_to_a_valid_run(group, name):
    config = cli.compose([*overrides_for(group, name), *(MORE.get(name, []) if group == "algorithm" else [])])
    assert part_of(config.model).group == "model"
    assert part_of(config.advantage).group == "advantage"


def test_no_preset_is_named_like_a_node():
    """Hydra would take the node as the preset's schema."""
    cli.discover()
    assert {(part.group, part.name) for part in parts()}.isdisjoint(PRESETS)


EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
ALL_ALGORITHMS = sorted(path.stem for path in (CONFIGS / "algorithm").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("algorithm", ["grpo", "spae_lines", "rloo"])
def test_every_experiment_takes_another_algorithm(experiment, algorithm):
    """Keys of an estimator stand in ``configs/algorithm``, so that an experiment fits any."""
    cli.compose([f"+experiment={experiment}", f"algorithm={algorithm}"])


@pytest.mark.parametrize("choice", [
    ["data=hub", "data.path=mine.jsonl", 'data.prompt="{question}"'], ["data=wordy_solutions"], ["model=smollm2"],
], ids=["hub", "wordy_solutions", "smollm2"])  # fmt: skip
def test_the_quickstart_takes_other_data_and_models(choice):
    """Keys of a data set or a model stand in their own YAML, so that another can be chosen."""
    cli.compose(["+experiment=quickstart", *choice])


@pytest.mark.parametrize("experiment", ["quickstart", "chains", "rlp"])
@pytest.mark.parametrize("algorithm", ALL_ALGORITHMS)
def test_an_experiment_takes_every_algorithm(experiment, algorithm):
    cli.compose([f"+experiment={experiment}", f"algorithm={algorithm}", *MORE.get(algorithm, [])])


ALGORITHMS = {
    "grpo": {"ratio": "token", "surrogate": "clip", "clip_high": 0.2, "aggregation": "sequence", "dual_clip": None},
    "dr_grpo": {"surrogate": "clip", "clip_high": 0.2, "aggregation": "constant"},
    "rloo": {"surrogate": "reinforce", "aggregation": "sequence_sum"},
    "reinforce_pp_baseline": {"surrogate": "clip", "aggregation": "token", "kl_estimator": "k2"},
    "dapo": {"surrogate": "clip", "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "kl_coef": 0.0},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence"},
    "cispo": {"surrogate": "cispo", "aggregation": "token"},
    "tempo": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "aggregation": "token", "kl_coef": 0.0},
    "spae": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token"},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_presets_are_those_of_the_papers(name):
    loss = cli.compose([f"algorithm={name}"]).loss
    assert {key: getattr(loss, key) for key in ALGORITHMS[name]} == ALGORITHMS[name]


def test_algorithms_choose_their_estimator():
    assert cli.compose(["algorithm=tempo"]).advantage.normalize_std is True
    dr_grpo, rloo = cli.compose(["algorithm=dr_grpo"]).advantage, cli.compose(["algorithm=rloo"]).advantage
    assert (dr_grpo.baseline, dr_grpo.scale) == ("mean", "none")
    assert (rloo.baseline, rloo.scale) == ("leave_one_out", "none")
    assert cli.compose(["algorithm=dapo"]).batch.dynamic_sampling is True


def test_an_estimator_can_be_changed_under_an_algorithm():
    config = cli.compose(["+experiment=quickstart", "algorithm=dapo", "advantage=tempo"])
    assert part_of(config.advantage).name == "tempo"
    assert config.loss.clip_high == 0.28


def test_needs_follow_from_the_parts():
    assert cli.compose([]).needs() == frozenset()
    assert cli.compose(["loss.kl_coef=0.1"]).needs() == {Need.REFERENCE_LOGPROBS}
    assert Need.PROBES in cli.compose(["advantage=spae"]).needs()


@pytest.mark.parametrize(("overrides", "message"), [
    (["batch.group_size=1"], "group_size=1: a group baseline needs at least 2 samples; set batch.group_size>=2"),
    (["batch.token_budget=100"], "batch.token_budget=100: below one sequence"),
    (["model.dtype=float16"], "model.dtype=float16: unknown; set float32 or bfloat16"),
    (["sampling.temperature=0"], "set sampling.temperature>0"),
    (["loss.importance_correction=truncate", "sampling.top_p=0.9"], "set sampling.top_k=0 sampling.top_p=1"),
    (["deepspeed.offload_optimizer=true"], "set deepspeed.zero_stage>=1"),
    (["evaluation.samples=4"], "set evaluation.temperature=1.0 or evaluation.samples=1"),
    (["model=pretrained"], "model.path: has no value"),
    (["sampling.max_new_tokens=0"], "sampling.max_new_tokens=0: set at least 1"),
    (["evaluation.every_steps=-1"], "evaluation.every_steps=-1: must be >= 0; 0 means never"),
    (["checkpoint.every_steps=-1"], "checkpoint.every_steps=-1: must be >= 0"),
    (["loss.entropy_coef=-0.1"], "loss.entropy_coef=-0.1: must be >= 0"),
    (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: set two numbers"),
    (["deadline_s=0"], "deadline_s=0.0: must be > 0"),
    (["cold_start.batch_size=0"], "cold_start.batch_size=0: set at least 1"),
    (
        [
            "reward@rewards.answer=custom",
            "rewards.answer.import_path=user_rewards:hangs",
            "rewards.answer.deadline_s=1000",
        ],
        "set it to half of that or less",
    ),
    (
        ["loss.kl_coef=0.1", "loss.kl_estimator=k1"],
        "loss.kl_estimator=k1 with loss.kl_coef=0.1: in a loss its gradient is the score function, whose mean is zero, "
        "so it does not pull towards the reference; set loss.kl_estimator=k3 (or k2)",
    ),
    (
        [
            "+reward@eval_rewards.answer=custom",
            "eval_rewards.answer.import_path=user_rewards:hangs",
            "eval_rewards.answer.deadline_s=1000",
        ],
        "eval_rewards.answer: may take 1000 s by its own deadline",
    ),
    (["rewards.answer.weight=nan"], "rewards.answer.weight=nan: must be finite; 1.0 is usual"),
    (["rewards.answer.weight=-inf"], "rewards.answer.weight=-inf: must be finite; 1.0 is usual"),
    (["loss.kl_coef=inf"], "loss.kl_coef=inf: must be >= 0 and finite; 0 turns it off"),
    (["loss.kl_coef=nan"], "loss.kl_coef=nan: must be >= 0 and finite; 0 turns it off"),
    ([f"seed={2**63}"], f"seed={2**63}: must lie in -2**63..2**63-1; 0 is usual"),
    ([f"seed={-(2**63) - 1}"], f"seed={-(2**63) - 1}: must lie in -2**63..2**63-1; 0 is usual"),
    (["run_dir=''"], "run_dir: is empty; set a folder"),
    (
        ["environment.max_turns=3"],
        "environment.max_turns: no environment is chosen; choose it first: environment=NAME",
    ),
    (["eval_data.seed=3"], "eval_data.seed: no eval_data is chosen; choose it first: +data@eval_data=NAME"),
    (["optimizer.schedule=step"], "set one of constant, linear, cosine"),
])  # fmt: skip
def test_impossible_combinations_name_key_cause_and_remedy(overrides, message):
    with pytest.raises(ConfigError) as error:
        cli.compose(overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_folder_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert cli.compose(["run_dir='~/runs/first'"]).run_dir == "/somewhere/runs/first"


def test_two_parts_under_one_name_are_refused():
    from rltrain.config import AdvantageConfig
    from rltrain.registry import register

    with pytest.raises(ValueError, match="registered twice"):
        register("advantage", "group", AdvantageConfig)(lambda: None)


def command(*arguments: str, module: str = "rltrain.train") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), [
    (["batch.groupsize=4"], ["batch.groupsize", "did you mean batch.group_size?"]),
    (["batch.group_size=four"], ["batch.group_size", "four", "Integer"]),
    (["advantage=tempoo"], ["advantage/tempoo", "tempo"]),
    (["+experiment=nothing"], ["experiment/nothing"]),
    (["batch.group_size=1"], ["set batch.group_size>=2"]),
])  # fmt: skip
def test_mistakes_on_the_command_line_are_one_line(arguments, expected):
    result = command(*arguments)
    assert result.returncode == 2
    first, line = result.stderr.strip().splitlines()
    assert first.endswith("start       train: reading the configuration")
    assert line.startswith("config error: ")
    for text in expected:
        assert text in line


def test_help_lists_the_groups():
    result = command("--help")
    assert result.returncode == 0
    for group in ("advantage", "algorithm", "data", "experiment", "model", "reward", "rollout"):
        assert re.search(rf"^  \+?{group}(@rewards\.answer)?= +\w", result.stdout, re.M)
    assert "quickstart" in result.stdout


def test_help_imports_torch_at_most():
    """What makes --help slow is what it imports."""
    code = "import sys; from rltrain import train, cli; cli.store_nodes(); print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    heavy = {"transformers", "deepspeed", "datasets", "trl", "wandb", "vllm", "peft", "matplotlib", "sympy.core"}
    loaded = set(result.stdout.split())
    assert heavy & loaded <= {"sympy.core"}, heavy & loaded  # torch itself loads sympy


def test_own_folder_of_experiments_needs_no_code(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nbatch: {group_size: 1}\n")
    result = command("--config-dir", str(tmp_path), "+experiment=mine")
    assert "batch.group_size=1: a group baseline" in result.stderr
