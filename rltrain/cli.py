"""The command line that every entry point shares: compose with Hydra, check, and say what is wrong in one line."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rltrain.config import RunConfig
from rltrain.errors import ConfigError, RunError
from rltrain.registry import discover, parts
from rltrain.runtime import watchdog

# Lines of Hydra's and OmegaConf's messages that tell a user nothing.
UNSAID = ("full_key", "object_type", "reference_type", "Set the env", "Config search path", "provider=")
# What a disk or a folder can refuse in the middle of a run.
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


def config_folder() -> Path:
    """The YAML folder: inside an installed wheel, beside the package in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def store_nodes() -> None:
    """Put the root schema and every registered part into Hydra's ConfigStore."""
    from hydra.core.config_store import ConfigStore

    discover()
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for part in parts():
        store.store(group=part.group, name=part.name, node=part.config)


def to_config(composed: Any) -> RunConfig:
    """A composed DictConfig as the typed, validated record."""
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{missing[0]}: has no value; set {missing[0]}=… on the command line or in the experiment")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config


def compose(overrides: list[str]) -> RunConfig:
    """The config that these command-line overrides give, for tests and notebooks."""
    import hydra

    store_nodes()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        return to_config(hydra.compose("config", overrides=overrides))


def one_line(error: BaseException) -> str:
    """The cause of a configuration error in one line, with a remedy where one can be guessed."""
    cause: BaseException = error
    while cause.__cause__ is not None and type(cause).__module__.startswith(("hydra", "omegaconf")):
        cause = cause.__cause__
    outer, inner = _first_lines(error), _first_lines(cause)
    message = outer if inner in outer else f"{outer}: {inner}"
    return message + _suggestion(message)


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(UNSAID)]
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    text = " ".join(kept) or type(error).__name__
    return f"{keys[0]}: {text}" if keys and keys[0] and keys[0] not in text else text


def _suggestion(message: str) -> str:
    unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in '(\w+)')", message)
    choice = re.search(r"Could not find '([^']+)'|In '[^']*': Could not find", message)
    if unknown:
        close = difflib.get_close_matches(unknown[1].split(".")[-1], _known_keys(), n=1)
        return f"; did you mean {close[0]}?" if close else "; --help lists the keys"
    return "; --help lists the choices" if choice else ""


def _known_keys() -> list[str]:
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    keys: set[str] = set()
    pending: list[type] = [RunConfig, *(part.config for part in parts())]
    while pending:
        owner = pending.pop()
        keys |= {field.name for field in fields(owner)}
        pending += [hint for hint in get_type_hints(owner).values() if is_dataclass(hint) and isinstance(hint, type)]
    return sorted(keys)


def setup_logging() -> None:
    """Plain one-line logs on stderr; libraries speak only from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("rltrain").setLevel(logging.INFO)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print what a user did wrong, or what ended a run, and exit: 2 for the config, 1 for the run, 124 for a wait."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"config error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        print(
            f"error: {error.filename or 'a file'}: {error.strerror}; free space or mend the folder, then run the same "
            "command to resume",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def run(task: Callable[[RunConfig], None]) -> None:
    """Entry point: compose the command line into a RunConfig, hand it to ``task``, and leave the process group.

    Exits with 2 on a config error.
    """
    import hydra
    from omegaconf import DictConfig

    # With this set Hydra raises instead of printing a page; what is shown is then ours to decide.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    setup_logging()
    store_nodes()

    # Hydra prints a line of its own about whatever is raised inside it, so the work is done once it has returned.
    configs: list[RunConfig | ConfigError] = []

    def compose_only(composed: DictConfig) -> None:
        try:
            configs.append(to_config(composed))
        except ConfigError as error:
            configs.append(error)

    compose_only.__module__ = "__main__"
    code: str | int | None = None
    try:
        with errors_in_one_line():
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(compose_only)()
            for config in configs:
                if isinstance(config, ConfigError):
                    raise config
                _watched(task, config)
    except SystemExit as end:
        code = end.code
    finally:
        # After a clause that is done an error's frames are gone, which hold the run and with it the process group.
        _leave()
    if code is not None:
        raise SystemExit(code)


def _leave() -> None:
    if "rltrain.runtime.dist" in sys.modules:
        try:
            sys.modules["rltrain.runtime.dist"].teardown()
        except Exception as error:  # what ended the run says more, by its exit code too
            print(f"error: the process group did not end: {error}", file=sys.stderr)


def _watched(task: Callable[[RunConfig], None], config: RunConfig) -> None:
    from rltrain.runtime import dist  # imports torch, which --help and config errors do without

    with watchdog.armed(Path(config.run_dir), rank=dist.rank()):
        task(config)
    dist.teardown()  # a sweep has another task
