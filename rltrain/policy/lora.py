"""LoRA adapters through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rltrain.config import LoraConfig
from rltrain.errors import require


def add_lora(model: Any, config: LoraConfig) -> Any:
    """Wrap a model with peft's LoRA adapters. Only the adapters are trained."""
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
