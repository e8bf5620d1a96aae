"""The behaviour handbook: the file and what is refused in it, retrieval, the prompt, and what a model answers."""

import json
import math

import pytest
import torch

from rltrain import cli, sft
from rltrain.commands import sample
from rltrain.config import DataConfig
from rltrain.data import behaviours
from rltrain.data.embeddings import embedder
from rltrain.data.handbook import Behaviour, best, by_tag, by_words, normalised, problems_of, read, with_handbook
from rltrain.data.random_calculation import RandomCalculationConfig
from rltrain.errors import ConfigError
from rltrain.policy.encode import encode, encode_all, refuse_long_entries
from rltrain.policy.load import Policy
from rltrain.policy.tiny import character_tokenizer, tiny_architecture
from rltrain.runs import cold_starts
from rltrain.runs.handbook_metrics import handbook_metrics
from rltrain.runtime.handbook import HandbookConfig
from rltrain.types import AdvisedProblem, Group, Problem, Prompt

TINY = ["model.hidden_size=32", "model.layers=1", "model.heads=2", "model.intermediate_size=64", "data=small_integers"]
ROWS = [
    {"tags": ["sum", "product"]},
    {"name": "carry", "instruction": "Carry the ten.", "tags": ["sum"]},
    {"name": "check_sign", "instruction": "Check the sign."},
    {"name": "distribute", "instruction": "Split a factor.", "tags": ["product", "sum"]},
]
SUM = Problem(id="s", prompt="3+4", answer="7", meta={"tag": "sum"})
BOTH = Problem(id="b", prompt="3+4*2", answer="11", meta={"tag": ["sum", "product"]})


def file_of(folder, *rows):
    path = folder / "handbook.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def data(path, **keys):
    return DataConfig(handbook=str(path), **keys)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the file ----------------------------------------------------------------------------------------------------


def test_a_line_ends_at_a_newline_alone(tmp_path):
    """JSON leaves U+2028 and U+0085 in a string as they are; an editor may put a byte-order mark before the text."""
    path = tmp_path / "handbook.jsonl"
    lines = [{"name": "a", "instruction": "one\u2028two\x85three"}, {"name": "b", "instruction": "four"}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read(path, "data.handbook").behaviours
    assert [(each.row, each.instruction) for each in found] == [(1, "one\u2028two\x85three"), (2, "four")]


def test_entries_keep_the_number_of_their_line(tmp_path):
    handbook = read(file_of(tmp_path, ROWS[0], "", *ROWS[1:]), "data.handbook")
    assert [(each.row, each.name, each.tags) for each in handbook.behaviours] == [
        (3, "carry", ("sum",)), (4, "check_sign", ()), (5, "distribute", ("product", "sum")),
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), [
    ([{"name": "a", "instruction": " "}], "row 1: its instruction is empty; write it, or delete it"),
    ([{"name": "", "instruction": "x"}], "row 1: its name is empty"),
    ([{"name": "a"}], "row 1: its instruction is empty"),
    ([{"name": "--", "instruction": "x"}], "row 1: its name '--' has no letter"),
    (
        [*ROWS[:2], {"name": "Behavior: Carry", "instruction": "x"}],
        "row 3: its name Behavior: Carry is also that of row 2; merge the two, or rename one",
    ),
    (
        [ROWS[0], {"name": "a", "instruction": "x", "tags": ["summ"]}],
        "row 2: its tag summ is unknown, row 1 lists sum, product; mend the tag, or add it there",
    ),
    ([{"name": "a", "instruction": "x", "tags": ["sum"]}], "row 1: its tag sum is unknown, row 1 lists no tags"),
    ([ROWS[0], {"name": "a", "instruction": "x", "tags": "sum"}], "row 2: its tags are no list of texts"),
    ([{"name": "a", "instruktion": "x"}], "row 1: instruktion is no key of an entry; choose of name, instruction"),
    (["{"], "row 1: is no JSON"),
    (["[1]"], "row 1: is no entry"),
    ([{"tags": [1]}], "row 1: neither an entry with a name nor a first line"),
    ([ROWS[0]], "has no entry; add lines"),
    ([], "has no entry; add lines"),
], ids=[
    "empty", "empty name", "no instruction", "no letter", "duplicate", "unknown tag", "no tags", "tags", "key", "json",
    "list", "header", "header alone", "nothing",
])  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, rows, message):
    path = file_of(tmp_path, *rows)
    with pytest.raises(ConfigError) as error:
        read(path, "data.handbook")
    assert one_line(error).startswith(f"data.handbook={path}") and message in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\); rltrain handbook extract"):
        read(tmp_path / "none.jsonl", "data.handbook")


@pytest.mark.parametrize(("name", "normal"), [
    ("behavior_Check-Units", "check_units"), ("Behaviour: check  units!", "check_units"), ("__x__", "x"), ("*", ""),
])  # fmt: skip
def test_names_are_compared_in_one_form(name, normal):
    assert normalised(name) == normal


# --- retrieval ---------------------------------------------------------------------------------------------------


def entries(tmp_path):
    return read(file_of(tmp_path, *ROWS), "data.handbook").behaviours


def names(chosen):
    return [each.name for each in chosen]


def test_by_tag_the_most_shared_tags_come_first_and_general_entries_last(tmp_path):
    known = entries(tmp_path)
    scores = by_tag(known, "tag", "data")
    assert scores(SUM) == [1, 0.5, 1] and scores(BOTH) == [1, 0.5, 2]
    assert names(best(known, scores(SUM), 2)) == ["carry", "distribute"]
    assert names(best(known, scores(BOTH), 5)) == ["distribute", "carry", "check_sign"]
    assert names(best(known, scores(Problem(id="o", prompt="", answer="", meta={"tag": 3})), 5)) == ["check_sign"]


def test_by_words_the_scores_are_cosines_of_tf_idf_vectors():
    known = [Behaviour(row=1, name="a", instruction="sum sum"), Behaviour(row=2, name="b", instruction="sum carry")]
    # Of 2 entries, "sum" is in both: ln(3/3)+1 = 1. "a", "b" and "carry" are in one: w = ln(3/2)+1.
    w = math.log(1.5) + 1
    first, second = math.sqrt(4 + w * w), math.sqrt(1 + 2 * w * w)
    query = math.sqrt(1 + w * w)  # "Sum" and "carry"; "the" is in no entry
    scores = by_words(known)(Problem(id="p", prompt="Sum the CARRY", answer=""))
    assert scores == pytest.approx([2 / (first * query), (1 + w * w) / (second * query)])
    assert best(known, by_words(known)(Problem(id="p", prompt="nothing", answer="")), 2) == []


def test_of_equal_scores_the_earlier_line_comes_first(tmp_path):
    known = entries(tmp_path)
    assert names(best(known[::-1], [1.0, 1.0, 1.0], 2)) == ["carry", "check_sign"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a tiny model of random weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("encoder")
    AutoModelForCausalLM.from_config(tiny_architecture(cli.compose(TINY).model)).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def test_an_embedding_is_the_mean_of_the_last_hidden_states(encoder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(encoder)
    ids = torch.tensor([character_tokenizer()("3+4")["input_ids"]])
    with torch.no_grad():
        hidden_TD = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    mean_D = sum(hidden_TD) / 3
    embed = embedder(str(encoder), "data.handbook_model")
    assert torch.allclose(embed("3+4"), mean_D / mean_D.norm(), atol=1e-6)


def test_by_embedding_a_question_finds_the_entry_of_its_words(tmp_path, encoder):
    path = file_of(tmp_path, {"name": "a", "instruction": "zzz"}, {"name": "b", "instruction": "3+4"})
    found = with_handbook([SUM], data(path, handbook_by="embedding", handbook_model=str(encoder), handbook_top=1))
    assert found[0].behaviours == ("b",)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        embedder(str(tmp_path), "data.handbook_model")
    assert one_line(error).startswith(f"data.handbook_model={tmp_path}: cannot be loaded (")


# --- the prompt --------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "3+4"}]


@pytest.mark.parametrize(("prompt", "place", "shown", "as_system"), [
    ("3+{behaviours}", "question", "[carry: Carry the ten.] 3+{behaviours}", False),
    (CHAT, "question", [CHAT[0], {"role": "user", "content": "[carry: Carry the ten.] 3+4"}], False),
    (CHAT, "system", [{"role": "system", "content": "Be exact.\n\n[carry: Carry the ten.]"}, CHAT[1]], False),
    ("3+4", "system", [{"role": "system", "content": "[carry: Carry the ten.]"}, CHAT[1]], True),
], ids=["text", "chat", "behind the system message", "as the system message"])  # fmt: skip
def test_entries_stand_where_the_template_puts_them(tmp_path, prompt, place, shown, as_system):
    template = "[{behaviours}] {question}" if place == "question" else "[{behaviours}]"
    keys = {"handbook_top": 1, "handbook_place": place, "handbook_template": template}
    problem = Problem(id="s", prompt=prompt, answer="7", meta={"tag": "sum"})
    (found,) = with_handbook([problem], data(file_of(tmp_path, *ROWS), **keys))
    assert found == AdvisedProblem(
        id="s", prompt=shown, answer="7", meta={"tag": "sum"}, bare=prompt, behaviours=("carry",),
        rows=f"data.handbook={tmp_path}/handbook.jsonl rows 2", as_system=as_system,
    )  # fmt: skip


def test_a_problem_without_an_entry_keeps_its_prompt(tmp_path):
    other = Problem(id="o", prompt="1/2", answer="0.5", meta={"tag": "quotient"})
    found = with_handbook([SUM, other], data(file_of(tmp_path, ROWS[0], ROWS[1])))
    assert found[1].prompt == found[1].bare == "1/2" and found[1].behaviours == ()
    assert len(found) == 2 and found[0:2] == [found[0], found[1]]


def test_without_a_handbook_the_data_stay_what_they_are():
    problems = [SUM]
    assert with_handbook(problems, DataConfig()) is problems
    assert cold_starts.made_with(cli.compose(TINY))["data"]["handbook"] is None


def test_problems_of_other_tags_are_refused(tmp_path):
    path = file_of(tmp_path, *ROWS[:2])
    with pytest.raises(ConfigError) as error:
        with_handbook([Problem(id="o", prompt="", answer="", meta={"tag": "limit"})], data(path))
    assert "no entry has a tag of these problems (tag: limit), its tags are sum" in one_line(error)
    with pytest.raises(ConfigError, match="handbook_tag=topic: problem s has no such entry of meta, it has tag; name"):
        with_handbook([SUM], data(path, handbook_tag="topic"))


def test_a_source_of_a_mixture_has_a_handbook_of_its_own(tmp_path):
    path = file_of(tmp_path, {"tags": ["2"]}, {"name": "a", "instruction": "x", "tags": ["2"]})
    words = ["data=mixture", "+data@data.sources.a=small_integers", "+data@data.sources.b=small_integers"]
    words += [f"data.sources.a.handbook={path}", "data.sources.a.handbook_tag=steps"]
    problems = problems_of(cli.compose(words).data, "train")
    found = {p.meta["mixture_source"]: p for p in (problems[i] for i in range(20)) if p.meta["steps"] == 2}
    assert isinstance(found["a"], AdvisedProblem) and found["a"].behaviours == ("a",)
    assert not isinstance(found["b"], AdvisedProblem)


@pytest.mark.parametrize(("words", "message"), [
    (["data.handbook_by=topic"], "data.handbook_by=topic: unknown; set one of tag, words, embedding"),
    (["data.handbook_place=end"], "data.handbook_place=end: unknown"),
    (["data.handbook_top=0"], "data.handbook_top=0: set at least 1"),
    (["data.handbook_by=embedding"], "embeddings come from a named model"),
    (["data.handbook_model=m"], "nothing else reads it; set both or neither"),
    (["data.handbook_template='{question}'"], "data.handbook_template: lacks {behaviours}; add it"),
    (["data.handbook_template='{behaviours}'"], "lacks {question}, with data.handbook_place=question; add it"),
    (
        ["data.handbook_place=system", "data.handbook_template='{behaviours}{question}'"],
        "has {question}, with data.handbook_place=system; take it out",
    ),
    (["data.handbook_entry='{name}'"], "data.handbook_entry: lacks {instruction}; add it"),
    (["+data@eval_data=small_integers", "eval_data.handbook_top=0"], "eval_data.handbook_top=0"),
    (
        ["data=mixture", "+data@data.sources.a=small_integers", "data.handbook=f"],
        "data.handbook: belongs to a source of a mixture; set data.sources.NAME.handbook",
    ),
    (["handbook.keep=best"], "handbook.keep=best: unknown; set one of right, wrong, all"),
    (["handbook.line='('"], "handbook.line=(: no regular expression"),
    (["handbook.line='(?P<name>.*)'"], "lacks a group name or instruction; add"),
    (["handbook.extract='{question}{solution}'"], "handbook.extract: lacks {reflection}; add it"),
    (["handbook.samples=0"], "handbook.samples=0: set at least 1"),
], ids=lambda value: value[-1].partition("=")[2] if isinstance(value, list) else "")  # fmt: skip
def test_wrong_keys_are_named(words, message):
    with pytest.raises(ConfigError) as error:
        cli.compose(words)
    assert message in one_line(error)


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy():
    return Policy(model=None, tokenizer=character_tokenizer(), stop_token_ids=(1,), pad_token_id=0)


def test_the_tokens_that_entries_cost_are_counted(tmp_path, policy):
    config = data(file_of(tmp_path, *ROWS), handbook_template="{behaviours}\n{question}", handbook_top=2)
    other = Problem(id="o", prompt="1/2", answer="0.5", meta={"tag": "quotient"})
    prompts = [encode(policy, each, cli.compose(TINY).model) for each in with_handbook([SUM, other], config)]
    added = len("carry: Carry the ten.\ndistribute: Split a factor.\n"), len("check_sign: Check the sign.\n")
    assert [prompt.handbook_tokens for prompt in prompts] == list(added)
    assert len(prompts[0].token_ids) == added[0] + len("3+4")
    plain = Group(prompt=Prompt(problem=SUM, token_ids=(1,)), completions=())
    metrics = handbook_metrics([*(Group(prompt=prompt, completions=()) for prompt in prompts), plain])
    assert {name: (each.total, each.count) for name, each in metrics.items()} == {
        "handbook/tokens": (sum(added), 2), "handbook/entries": (3, 2),
    }  # fmt: skip
    assert handbook_metrics([plain]) == {}


def test_entries_that_do_not_fit_are_refused_with_their_lines(tmp_path, policy):
    path = file_of(tmp_path, *ROWS)
    problems = with_handbook([SUM], data(path, handbook_template="{behaviours}\n{question}", handbook_top=2))
    model = cli.compose(TINY).model
    size = len("carry: Carry the ten.\ndistribute: Split a factor.\n3+4")
    assert encode_all(policy, problems, model, max_prompt_tokens=size)[1] == []
    dropped = encode_all(policy, problems, model, max_prompt_tokens=size - 1)[1]
    with pytest.raises(ConfigError) as error:
        refuse_long_entries(policy, dropped, model, max_prompt_tokens=size - 1)
    start = f"data.handbook={path} rows 2, 4: add {size - 3} tokens to problem s, whose prompt of {size} is then over"
    assert one_line(error).startswith(f"{start} {size - 1} (sampling.max_prompt_tokens")
    refuse_long_entries(policy, dropped, model, max_prompt_tokens=2)  # too long without a handbook, too


def test_a_cold_start_refuses_entries_that_do_not_fit(tmp_path, policy):
    path = file_of(tmp_path, *ROWS)
    problem = Problem(id="s", prompt="3+4", answer="7", meta={"tag": "sum", "solution": "7"})
    config = cli.compose([*TINY, "cold_start.max_length=30"])
    with pytest.raises(ConfigError, match=r"over 30 \(cold_start.max_length\); lower data.handbook_top"):
        sft.examples(list(with_handbook([problem], data(path))), policy, config)


def test_a_system_message_needs_a_template_and_replaces_none(tmp_path, policy):
    (problem,) = with_handbook([SUM], data(file_of(tmp_path, *ROWS), handbook_place="system"))
    with pytest.raises(ConfigError, match=r"handbook_place=system: a system message needs a chat template; set"):
        encode(policy, problem, cli.compose(TINY).model)
    chat = cli.compose([*TINY, "model.chat=true", "model.system=x"]).model
    with pytest.raises(ConfigError, match=r"handbook_place=system: would stand in the place of model.system"):
        encode(policy, problem, chat)


def test_a_sample_has_the_entries_of_its_tags(tmp_path):
    config = data(file_of(tmp_path, *ROWS), handbook_top=1)
    problem = Problem(id="prompt", prompt="3+4", answer="")
    assert sample.advised(config, problem, ["product"]).behaviours == ("distribute",)
    assert sample.advised(DataConfig(), problem, []) is problem
    with pytest.raises(ConfigError, match="--tag: none is given, and data.handbook="):
        sample.advised(config, problem, [])
    with pytest.raises(ConfigError, match="--tag: the run's data have no handbook"):
        sample.advised(RandomCalculationConfig(), problem, ["sum"])


# --- what a model answers ----------------------------------------------------------------------------------------

ANSWER = """\
Here are the behaviors:
- behavior_Check_Units: Write the unit beside each number.
2. behaviour_carry: one two three four

behavior_empty:
NONE.
behavior___: no letter
behavior_last: cut in the mid"""


def test_lines_are_entries_or_refused_with_the_reason():
    parsed = behaviours.parse(ANSWER, HandbookConfig(most_words=6), cut=True)
    assert parsed.entries == (("check_units", "Write the unit beside each number."), ("carry", "one two three four"))
    assert parsed.refused == (
        ("Here are the behaviors:", "no behaviour"), ("behavior_empty:", "no behaviour"),
        ("behavior___: no letter", "no name"), ("behavior_last: cut in the mid", "cut"),
    )  # fmt: skip
    whole = behaviours.parse(ANSWER, HandbookConfig(most_words=5), cut=False)
    assert ("- behavior_Check_Units: Write the unit beside each number.", "too long") in whole.refused
    assert whole.entries[-1] == ("last", "cut in the mid")
    assert behaviours.parse("NONE", HandbookConfig(), cut=False) == behaviours.Parsed()


def test_equal_names_are_merged_and_the_file_is_read_again(tmp_path):
    def row(problem, tags, *pairs):
        return {"entries": pairs, "tags": tags, "origin": {"problem": problem, "run": "r", "step": 4}}

    rows = [
        row("p", ["sum"], ("a", "first"), ("b", "it")),
        row("q", ["product", "sum"], ("b", "other"), ("b", "again")),
    ]
    found = behaviours.merged(rows)
    assert [(each.name, each.instruction, each.tags) for each in found] == [
        ("b", "it", ["sum", "product"]), ("a", "first", ["sum"]),
    ]  # fmt: skip
    assert [each["problem"] for each in found[0].origins] == ["p", "q"]
    path = tmp_path / "handbook.jsonl"
    path.write_text(behaviours.written(found))
    handbook = read(path, "data.handbook")
    assert [(each.row, each.name) for each in handbook.behaviours] == [(2, "b"), (3, "a")]
    assert handbook.tags == {"product", "sum"}
