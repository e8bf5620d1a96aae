"""Cold starts that runs share: a folder ``cold_starts`` beside the run folders, by what a cold start is a function of.

``<run_dir>/../cold_starts/<hash>`` holds the fine-tuned model. A run takes it from there, or trains it and leaves it
there, as hard links where the file system has them, so that neither folder needs the other.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rltrain.config import ModelConfig, RunConfig
from rltrain.errors import ConfigError
from rltrain.registry import part_of
from rltrain.runs import run_folder
from rltrain.runtime import dist, progress

FOLDER, RECORD = "cold_starts", "sft.json"
DEPENDS_ON = ("seed", "model", "data", "cold_start_data", "environment", "cold_start")
HOW_TO_GET_IT = ("cold_start.path", "cold_start.share")  # change where it comes from, not what it is
RL_ALONE = ("pass_rate", "pass_rate_file")  # keys of a data set that a cold start does not read
LIBRARIES = ("torch", "transformers", "trl", "datasets", "peft")
# The code that makes examples and trains on them.
CODE = ("sft.py", "data/*.py", "policy/*.py", "environments/*.py", "rollout/conversation.py", "rollout/observations.py")
# Keys of model that change how weights are held and run, not what they are.
USE = ("dtype", "lora", "gradient_checkpointing", "attn_implementation")
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def made_with(config: RunConfig) -> dict[str, Any]:
    """The config keys on which a cold start depends."""
    plain = {key: value for key, value in run_folder.resolved(config).items() if key in DEPENDS_ON}
    for key in HOW_TO_GET_IT:
        section, _, name = key.partition(".")
        plain[section].pop(name, None)
    return _without_filters(plain)


def _without_filters(tree: Any) -> Any:
    """The filter by pass rate chooses RL's problems; a cold start reads all."""
    if not isinstance(tree, Mapping):
        return tree
    return {key: _without_filters(each) for key, each in tree.items() if key not in RL_ALONE}


def key_of(config: RunConfig) -> str:
    """A hash of all that the weights are a function of: config, files that it names, code, libraries, device."""
    made = made_with(config)
    versions = run_folder.package_versions()
    parts = [
        made,
        sorted(_changed(Path(text)) for text in _texts(made) if _is_path(text)),
        {name: versions.get(name) for name in LIBRARIES},
        _code_digest(),
        dist.device_in_words(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _texts(tree: Any) -> Iterator[str]:
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    for value in values:
        if isinstance(value, str):
            yield value
        else:
            yield from _texts(value)


def _is_path(text: str) -> bool:
    try:
        return bool(text) and ("/" in text or "." in text) and Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or a null byte
        return False


def _changed(path: Path) -> list[Any]:
    """A file's or a folder's files, with their sizes and times of change."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _code_digest() -> str:
    package = Path(__file__).parents[1]
    files = sorted(file for pattern in CODE for file in package.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of one shared cold start; wait, and say so, while another run trains it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("cold start", "another run trains the same one; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a cold start; it appears complete or not at all."""
    return (folder / RECORD).is_file()


def copied(source: Path, target: Path) -> None:
    """Make ``target`` a copy of ``source`` at once, of hard links where there are such."""
    writing = target.with_name(f".copying_{target.name}_{os.getpid()}")
    shutil.rmtree(writing, ignore_errors=True)
    shutil.copytree(source, writing, copy_function=_linked)
    try:
        writing.replace(target)
    except OSError:  # another run was quicker, without a lock that both see
        shutil.rmtree(writing, ignore_errors=True)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def checked(path: str, config: RunConfig) -> Path:
    """The folder of ``cold_start.path``. ConfigError where it holds no model, or not of this run's kind."""
    folder = Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises for an unknown user
    setting = f"cold_start.path={path}"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{setting}: holds no model (no config.json); give the folder cold_start of a run")
    if differing := _differing(folder, config.model):
        raise ConfigError(f"{setting}: another model than this run's ({differing}); give a cold start of this model")
    return folder


def _differing(folder: Path, model: ModelConfig) -> str:
    """What differs between the model that a cold start was made from, where it says so, or its shape, and the run's."""
    if (folder / RECORD).is_file():
        held = run_folder.with_new_keys(json.loads((folder / RECORD).read_text())["config"]["model"], model)
        now = {"kind": part_of(model).name} | json.loads(json.dumps(dataclasses.asdict(model)))
        before, after = {"model": held}, {"model": now}
        return run_folder.changes(before, after, ignored=[f"model.{key}" for key in USE], reasons=False)
    there, here = json.loads((folder / "config.json").read_text()), _shape(model)
    return ", ".join(f"{key}: {there.get(key)} -> {value}" for key, value in here.items() if there.get(key) != value)


def _shape(model: ModelConfig) -> dict[str, Any]:
    """The shape of a model in a folder on this machine; of others nothing is known before they are loaded."""
    path = vars(model).get("path")
    config = Path(path) / "config.json" if path else None
    if config is None or not config.is_file():
        return {}
    there = json.loads(config.read_text())
    return {key: there[key] for key in SHAPE if key in there}
