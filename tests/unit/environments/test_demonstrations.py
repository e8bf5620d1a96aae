"""Worked solutions of several turns as the ids of a cold start, with the calculator and with recorded observations."""

import json

import pytest

from rltrain import cli, sft
from rltrain.environments import demonstrations
from rltrain.environments.demonstrations import BadTurns, SolvedTurn, solved_turns
from rltrain.errors import ConfigError
from rltrain.policy.load import load_policy
from rltrain.registry import part_of
from rltrain.types import Problem

TINY = ["model.hidden_size=32", "model.layers=1", "model.heads=2", "model.intermediate_size=64"]
CALCULATOR = [*TINY, "environment=calculator", "environment.workers=1", "data=small_integers"]


def problem(name, solution):
    return Problem(id=name, prompt="2+3\n", answer="5", meta={"solution": solution})


def rows(problems, *overrides):
    config = cli.compose([*TINY, *overrides])
    policy = load_policy(config.model)
    return sft.examples(problems, policy, config), policy.tokenizer


def read(row, tokenizer):
    """The text of an example, and of what carries loss, with ``~`` for what does not."""
    labels = [tokenizer.decode([label]) if label != sft.IGNORED else "~" for label in row["labels"]]
    return tokenizer.decode(row["input_ids"]), "".join(labels)


def test_turns_of_a_solution():
    spoken = [{"written": "a", "observed": "b"}, {"written": "c", "observed": None}]
    assert solved_turns(spoken) == [SolvedTurn(written="a", observed="b"), SolvedTurn(written="c")]
    assert solved_turns(["a", {"written": "c"}]) == [SolvedTurn(written="a"), SolvedTurn(written="c")]


@pytest.mark.parametrize(("solution", "reason"), [
    ([], "it has no turn"),
    ([3], "turn 1 is neither a text nor"),
    (["a", {"said": "b"}], "turn 2 is neither a text nor"),
    (["a", ""], "turn 2 has no text in written"),
    ([{"written": "a", "observed": 5}, "b"], "turn 1 has no text in observed"),
    ([{"written": "a", "observed": "b"}], "turn 1 is the last and observes something"),
    ([{"written": "a", "observed": "b"}, "c", "d"], "turn 2 does not say what it observes and others do"),
])  # fmt: skip
def test_what_is_no_solution_is_named(solution, reason):
    with pytest.raises(BadTurns, match=reason):
        solved_turns(solution)


def test_the_environment_is_asked_and_the_loss_is_on_what_the_model_writes(caplog):
    (called, plain), tokenizer = rows(
        [
            problem("called", ["<calc>2+3</calc>", "\n\\boxed{5}"]),
            problem("plain", "\\boxed{6}"),
            problem("goes_on", ["<calc>2+3</calc>!", "\n\\boxed{5}"]),
            problem("no_call", ["2+3", "\n\\boxed{5}"]),
            problem("one_text", "<calc>2+3</calc><result>5</result>\n\\boxed{5}"),
        ],
        *CALCULATOR,
    )
    assert read(called, tokenizer) == (
        "2+3\n<calc>2+3</calc><result>5</result>\n\\boxed{5}<eos>",
        "~~~~<calc>2+3</calc>" + "~" * len("<result>5</result>") + "\n\\boxed{5}<eos>",
    )
    assert read(plain, tokenizer) == ("2+3\n\\boxed{6}<eos>", "~~~~\\boxed{6}<eos>")
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()][:1]
    assert message.startswith("cold start: 3 solutions are left out: goes_on: turn 1 ends after '<calc>2+3</calc>'")
    assert "no_call: after turn 1 nothing is observed (the environment ends the conversation)" in message
    assert "one_text: turn 1 ends after '<calc>2+3</calc>' in a rollout, and goes on here" in message


def test_recorded_observations_are_taken_as_they_are():
    solution = [{"written": "<calc>2+3</calc>", "observed": " is <eos>"}, {"written": "5"}]
    for overrides in (CALCULATOR, ["data=small_integers"]):
        (row,), tokenizer = rows([problem("recorded", solution)], *overrides)
        text, labels = read(row, tokenizer)
        eos = "" if overrides is CALCULATOR else "<eos>"  # without an environment no string ends a turn
        assert text == f"2+3\n<calc>2+3</calc>{eos} is <eos>5<eos>"
        # What the observation spells is text: five ids, none of them that of the end.
        assert labels == f"~~~~<calc>2+3</calc>{eos}{'~' * 9}5<eos>"
        assert row["input_ids"].count(tokenizer.eos_token_id) == 1 + bool(eos)


@pytest.mark.parametrize(("solution", "overrides", "reason"), [
    (["a", "b"], ["data=small_integers"], "no turn says what it observes, and the run has no environment to ask"),
    (["<calc>1</calc>"] * 2 + ["b"], [*CALCULATOR, "environment.max_turns=1"], "environment.max_turns or cold_start"),
    ([{"written": "<calc>1</calc>", "observed": "x" * 9}, "b"], [*CALCULATOR, "environment.reply_tokens=8"],
     "turn 1 observes more than 8 tokens"),
    (7, CALCULATOR, "of p is neither a text nor a list of turns"),
])  # fmt: skip
def test_a_cold_start_without_a_usable_solution_is_refused(solution, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        rows([problem("p", solution)], *overrides)


def test_many_conversations_are_held_in_pieces(monkeypatch):
    solutions = [[f"<calc>{n}+1</calc>", f"\n\\boxed{{{n + 1}}}"] for n in range(5)]
    problems = [problem(str(n), solution) for n, solution in enumerate(solutions)]
    whole, _ = rows(problems, *CALCULATOR)
    monkeypatch.setattr(demonstrations, "AT_ONCE", 2)
    assert rows(problems, *CALCULATOR)[0] == whole and len(whole) == 5


@pytest.mark.parametrize("style", ["call", "calls"])
def test_generated_solutions_get_the_right_results(style):
    """The environment computes every result; the box of the last turn must agree with the last one."""
    overrides = [*CALCULATOR, "data=calculator_chains", f"data.solution={style}", "data.all_worked=8"]
    config = cli.compose(overrides)
    source = part_of(config.data).function(config.data, "train")
    made, tokenizer = rows([source[index] for index in range(8)], *overrides, "cold_start.max_length=400")
    assert len(made) == 8
    for index, row in enumerate(made):
        text = read(row, tokenizer)[0]
        results = [part.partition("</result>")[0] for part in text.split("<result>")[1:]]
        assert results[-1] == source[index].answer
        assert text.endswith(f"\n\\boxed{{{results[-1]}}}<eos>")
        assert len(results) == (1 if style == "call" else source[index].meta["steps"])


def test_a_file_of_traces(tmp_path):
    lines = [
        {"question": "2+3", "answer": "5", "turns": [{"written": "<calc>2+3</calc>"}, {"written": "\\boxed{5}"}]},
        {"question": "4*4", "answer": "16", "turns": ["<calc>4*4</calc>", "\\boxed{16}"]},
    ]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = [
        *CALCULATOR[:-1],
        "data=hub",
        f"data.path={path}",
        "data.prompt='{question}'",
        "+data.meta.turns=turns",
        "data.holdout=0.01",
        "cold_start.solution_field=turns",
    ]
    config = cli.compose(overrides)
    source = part_of(config.data).function(config.data, "train")
    made, tokenizer = rows(source, *overrides)
    assert sorted(read(row, tokenizer)[0] for row in made) == [
        "2+3<calc>2+3</calc><result>5</result>\\boxed{5}<eos>",
        "4*4<calc>4*4</calc><result>16</result>\\boxed{16}<eos>",
    ]
