"""Very small models of several architectures, and the same rows in each layout."""

import random

import torch
from collated import group

from rltrain.batching.collate import collate

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


WINDOW = 4


class Norm64(torch.nn.Module):
    """An RMS norm in the precision of its input; transformers' are in fp32, whatever the model is in."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.shift = norm.weight, float("Gemma" in type(norm).__name__)
        self.eps = norm.eps if self.shift else norm.variance_epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.shift)


def tiny(name):
    """A random model in fp64 throughout; windows are shorter than the sequences."""
    import transformers as t

    configs = {
        "Llama": lambda: t.LlamaConfig(**SIZES),
        "Qwen3": lambda: t.Qwen3Config(**SIZES),
        "Mistral": lambda: t.MistralConfig(**SIZES, sliding_window=WINDOW),
        "Gemma": lambda: t.GemmaConfig(**SIZES),
        "Gemma2": lambda: t.Gemma2Config(
            **SIZES, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
        ),
        "Gemma3": lambda: t.Gemma3TextConfig(
            **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
        ),
        "GPT2": lambda: t.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=64),
        "GptOss": lambda: t.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
        "Mamba": lambda: t.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2),
        "Bloom": lambda: t.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=4),
    }
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(configs[name]()).double()
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(path, Norm64(module))
    return model


def groups_and_advantages(prompts=(5, 9, 5), completions=((3, 7, 1, 4), (6, 2), (1, 8, 8))):
    draw = random.Random(0)
    groups = [
        group(own, [float(i) for i in range(len(own))], prompt=draw.choices(range(60), k=length), name=str(index))
        for index, (length, own) in enumerate(zip(prompts, completions, strict=True))
    ]
    generator = torch.Generator().manual_seed(0)
    return groups, [[torch.randn(n, dtype=torch.float64, generator=generator) for n in own] for own in completions]


def batches_of(layout, *, budget=400, groups=None):
    groups, advantages = groups or groups_and_advantages()
    options = {"aggregation": "sequence", "token_budget": budget, "max_new_tokens": 8, "hidden_size": 16}
    return collate(groups, advantages, layouts=(layout,), **options)[0]


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
