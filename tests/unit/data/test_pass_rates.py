"""Pass rates: the file, the filter, what is refused, and a measurement that was killed."""

import json
import logging

import pytest
import torch
from tiny_run import config as tiny_config

from rltrain import cli
from rltrain.commands import pass_rates as command
from rltrain.data.pass_rates import fingerprint, read, training_problems, within
from rltrain.data.random_calculation import RandomCalculationConfig
from rltrain.errors import ConfigError
from rltrain.registry import part_of
from rltrain.runs import cold_starts
from rltrain.types import Problem

PROBLEMS = [Problem(id=f"p{index}", prompt=f"{index}+1", answer=str(index + 1)) for index in range(5)]
RIGHT = [0, 1, 4, 2]  # of 4 each; the fifth has no rate


def written(path, problems=PROBLEMS, right=RIGHT):
    rows = [{"index": i, "id": problems[i].id, "right": count, "judged": 4} for i, count in enumerate(right)]
    rows.append({"index": len(rows), "id": "refused", "right": 0, "judged": 0})
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"data": fingerprint(problems)}, *rows]))
    return path


def filtered(path, *bounds):
    return RandomCalculationConfig(pass_rate=list(bounds), pass_rate_file=str(path))


@pytest.mark.parametrize(("bounds", "ids"), [
    ((0.25, 0.5), ["p1", "p3"]),  # both ends belong to it
    ((0.0, 0.3), ["p0", "p1"]),
    ((1.0, 1.0), ["p2"]),
])  # fmt: skip
def test_the_filter_keeps_the_rates_within_the_bounds(tmp_path, caplog, bounds, ids):
    with caplog.at_level(logging.WARNING):
        kept = within(PROBLEMS, filtered(written(tmp_path / "rates.jsonl"), *bounds))
    assert [problem.id for problem in kept] == ids
    assert "1 of 5 problems have no pass rate and are left out" in caplog.text


def test_without_a_filter_the_data_stay_what_they_are():
    assert within(PROBLEMS, RandomCalculationConfig()) is PROBLEMS


def test_the_rates_of_another_data_set_are_refused(tmp_path):
    path = written(tmp_path / "rates.jsonl")
    others = [*PROBLEMS[:4], Problem(id="p4", prompt="9+9", answer="18")]
    with pytest.raises(ConfigError) as error:
        within(others, filtered(path, 0.0, 1.0))
    assert f"data.pass_rate_file={path}: rates of another data set (5-" in str(error.value)
    assert "measure this one: rltrain pass_rates" in str(error.value)
    with pytest.raises(ConfigError, match=r"no problem has such a rate, they lie in 0\.\.1; widen"):
        within(PROBLEMS, filtered(path, 0.3, 0.4))


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read (No such file or directory)"),
    ("no json\n", "is no file of pass rates"),
    ('{"step": 1}\n', "is no file of pass rates"),
    ('{"data": "5-a"}\n{"id": "p0"}\n', "is no file of pass rates"),
])  # fmt: skip
def test_another_file_is_refused(tmp_path, text, message):
    path = tmp_path / "rates.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        within(PROBLEMS, filtered(path, 0.0, 1.0))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.pass_rate=[0.2,0.8]"], "one without the other has no effect; set both (rltrain pass_rates measures)"),
    (["data.pass_rate_file=f"], "one without the other has no effect"),
    (["data.pass_rate=[0.8,0.2]", "data.pass_rate_file=f"], "must be [low, high] with 0 <= low <= high <= 1"),
    (["data.pass_rate=[0.2]", "data.pass_rate_file=f"], "must be [low, high]"),
    (
        ["+data@eval_data=small_integers", "eval_data.pass_rate=[0,1]"],
        "eval_data.pass_rate: filters RL's training problems alone; set it under data",
    ),
])  # fmt: skip
def test_bad_keys_are_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        cli.compose(overrides)
    assert message in str(error.value)


def test_a_filter_leaves_the_cold_start_what_it_was():
    overrides = ["data.pass_rate=[0.2,0.8]", "data.pass_rate_file=rates.jsonl"]
    assert cold_starts.made_with(cli.compose(overrides)) == cold_starts.made_with(cli.compose([]))


def test_sources_of_a_mixture_are_filtered_one_by_one(tmp_path):
    words = ["data=mixture", "+data@data.sources.a=small_integers", "+data@data.sources.b=small_integers"]
    words += ["data.sources.a.train_size=5", "data.sources.b.train_size=9"]
    source = cli.compose(words).data.sources["a"]
    path = written(tmp_path / "rates.jsonl", part_of(source).function(source, "train"))
    words += ["data.sources.a.pass_rate=[0.25,0.5]", f"data.sources.a.pass_rate_file={path}"]
    assert [len(each) for each in training_problems(cli.compose(words).data).sources] == [2, 9]


@pytest.mark.parametrize(("start", "stop", "size", "parts"), [
    (0, 5, 2, [(0, 2), (2, 4), (4, 5)]), (4, 5, 2, [(4, 5)]), (5, 5, 2, []),
])  # fmt: skip
def test_batches(start, stop, size, parts):
    assert [(part.start, part.stop) for part in command.batches(start, stop, size)] == parts


def test_a_killed_measurement_goes_on_where_it_stopped(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", "data.train_size=6", "rewards.answer.probability=0.5")
    options = command.parser().parse_args(["--samples", "3", "--batch", "2", "--to", str(tmp_path / "rates.jsonl")])
    with torch.no_grad():
        command.main(config, options)
        whole = (tmp_path / "rates.jsonl").read_bytes()
        lines = whole.splitlines(keepends=True)
        (tmp_path / "rates.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:10])  # two rows, and half of a third
        command.main(config, options)
    assert (tmp_path / "rates.jsonl").read_bytes() == whole
    rows = read(tmp_path / "rates.jsonl", "--to").rows
    assert [(row.index, row.judged) for row in rows] == [(index, 3) for index in range(6)]
    assert "not judged  0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--to .*: holds rates of another measurement \(samples: 3 -> 4\)"):
        command.begun(tmp_path / "rates.jsonl", command.header_of(config, training_problems(config.data), 4))
