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

from rltrain.config import AdvantageConfig, RunConfig
from rltrain.errors import ConfigError, RunError
from rltrain.options import help as help_pages
from rltrain.options import keys, overrides
from rltrain.options.catalogue import config_folder as config_folder
from rltrain.registry import discover, parts
from rltrain.runtime import progress, watchdog

# Lines of Hydra's and OmegaConf's messages that tell a user nothing.
log = logging.getLogger(__name__)

UNSAID = ("full_key", "object_type", "reference_type", "Set the env", "Config search path", "provider=")
# What a disk or a folder can refuse in the middle of a run.
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


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
    config = _to_object(composed)
    assert isinstance(config, RunConfig)
    if added := keys.unknown_in(config):
        raise keys.unknown(added[0])
    return config


def _to_object(composed: Any) -> Any:
    """The typed record of a composed node; ``ConfigError`` for a key without a value."""
    from omegaconf import OmegaConf

    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise ConfigError(f"{missing[0]}: has no value; set {missing[0]}=… on the command line or in the experiment")
    return OmegaConf.to_object(composed)


def compose(words: list[str]) -> RunConfig:
    """The config that these command-line overrides give, for tests and notebooks."""
    return to_config(_composed(words))


def compose_advantage(words: list[str]) -> AdvantageConfig:
    """The estimator's config alone, whatever it would ask of the rest of a run."""
    config = _to_object(_composed(words).advantage)
    assert isinstance(config, AdvantageConfig)
    return config


def _composed(words: list[str]) -> Any:
    import hydra

    store_nodes()
    folder = str(config_folder())
    with _hydra_errors_of_other_types(words), hydra.initialize_config_dir(version_base="1.3", config_dir=folder):
        return hydra.compose("config", overrides=words)


def one_line(error: BaseException) -> str:
    """The cause of a configuration error in one line, with a remedy where one can be guessed."""
    cause: BaseException = error
    while cause.__cause__ is not None and type(cause).__module__.startswith(("hydra", "omegaconf")):
        cause = cause.__cause__
    if said := _about_unknown(f"{error}\n{cause}"):
        return said
    outer, inner = _first_lines(error), _first_lines(cause)
    message = outer if inner in outer else f"{outer}: {inner}"
    return message + _about_choices(message)


def _about_unknown(text: str) -> str | None:
    """What to say about a key that is not there, named by Hydra's or OmegaConf's text; None about anything else."""
    missing = re.search(r"Key '[^']+' (?:is not in struct|not in '\w+')", text)
    reward = re.search(r"(?:eval_)?rewards\.(\w+)", text)
    if reward and (f"full_key: {reward[0]}\n" in f"{text}\n" or "not a subclass of RewardConfig" in text):
        return f"{reward[0]}: no reward is chosen by this name; choose it first: +reward@{reward[0]}=NAME"
    full, typed = re.search(r"full_key: (\S+)", text), re.search(r"Could not override '([^']+)'", text)
    named = typed if full is None or (typed and typed[1].startswith(f"{full[1]}.")) else full
    if not missing or not named:
        return None
    place = re.search(r"^In '([^']+)'", text)
    return (f"{place[1]}: " if place else "") + str(keys.unknown(named[1]))


def _about_choices(message: str) -> str:
    """What to add about a choice that is not there."""
    choice = re.search(r"Could not find '([^']+)/([^'/]+)'(?: Available options in '[^']*': ([\w ]+))?", message)
    close = difflib.get_close_matches(choice[2], (choice[3] or "").split(), n=1) if choice else []
    if choice and close:
        return f"; did you mean {choice[1]}={close[0]}?"
    return "; rltrain list shows the choices" if "Could not find" in message else ""


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(UNSAID)]
    named = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    text = " ".join(kept) or type(error).__name__
    return f"{named[0]}: {text}" if named and named[0] and named[0] not in text else text


def setup_logging(*, verbose: bool = False) -> None:
    """One-line logs on stderr under the time and the stage; libraries speak from errors on, or from warnings on."""
    progress.start(verbose=verbose)


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
    if help_pages.wants_help(sys.argv[1:]):
        print(help_pages.command(*_command()))
        return

    progress.begin(shows=_is_first_process())
    sys.argv[1:] = ["tracking.verbose=true" if word == "-v" else word for word in sys.argv[1:]]
    setup_logging(verbose="tracking.verbose=true" in sys.argv)
    progress.say("start", f"{_command()[0]}: reading the configuration")
    import hydra
    from omegaconf import DictConfig

    # With this set Hydra raises instead of printing a page; what is shown is then ours to decide.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    store_nodes()

    # Hydra prints a line of its own about whatever is raised inside it, so the work is done once it has returned.
    configs: list[RunConfig | ConfigError] = []
    words: list[str] = []

    def compose_only(composed: DictConfig) -> None:
        try:
            overrides.check_texts(words, composed)
            configs.append(to_config(composed))
        except ConfigError as error:
            configs.append(error)

    compose_only.__module__ = "__main__"
    code: str | int | None = None
    try:
        with errors_in_one_line():
            words += checked_overrides(sys.argv[1:])
            with _hydra_errors_of_other_types(sys.argv[1:]):
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


def checked_overrides(arguments: list[str]) -> list[str]:
    """The overrides of a command line, without Hydra's flags; none where it sweeps, whose values are lists of values.

    Raises ``ConfigError`` where they cannot be read.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    for argument in arguments:
        flag = argument.partition("=")[0]
        if argument.startswith("-") and not any(known.startswith(flag) for known in parser._option_string_actions):
            raise ConfigError(f"{argument}: not a flag; write {argument.lstrip('-').replace('-', '_')}, without dashes")
    flags = parser.parse_args(arguments)
    own = [Path(flags.config_dir)] if flags.config_dir else []
    overrides.check(flags.overrides, folders=[config_folder(), *own], multirun=flags.multirun)
    return [] if flags.multirun else flags.overrides


@contextmanager
def _hydra_errors_of_other_types(words: list[str]) -> Iterator[None]:
    """Hydra lets some of its own errors, and those of YAML, out as they are."""
    import yaml

    try:
        yield
    except (AssertionError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, ConfigError):
            raise
        overrides.check_chosen(words, error)
        raise ConfigError(f"the command line or its YAML cannot be composed: {' '.join(str(error).split())}") from error


def _leave() -> None:
    if "rltrain.runtime.dist" in sys.modules:
        try:
            sys.modules["rltrain.runtime.dist"].teardown()
        except Exception as error:  # what ended the run says more, by its exit code too
            print(f"error: the process group did not end: {error}", file=sys.stderr)


def _is_first_process() -> bool:
    """Whether this is rank 0, before torch is imported, which :mod:`rltrain.runtime.dist` needs to know it."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _command() -> tuple[str, str]:
    """The name and the docstring of the command that runs: those of the main module, train's for a script."""
    main = sys.modules["__main__"]
    name = main.__spec__.name if main.__spec__ else ""
    name = name.removeprefix("rltrain.").removeprefix("commands.").removesuffix(".__main__")
    return (name, main.__doc__ or "") if name in help_pages.READS else ("train", help_pages.module_doc("rltrain.train"))


def make_folder(folder: Path) -> None:
    """Make the run folder and try to write there, before a model is loaded."""
    probe = folder / f".writable_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        cause = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"run_dir={folder}: cannot be written to ({cause}); set run_dir to a folder that this user can write to"
        ) from error


def _watched(task: Callable[[RunConfig], None], config: RunConfig) -> None:
    from rltrain.runtime import dist  # imports torch, which config errors do without

    dist.refuse_tasks_without_srun()
    make_folder(Path(config.run_dir))
    dist.refuse_unused_gpu()
    setup_logging(verbose=config.tracking.verbose)
    progress.say("start", f"device: {dist.device_in_words()}")
    with watchdog.armed(Path(config.run_dir), rank=dist.rank()):
        task(config)
    dist.teardown()  # a sweep has another task
