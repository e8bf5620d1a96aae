"""Load a causal language model of transformers, or say in one line what is wrong with its folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from rltrain.errors import ConfigError, require

log = logging.getLogger(__name__)

EAGER = "eager"
_DEVICE: ContextVar[torch.device | None] = ContextVar("the device that weights are loaded to", default=None)


@contextmanager
def weights_on(device: torch.device | None) -> Iterator[None]:
    """Inside, :func:`causal_lm` puts weights on ``device`` tensor by tensor, not into the host's memory first."""
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)


def causal_lm(source: str, setting: str, *, attn_implementation: str, dtype: Any, **options: Any) -> Any:
    """The model at ``source``. Attention that the architecture refuses falls back to ``eager``, with a warning.

    ``setting`` is the key and value that an error names; ``options`` are those of ``from_pretrained``. Raises a
    ``ConfigError`` where the model is none of ours, or its weights are damaged or not all there.
    """
    try:
        _refuse_encoder_decoder(source, setting, options)
        try:
            return _load(source, setting, attn_implementation, dtype, options)
        except (ValueError, ImportError) as error:
            if attn_implementation == EAGER or not _about_attention(error):
                raise
            why = _line(error)
            log.warning("model.attn_implementation=%s: refused (%s); eager is used instead", attn_implementation, why)
            return _load(source, setting, EAGER, dtype, options)
    except ConfigError:
        raise
    except Exception as error:  # a folder of weights can be wrong in many ways, which have no type in common
        raise ConfigError(f"{setting}: cannot be loaded ({_line(error)}); {_remedy(error)}") from error


def _refuse_encoder_decoder(source: str, setting: str, options: dict[str, Any]) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, **options)
    require(
        not config.is_encoder_decoder,
        f"{setting}: {config.model_type} is an encoder-decoder model; give a causal language model",
    )


def _load(source: str, setting: str, attention: str, dtype: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation=attention, output_loading_info=True, **_placement(options), **options
    )
    model, found = loaded
    missing = sorted(found["missing_keys"])
    require(
        not missing,
        f"{setting}: {len(missing)} weights are in no file and would be random, the first is {missing[:1]}; "
        "give the folder of a whole causal language model",
    )
    require_finite(model, setting)
    return model


def _placement(options: dict[str, Any]) -> dict[str, Any]:
    """Where transformers puts the weights. ZeRO 3 places them itself, and a GGUF file is unpacked by the host."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    device = _DEVICE.get()
    elsewhere = device is not None and device.type != "cpu" and not is_deepspeed_zero3_enabled()
    return {"device_map": {"": device}} if elsewhere and "gguf_file" not in options else {}


def require_finite(model: Any, setting: str) -> None:
    """A ``ConfigError`` where a weight is NaN or infinite."""
    bad = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    require(
        not bad,
        f"{setting}: {len(bad)} weights hold NaN or infinity, the first is {bad[:1]}; give weights from before",
    )


def _about_attention(error: Exception) -> bool:
    words = ("attn_implementation", "attention implementation", "flash_attn", "flashattention")
    return any(word in str(error).casefold() for word in words)


def _line(error: Exception) -> str:
    """The first sentence of an error, at most 200 characters."""
    text = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
    return f"{type(error).__name__}: {text[:200]}".rstrip(": ")


def _remedy(error: Exception) -> str:
    if "Unrecognized configuration class" in str(error):
        return "it is no causal language model; give one"
    if type(error).__name__ in ("SafetensorError", "UnpicklingError", "EOFError"):
        return "a file of weights is cut off or damaged; copy the model again"
    return "give a folder with config.json and weights, or a hub name this machine can reach"
