"""LoRA adapters through peft."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from rltrain.config import LoraConfig
from rltrain.errors import ConfigError, require
from rltrain.policy.from_pretrained import require_finite

log = logging.getLogger(__name__)


def add_lora(model: Any, config: LoraConfig) -> Any:
    """Wrap a model with peft's LoRA adapters. Only the adapters are trained."""
    import peft

    _refuse_unmatched(model, config)
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] - peft divides it by the rank
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, adapters)
    except ValueError as error:  # a module of a kind that peft cannot adapt
        raise ConfigError(
            f"model.lora.target_modules={config.target_modules}: {str(error).splitlines()[0]}; {_choices(model)}"
        ) from error


def _refuse_unmatched(model: Any, config: LoraConfig) -> None:
    """Every name stands for some module: where one does not, less would be trained than was asked for."""
    names = [name for name, _ in model.named_modules()]
    unmatched = [
        target for target in config.target_modules if not any(f".{name}".endswith(f".{target}") for name in names)
    ]
    require(
        not unmatched,
        f"model.lora.target_modules: no module of {type(model).__name__} is called {', '.join(unmatched)}; "
        f"{_choices(model)}",
    )


def _choices(model: Any) -> str:
    """What there is to adapt: the last words of the names of layers with a matrix."""
    weights = model.named_parameters(remove_duplicate=False)
    layers = {name.split(".")[-2] for name, weight in weights if name.endswith(".weight") and weight.dim() == 2}
    return f"set some of {', '.join(sorted(layers))}"


def load_lora(model: Any, folder: Path, config: LoraConfig) -> Any:
    """Put saved adapters on their base model: trainable, or merged into plain weights where ``config.rank=0``."""
    import peft

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # peft would go on with random ones
            adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=config.rank > 0)
    except Exception as error:  # cut-off files, other shapes, names that the base lacks: they have no type in common
        raise ConfigError(
            f"model.path={folder}: adapters cannot be loaded ({(str(error).splitlines() or [''])[0][:200]}); "
            "give the folder of whole adapters of this base model"
        ) from error
    require_finite(adapted, f"model.path={folder}")
    if config.rank == 0:
        return adapted.merge_and_unload()  # type: ignore[operator]
    saved: Any = adapted.peft_config["default"]  # type: ignore[attr-defined]
    require(
        saved.r == config.rank, f"model.lora.rank={config.rank}: {folder} holds adapters of rank {saved.r}; set that"
    )
    _warn_of_others(saved, folder, config)
    return adapted


def _warn_of_others(saved: Any, folder: Path, config: LoraConfig) -> None:
    """Saved adapters go on with their own alpha and modules, whatever the config says."""
    named = saved.target_modules or []  # a regex, names, or none
    targets = [named] if isinstance(named, str) else sorted(named)
    if saved.lora_alpha != config.alpha:
        told = "model.lora.alpha=%s: %s holds adapters of lora_alpha=%s, which is used"
        log.warning(told, config.alpha, folder, saved.lora_alpha)
    if targets != sorted(config.target_modules):
        told = "model.lora.target_modules=%s: %s holds adapters of %s, which are used"
        log.warning(told, config.target_modules, folder, targets)
