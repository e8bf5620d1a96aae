"""Every causal language model of transformers that can be made tiny from its config, through the check and a judge.

    python scripts/model_zoo.py [NAME ...]            # all, and writes docs/results/models.md, if none is named

The judge is not the check: it forwards other rows, longer ones, row by row through ``model(input_ids).logits`` and
compares the trainer's log-probs in every layout of the run, the log-probs of sampled completions, and greedy
completions.
"""

from __future__ import annotations

import gc
import logging
import platform
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rltrain.batching.collate import NO_WEIGHTING, LossRow, token_batch
from rltrain.config import SamplingConfig
from rltrain.errors import ConfigError
from rltrain.policy.layout_check import usable_layouts
from rltrain.policy.load import Policy
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.tiny import character_tokenizer
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.types import Problem, Prompt

PAGE = Path(__file__).parents[1] / "docs/results/models.md"
LIMIT = 1e-4  # nats, of any token: fp32 rounding of these models is 100 times less
MOST_PARAMETERS = 20_000_000
VOCABULARY, PROMPTS, GROUP_SIZE, NEW_TOKENS = 128, (4, 9, 17), 2, 10

HEADS = 4

# The first pattern that fits a config's field gives its value.
SIZES: list[tuple[str, int]] = [
    (r"vocab_size", VOCABULARY),
    (r"(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers)$", 4),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|num_key_value_groups)$", 2),
    (r"(num_attention_heads|n_heads?|num_heads|\w*attention_heads|index_n_heads|linear_num_\w+_heads)$", HEADS),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|index_head_dim|head_dim|linear_\w+_head_dim|rotary_dim)$", 8),
    (r"(q_lora_rank|kv_lora_rank)$", 16),
    (r"(moe_|shared_expert_|expert_|dense_)?(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|inner_dim)$", 48),
    (r"(hidden_size|d_model|n_embd|word_embed_proj_dim|embedding_size|lru_width|dim)$", 32),
    (r"(num_experts_per_tok|moe_topk|moe_k|num_selected_experts|topk_group|top_k_experts)$", 1),
    (r"(n_group|n_shared_experts|num_shared_experts)$", 1),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"(max_position_embeddings|n_positions|n_ctx|seq_length|max_seq_len)$", 128),
    (r"(state_size|mamba_d_state|ssm_state_size|d_state)$", 8),
    (r"(sliding_window|attention_window_size)$", 6),
    (r"first_k_dense_replace$", 1),
    (r"(pad_token_id|eos_token_id|bos_token_id)$", 1),
]
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "lm_head_multiplier": 0.3},
    "falcon_mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "granitemoe": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "minicpm3": {"scale_emb": 3, "dim_model_base": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "hybrid_override_pattern": "M*M-"},
    "phi3": {"pad_token_id": 0},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1},
    "xlnet": {"d_head": 8},
}


@dataclass(frozen=True)
class Verdict:
    """What came of an architecture: right, falls back, refused, wrong, or not made."""

    name: str
    result: str
    layouts: str = ""
    head: str = ""
    decoder: str = ""
    worst: float = 0.0
    note: str = ""

    @property
    def line(self) -> str:
        worst = f"{self.worst:.1e}" if self.layouts else ""
        return (
            f"| {self.name} | {self.result} | {self.layouts} | {self.head} | {self.decoder} | {worst} | {self.note} |"
        )


def tiny_config(name: str) -> Any:
    """The default config with every size shrunk that a pattern names; lists by layer are left to the config."""
    kind = type(transformers.AutoConfig.for_model(name))
    plain = kind().to_dict()
    sizes: dict[str, Any] = {}
    for field, value in plain.items():
        fitting = [size for pattern, size in SIZES if re.fullmatch(pattern, field)]
        if fitting and isinstance(value, int) and not isinstance(value, bool):
            sizes[field] = fitting[0]
    if "kv_lora_rank" in plain:  # latent keys belong to every head
        sizes["num_key_value_heads"] = HEADS
    return kind(**sizes | OVERRIDES.get(name, {}))


def tiny_model(name: str) -> Any:
    """Seeded random weights, spread enough for tokens of unequal probability."""
    torch.manual_seed(0)
    config = tiny_config(name)
    for part in (config, config.get_text_config()):
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
    with torch.device("meta"):
        size = sum(weight.numel() for weight in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} M parameters: not made tiny")
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2 and weight.is_floating_point():
                weight += 0.1 * torch.randn_like(weight)
    return model.float().eval()


def ids(seed: int, count: int) -> tuple[int, ...]:
    """Token ids that are neither the first nor the last of the vocabulary, where special ones are."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(8, VOCABULARY - 8, (count,), generator=generator).tolist())


@torch.no_grad()
def plain_logits(model: Any, token_ids: tuple[int, ...]) -> Tensor:
    """[T, V] in float64 by the independent forward."""
    return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].double()


def plain_logprobs(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """[T] of the completion's tokens by the independent forward."""
    logprobs = plain_logits(model, prompt + completion)[len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def trainer_error(module: LogprobModel, layouts: tuple[Any, ...]) -> float:
    """The largest difference of any token in any layout."""
    units = [
        tuple(
            LossRow(
                prompt_ids=ids(prompt, prompt),
                completion_ids=ids(100 * prompt + g, 12 - 5 * g),
                sampler_logprobs=(0.0,) * (12 - 5 * g),
                advantages_T=torch.zeros(12 - 5 * g),
            )
            for g in range(GROUP_SIZE)
        )
        for prompt in PROMPTS
    ]
    rows = [row for unit in units for row in unit]
    expected = torch.cat([plain_logprobs(module.model, row.prompt_ids, row.completion_ids) for row in rows])
    errors = []
    for layout in layouts:
        batch = token_batch(units if layout == "shared" else [(row,) for row in rows], NO_WEIGHTING, layout)
        with torch.no_grad():
            found = module(batch, entropy=False, temperature=1.0)[0]
        errors.append(float((found.double() - expected).abs().max()))
    return max(errors)


def rollout_error(model: Any, rollout: LocalRollout) -> float:
    """The largest difference of a sampled log-prob, or of a greedy token's logit from the largest."""
    prompts = [
        Prompt(problem=Problem(id=str(count), prompt="", answer=""), token_ids=ids(count, count)) for count in PROMPTS
    ]
    errors = [0.0]
    for group in rollout.generate(prompts, step=0, group_size=GROUP_SIZE):
        for one in group.completions:
            expected = plain_logprobs(model, group.prompt.token_ids, one.token_ids)
            errors.append(float((torch.tensor(one.logprobs).double() - expected).abs().max()))
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=NEW_TOKENS)
    for group in rollout.generate(prompts, step=0, group_size=1, sampling=greedy):
        [one] = group.completion_ids
        logits = plain_logits(model, group.prompt.token_ids + one)[len(group.prompt.token_ids) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(one)[:, None])[:, 0]
        errors.append(float((logits.amax(-1) - chosen).max()))
    return max(errors)


def verdict(name: str) -> Verdict:
    """One architecture."""
    try:
        model = tiny_model(name)
    except Exception as error:  # whatever a config's sizes lead to in three hundred files of others
        return Verdict(name, "not made", note=first_line(error))
    try:
        module = LogprobModel(model, temperature=1.0)
        layouts = usable_layouts("auto", [module])
        tokenizer = character_tokenizer()
        policy = Policy(model=model, tokenizer=tokenizer, stop_token_ids=(1,), pad_token_id=0)
        sampling = SamplingConfig(max_new_tokens=NEW_TOKENS)
        rollout = LocalRollout(LocalRolloutConfig(), sampling, policy, seed=0)
        first = rollout.decoder_name
        rollout.check()
    except ConfigError as error:
        return Verdict(name, "refused", note=first_line(error))
    except Exception as error:
        return Verdict(name, "wrong", note="not refused: " + first_line(error))
    falls_back = module.own_head or rollout.decoder_name != first
    try:
        worst = max(trainer_error(module, layouts), rollout_error(model, rollout))
    except Exception as error:
        return Verdict(name, "wrong", note="not refused: " + first_line(error))
    result = "wrong" if not worst <= LIMIT else "falls back" if falls_back else "right"
    head = "the model's" if module.own_head else "by weights"
    return Verdict(name, result, " ".join(layouts), head, rollout.decoder_name.removeprefix("the decoder "), worst)


def first_line(error: Exception) -> str:
    """What went wrong, in a table's cell."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.replace("|", "/")[:160]


def page(verdicts: list[Verdict]) -> str:
    """docs/results/models.md."""
    counts = Counter(each.result for each in verdicts)
    made = [each for each in verdicts if each.result != "not made"]
    git = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=PAGE.parent, capture_output=True, text=True)
    revision = git.stdout.strip()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    head = f"""# Which architectures train and sample as they compute by themselves?

**Answer.** Of the {len(verdicts)} causal language models of transformers {len(made)} could be made tiny from their
configs: {counts["right"]} are right, {counts["falls back"]} fall back to a slower path with a warning,
{counts["refused"]} are refused with a reason before the first step, and {counts["wrong"]} are wrong.

    python scripts/model_zoo.py

Revision {revision}; {versions}, fp32, CPU.

The judge is not the check that every run makes. It forwards other rows, one at a time, through
`model(input_ids).logits`, and compares the trainer's log-probs in every layout that the run may take, the log-probs of
sampled completions, and greedy completions. "Worst" is the largest difference of any token in nats.

| architecture | result | layouts | head | decoder | worst | note |
|---|---|---|---|---|---|---|
"""
    order = ["wrong", "right", "falls back", "refused"]
    rows = sorted(made, key=lambda each: (order.index(each.result), each.name))
    unmade = ", ".join(each.name for each in verdicts if each.result == "not made")
    return head + "\n".join(each.line for each in rows) + f"\n\nNot made tiny, hence not judged: {unmade}.\n"


def main(names: list[str]) -> None:
    """Judge the named architectures, or all and write the page."""
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    verdicts = []
    for name in names or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdicts.append(verdict(name))
        print(verdicts[-1].line, flush=True)
        gc.collect()
    print(Counter(each.result for each in verdicts))
    if not names:
        PAGE.write_text(page(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
