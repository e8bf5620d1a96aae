"""Columns as golds, options and messages: kept as they read, or a bad row with its reason."""

import datetime
import json
import math
from decimal import Decimal

import pytest

from rltrain.data.columns import BadRow, lettered, messages_at, options_at, require_option, text_of, value_at
from rltrain.data.hub import HubConfig, hub
from rltrain.errors import ConfigError

USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("5.0", "5.0"),
        (5, "5"),
        (5.0, "5"),
        (-0.0, "0"),
        (1e16, "10000000000000000"),
        (0.1, "0.1"),
        (2.5e-7, "2.5e-07"),
        (2**70, "1180591620717411303424"),
        (True, "True"),
        (Decimal("5.00"), "5.00"),
        (Decimal("1E+2"), "100"),
        (datetime.date(2024, 7, 26), "2024-07-26"),
        ("😀", "😀"),
    ],
)
def test_scalars_as_text(value, text):
    assert text_of(value, "answer") == text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["5"], "answer is a list, not text (name an element: answer.0"),
        ([["5"]], "answer is a list, not text"),
        ([USER], "answer is a list, not text (messages: set data.messages=answer and data.prompt=null"),
        ({"value": "5"}, "answer is an object, not text (name one of its fields: answer.FIELD"),
        (b"5", "answer is bytes, not text"),
        (math.nan, "answer is NaN"),
        (Decimal("NaN"), "answer is NaN"),
        (math.inf, "answer is inf, not a finite number"),
        (None, "empty answer"),
        ("", "empty answer"),
        (" \n", "empty answer"),
        ([], "empty answer"),
        ({}, "empty answer"),
        ("a \ud83d b", "answer holds half a character (a lone surrogate)"),
    ],
)
def test_values_that_are_no_gold(value, reason):
    with pytest.raises(BadRow) as error:
        text_of(value_at({"answer": value}, "answer"), "answer")
    assert str(error.value).startswith(reason)


def test_paths_reach_into_objects_and_lists():
    row = {"a": {"b": [{"c": "x"}, {"c": "y"}]}, "a.b": "dotted name"}
    assert value_at(row, "a.b.1.c") == "y"
    assert value_at(row, "a.b") == "dotted name"
    for path in ("a.b.2.c", "a.c", "a.b.x", "a.b.-1", "b"):
        with pytest.raises(BadRow, match=f"^empty {path}$"):
            value_at(row, path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"A": "yes", "B": "no"}, {"A": "yes", "B": "no"}),
        ({"A": "yes", "B": "no", "C": None}, {"A": "yes", "B": "no"}),
        (["yes", "no"], {"A": "yes", "B": "no"}),
        ([1, 2.0], {"A": "1", "B": "2"}),
        ([{"key": "A", "value": "yes"}, {"key": "B", "value": "no"}], {"A": "yes", "B": "no"}),
        ([{"label": "1", "text": "yes"}, {"label": "2", "text": "no"}], {"1": "yes", "2": "no"}),
        ({"text": ["yes", "no"], "label": ["A", "B"]}, {"A": "yes", "B": "no"}),
        ({"key": ["A", "B"], "value": ["yes", "no"]}, {"A": "yes", "B": "no"}),
    ],
)
def test_forms_of_options(options, expected):
    assert lettered(options, "options") == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("A) yes B) no", "options is neither a list nor an object of options"),
        ({"A": ["yes"]}, "option A of options is a list, not text"),
        ([["yes"], ["no"]], "option A of options is a list, not text"),
        ([{"letter": "A", "value": "x"}, {"letter": "A", "value": "y"}], "options has two options A"),
        ([{"name": "A"}], "an option of options has no key and value"),
        ({"label": ["A"], "text": ["yes", "no"]}, "options has not as many letters as texts"),
        ([str(n) for n in range(27)], "options has 27 options, more than letters"),
        ({"A": None}, "empty options"),
        ({"A": math.nan}, "option A of options is nan, not a finite number"),
    ],
)
def test_options_that_are_none(options, reason):
    with pytest.raises(BadRow) as error:
        options_at({"options": options}, "options")
    assert str(error.value).startswith(reason)


def test_a_gold_is_an_option():
    options = {"A": "alpha", "B": "beta 2"}
    for gold in ("A", "(b)", "B. beta 2", "Beta 2", "alpha"):
        require_option(gold, options, "answer")
    for gold in ("C", "2", "gamma"):
        with pytest.raises(BadRow, match="answer is none of the row's options"):
            require_option(gold, options, "answer")


def test_messages_keep_what_the_template_reads():
    calls = [{"function": {"name": "add", "arguments": {"a": 1, "b": None}}, "id": None}]
    table = [
        {"role": "user", "content": [{"type": "text", "text": "1+", "image": None}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2", "tool_calls": None, "name": "add"},
    ]
    assert messages_at({"m": table}, "m", continued=False) == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2", "name": "add"},
    ]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": None}], "message 0 of m has no content"),
        ([{"role": "user"}], "message 0 of m has no content"),
        ([{"role": "user", "content": " "}], "message 0 of m is empty"),
        ([USER, {"role": "assistant", "content": ""}, USER], "message 1 of m is empty"),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            "message 0 of m holds a part that is no text",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "?"}]}],
            "message 0 of m holds a part that is no text (image)",
        ),
        ([{"role": "user", "content": [5]}], "message 0 of m holds a part that is no text (int)"),
        ([{"role": "user", "content": {"text": "x"}}], "message 0 of m is an object, not text"),
        ([{"role": "user", "content": "\ud83d"}], "message 0 of m holds half a character"),
        ([{"from": "human", "value": "x"}], "m is no list of messages with role and content"),
        ('[{"role": "user"}]', "m is no list of messages with role and content"),
        ({"role": ["user"], "content": ["x"]}, "m is no list of messages with role and content"),
        ([], "empty m"),
        (
            [USER, {"role": "assistant", "content": "5"}],
            "m ends with the assistant, whose text would stand in the prompt",
        ),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{}]}], "m ends with tool calls"),
        (
            [USER, {"role": "Assistant", "content": "5"}],
            "m ends with the unknown role 'Assistant' (rename it to one of",
        ),
        ([USER, {"role": "model", "content": "5"}], "m ends with the unknown role 'model'"),
        ([{"role": "", "content": "5"}], "m ends with the unknown role ''"),
    ],
)
def test_messages_that_are_no_prompt(messages, reason):
    with pytest.raises(BadRow) as error:
        messages_at({"m": messages}, "m", continued=False)
    assert str(error.value).startswith(reason)


@pytest.mark.parametrize("role", ["user", "tool", "function", "ipython", "system", "developer"])
def test_last_roles_that_are_answered(role):
    messages = [USER, {"role": role, "content": "5"}]
    assert messages_at({"m": messages}, "m", continued=False) == messages


def table(tmp_path, rows, **changes):
    """The training problems of rows written as parquet, as pandas or another program would have."""
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.Table.from_pylist(rows) if isinstance(rows, list) else rows
    pyarrow.parquet.write_table(rows, tmp_path / "x.parquet")
    changes = {"prompt": "{q}", "answer": "a"} | changes
    return hub(HubConfig(path=str(tmp_path / "x.parquet"), holdout=1e-9, **changes), "train")


def test_a_column_that_became_float_keeps_its_integers(tmp_path):
    found = table(tmp_path, [{"q": "x", "a": 5.0}, {"q": "y", "a": None}, {"q": "z", "a": math.nan}])
    assert [problem.answer for problem in found] == ["5"]
    assert [(row.id, row.reason) for row in found.left_out] == [("train-1", "empty a"), ("train-2", "a is NaN")]


def test_bytes_and_lists_are_no_golds_but_may_be_handed_on(tmp_path):
    for gold, reason in (
        (b"5", "a is bytes, not text"),
        (["5"], "a is a list, not text (name an element: a.0; as it "),
    ):
        with pytest.raises(ConfigError) as error:
            table(tmp_path, [{"q": "x", "a": gold}] * 7)
        assert (
            f"no usable row for train among 7: 7 rows (train-0, train-1, train-2, train-3, train-4, …): {reason}"
            in str(error.value)
        )
        raw = table(tmp_path, [{"q": "x", "a": gold}], answer=None, meta={"answer": "a"})[0]
        assert (raw.answer, raw.meta) == ("", {"answer": gold})
    assert table(tmp_path, [{"q": "x", "a": ["5", "6"]}], answer="a.1")[0].answer == "6"


def test_parts_in_a_table(tmp_path):
    content = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    rows = [{"m": [{"role": "user", "content": content}], "a": "2"}]
    assert table(tmp_path, rows, prompt=None, messages="m")[0].prompt == [{"role": "user", "content": "1+1?"}]


def test_columns_that_are_not_mapped_are_not_read(tmp_path):
    """A column of images would be decoded, and of broken text would end the run."""
    import pyarrow

    broken = pyarrow.array([b"\xff"]).cast(pyarrow.binary()).view(pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 1, broken.buffers())
    rows = pyarrow.table({"q": ["x"], "a": ["1"], "other": broken})
    assert table(tmp_path, rows)[0].answer == "1"
    with pytest.raises(ConfigError, match=r"cannot be read \(UnicodeDecodeError: .*\); mend the data$"):
        table(tmp_path, rows, answer="other")


def test_dictionary_columns_are_text(tmp_path):
    import pyarrow

    rows = pyarrow.table({"q": pyarrow.array(["x", "y", "x"]).dictionary_encode(), "a": ["1", "2", "3"]})
    assert [problem.prompt for problem in table(tmp_path, rows)] == ["x", "y", "x"]


def problems(tmp_path, rows, **changes):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return hub(HubConfig(path=str(tmp_path / "x.jsonl"), holdout=1e-9, **changes), "train")


def test_bad_rows_of_all_kinds_are_reported_once_and_the_rest_is_kept(tmp_path, caplog):
    golds = ["1", ["1"], {"x": "1"}, math.nan, math.inf, "", None, "\ud83d", 2.0, 3]
    found = problems(tmp_path, [{"q": "x", "answer": gold} for gold in golds], prompt="{q}")
    assert [(problem.id, problem.answer) for problem in found] == [("train-0", "1"), ("train-8", "2"), ("train-9", "3")]
    assert [row.id for row in found.left_out] == [f"train-{number}" for number in range(1, 8)]
    (line,) = caplog.messages
    assert "3 rows kept, 7 left out: 1 row (train-1): answer is a list" in line
    assert "2 rows (train-5, train-6): empty answer" in line
    assert line.isprintable()


def test_the_warning_stays_one_line_of_bounded_length(tmp_path, caplog):
    turn = {"role": "user", "content": "Hi"}
    rows = [{"i": f"row\n{n}", "m": [turn] * n + [{"role": "user", "content": ""}], "answer": "1"} for n in range(12)]
    rows.append({"i": "good", "m": [turn], "answer": "1"})
    assert len(problems(tmp_path, rows, messages="m", id="i").left_out) == 12
    (line,) = caplog.messages
    assert line.isprintable()
    assert line.count("is empty") == 8
    assert "1 row ('row\\n0'): message 0 of m is empty" in line
    assert line.endswith("; 12 reasons in all")


def test_a_list_in_the_prompt_is_no_text(tmp_path):
    with pytest.raises(
        ConfigError, match=r"q is a list, not text \(messages: set data.messages=q and data.prompt=null"
    ):
        problems(tmp_path, [{"q": [USER], "answer": "1"}], prompt="{q}")


def test_a_gold_without_its_option_is_a_bad_row(tmp_path):
    rows = [{"q": "x", "o": {"A": "a", "B": "b", "C": None, "D": None}, "answer": letter} for letter in "ABC"]
    found = problems(tmp_path, rows, prompt="{q}\n{choices}", choices="o")
    assert [problem.answer for problem in found] == ["A", "B"]
    assert [(row.id, row.reason) for row in found.left_out] == [("train-2", "answer is none of the row's options")]


def test_options_of_medqa_in_the_bigbio_form(tmp_path):
    rows = [{"q": "x", "o": [{"key": "A", "value": "yes"}, {"key": "B", "value": "no"}], "answer": "B"}]
    (problem,) = problems(tmp_path, rows, prompt="{q}\n{choices}", choices="o")
    assert problem.prompt == "x\n(A) yes\n(B) no"
    assert problem.meta == {"choices": {"A": "yes", "B": "no"}}


def test_a_final_assistant_turn_is_continued_only_when_asked_for(tmp_path):
    rows = [{"m": [USER, {"role": "assistant", "content": "It is"}], "answer": "5"}, {"m": [USER], "answer": "6"}]
    found = problems(tmp_path, rows, messages="m")
    assert [problem.id for problem in found] == ["train-1"]
    assert [row.id for row in found.left_out] == ["train-0"]
    continued = problems(tmp_path, rows, messages="m", continue_final_message=True)
    assert [problem.prompt for problem in continued] == [rows[0]["m"], rows[1]["m"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{q} Put it in \\boxed{answer}"}, "data.prompt: {answer} is data.answer, so that the gold would "),
        ({"prompt": "{q} {x.gold}", "answer": "x.gold"}, "data.prompt: {x.gold} is data.answer"),
        (
            {"prompt": "{q}", "continue_final_message": True},
            "data.continue_final_message: has no effect on data.prompt",
        ),
        ({"prompt": "{q}", "answer": None, "answer_boxed": True}, "data.answer=null: nothing for data.answer_boxed"),
    ],
)
def test_impossible_configs_name_the_key(changes, message):
    with pytest.raises(ConfigError) as error:
        HubConfig(path="x", **changes)
    assert str(error.value).startswith(message)
