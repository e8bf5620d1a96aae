"""ConMax as a whole: scores against a naive loop, what counts as a trace, bad data, exact resume, two ranks."""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import COMPRESSION
from tiny_run import metrics

from rltrain import cli, trainer
from rltrain.advantages.group import group_advantages
from rltrain.data.traces import CompressionConfig, TracesConfig, trace_problem
from rltrain.data.wordy_solutions import WordySolutionsConfig
from rltrain.errors import ConfigError
from rltrain.policy.encode import encode, encode_all
from rltrain.policy.load import load_policy
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.scorer import Scorer
from rltrain.policy.tiny import TinyConfig
from rltrain.registry import discover, part_of
from rltrain.rewards.bare_trace import redundant
from rltrain.rewards.compression import CompressionRewardConfig, compressed_ids, compression, overlap
from rltrain.runs import checkpoint
from rltrain.types import Completion, Context, Group, Problem, Prompt

discover()
ROOT = Path(__file__).parents[2]
MODEL = TinyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64)
LAYOUT = CompressionConfig(
    instruction="{question}\n{trace}\n", ask="{question}\n", before_trace="", after_trace="\n", before_answer="\\boxed{"
)


@pytest.fixture(scope="module")
def policy():
    return load_policy(MODEL)


def prompt_of(policy, *, trace="3+4=7\nso 3+4=7", answer="7", layout=LAYOUT, bare=""):
    problem = Problem(id="p", prompt="3+4", answer=answer)
    return encode(policy, trace_problem(problem, question="3+4", trace=trace, config=layout, bare=bare), MODEL)


def completion(policy, text: str, *, finish="stop") -> Completion:
    ids = tuple(policy.tokenizer(text)["input_ids"])
    return Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), finish=finish, text=text)


def score(policy, *texts, config=None, **prompt):
    model = LogprobModel(policy.model, temperature=1.0)
    context = Context(tokenizer=policy.tokenizer, scorer=Scorer(model, model, token_budget=256))
    group = Group(prompt=prompt_of(policy, **prompt), completions=tuple(completion(policy, one) for one in texts))
    return compression([group], config or CompressionRewardConfig(), context)


def naive(policy, before: str, text: str) -> list[float]:
    """The log-prob of each character, one plain forward each."""
    values = []
    for character in text:
        ids = policy.tokenizer(before)["input_ids"]
        with torch.no_grad():
            logprobs = policy.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        values.append(float(logprobs[policy.tokenizer(character)["input_ids"][0]]))
        before += character
    return values


def mean(values):
    return sum(values) / len(values)


def test_both_scores_equal_a_naive_loop(policy):
    trace, answer = "3+4=12", "12"
    result = score(policy, f"<think>{trace}</think>", answer=answer)
    trace_score = mean(naive(policy, "3+4\n", trace))
    answer_score = mean(naive(policy, f"3+4\n{trace}\n\\boxed{{", answer))
    assert result.scores[0] == pytest.approx([answer_score + 1.2 * trace_score], abs=1e-5)
    assert result.metrics["compression/trace_score"].total == pytest.approx(trace_score, abs=1e-5)
    assert result.metrics["compression/answer_score"].total == pytest.approx(answer_score, abs=1e-5)


def test_the_original_trace_changes_no_score(policy):
    first, second = (score(policy, "<think>3+4=7</think>", trace=trace).scores for trace in ("3+4=7", "anything else"))
    assert first == second


def test_bad_outputs_get_the_floor_of_their_group(policy):
    good = "<think>3+4=7</think>"
    bad = ["3+4=7", "<think>3+4=7", "<think></think>", "<think> \n</think>", "3</think>", f"{good}{good}", ""]
    (rewards,) = score(policy, good, "<think>4</think>", *bad).scores
    assert rewards[2:] == pytest.approx([min(rewards[:2]) - 1] * len(bad))
    assert score(policy, *bad[:3]).scores == [[-10.0] * 3]


def test_an_output_cut_at_the_limit_has_no_trace(policy):
    cut = completion(policy, "<think>3+4=7</think>", finish="length")
    assert compressed_ids(prompt_of(policy), cut, policy.tokenizer) == ()


def test_a_forced_opening_tag_is_not_asked_for_again(policy):
    prompt = prompt_of(policy, layout=dataclasses.replace(LAYOUT, prefill="<think>"))
    assert policy.tokenizer.decode(prompt.token_ids).endswith("\n<think>")
    assert policy.tokenizer.decode(compressed_ids(prompt, completion(policy, "34</think>"), policy.tokenizer)) == "34"
    assert compressed_ids(prompt, completion(policy, "<think>34</think>"), policy.tokenizer) == ()


def test_tags_of_several_tokens_are_found_in_the_ids(policy):
    layout = dataclasses.replace(LAYOUT, opening="[short]", closing="[/short]")
    output = completion(policy, "x [short]3+4[/short]")
    assert policy.tokenizer.decode(compressed_ids(prompt_of(policy, layout=layout), output, policy.tokenizer)) == "3+4"


def test_pooled_score_is_one_mean_over_all_tokens(policy):
    trace = "3+4=12"
    tokens = naive(policy, "3+4\n", trace) + naive(policy, f"3+4\n{trace}\n\\boxed{{", "7")
    result = score(policy, f"<think>{trace}</think>", config=CompressionRewardConfig(pooled=True))
    assert result.scores[0] == pytest.approx([mean(tokens)], abs=1e-5)


def test_likelihoods_and_length_reward_are_both_whitened(policy):
    outputs = ["<think>3+4=7</think>", "<think>7</think>", "<think>7=7=7=7=7=7</think>", "nothing"]
    plain = score(policy, *outputs).scores[0]
    with_length = score(policy, *outputs, config=CompressionRewardConfig(length_weight=0.5)).scores[0]
    original = len("3+4=7\nso 3+4=7")
    white = group_advantages([(original - n) / original for n in (5, 1, 11)] + [None])
    likelihood = group_advantages([*plain[:3], None])
    expected = [float(p) + 0.5 * float(w) for p, w in zip(likelihood[:3], white[:3], strict=True)]
    assert with_length == pytest.approx([*expected, min(expected) - 1])


def test_metrics_show_copying_looping_leaking_and_length(policy):
    found = score(
        policy,
        "<think>3+4=7\nso 3+4=7</think>",
        "<think>1111111111</think>",
        "no",
        config=CompressionRewardConfig(ngram=3),
    ).metrics
    original = len("3+4=7\nso 3+4=7")
    assert found["compression/length_ratio"].total == pytest.approx(1 + 10 / original)
    assert found["compression/overlap"].total == 1.0  # the copy 1, the loop 0
    assert found["compression/repeated_ngrams"].total == pytest.approx((1 - 9 / 12) + (1 - 1 / 8))
    assert found["compression/states_answer"].total == 1.0
    assert found["compression/floored"].total == 1.0


def test_redundant_lines_are_scored_beside_the_bare_trace(policy):
    bare, long = "3+4=7\n7+1=8", "3+4=7\n9-2=7\n7+1=8\n7+1=8"
    found = score(policy, f"<think>{long}</think>", f"<think>{bare}</think>", "no", bare=bare).metrics
    assert found["compression/bare_nll"].total == pytest.approx(-mean(naive(policy, "3+4\n", bare)), abs=1e-5)
    assert found["compression/bare_nll"].count == 1  # a prompt's, not a completion's
    tokens = naive(policy, "3+4\n", long)
    lines = [mean(tokens[6:12]), mean(tokens[18:])]  # the detour with its line break, and the step said once more
    assert (found["compression/redundant_lines"].total, found["compression/redundant_lines"].count) == (2, 6)
    assert found["compression/redundant_nll"].total == pytest.approx(-sum(lines), abs=1e-5)
    assert found["compression/redundant_pays"].total == sum([line > mean(tokens) for line in lines])


def test_traces_without_a_known_bare_one_have_no_such_metrics(policy):
    assert not [name for name in score(policy, "<think>3+4=7</think>").metrics if "bare" in name or "redundant" in name]


def test_overlap_counts_ngrams_of_the_original():
    assert overlap([1, 2, 3, 9], [0, 1, 2, 3], ngram=2) == pytest.approx(2 / 3)
    assert overlap([1, 2], [0, 1, 2, 3], ngram=8) == 1.0


def test_prompts_without_a_trace_are_a_config_error(policy):
    group = Group(prompt=Prompt(problem=Problem(id="q1", prompt="", answer=""), token_ids=(5,)), completions=())
    with pytest.raises(ConfigError, match="no trace to compress in q1"):
        compression([group], CompressionRewardConfig(), Context())


def test_an_answer_without_tokens_and_a_trace_over_the_context_are_left_out(policy):
    problems = [
        trace_problem(Problem(id=name, prompt="1", answer=answer), question="1", trace=trace, config=LAYOUT)
        for name, answer, trace in (("good", "1", "1=1"), ("empty", "", "1=1"), ("long", "1", "1=" * 40))
    ]
    prompts, dropped = encode_all(policy, problems, MODEL, max_prompt_tokens=30)
    assert [prompt.problem.id for prompt in prompts] == ["good"]
    assert [problem.id for problem in dropped] == ["empty", "long"]


def write_traces(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_wrong_traces_are_dropped_and_counted(tmp_path, caplog):
    caplog.set_level("INFO", logger="rltrain")
    rows = [
        {"question": f"{i}+1", "trace": f"{i}+1 is \\boxed{{{i + 1 + i % 2}}}", "answer": str(i + 1)} for i in range(10)
    ]
    path = write_traces(tmp_path / "traces.jsonl", rows)
    config = TracesConfig(path=path, holdout=1e-6, verifier="random_calculation", verifier_options={"kind": "exact"})
    kept = part_of(config).function(config, "train")
    assert [one.question for one in kept] == ["0+1", "2+1", "4+1", "6+1", "8+1"]
    assert "5 traces kept, left out: 5 wrong, 0 not gradeable" in caplog.text
    assert kept[0].trace == "0+1 is \\boxed{1}"
    assert "Question: 0+1\n\nSolution: 0+1 is \\boxed{1}" in kept[0].prompt


def test_a_trace_that_is_a_list_is_left_out_or_taken_by_element(tmp_path, caplog):
    rows = [{"question": f"{i}+1", "trace": [f"\\boxed{{{i + 1}}}", "other"], "answer": str(i + 1)} for i in range(3)]
    path = write_traces(tmp_path / "traces.jsonl", rows)
    with pytest.raises(ConfigError, match="data.trace_column: no row has a trace, the first is train-0: trace is a l"):
        part_of(TracesConfig(path=path)).function(TracesConfig(path=path, holdout=1e-6, verifier="math"), "train")
    config = TracesConfig(path=path, holdout=1e-6, verifier="math", trace_column="trace.0")
    assert [one.trace for one in part_of(config).function(config, "train")] == [f"\\boxed{{{i + 1}}}" for i in range(3)]
    write_traces(tmp_path / "traces.jsonl", [*rows, {"question": "3+1", "trace": "\\boxed{4}", "answer": "4"}])
    config = TracesConfig(path=path, holdout=1e-6, verifier="math")
    assert [one.question for one in part_of(config).function(config, "train")] == ["3+1"]
    assert "3 rows have no text for a trace and are left out, the first is train-0: trace is a list" in caplog.text


def test_no_right_trace_is_one_line(tmp_path):
    path = write_traces(tmp_path / "traces.jsonl", [{"question": "1", "trace": "\\boxed{2}", "answer": "1"}])
    config = TracesConfig(path=path, holdout=1e-6, verifier="math")
    with pytest.raises(ConfigError, match="none of 1 traces of train is right by data.verifier=math"):
        part_of(config).function(config, "train")


@pytest.mark.parametrize(("values", "message"), [
    ({"instruction": "{question}"}, r"data.instruction: lacks \{trace\}"),
    ({"ask": "Now"}, r"data.ask: lacks \{question\}"),
    ({"closing": ""}, "neither may be empty"),
])  # fmt: skip
def test_impossible_layouts_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig(**values)


def test_an_unknown_verifier_is_refused():
    with pytest.raises(ConfigError, match="data.verifier=mathh: no such reward"):
        TracesConfig(path="x", verifier="mathh")


def test_wordy_solutions_say_every_step_and_shorter_ones_are_made_of_their_lines(policy):
    config = WordySolutionsConfig(steps=[2, 3])
    tasks = part_of(config).function(config, "train")
    for task in (tasks[i] for i in range(50)):
        short = task.meta["solution"].removeprefix("<think>").removesuffix("</think>").split("\n")
        lines = task.trace.split("\n")
        new = [line for line in lines if " " not in line]
        assert len(new) == task.meta["steps"]
        assert [line for line in short if " " not in line] == new
        assert Counter(short) <= Counter(lines)
        assert new[-1].split("=")[-1] == task.answer


@pytest.mark.parametrize("again", [0.0, 0.6, 1.0])
def test_steps_are_said_again_as_often_as_their_coin_says(again):
    config = WordySolutionsConfig(again=again, most=3)
    tasks = part_of(config).function(config, "train")
    extra = [task.trace.count("\n") + 1 - task.meta["steps"] for task in (tasks[i] for i in range(400))]
    expected = 2 * (again + again**2 + again**3)  # two steps; the second repetition needs the first
    assert statistics.mean(extra) == pytest.approx(expected, abs=5 * statistics.stdev(extra) / 20)


def test_detours_are_right_calculations_of_numbers_that_the_problem_does_not_hold():
    config = WordySolutionsConfig(redundancy="detours", steps=[2, 3], max_operand=9, operators="+-")
    tasks = part_of(config).function(config, "train")
    count = 0
    for task in (tasks[i] for i in range(100)):
        lines, bare = task.trace.split("\n"), task.bare.split("\n")
        detours = [line for line, again in zip(lines, redundant(lines, bare), strict=True) if again]
        used = set(re.findall(r"\d+", task.bare))
        assert len(detours) == len(lines) - task.meta["steps"]
        for line in detours:
            left, operator, right, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line).groups()
            assert not used & {left, right}
            assert int(result) == int(left) + int(right) * (1 if operator == "+" else -1)
        short = task.meta["solution"].removeprefix("<think>").removesuffix("</think>").split("\n")
        assert Counter(bare) <= Counter(short) <= Counter(lines)
        count += len(detours)
    assert count > 100


@pytest.mark.parametrize(("values", "message"), [
    ({"redundancy": "noise"}, "data.redundancy=noise: unknown; choose from said_again, detours"),
    ({"steps": [2, 3], "max_operand": 6}, "data.max_operand=6: too few numbers for detours; set at least 7"),
    ({"operators": "/"}, "data.operators='/': detours add, subtract or multiply"),
])  # fmt: skip
def test_impossible_detours_are_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        WordySolutionsConfig(**{"redundancy": "detours", **values})


def run(folder, *overrides):
    # No cold start: the pipeline is what is tested, so that nearly all outputs lack tags and get the floor.
    trainer.fit(cli.compose([*COMPRESSION, "cold_start.steps=0", f"run_dir={folder}", *overrides]))
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that has learnt to write tags, so that groups have signal."""
    folder = tmp_path_factory.mktemp("start") / "run"
    overrides = ["cold_start.steps=40", "cold_start.learning_rate=5e-3", "data.steps=[1]", "data.max_operand=2"]
    overrides += ["cold_start_data.steps=[1]", "cold_start_data.max_operand=2", "cold_start_data.keep=0", "steps=0"]
    trainer.fit(cli.compose([*COMPRESSION, *overrides, "cold_start_data.tasks=[compress]", f"run_dir={folder}"]))
    return folder / "cold_start"


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    return run(tmp_path_factory.mktemp("conmax") / "run", f"model.path={start}", "sampling.max_new_tokens=32")


def test_groups_have_signal_and_kl_starts_at_zero(unbroken):
    lines = metrics(unbroken)[1:]
    assert lines[0]["compression/floored"] < 0.9
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["kl"] > 0


def test_resume_is_bit_for_bit(start, unbroken, tmp_path):
    overrides = [f"model.path={start}", "sampling.max_new_tokens=32"]
    run(tmp_path / "run", *overrides, "steps=2")
    run(tmp_path / "run", *overrides)
    assert metrics(tmp_path / "run")[3:] == metrics(unbroken)[3:]
    ours, theirs = (
        load_file(checkpoint.list_checkpoints(folder)[-1].policy / "model.safetensors")
        for folder in (tmp_path / "run", unbroken)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_group_of_equal_rewards_gives_zero_loss_apart_from_kl(tmp_path):
    """An untrained model writes no tags at all: every output gets the floor."""
    folder = run(tmp_path / "run", "steps=1", "max_zero_signal_steps=5")
    line = metrics(folder)[1]
    assert line["compression/floored"] == 1.0
    assert line["reward"] == -10.0
    assert line["loss"] == pytest.approx(0.001 * line["kl"], abs=1e-9)


def test_two_ranks_give_the_rewards_of_one(start, unbroken, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rltrain.train"]
    overrides = [
        f"run_dir={tmp_path / 'two'}",
        "cold_start.steps=0",
        f"model.path={start}",
        "sampling.max_new_tokens=32",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *COMPRESSION, *overrides]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    for line, expected in zip(metrics(tmp_path / "two"), metrics(unbroken), strict=True):
        line.pop("padding_share", None), expected.pop("padding_share", None)  # the layout may differ
        assert line == pytest.approx(expected, rel=5e-4, abs=5e-6), line["step"]
