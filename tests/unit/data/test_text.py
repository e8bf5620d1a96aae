"""Documents cut in token ids: where, how the prompt is laid out, and what is left out."""

import json
from collections import Counter

import pytest
from chat_tokenizers import character_tokenizer

from rltrain import sft
from rltrain.data.equations import EquationsConfig
from rltrain.data.text import CutConfig, Document, TextConfig
from rltrain.errors import ConfigError
from rltrain.policy.encode import encode, encode_all
from rltrain.policy.load import load_policy
from rltrain.policy.tiny import TinyConfig
from rltrain.registry import discover, part_of

discover()
MODEL = TinyConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64)


@pytest.fixture(scope="module")
def policy():
    return load_policy(MODEL)


def documents(config, split="train"):
    return part_of(config).function(config, split)


def ids(policy, text):
    return tuple(policy.tokenizer(text)["input_ids"])


def test_prompt_is_instruction_prefix_tag_and_the_target_follows_in_the_text(policy):
    config = CutConfig(min_prefix=3, max_prefix=3, horizon=2, instruction="Think. ")
    prompt = encode(policy, Document(id="d", prompt="abcdefg", answer="", config=config), MODEL)
    assert prompt.token_ids == ids(policy, "Think. abc<think>")
    assert prompt.context_ids == ids(policy, "abc")
    assert prompt.target_ids == ids(policy, "de")
    assert prompt.continuation_ids == ids(policy, "defg")
    assert prompt.closing_ids == ids(policy, "</think>")


@pytest.mark.parametrize("written", ["", "<s>"])
def test_a_document_begins_once_and_has_no_end_before_its_target(written):
    """Also where the tokenizer puts EOS after every text, and where the document writes BOS itself."""
    tokenizer = character_tokenizer(before="<s>", after="</s>")
    config = CutConfig(min_prefix=3, max_prefix=3, horizon=2)
    shown = Document(id="d", prompt=written + "abcdef", answer="", config=config).encode(tokenizer, render=None)
    letters = tuple(tokenizer("abcdef", add_special_tokens=False)["input_ids"])
    cut = 2 if written else 3  # the BOS of the document counts as one of its tokens
    assert shown.context_ids == (1, *letters[:cut])
    assert shown.target_ids == letters[cut : cut + 2]


def test_cuts_are_uniform_over_all_admissible_positions():
    config = CutConfig(min_prefix=2, max_prefix=6, horizon=1)
    counts = Counter(Document(id=str(i), prompt="", answer="", config=config).position(20) for i in range(5000))
    assert sorted(counts) == [2, 3, 4, 5, 6]
    assert all(abs(count - 1000) < 150 for count in counts.values())  # five standard deviations


def test_cuts_come_after_a_mark(policy):
    config = CutConfig(after="=", horizon=1)
    prompts = [
        encode(policy, Document(id=str(i), prompt="12+3=15=x", answer="", config=config), MODEL) for i in range(400)
    ]
    found = Counter(policy.tokenizer.decode(prompt.context_ids) for prompt in prompts)
    assert sorted(found) == ["12+3=", "12+3=1", "12+3=15", "12+3=15="]
    assert all(abs(count - 100) < 45 for count in found.values())  # five standard deviations
    unmarked = Document(id="d", prompt="12+3", answer="", config=config)
    assert encode_all(policy, [unmarked], MODEL, max_prompt_tokens=50) == ([], [unmarked])


def test_a_horizon_of_zero_cuts_at_the_mark_and_takes_all_that_follows(policy):
    config = CutConfig(after="=", horizon=0)
    for name in map(str, range(20)):
        prompt = encode(policy, Document(id=name, prompt="12+3=15=.", answer="", config=config), MODEL)
        assert (prompt.context_ids, prompt.target_ids) == (ids(policy, "12+3="), ids(policy, "15=."))
    for text in ("12+3=", "12+3"):  # nothing follows the mark, and there is none
        assert not encode(policy, Document(id="d", prompt=text, answer="", config=config), MODEL).token_ids
    late = CutConfig(after="=", horizon=0, min_prefix=6)
    assert not encode(policy, Document(id="d", prompt="12+3=15", answer="", config=late), MODEL).token_ids


def test_cuts_leave_room_for_the_target():
    config = CutConfig(min_prefix=1, horizon=3)
    cuts = {Document(id=str(i), prompt="", answer="", config=config).position(6) for i in range(200)}
    assert cuts == {1, 2, 3}


def test_a_cut_depends_on_seed_and_document_alone(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i} " * 3}) + "\n" for i in range(40)))
    config = TextConfig(path=str(path), holdout=1e-6)
    first, again = documents(config), documents(config)
    cuts = [document.position(50) for document in first]
    assert cuts == [document.position(50) for document in again]
    other = documents(TextConfig(path=str(path), holdout=1e-6, seed=1))
    assert cuts != [document.position(50) for document in other]


def test_several_positions_of_a_document_differ_in_id_and_cut(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text(json.dumps({"text": "abcdefghij" * 20}) + "\n" + json.dumps({"text": "xyz" * 50}) + "\n")
    found = documents(TextConfig(path=str(path), holdout=1e-6, positions=3))
    assert [one.id for one in found] == ["train-0@0", "train-1@0", "train-0@1", "train-1@1", "train-0@2", "train-1@2"]
    assert len({one.position(150) for one in found[::2]}) == 3


def test_too_short_a_document_is_left_out_and_counted(policy):
    config = CutConfig(min_prefix=4)
    short, long = (Document(id=text, prompt=text, answer="", config=config) for text in ("abcd", "abcde"))
    prompts, dropped = encode_all(policy, [short, long], MODEL, max_prompt_tokens=50)
    assert [prompt.problem.id for prompt in prompts] == ["abcde"]
    assert [problem.id for problem in dropped] == ["abcd"]


def test_documents_are_cut_in_ids_never_in_text():
    """A tokenizer that merges: the prefix's ids are those of the whole document, whatever its text alone would give."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, merges=[("a", "b"), ("ab", "c")]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    config = CutConfig(min_prefix=2, max_prefix=2, opening="", closing="c")
    prompt = Document(id="d", prompt="abcabab", answer="", config=config).encode(tokenizer, lambda text: ())
    assert prompt.token_ids == (4, 3)
    assert prompt.target_ids == (3,)


def test_equations_are_text_and_their_thoughts_worked_steps(policy):
    one = documents(EquationsConfig())[0]
    assert (one.prompt, one.meta["solution"]) == ("18-(9+8)=1", "9+8=17\n18-17=1</think>")
    bare = documents(EquationsConfig(end=".", worked_share=0.0))[0]
    assert (bare.prompt, bare.meta["solution"]) == ("18-(9+8)=1.", "</think>")


def test_cold_start_rows_think_then_go_on_with_the_text(policy):
    from tiny_run import config as tiny_config

    run_config = tiny_config("unused")
    source = documents(EquationsConfig(plain_share=0.5))
    rows = sft.examples([source[i] for i in range(60)], policy, run_config)
    texts = [policy.tokenizer.decode(row["input_ids"]) for row in rows]
    thoughtful = [text for text in texts if "<think>" in text]
    assert 15 < len(thoughtful) < 45
    for index, text in enumerate(texts):
        before, _, rest = text.partition("<think>")
        thought, _, after = rest.rpartition("</think>")
        assert before + after == source[index].prompt + "<eos>"
        if thought:
            assert thought + "</think>" == source[index].meta["solution"]


@pytest.mark.parametrize(("values", "message"), [
    ({"min_prefix": 0}, "a target needs a token before it"),
    ({"min_prefix": 5, "max_prefix": 4}, "data.max_prefix=4: below data.min_prefix=5"),
    ({"horizon": -1}, "data.horizon=-1"),
    ({"horizon": 0}, "data.horizon=0: takes all that follows data.after, which is empty"),
    ({"horizon": 0, "after": "=", "positions": 2}, "data.positions=2 with data.horizon=0"),
    ({"closing": ""}, "no thought ever ends"),
    ({"plain_share": 2}, "must lie in"),
])  # fmt: skip
def test_impossible_cuts_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        CutConfig(**values)
