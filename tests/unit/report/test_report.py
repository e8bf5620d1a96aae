"""Run reports: the parts on made numbers, and whole pages from a real run folder, whatever is missing or torn in it."""

import json
import math
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tiny_run import config

from rltrain import trainer
from rltrain.advantages.group import group_advantages
from rltrain.advantages.prefix_tree import prefix_values
from rltrain.advantages.tempo import tempo_advantages
from rltrain.errors import ConfigError
from rltrain.report import __main__ as command
from rltrain.report import charts, curves, estimators, page
from rltrain.report.credit import credit
from rltrain.report.estimators import SampledStep
from rltrain.report.folder import read_run
from rltrain.report.provenance import origin, preset_differences
from rltrain.report.samples import by_group
from rltrain.report.tree import branches
from rltrain.runs import run_folder


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "tiny"
    trainer.fit(config(folder))
    return folder


@pytest.fixture(scope="module")
def probed_run(tmp_path_factory):
    """Checkpoints after every step, so that there is one of the policy that drew the samples."""
    folder = tmp_path_factory.mktemp("report") / "probed"
    often = ["checkpoint.every_steps=1", "checkpoint.keep_last=9", "evaluation.every_steps=0", "steps=3"]
    delimiter = ["advantage=spae", "advantage.delimiter=e", 'advantage.probe="\\\\boxed{"']
    trainer.fit(config(folder, *often, *delimiter, "sampling.max_new_tokens=60", "batch.token_budget=512"))
    return folder


def credit_of(html):
    return json.loads(re.search(r'<script type="application/json" id="credit-data">(.*?)</script>', html)[1])


# The prefix tree


def test_tree_by_hand():
    """ab|c, ab|d, x: the root splits at once, ab once more."""
    found = branches([[1, 2, 3], [1, 2, 4], [9]], [1.0, 0.0, 0.0])
    rows = [(one.level, one.start, one.stop, one.members, one.leaf) for one in found]
    assert rows == [
        (0, 0, 0, (0, 1, 2), False),
        (1, 0, 2, (0, 1), False),
        (2, 2, 3, (0,), True),
        (2, 2, 3, (1,), True),
        (1, 0, 1, (2,), True),
    ]
    assert [one.value for one in found] == pytest.approx([1 / 3, 0.5, 1.0, 0.0, 0.0])


def test_tree_of_duplicates_continuations_and_abstainers():
    found = branches([[5, 6], [5, 6], [5, 6, 7], [8]], [1.0, 0.0, 1.0, math.nan])
    rows = [(one.level, one.stop, one.members, one.leaf) for one in found]
    # 5 6 ends twice and goes on once: one leaf for the two that end, which adds no token.
    assert rows == [
        (0, 0, (0, 1, 2, 3), False),
        (1, 2, (0, 1, 2), False),
        (2, 2, (0, 1), True),
        (2, 3, (2,), True),
        (1, 1, (3,), True),
    ]
    assert [one.value for one in found[:4]] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1.0])
    assert math.isnan(found[4].value)


def test_tree_holds_every_token_once_per_path_and_the_values_of_tempo():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 2, (n,), generator=generator).tolist() for n in (9, 7, 8, 8, 3, 9)]
    rewards = [1.0, 0.0, 1.0, 0.0, 0.5, 0.25]
    found = branches(ids, rewards)
    for i, (tokens, values) in enumerate(zip(ids, prefix_values(ids, rewards), strict=True)):
        path = [one for one in found if i in one.members]
        assert [t for one in path for t in tokens[one.start : one.stop]] == tokens
        assert [one.value for one in path] == [float(values[one.stop]) for one in path]
    assert branches([], []) == []


# Charts


def test_scale_maps_ends_and_ticks_are_round():
    found = charts.scale([0.0, 10.0], start=100, end=0)
    assert (found(0), found(10), found(2.5)) == (100, 0, 75)
    assert found.ticks(5) == [(100, "0"), (80, "2"), (60, "4"), (40, "6"), (20, "8"), (0, "10")]
    constant = charts.scale([0.0, 0.0], start=100, end=0)
    assert (constant.low, constant.high) == (0, 1)


def test_thinning_keeps_both_ends():
    assert charts.thinned(range(11), 3) == [0, 5, 10]
    assert charts.thinned(range(3), 5) == [0, 1, 2]


REWARD = curves.CurveWords(title="reward", says="What training raises.")


def test_line_chart_smooths_long_series_and_says_its_ends():
    rows = [{"step": i, "reward": float(i % 2)} for i in range(40)]
    found = charts.line_chart(REWARD, {"a": rows, "b": []}, "reward", most_points=100)
    assert [line.faint for line in found.lines] == [True, False]
    last_y = [float(line.points.split()[-1].split(",")[1]) for line in found.lines]
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    # The scale has a twentieth to spare on both sides; the mean of ten is 0.5, in the middle.
    assert last_y == pytest.approx([top + 0.05 / 1.1 * (bottom - top), (top + bottom) / 2], abs=0.1)
    assert found.words == ["a: 0.5 → 0.5"]
    assert found.says == "What training raises. Means of 10 steps, first → last:"
    assert charts.line_chart(REWARD, {"a": rows[:4]}, "reward", most_points=100).words == ["0 → 1"]
    assert charts.line_chart(REWARD, {"a": rows}, "kl", most_points=100) is None


def test_shares_have_percent_axes():
    rows = [{"step": 0, "eval_accuracy": 0.25}, {"step": 4, "eval_accuracy": 0.75}]
    found = charts.line_chart(REWARD, {"a": rows}, "eval_accuracy", most_points=100)
    assert [text for _, text in found.ticks_y] == ["30 %", "45 %", "60 %", "75 %"]
    assert found.words == ["25.0 % → 75.0 %"]


def test_stages_are_means_per_step_and_probes_are_taken_out_of_the_advantage():
    rows = [{"step": 0, "eval_accuracy": 0.1}] + [
        {"step": i, "timing_s/advantage": 3.0, "timing_s/probe": 2.0, "timing_s/train": 5.0 * i, "timing_s/step": 9.0}
        for i in (1, 2)
    ]
    found = {one.name: (one.seconds, one.share) for one in charts.stages(rows)}
    assert found == {"probe": (2.0, 2 / 10.5), "advantage": (1.0, 1 / 10.5), "train": (7.5, 7.5 / 10.5)}
    assert list(found)[:2] == ["probe", "advantage"]
    assert charts.stages([]) == []


# Provenance


def test_config_differences_by_key():
    found = preset_differences({"a": {"b": 1, "c": None}, "d": [1]}, {"a": {"b": 2, "c": None}, "e": "x"})
    assert [(one.key, one.preset, one.run) for one in found] == [("a.b", "1", "2"), ("d", "[1]", "—"), ("e", "—", "x")]


def test_of_an_exchanged_part_the_new_settings_are_shown():
    found = preset_differences({"advantage": {"kind": "a", "eps": 1}}, {"advantage": {"kind": "b", "delimiter": "\n"}})
    rows = [(one.key, one.preset, one.run) for one in found]
    assert rows == [("advantage.delimiter", "—", "'\\n'"), ("advantage.kind", "a", "b")]


def test_the_preset_is_the_experiment_of_the_command(grpo_run, tmp_path):
    folder = tmp_path / "run"
    run_folder.write_provenance(folder, config(folder, "+experiment=quickstart", "seed=3"))
    provenance = json.loads((folder / "run.json").read_text())
    command = ["/somewhere/python", "-m", "rltrain.train", "+experiment=quickstart", "seed=3", "name=a b"]
    (folder / "run.json").write_text(json.dumps(provenance | {"command": command}))
    found = origin(read_run(folder, label="run"))
    assert found.command == "python -m rltrain.train +experiment=quickstart seed=3 'name=a b'"
    assert found.preset == "experiment=quickstart"
    changed = {one.key: (one.preset, one.run) for one in found.differences}
    assert changed["seed"] == ("0", "3") and changed["batch.group_size"] == ("8", "4")
    assert "data.kind" not in changed and not found.remark


def test_an_unknown_preset_is_a_remark(grpo_run, tmp_path):
    folder = copied(grpo_run, tmp_path)
    (folder / "run.json").write_text(json.dumps({"command": ["python", "-m", "rltrain.train", "+experiment=gone"]}))
    found = origin(read_run(folder, label="run"))
    assert found.differences == [] and "+experiment=gone cannot be composed" in found.remark


# Estimators


def sampled(folder):
    run = read_run(folder, label="run")
    groups = by_group(run.samples(2))
    return run, groups, SampledStep(run, 2, groups)


def test_samples_of_the_first_and_the_last_step_are_always_kept(grpo_run, probed_run):
    assert read_run(grpo_run, label="run").sampled_steps() == [1, 2, 4]  # of 4, every second
    assert read_run(probed_run, label="run").sampled_steps() == [1, 2, 3]  # of 3, every second


def test_groups_are_rebuilt_from_rows(grpo_run):
    _, groups, _ = sampled(grpo_run)
    assert [len(rows) for rows in groups] == [4, 4, 4, 4]
    assert [[row["sample"] for row in rows] for rows in groups] == [[0, 1, 2, 3]] * 4


def test_estimators_recompute_what_their_functions_give(grpo_run):
    _, groups, step = sampled(grpo_run)
    tempo = step.under("tempo")
    assert tempo.remark == "settings of algorithm=tempo; recomputed from token ids and rewards"
    for rows, values in zip(groups, tempo.values, strict=True):
        expected = tempo_advantages([row["token_ids"] for row in rows], [row["reward"] for row in rows])
        assert values == [one.tolist() for one in expected]
    leave_one_out = step.under("rloo")
    for rows, values in zip(groups, leave_one_out.values, strict=True):
        expected = group_advantages([row["reward"] for row in rows], baseline="leave_one_out", scale="none")
        assert [one[0] for one in values] == expected.tolist()


def test_the_runs_own_estimator_is_shown_as_recorded(grpo_run):
    _, groups, step = sampled(grpo_run)
    own = step.under("grpo")
    assert own.values == [[row["advantages"] for row in rows] for rows in groups]
    assert own.is_recorded and step.under("group").values == own.values
    # A preset of the same estimator with other settings is another view.
    assert not step.under("dr_grpo").is_recorded
    assert step.under("custom").remark.startswith("not shown: advantage.import_path")


def test_probes_of_the_policy_that_drew_the_samples_give_the_recorded_credit(probed_run):
    """Completions, potentials and advantages of the run, again, from its checkpoint and its samples."""
    run, groups, own = sampled(probed_run)
    recorded = own.under("spae")
    assert any(row["note/step_potential"] for rows in groups for row in rows)
    assert recorded.values == [[row["advantages"] for row in rows] for rows in groups]
    settings = estimators._part_config("advantage", run.config["advantage"])
    context, source = own._context(estimators.part_of(settings).needs)
    assert source == "probes of the checkpoint of step 1 on samples drawn after step 1"
    again = estimators.part_of(settings).function(own._groups, settings, context)
    for mine, theirs in zip(again.values, recorded.values, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.tolist() == pytest.approx(other, abs=1e-6)
    for mine, theirs in zip(again.notes, recorded.notes, strict=True):
        for one, other in zip(mine.get("step_potential", []), theirs["step_potential"], strict=bool(mine)):
            assert list(one) == pytest.approx(other, abs=1e-6)


def test_an_estimator_that_cannot_be_computed_says_why(grpo_run, tmp_path):
    folder = copied(grpo_run, tmp_path)
    found = sampled(folder)[2].under("spae")
    # The tiny model has no token that ends in the paper's delimiter, but one for the variant's, which is then taken.
    assert found.values is not None and "algorithm=spae_lines" in found.remark
    shutil.rmtree(folder / "checkpoints")
    found = sampled(folder)[2].under("spae")
    assert found.values is None
    assert found.remark == "not shown: it probes the policy, and the run folder holds no finished checkpoint"


def test_probes_start_no_rollout_engine(grpo_run, tmp_path):
    """The run's engine may be one that is not installed here, or servers that have long been stopped."""
    folder = copied(grpo_run, tmp_path)
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    resolved["rollout"] = {"kind": "vllm", "mode": "server", "urls": ["http://127.0.0.1:1"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved))
    found = sampled(folder)[2].under("spae")
    assert found.values is not None
    assert found.values == sampled(grpo_run)[2].under("spae").values


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
    command.main()


def test_the_command_writes_the_page_into_the_runs_folder(grpo_run, tmp_path, monkeypatch, capsys):
    folder = copied(grpo_run, tmp_path)
    run_command(monkeypatch, folder, "--estimators", "tempo", "--step", "2", "--groups", "1")
    (group,) = credit_of((folder / "report.html").read_text())
    assert " · step 2 · " in group["title"] and [one["name"] for one in group["estimates"]][1] == "tempo"
    assert capsys.readouterr().out.startswith(f"written to {folder}/report.html (0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/run"], "/no/such/run: no such folder; give the folder of a run"),
        ([".", "--groups", "0"], "--groups 0: set at least 1"),
        ([".", "--estimators", "temper"], "--estimators temper: unknown; choose among"),
    ],
)
def test_wrong_arguments_end_in_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"config error: {message}") and error.count("\n") == 1


def test_unknown_estimators_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"--estimators temper: unknown; choose among .*tempo"):
        estimators.check(["grpo", "temper"])


# Credit


def test_credit_holds_tokens_values_and_tree(grpo_run):
    run = read_run(grpo_run, label="run")
    shown = credit(run, estimators=["tempo"], groups=2, step=2, most_bytes=10**6)
    rows = {row["problem_id"]: [] for row in run.samples(2)}
    for row in run.samples(2):
        rows[row["problem_id"]].append(row)
    assert len(shown) == 2
    for group in shown:
        mine = rows[group["problem"]]
        values = prefix_values([row["token_ids"] for row in mine], [row["reward"] for row in mine])
        for one, row, value in zip(group["completions"], mine, values, strict=True):
            assert one["tokens"] == row["tokens"] and one["reward"] == row["reward"]
            assert one["values"] == pytest.approx(value.tolist(), rel=1e-4)
        assert [one["name"] for one in group["estimates"]] == ["group (as trained)", "tempo"]
        assert {c for one in group["tree"] if one["leaf"] for c in one["members"]} == {0, 1, 2, 3}
        json.dumps(group, allow_nan=False)


def test_long_completions_and_many_steps_stay_below_five_megabytes(tmp_path):
    tokens, size = 12_000, 8
    one = {
        "prompt": "q", "answer": "a", "completion": "", "finish": "stop", "token_ids": list(range(tokens)),
        "tokens": [f" word{i}" for i in range(tokens)], "logprobs": [-1.2345678] * tokens,
        "advantages": [0.1234567] * tokens,
    }  # fmt: skip
    rows = [one | {"problem_id": f"p{i // size}", "sample": i % size, "reward": float(i % 3)} for i in range(2 * size)]
    run_folder.write_samples(tmp_path, "step_000001", rows)
    line = {f"metric_{k}": 0.123456789 * k for k in range(60)} | {"reward": 0.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **line}) + "\n" for i in range(3000)))
    html = page.build([tmp_path], estimators=["grpo", "tempo"])
    assert 1e6 < len(html.encode()) < 5e6
    first = credit_of(html)[0]["completions"][0]
    assert first["length"] == tokens > len(first["tokens"]) > 1000


# Whole pages


def copied(folder, tmp_path):
    target = tmp_path / "copy"
    shutil.copytree(folder, target)
    return target


def notes_of(html):
    return re.findall(r'<li class="note">(.*?)</li>', html)


def test_a_finished_run_has_no_note_and_every_section(grpo_run):
    html = page.build([grpo_run])
    assert notes_of(html) == []
    for text in ("advantage</th><td>group", "held-out accuracy", "s a step", "eval_accuracy", "torch 2."):
        assert text in html
    assert len(credit_of(html)) == 4


def test_two_runs_share_the_charts(grpo_run, probed_run):
    html = page.build([grpo_run, probed_run])
    assert "<title>tiny, probed – rltrain report</title>" in html
    assert html.count('class="line run1"') > 5
    assert {group["title"].split(" · ")[0] for group in credit_of(html)} == {"tiny", "probed"}


def test_labels_take_as_much_path_as_they_need(tmp_path):
    assert page.labels([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert page.labels([tmp_path, tmp_path]) == [f"{tmp_path.name} (1)", f"{tmp_path.name} (2)"]


def test_nothing_is_loaded_from_elsewhere(grpo_run):
    """No address at all but the namespaces that SVG needs."""
    html = page.build([grpo_run])
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|script|iframe)[^>]+(src|href)=[\"'](?!data:|#)", html)


RUN_FILES = [
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "samples/step_000004.parquet",
    "samples/eval_step_000000.parquet",
]


@pytest.mark.parametrize("damage", ["deleted", "half", "garbage", "empty"])
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_damaged_file_is_a_note_and_the_rest_is_shown(grpo_run, tmp_path, name, damage):
    path = copied(grpo_run, tmp_path) / name
    data = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes({"half": data[: len(data) // 2], "garbage": bytes(range(256)) * 8, "empty": b""}[damage])
    html = page.build([tmp_path / "copy"])
    silent = {("samples/step_000004.parquet", "deleted"), ("samples/eval_step_000000.parquet", "deleted")}
    if (name, damage) not in silent:  # without the file nothing says that there was one
        assert any(note.startswith(name.split(" ")[0]) for note in notes_of(html)), notes_of(html)
    assert credit_of(html), "the samples of the step before are shown"
    if name != "metrics.jsonl":
        assert 'aria-label="reward. ' in html


def test_a_torn_last_line_is_counted(grpo_run, tmp_path):
    path = copied(grpo_run, tmp_path) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    html = page.build([tmp_path / "copy"])
    assert "metrics.jsonl: 1 of 5 lines are torn and were left out" in notes_of(html)
    assert "3 of 4 steps are recorded: the run goes on, or was interrupted" in notes_of(html)


def test_interrupted_saves_are_noted(grpo_run, tmp_path):
    folder = copied(grpo_run, tmp_path)
    (folder / "checkpoints" / ".writing_step_000006").mkdir()
    (folder / "checkpoints" / "step_000004" / "manifest.json").unlink()
    assert notes_of(page.build([folder])) == [
        "checkpoints/.writing_step_000006: a save was interrupted, or is under way",
        "checkpoints/step_000004 has no manifest: it was never finished",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_takes_away_what_needs_it_alone(grpo_run, tmp_path, name):
    folder = copied(grpo_run, tmp_path)
    for path in folder.glob(f"checkpoints/*/policy/{name}"):
        path.write_bytes(path.read_bytes()[:20])
    estimates = credit_of(page.build([folder], estimators=["tempo", "spae"]))[0]["estimates"]
    assert [one["name"] for one in estimates] == ["group (as trained)", "tempo", "spae"]
    assert estimates[1]["advantages"] is not None
    if name != "tokenizer.json":  # the tiny model makes its tokenizer in code
        assert estimates[2]["advantages"] is None and "cannot be loaded" in estimates[2]["remark"]


def test_an_empty_folder_gives_a_page_of_notes(tmp_path):
    html = page.build([tmp_path], estimators=["tempo"])
    assert {
        "config.yaml is missing",
        "run.json is missing",
        "metrics.jsonl is missing",
        "metrics.jsonl holds no step",
    } <= set(notes_of(html))
    assert credit_of(html) == []


def test_samples_of_an_older_layout_are_shown(grpo_run, tmp_path):
    folder = copied(grpo_run, tmp_path)
    for path in (folder / "samples").glob("step_*"):
        table = pq.read_table(path)
        keep = ["step", "problem_id", "sample", "prompt", "completion", "reward", "tokens", "advantages"]
        pq.write_table(table.select(keep), path)
    group = credit_of(page.build([folder], estimators=["tempo"]))[0]
    own, tempo = group["estimates"]
    assert group["tree"] == [] and own["advantages"][0]
    assert tempo["remark"] == "not shown: the samples hold completions without token ids"
    for path in (folder / "samples").glob("step_*"):
        pq.write_table(pa.table({"step": [1], "completion": ["text alone"]}), path)
    group = credit_of(page.build([folder]))[0]
    assert group["completions"][0]["tokens"] == ["text alone"]


def test_model_output_is_escaped(grpo_run, tmp_path):
    folder = copied(grpo_run, tmp_path)
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    for path in (folder / "samples").glob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row["prompt"] = row["completion"] = row["answer"] = row["problem_id"] = hostile
            row["tokens"] = [hostile for _ in row["tokens"]]
        run_folder.write_samples(folder, path.stem, rows)
    html = page.build([folder])
    assert "<script>alert" not in html and "<img" not in html
    assert credit_of(html)[0]["completions"][0]["tokens"][0] == hostile
