"""Training from Python, in a script or a notebook.

    from rltrain.api import train
    run = train("quickstart", steps=20, advantage=my_function)

Config keys are keywords: a dict where a key has keys below it, the name of a choice (``algorithm="dapo"``), or a
function as ``advantage``, as ``loss`` or as a reward. Errors are :class:`rltrain.errors.ConfigError` and ``RunError``,
whose text is the line that the command line prints.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import inspect
import json
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.errors import ConfigError, RunError
from rltrain.options import overrides
from rltrain.options.described import described
from rltrain.runtime import progress

# Keys whose value names a choice, those of them whose group has another name, and those that no default chooses.
CHOICES = ("algorithm", "model", "data", "eval_data", "cold_start_data", "advantage", "loss", "rollout", "deepspeed")
CHOICES += ("environment",)
OTHER_GROUP = {"eval_data": "data@eval_data", "cold_start_data": "data@cold_start_data"}
OPTIONAL = ("eval_data", "cold_start_data")
REWARDS = ("rewards", "eval_rewards")


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run folder after training. ``last`` holds the metrics of the last step that this call made."""

    folder: Path
    last: Mapping[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> Any:
        """``metrics.jsonl``, a row per step: a pandas frame with the step as index, or dicts without pandas."""
        from rltrain.runs.metrics import read_jsonl

        rows = read_jsonl(self.folder / "metrics.jsonl")
        try:
            import pandas as pd
        except ImportError:
            return rows
        return pd.DataFrame(rows).set_index("step")

    @property
    def policy(self) -> Path:
        """The trained model: a plain transformers folder in the newest checkpoint."""
        from rltrain.runs import checkpoint

        return checkpoint.list_checkpoints(self.folder)[-1].policy

    def plot(self, *names: str) -> Any:
        """A matplotlib figure of metrics against steps; the training reward and the held-out accuracy by default."""
        from rltrain.runs.figure import ShownFigure
        from rltrain.runs.metrics import read_jsonl
        from rltrain.runs.summary import series

        rows = read_jsonl(self.folder / "metrics.jsonl")
        chosen = names or ("reward", "eval_accuracy")
        figure = ShownFigure(figsize=(4.5 * len(chosen), 3.2), layout="constrained")
        for index, name in enumerate(chosen):
            axes = figure.add_subplot(1, len(chosen), index + 1)
            axes.plot(*series(rows, name), marker=".")
            axes.set(xlabel="step", ylabel=name)
            axes.grid(alpha=0.3)
        return figure

    def summary(self) -> str:
        """The last lines that the command line prints."""
        from rltrain.runs import ending

        return ending.last_lines(self.folder)


def train(experiment: str | None = None, settings: Mapping[str, Any] | None = None, /, **keys: Any) -> TrainedRun:
    """Train a policy, or go on with the run that is in ``run_dir``, and return the run.

    ``settings`` is for dotted keys, ``{"batch.group_size": 4}``; ``keys`` for the others. A function as ``advantage``
    takes ``(groups, options, context)`` as with ``advantage=custom``, likewise as ``loss`` and in ``rewards``.

    The text of a function that no module holds, as in a notebook, is saved in the run folder as
    ``functions_HASH.py``. The hash of the text is part of the config: a run resumes with the same text alone. To resume
    from the command line put the run folder on PYTHONPATH; what the function uses must then be imported inside it.
    """
    config, functions = configured(experiment, settings, **keys)
    progress.begin()
    with progress.set_up(verbose=config.tracking.verbose):
        from rltrain.runs import run_folder
        from rltrain.runtime import dist
        from rltrain.trainer import fit

        cli.make_folder(Path(config.run_dir))
        dist.refuse_unused_gpu()
        for name, text in functions.items():
            (Path(config.run_dir) / f"{name}.py").write_text(text, encoding="utf-8")
        try:
            dist.setup(deadline_s=config.deadline("collective"), join_s=config.deadline("join"))
            with run_folder.opened(Path(config.run_dir)):
                last = fit(config)
        except SystemExit as error:  # a signal, after a saved step
            raise RunError("interrupted after a saved step; the same call goes on from there") from error
        finally:
            dist.teardown()
            gc.collect()
    return TrainedRun(folder=Path(config.run_dir), last=last)


def configured(
    experiment: str | None = None, settings: Mapping[str, Any] | None = None, /, **keys: Any
) -> tuple[RunConfig, dict[str, str]]:
    """The config that :func:`train` would run, and the texts of its functions by the name of their module.

    ConfigError, in one line, where there is no such config.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    functions: dict[str, str] = {}
    words = [f"+experiment={experiment}"] if experiment else []
    words += [*_words({**(settings or {}), **keys}, functions)]
    try:
        cli.store_nodes()
        overrides.check(words, folders=[cli.config_folder()])
        return cli.compose(words), functions
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(cli.one_line(error)) from None


def _words(settings: Mapping[str, Any], functions: dict[str, str]) -> Iterator[str]:
    """The overrides of a command line that say the same, choices first."""
    chosen, values = [], []
    for key, value in settings.items():
        if key in REWARDS:
            for name, reward in value.items():
                mark = "" if (key, name) == ("rewards", "answer") else "+"
                first, *rest = _choice(f"{mark}reward@{key}.{name}", reward, functions, path=f"{key}.{name}")
                chosen, values = [*chosen, first], [*values, *rest]
        elif key in CHOICES and _names_a_choice(value):
            mark = "+" if key in OPTIONAL else ""
            first, *rest = _choice(f"{mark}{OTHER_GROUP.get(key, key)}", value, functions, path=key)
            chosen, values = [*chosen, first], [*values, *rest]
        else:
            values += [*_flat(key, value)]
    yield from [*chosen, *values]


def _names_a_choice(value: Any) -> bool:
    return isinstance(value, str) or callable(value) or (isinstance(value, Mapping) and "kind" in value)


def _choice(group: str, value: Any, functions: dict[str, str], *, path: str) -> Iterator[str]:
    """The choice of a part: a name or a function, or ``{"kind": either, …}`` with its keys."""
    settings = dict(value) if isinstance(value, Mapping) else {"kind": value}
    kind = settings.pop("kind")
    yield f"{group}=custom" if callable(kind) else f"{group}={kind}"
    if callable(kind):
        yield f"{path}.import_path={_import_path(kind, functions)}"
    for key, each in settings.items():
        yield from _flat(f"{path}.{key}", each)


def _flat(path: str, value: Any) -> Iterator[str]:
    """``path=value`` in Hydra's grammar; of a mapping each of its keys, or the whole where it takes any name."""
    if callable(value):
        raise ConfigError(f"{path}: is a function; only advantage, loss and rewards take one")
    if not isinstance(value, Mapping) or not value:
        yield f"{path}={_written(value)}"
    elif described().is_open(path):
        yield f"+{path}={_written(value)}"
    else:
        for key, each in value.items():
            yield from _flat(f"{path}.{key}", each)


def _written(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' if value else "''"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_written(each) for each in value) + "]"
    if isinstance(value, Mapping) and value:
        return "{" + ",".join(f"{key}:{_written(each)}" for key, each in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else json.dumps(value)


def _import_path(function: Callable[..., Any], functions: dict[str, str]) -> str:
    """Where a function is found; one that no module holds is put into a module named by the hash of its text."""
    name, module = function.__qualname__, function.__module__
    if module != "__main__" and "<" not in name and "." not in name and _holds(module, name, function):
        return f"{module}:{name}"
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise ConfigError(f"{name}: its source cannot be read; define it with def, in a cell or a file") from None
    if not text.startswith(f"def {function.__name__}"):
        raise ConfigError(f"{name}: not a plain function; define it with def, without decorators")
    made = f"functions_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    module_here = sys.modules.setdefault(made, types.ModuleType(made, "A function given to rltrain.api.train."))
    setattr(module_here, function.__name__, function)
    functions[made] = f'"""A function given to rltrain.api.train."""\n\n{text}'
    return f"{made}:{function.__name__}"


def _holds(module: str, name: str, function: Callable[..., Any]) -> bool:
    try:
        return vars(importlib.import_module(module)).get(name) is function
    except ImportError:
        return False
