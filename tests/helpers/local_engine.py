"""A local engine over a very small model, and its log-probs by a plain forward."""

import string
from dataclasses import dataclass
from functools import cache
from typing import Any

import tokenizers
import torch
import transformers

from rltrain.config import SamplingConfig
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.types import Group, Problem, Prompt

ALPHABET = string.ascii_lowercase + string.digits + " .+=?\n"


PAD, EOS, END = 0, 1, 2


SHARED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


VOCABULARY = {"vocab_size": len(ALPHABET) + 3, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": END}


@dataclass(frozen=True)
class Policy:
    model: Any
    tokenizer: Any
    stop_token_ids: tuple[int, ...] = (EOS,)
    pad_token_id: int = PAD


@cache
def tokenizer():
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<end>": END} | {c: i + 3 for i, c in enumerate(ALPHABET)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>")


@cache
def model(name: str):
    torch.manual_seed(0)
    config = {
        "qwen3": lambda: transformers.Qwen3Config(**SHARED, **VOCABULARY, num_key_value_heads=2, head_dim=8),
        "llama": lambda: transformers.LlamaConfig(**SHARED, **VOCABULARY, num_key_value_heads=1),
        "gemma2": lambda: transformers.Gemma2Config(
            **SHARED, **VOCABULARY, num_key_value_heads=2, head_dim=8, sliding_window=6
        ),
        "gpt2": lambda: transformers.GPT2Config(**VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "bloom": lambda: transformers.BloomConfig(**VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: transformers.MambaConfig(**VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **SHARED, **VOCABULARY, num_key_value_heads=2, head_dim=8, sliding_window=6, num_local_experts=4
        ),
    }[name]()
    config.tie_word_embeddings = False
    network = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return network.train()


def prompts(*texts: str) -> list[Prompt]:
    encode = tokenizer().convert_tokens_to_ids
    return [
        Prompt(problem=Problem(id=text, prompt=text, answer=""), token_ids=tuple(encode(list(text)))) for text in texts
    ]


PROMPTS = prompts("12+7=", "a", "what is 3 + 4 ?", "99", "sum of 1 2 3 4 5 6 7 8 9")


def engine(name: str = "qwen3", stop_ids: tuple[int, ...] = (EOS,), **config: Any) -> LocalRollout:
    sampling = SamplingConfig(max_new_tokens=24)
    return LocalRollout(LocalRolloutConfig(**config), sampling, Policy(model(name), tokenizer(), stop_ids), seed=7)


def ids(groups: list[Group]) -> dict[str, list[tuple[int, ...]]]:
    return {group.prompt.problem.id: group.completion_ids for group in groups}


def plain_logprobs(network: Any, prompt: Prompt, token_ids: tuple[int, ...], temperature: float) -> torch.Tensor:
    sequence = torch.tensor([prompt.token_ids + token_ids])
    network.eval()
    with torch.no_grad():
        logits = network(input_ids=sequence, use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]
    network.train()
    logprobs = (logits.double() / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]
