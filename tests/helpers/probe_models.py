"""A very small policy, and probes of it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rltrain.policy.load import Policy
from rltrain.policy.tiny import character_tokenizer
from rltrain.rollout.probe_types import ProbeRequest

# Few characters, so that braces and EOS are drawn often.
TOKENIZER = character_tokenizer("0123456789+-*={}\\boxed?.\n ")


def tiny_model(family="qwen3", attention="sdpa"):
    torch.manual_seed(0)
    architecture, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    config = architecture(
        vocab_size=len(TOKENIZER) + 3,  # padded, as real vocabularies are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    config._attn_implementation = attention
    return model(config).eval()


def policy_of(model):
    eos = TOKENIZER.eos_token_id
    return Policy(model=model, tokenizer=TOKENIZER, stop_token_ids=(eos,), pad_token_id=TOKENIZER.pad_token_id)


def request(problem_id, prompt, completion, cuts, answer, sample_index=0):
    prompt_ids, completion_ids, answer_ids = (
        tuple(TOKENIZER(text)["input_ids"]) for text in (prompt, completion, answer)
    )
    return ProbeRequest(
        problem_id=problem_id,
        sample_index=sample_index,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        cuts=cuts,
        answer_ids=answer_ids,
    )
