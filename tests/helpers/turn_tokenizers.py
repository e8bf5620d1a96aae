"""Tokenizers made in code for conversations: byte-level BPE whose merges cross borders, SentencePiece BPE, unigram."""

import string
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{%- for message in messages %}{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{- raise_exception('Unknown role ' + message['role']) }}{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "</s>"]
PLAIN = "<tool_call>"  # an added token that is not special


def _finished(backend, **names):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False, **names
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "</s>"]})
    tokenizer.add_tokens([AddedToken(PLAIN, special=False)])
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def byte_bpe():
    """Every byte, and merges of "12", of "1" behind every letter, "calc" and the like."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("=", "1"), (">", "1"), ("c", "a"), ("l", "c"), ("ca", "lc"), ("2", "1"), ("12", "1")]
    merges += [(letter, "1") for letter in string.ascii_letters]
    tokens = [*SPECIAL, *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend)


@cache
def sentencepiece_bpe():
    """The manner of Llama 2: a space before every text, byte fallback."""
    letters = [chr(i) for i in range(33, 127)]
    tokens = [*SPECIAL, "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters, "▁1", "12"]
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [("▁", "1"), ("1", "2")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(backend, unk_token="<unk>")


@cache
def unigram():
    """A unigram model knows its control tokens as its best pieces."""
    letters = [chr(i) for i in range(33, 127)]
    pieces = [*((token, 0.0) for token in SPECIAL), ("<unk>", 0.0), ("▁", -2.0), ("\n", -3.0)]
    pieces += [(letter, -3.0) for letter in letters]
    backend = Tokenizer(models.Unigram(pieces, unk_id=len(SPECIAL)))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return _finished(backend, unk_token="<unk>")
