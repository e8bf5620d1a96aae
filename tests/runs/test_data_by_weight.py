"""A run on a mixture with a filter and a reward whose weight changes: the same after a resume."""

import json

import pytest
from tiny_run import config, metrics

from rltrain import cli, trainer
from rltrain.data.pass_rates import fingerprint
from rltrain.registry import part_of

MIXTURE = ["data=mixture", "+data@data.sources.a=small_integers", "+data@data.sources.b=small_integers"]
MIXTURE += ["data.sources.a.train_size=30", "data.sources.b.seed=1", "+data.weights={a: 1, b: 3}"]
WEIGHTS = ["+reward@rewards.other=random", "rewards.other.weight={linear: [[0, 0.0], [4, 2.0]]}"]


def test_mixture_filter_and_schedule_are_the_same_after_a_resume(tmp_path):
    source = cli.compose(MIXTURE).data.sources["a"]
    rates = [{"index": index, "id": f"{index}", "right": index % 3, "judged": 2} for index in range(30)]
    header = {"data": fingerprint(part_of(source).function(source, "train"))}
    (tmp_path / "rates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [header, *rates]))
    filtered = ["data.sources.a.pass_rate=[0.5,0.5]", f"data.sources.a.pass_rate_file={tmp_path / 'rates.jsonl'}"]
    overrides = [*MIXTURE, *filtered, *WEIGHTS]
    trainer.fit(config(tmp_path / "unbroken", *overrides))
    trainer.fit(config(tmp_path / "run", *overrides, "steps=2"))
    trainer.fit(config(tmp_path / "run", *overrides))
    lines = metrics(tmp_path / "unbroken")
    assert metrics(tmp_path / "run") == lines
    assert [line["rewards/other/weight"] for line in lines[1:]] == [0.0, 0.5, 1.0, 1.5]
    for line in lines[1:]:
        both = line["rewards/answer/mean"] + line["rewards/other/weight"] * line["rewards/other/mean"]
        assert line["reward"] == pytest.approx(both)
    last = lines[-1]
    assert last["eval_problems/a"] + last["eval_problems/b"] == last["eval_problems"] == 6
    of_sources = sum(last[f"eval_problems/{name}"] * last[f"eval_accuracy/{name}"] for name in "ab")
    assert of_sources == pytest.approx(6 * last["eval_accuracy"])
