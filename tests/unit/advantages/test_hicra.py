"""HICRA: which tokens lie in a phrase, whatever the tokenizer, and the advantage by hand."""

import pytest
import torch
from advantage_groups import make_group
from chat_tokenizers import character_tokenizer

from rltrain.advantages.group import group_advantages
from rltrain.advantages.hicra import HicraConfig, hicra
from rltrain.advantages.phrases import compiled, in_phrases
from rltrain.errors import ConfigError, RunError
from rltrain.types import Context

TEXT = "Wait, let me\ncheck: await it. WAIT"


def byte_tokenizer(merges=()):
    """Byte-level BPE: one id per byte, and those of the merges, so that a token may end inside a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def marked(tokenizer, ids, phrases, **options):
    return in_phrases(tokenizer, ids, compiled(phrases, **options)).tolist()


def test_characters_of_whole_words_in_any_case_and_over_any_space():
    tokenizer = character_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    inside = marked(tokenizer, ids, ["wait", "let me check"])
    assert "".join(c for c, one in zip(TEXT, inside, strict=True) if one) == "Waitlet me\ncheckWAIT"
    exact = marked(tokenizer, ids, ["WAIT"], ignore_case=False)
    assert [t for t, one in enumerate(exact) if one] == list(range(len(TEXT) - 4, len(TEXT)))


def test_a_token_that_straddles_the_border_is_inside():
    tokenizer = byte_tokenizer([("w", "a"), ("Ġ", "wa"), ("i", "t"), ("it", ".")])
    ids = tokenizer.convert_tokens_to_ids(["I", "Ġwa", "it.", "Ġ", "a"])
    assert tokenizer.decode(ids) == "I wait. a"
    assert marked(tokenizer, ids, ["wait"]) == [False, True, True, False, False]


def test_bytes_of_a_character_belong_to_it():
    """é is two bytes, 思 three: the tokens of their bytes are inside, those of the characters beside them are not."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé éa 思 é")["input_ids"]
    assert len(ids) == 14
    assert marked(tokenizer, ids, ["éa"]) == [False] * 4 + [True] * 3 + [False] * 7
    assert marked(tokenizer, ids, ["思"]) == [False] * 8 + [True] * 3 + [False] * 3
    assert marked(tokenizer, ids, ["é"]) == [False] * 12 + [True] * 2


def test_ids_that_no_text_would_become_keep_their_places():
    """A policy may sample w, a, i, t one by one where the tokenizer merges them: the ids are never made again."""
    tokenizer = byte_tokenizer([("w", "a"), ("wa", "i"), ("wai", "t")])
    whole = tokenizer("wait")["input_ids"]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "wait"]
    space, comma = (tokenizer.convert_tokens_to_ids(one) for one in ("Ġ", ","))
    assert len(whole) == 1 and len(letters) == 4
    assert marked(tokenizer, [*letters, comma, space, *whole], ["wait"]) == [True] * 4 + [False, False, True]


def test_hand_computed():
    tokenizer = character_tokenizer()
    ids = [tokenizer("so wait")["input_ids"], tokenizer("wait")["input_ids"], tokenizer("no")["input_ids"]]
    group = make_group(ids, [1.0, 0.0, 0.0])
    result = hicra([group], HicraConfig(phrases=["wait"]), Context(tokenizer=tokenizer))
    good, bad, _ = group_advantages([1.0, 0.0, 0.0]).tolist()
    rows = [row_T.tolist() for row_T in result.values[0]]
    assert rows[0] == pytest.approx([good] * 3 + [1.2 * good] * 4, abs=1e-12)
    assert rows[1] == pytest.approx([0.8 * bad] * 4, abs=1e-12)  # a negative advantage comes nearer to 0
    assert rows[2] == pytest.approx([bad] * 2, abs=1e-12)
    assert (result.metrics["hicra/planning_share"].total, result.metrics["hicra/planning_share"].count) == (8, 13)


def test_alpha_zero_is_grpo():
    tokenizer = character_tokenizer()
    group = make_group([tokenizer("wait")["input_ids"], tokenizer("no")["input_ids"]], [1.0, 0.0])
    (rows,) = hicra([group], HicraConfig(alpha=0.0), Context(tokenizer=tokenizer)).values
    expected = group_advantages([1.0, 0.0])
    torch.testing.assert_close(torch.stack([row_T[0] for row_T in rows]), expected)


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match=r"advantage\.phrases: lists no phrase; give planning phrases"):
        HicraConfig(phrases=[])
    with pytest.raises(ConfigError, match=r"advantage\.phrases: holds \[' '\], which is in every text; remove it"):
        HicraConfig(phrases=["wait", " "])
    with pytest.raises(RunError, match="advantage=hicra: the tokenizer is not at hand"):
        hicra([make_group([(1,), (2,)], [1.0, 0.0])], HicraConfig(), Context())
