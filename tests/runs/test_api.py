"""Training from Python: settings as keywords, functions as parts, errors as exceptions, twice in one process."""

import logging
import signal
import sys
import warnings

import pytest
import torch
import torch.distributed as torch_dist

from rltrain import api, cli
from rltrain.advantages.group import group_advantages, per_token
from rltrain.errors import ConfigError
from rltrain.types import Advantages

SMALL = {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64}
SETTINGS = {
    "sampling.max_new_tokens": 10, "sampling.max_prompt_tokens": 32, "batch.prompts_per_step": 4, "batch.group_size": 4,
    "batch.token_budget": 256, "evaluation.every_steps": 2, "evaluation.problems": 6, "tracking.wandb": "disabled",
}  # fmt: skip


def everywhere(groups, options, context):
    """An estimator that a module holds."""
    return Advantages(values=[per_token(group_advantages(group.rewards_G), group.completion_ids) for group in groups])


def state():
    root = logging.getLogger()
    return root.handlers[:], root.level, warnings.showwarning, signal.getsignal(signal.SIGINT)


def test_two_runs_in_one_process(tmp_path, capsys):
    seen = []

    def first_token(groups, options, context):
        seen.append(context.step)
        rows = [[torch.zeros(len(ids), dtype=torch.float64) for ids in group.completion_ids] for group in groups]
        for row in (row for group in rows for row in group):
            row[0] = options.get("credit", 1.0)
        return Advantages(values=rows)

    before = state()
    common = {"model": SMALL, "data": "small_integers", "rewards": {"answer": {"kind": "random", "probability": 0.5}}}
    estimator = {"kind": first_token, "options": {"credit": 2.0}}
    run = api.train(None, SETTINGS, steps=2, run_dir=str(tmp_path / "a"), advantage=estimator, **common)
    assert seen == [0, 1]
    assert (state(), torch_dist.is_initialized()) == (before, False)
    assert list(run.metrics.index) == [0, 1, 2] and 0 <= run.metrics.loc[2, "eval_accuracy"] <= 1
    assert (run.policy / "config.json").is_file() and run.last["eval_accuracy"] == run.metrics.loc[2, "eval_accuracy"]
    assert [axes.get_ylabel() for axes in run.plot().axes] == ["reward", "eval_accuracy"]
    assert run.plot()._repr_png_()[:4] == b"\x89PNG"
    assert run.summary().splitlines()[0].startswith("held-out, n = 6")
    (saved,) = run.folder.glob("functions_*.py")
    assert "def first_token(groups, options, context):" in saved.read_text()
    assert f"import_path: {saved.stem}:first_token" in (run.folder / "config.yaml").read_text()
    assert "evaluation  after step 2: accuracy" in capsys.readouterr().err

    again = api.train(None, SETTINGS, steps=1, run_dir=str(tmp_path / "b"), advantage=everywhere, **common)
    assert list(again.metrics.index) == [0, 1] and not list(again.folder.glob("functions_*.py"))
    assert f"import_path: {__name__}:everywhere" in (again.folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"advantage.import_path: .*credit before and after"):
        api.train(None, SETTINGS, steps=1, run_dir=str(tmp_path / "b"), advantage=first_token, **common)
    assert (state(), torch_dist.is_initialized()) == (before, False)


def composed(*arguments, **keys):
    return api.configured(*arguments, **keys)[0]


def test_settings_are_those_of_the_command_line():
    given = composed(
        "quickstart", {"batch.group_size": 4}, steps=7, algorithm="dapo", optimizer={"betas": [0.9, 0.95]},
        model={"kind": "pretrained", "path": 'a "b" {c}', "lora": {"rank": 4}}, eval_data="small_integers",
        reference=None,
        rewards={"answer": "boxed", "brief": {"kind": "overlong", "weight": 0.1}}, sampling={"stop": ["</s>", "a,b"]},
        tracking={"verbose": True},
    )  # fmt: skip
    words = [
        "+experiment=quickstart", "algorithm=dapo", "model=pretrained", "+data@eval_data=small_integers",
        "reward@rewards.answer=boxed", "+reward@rewards.brief=overlong", "batch.group_size=4", "steps=7",
        "optimizer.betas=[0.9,0.95]", 'model.path="a \\"b\\" {c}"', "model.lora.rank=4", "reference=null",
        "rewards.brief.weight=0.1", 'sampling.stop=["</s>","a,b"]', "tracking.verbose=true",
    ]  # fmt: skip
    assert given == cli.compose(words)


@pytest.mark.parametrize(("keys", "message"), [
    ({"batch": {"group_size": 1}}, "batch.group_size=1: a group baseline"),
    ({"advantage": "tempoo"}, "did you mean advantage=tempo?"),
    ({"learning_rate": 1e-3}, "learning_rate: no such key; did you mean optimizer.learning_rate?"),
    ({"steps": len}, "steps: is a function; only advantage, loss and rewards take one"),
    ({"advantage": lambda groups, options, context: None}, "<lambda>: not a plain function"),
])  # fmt: skip
def test_errors_are_exceptions_of_one_line(keys, message):
    with pytest.raises(ConfigError) as error:
        api.configured("quickstart", **keys)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_name_of_a_functions_module_is_its_text():
    def reward(groups, options, context):
        return [[0.0 for _ in group.completions] for group in groups]

    first, texts = api.configured("quickstart", rewards={"mine": reward})
    again, _ = api.configured("quickstart", rewards={"mine": reward})
    ((module, text),) = texts.items()
    assert first.rewards["mine"].import_path == again.rewards["mine"].import_path == f"{module}:reward"
    assert text.endswith(
        "\n\ndef reward(groups, options, context):\n    return [[0.0 for _ in group.completions] for group in groups]\n"
    )
    assert sys.modules[module].reward is reward
