import sys

import pytest
from advantage_groups import make_group

from rltrain import cli
from rltrain.advantages.check import EstimatorError
from rltrain.advantages.custom import CustomAdvantageConfig
from rltrain.advantages.estimator import estimator_of
from rltrain.errors import ConfigError
from rltrain.registry import declared_needs, part_of
from rltrain.types import Context

MODULE = """
import torch
from rltrain.types import Advantages, Mean

version = "1.0"

def scaled_reward(groups, options, context):
    values = [
        [reward.expand(len(ids)) * options["scale"] for reward, ids in zip(group.rewards_G, group.completion_ids)]
        for group in groups
    ]
    return Advantages(values=values, metrics={"mine": Mean.of(options["scale"])})

def one_per_completion(groups, options, context):
    return Advantages(values=[[torch.zeros(1) for _ in group.completions] for group in groups])
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A package of a user's own, found on the path and forgotten afterwards."""
    package = tmp_path / "outside_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "credit.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "outside_package"
    for name in [name for name in sys.modules if name.startswith("outside_package")]:
        del sys.modules[name]


def test_a_function_from_outside_is_the_estimator(outside):
    config = CustomAdvantageConfig(import_path=f"{outside}.credit:scaled_reward", options={"scale": 3.0})
    result = part_of(config).function([make_group([(1, 2), ()], [1.0, 0.5])], config, Context())
    assert [row.tolist() for row in result.values[0]] == [[3.0, 3.0], []]
    assert result.metrics["mine"].total == 3.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "no module named no_such_module_here; install it or add its folder to PYTHONPATH"),
        ("outside_package.nothing:f", "no module named outside_package.nothing;"),
        ("outside_package.credit:other", "outside_package.credit has no other; name one of its functions"),
        ("outside_package.credit:version", "version is str, not callable; name a function"),
        ("outside_package.credit", "not of the form my_package.my_module:function"),
        ("outside_package.credit:", "not of the form my_package.my_module:function"),
        (":scaled_reward", "not of the form my_package.my_module:function"),
        (".credit:scaled_reward", "not of the form my_package.my_module:function"),
    ],
)
def test_a_wrong_path_is_refused_in_one_line_when_the_config_is_made(outside, path, message):
    with pytest.raises(ConfigError) as caught:
        CustomAdvantageConfig(import_path=path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"advantage.import_path={path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_package_nobody_has", "broken imports a_package_nobody_has, which is not installed; install it"),
        ("raise ValueError('a reason\\nand more')", "importing broken raised ValueError: a reason; mend it"),
        ("raise TypeError('a reason')", "importing broken raised TypeError: a reason; mend it"),
        ("raise RuntimeError", "importing broken raised RuntimeError; mend it"),
        ("{}['a key']", "importing broken raised KeyError: 'a key'; mend it"),
        ("raise ImportError('a reason')", "importing broken raised ImportError: a reason; mend it"),
        ("def f(:", "importing broken raised SyntaxError: invalid syntax (broken.py, line 1); mend it"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line_on_the_command_line(
    tmp_path, monkeypatch, capsys, source, message
):
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "advantage=custom", "advantage.import_path=broken:f"])
    with pytest.raises(SystemExit) as end:
        cli.run(lambda config: None)
    assert end.value.code == 2
    *stages, last = capsys.readouterr().err.splitlines()
    assert last == f"config error: advantage.import_path=broken:f: {message}"
    assert [line.split()[1] for line in stages] in ([], ["start"])


@pytest.mark.parametrize("needs", [7, "scorer", None])
def test_needs_that_are_no_set_are_named(needs):
    def estimator(groups, options, context):
        raise NotImplementedError

    estimator.needs = needs
    with pytest.raises(ConfigError) as caught:
        declared_needs(estimator, [], setting="advantage")
    assert str(caught.value) == f"advantage: its attribute needs is {needs!r}; give a set such as {{Need.SCORER}}"


def test_values_that_do_not_fit_the_tokens_are_refused(outside):
    config = CustomAdvantageConfig(import_path=f"{outside}.credit:one_per_completion")
    message = (
        "advantage.import_path=outside_package.credit:one_per_completion: group 0 (problem p), completion 0: has a "
    )
    with pytest.raises(EstimatorError) as caught:
        estimator_of(config)([make_group([(1, 2), (3,)], [1.0, 0.0])], Context())
    assert str(caught.value).startswith(
        message + "tensor of shape (1,), expected a tensor of shape (2,), one value per"
    )
