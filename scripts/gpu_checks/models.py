"""A model of many layers: kernels of attention, layouts, decoding, draws."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_checks.machine import Finding, Machine, Skipped, check, short
from rltrain.batching.collate import collate
from rltrain.config import SamplingConfig
from rltrain.plan.known_models import known_architecture
from rltrain.policy.logprobs import LogprobModel, inference, logprobs, to_device
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.rollout.sampling import sample, uniforms
from rltrain.types import Group, Problem, Prompt

PROMPT, NEW = 64, 192


@check("kernels of attention")
def kernels_of_attention(machine: Machine) -> Finding:
    """Which kernels of torch take rows without a mask, grouped heads, and a mask; ms and GiB forward and backward."""
    machine.gpu_only("kernels of SDPA are chosen by CUDA's dispatcher")
    made = {"device": machine.device, "requires_grad": True}
    lines, flash = [], True
    for dtype in machine.dtypes:
        query = torch.randn(2, 16, 4096, 128, dtype=dtype, **made)
        key = torch.randn(2, 8, 4096, 128, dtype=dtype, **made)
        mask = torch.ones(4096, 4096, dtype=torch.bool, device=machine.device).tril()
        for name, options in {"plain": {"is_causal": True}, "masked": {"attn_mask": mask}}.items():
            taken = [
                backend.name.removesuffix("_ATTENTION").lower()
                for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
                if _runs(backend, query, key, options)
            ]

            def run(query: Any = query, key: Any = key, options: Any = options) -> None:
                out = functional.scaled_dot_product_attention(query, key, key, enable_gqa=True, **options)
                out.sum().backward()

            lines.append(
                f"{short(dtype)} {name} {taken[0]} {1e3 * machine.seconds(run):.1f} ms {machine.peak_gib(run):.1f} GiB"
            )
            flash &= dtype != torch.bfloat16 or name != "plain" or taken[0] == "flash"
    return Finding(expected="flash for bf16 rows without a mask", found="; ".join(lines), ok=flash)


def _runs(backend: SDPBackend, query: Any, key: Any, options: dict[str, Any]) -> bool:
    try:
        with sdpa_kernel(backend):
            functional.scaled_dot_product_attention(query, key, key, enable_gqa=True, **options)
    except RuntimeError:
        return False
    return True


def a_model(machine: Machine, dtype: torch.dtype) -> Any:
    """Qwen3-0.6B's shape with random weights, or two small layers on a CPU."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = Qwen3Config(**small) if machine.small else known_architecture("Qwen/Qwen3-0.6B")
    torch.manual_seed(0)
    with torch.device(machine.device):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()


class NoText:
    """A tokenizer of a model without words."""

    def decode(self, *_: Any, **__: Any) -> str:
        """Nothing."""
        return ""


@dataclass(frozen=True)
class Sampler:
    """What a local rollout needs of a policy; no token ends a completion, so all have full length."""

    model: Any
    tokenizer: Any = field(default_factory=NoText)
    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0


def sampled(machine: Machine, model: Any, *, prompts: int, group_size: int, prompt: int, new: int) -> list[Group]:
    """Completions of full length by ``rollout=local``."""
    sampling = SamplingConfig(max_new_tokens=new, max_prompt_tokens=prompt)
    engine = LocalRollout(LocalRolloutConfig(), sampling, Sampler(model), seed=0)
    most = model.config.vocab_size - 1
    asked = [
        Prompt(
            problem=Problem(id=str(index), prompt="", answer=""),
            token_ids=tuple(1 + (7 * index + 3 * place) % most for place in range(prompt)),
        )
        for index in range(prompts)
    ]
    return engine.generate(asked, step=0, group_size=group_size)


def apart_from_the_trainer(model: Any, groups: list[Group], layout: Any, *, device: torch.device) -> torch.Tensor:
    """Log-probs by the trainer in a layout, less those of the sampler, of all tokens."""
    advantages = [
        [torch.ones(len(one.token_ids), dtype=torch.float64) for one in group.completions] for group in groups
    ]
    new = max(len(one.token_ids) for group in groups for one in group.completions)
    batches = collate(
        groups, advantages, aggregation="token", token_budget=16 * (PROMPT + NEW), max_new_tokens=new,
        hidden_size=model.config.hidden_size, layouts=(layout,),
    )[0]  # fmt: skip
    scored = LogprobModel(model, temperature=1.0)
    found = []
    with inference(scored):
        for batch in batches:
            there = to_device(batch, device)
            found.append(logprobs(scored, there, entropy=False).logprobs_N - there.sampler_logprobs_N)
    return torch.cat(found).float()


@check("sampler against trainer, in every layout")
def sampler_against_trainer(machine: Machine) -> Finding:
    """Mean |log p - log p'| in nats of the tokens that the local rollout sampled; ms of the trainer's forward."""
    limits = {torch.float32: 1e-3, torch.bfloat16: 0.1}
    lines, ok = [], True
    sizes = {"prompts": 2, "group_size": 2, "prompt": 6, "new": 12} if machine.small else {}
    sizes = sizes or {"prompts": 4, "group_size": 8, "prompt": PROMPT, "new": NEW}
    for dtype in (torch.float32, torch.bfloat16):
        model = a_model(machine, dtype)
        groups = sampled(machine, model, **sizes)
        for layout in ("padded", "packed", "shared"):

            def run(model: Any = model, groups: Any = groups, layout: Any = layout) -> torch.Tensor:
                return apart_from_the_trainer(model, groups, layout, device=machine.device)

            nats = float(run().abs().mean())
            ok &= nats <= limits[dtype]
            lines.append(f"{short(dtype)} {layout} {nats:.1e} ({1e3 * machine.seconds(run, repeats=1):.0f} ms)")
    return Finding(expected="fp32 below 1e-03, bf16 below 1e-01 nats", found=", ".join(lines), ok=ok)


@check("decode")
def decode(machine: Machine) -> Finding:
    """ms a token of 128 rows, 512 new tokens, beside transformers' generate; launches a token; reserved/allocated."""
    rows, new, prompt = (8, 16, 8) if machine.small else (128, 512, 128)
    model = a_model(machine, machine.dtypes[0])
    options = {"prompts": rows // 8, "group_size": 8, "prompt": prompt}
    ids_BT = torch.ones(rows, prompt, dtype=torch.long, device=machine.device)

    def peer() -> None:
        with torch.no_grad():
            model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, min_new_tokens=new, do_sample=True
            )

    ours = machine.seconds(lambda: sampled(machine, model, new=new, **options), repeats=1)
    theirs = machine.seconds(peer, repeats=1)
    found = f"ours {1e3 * ours / new:.2f} ms, generate {1e3 * theirs / new:.2f} ms a token of {rows} rows"
    if not machine.small:
        found += f"; {launches(machine, model, options):.0f} launches a token; reserved/allocated "
        found += f"{torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated():.2f}"
    return Finding(expected="no more than generate", found=found, ok=machine.small or ours <= theirs)


def launches(machine: Machine, model: Any, options: dict[str, int]) -> float:
    """CUDA kernels and graphs that the host starts for a token: the difference of two lengths."""
    counts = []
    for new in (16, 48):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as seen:
            sampled(machine, model, new=new, **options)
        counts.append(sum(event.count for event in seen.key_averages() if "Launch" in event.key))
    return (counts[1] - counts[0]) / 32


@check("decode by vLLM")
def decode_by_vllm(machine: Machine) -> Finding:
    """ms a token of 128 rows by an engine beside this process, where vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not installed here (make vllm-env, then .venv-vllm/bin/python scripts/gpu_check.py)")
    machine.gpu_only("vLLM's speed on a CPU says nothing about a GPU")
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    folder, new = machine.folder / "for_vllm", 512
    model = a_model(machine, torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    engine = LLM(model=str(folder), skip_tokenizer_init=True, gpu_memory_utilization=round(0.9 * free / total, 3))
    asked = [{"prompt_token_ids": [1 + index % 100 + place for place in range(128)]} for index in range(128)]
    parameters = SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False)
    taken = machine.seconds(lambda: engine.generate(asked, parameters, use_tqdm=False), repeats=1)
    return Finding(expected="a figure", found=f"{1e3 * taken / new:.2f} ms a token of 128 rows", ok=True)


@check("uniform numbers and draws")
def draws(machine: Machine) -> Finding:
    """SplitMix64 by Python's integers, and tokens drawn from the same logits on the CPU."""
    keys, positions = [0, 1, -5, 2**62], [0, 1, 77, 4095]
    on = {"device": machine.device}
    found_KP = uniforms(torch.tensor(keys, **on)[:, None], torch.tensor(positions, **on))
    expected_KP = torch.tensor([[splitmix(key, place) for place in positions] for key in keys], dtype=torch.float64)
    same = torch.equal(found_KP.cpu(), expected_KP)
    logits_BV = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    uniforms_B = uniforms(torch.arange(64), torch.zeros(64, dtype=torch.long))
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    here = sample(logits_BV.to(machine.device), uniforms_B.to(machine.device), **options)[0].cpu()
    equal = int((here == sample(logits_BV, uniforms_B, **options)[0]).sum())
    found = f"uniforms {'equal' if same else 'differ'}, {equal} of 64 draws equal to the CPU's"
    return Finding(expected="uniforms equal, at least 63 draws", found=found, ok=same and equal >= 63)


def splitmix(key: int, position: int) -> float:
    """A uniform number in Python's integers."""
    mask = 2**64 - 1
    bits = (key + (position + 1) * 0x9E3779B97F4A7C15) & mask
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
    return ((bits ^ (bits >> 31)) >> 11) * 2.0**-53
