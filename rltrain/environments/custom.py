"""An environment from outside the package: ``environment=custom environment.import_path=my_package.my_module:Game``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from rltrain.config import MISSING, EnvironmentConfig
from rltrain.errors import ConfigError, require
from rltrain.registry import check_arguments, load_callable, register
from rltrain.types import Environment, Problem, Reply

KEY = "environment.import_path"
METHODS = {"start": ("problem",), "respond": ("state", "text")}


@dataclass(kw_only=True)
class CustomEnvironmentConfig(EnvironmentConfig):
    """``import_path`` names a class with ``start(problem)`` and ``respond(state, text)``, or a module with both.

    A class is built as ``Class(**options)``. It may derive from ``rltrain.types.Environment``. ``stop``, ``role``,
    ``key(state)`` and ``prepare()`` may be left out of both. A module has no options.
    """

    import_path: str = MISSING  # your class or module: package.module:Class, or package.module
    options: dict[str, Any] = field(default_factory=dict)  # what your class is built with, by name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.import_path != MISSING:
            self.load()

    def load(self) -> Environment:
        """The environment; ``ConfigError`` where there is none."""
        setting = f"{KEY}={self.import_path}"
        made = self._made(setting)
        for name, arguments in METHODS.items():
            require(hasattr(made, name), f"{setting}: has no {name}; write {name}({', '.join(arguments)})")
            check_arguments(getattr(made, name), arguments, setting=f"{setting}: {name}")
        stop = made.stop if hasattr(made, "stop") else ()
        given_texts = isinstance(stop, list | tuple) and all(isinstance(text, str) and text for text in stop)
        require(given_texts, f"{setting}: stop is {stop!r}; give texts, such as ['</call>']")
        role = made.role if hasattr(made, "role") else None
        require(
            role is None or (isinstance(role, str) and bool(role)), f"{setting}: role is {role!r}; give a text or None"
        )
        return _UserEnvironment(made, stop=stop, role=role)

    def _made(self, setting: str) -> Any:
        if ":" not in self.import_path:
            require(not self.options, f"{setting}: is a module, which takes no environment.options; name a class")
            return _module(self.import_path, setting)
        made = load_callable(self.import_path, key=KEY)
        require(inspect.isclass(made), f"{setting}: is not a class; name a class, or the module alone")
        try:
            return made(**self.options)
        except Exception as error:  # the class is the user's and may raise anything
            raise ConfigError(
                f"{setting}: building it with environment.options={self.options} raised {type(error).__name__}: "
                f"{' '.join(str(error).split())}; mend the class or the options"
            ) from error


def _module(import_path: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(import_path)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{setting}: no module named {error.name}; install it, or add its folder to PYTHONPATH"
        ) from None
    except Exception as error:
        raise ConfigError(f"{setting}: importing it raised {type(error).__name__}: {error}; mend it") from error


class _UserEnvironment(Environment):
    """A user's class or module with what it leaves out."""

    def __init__(self, made: Any, *, stop: Sequence[str], role: str | None) -> None:
        self.made, self.stop, self.role = made, stop, role

    def prepare(self) -> None:
        if hasattr(self.made, "prepare"):
            self.made.prepare()

    def start(self, problem: Problem) -> Any:
        return self.made.start(problem)

    def respond(self, state: Any, text: str) -> Reply:
        return self.made.respond(state, text)

    def key(self, state: Any) -> str | None:
        return self.made.key(state) if hasattr(self.made, "key") else None


@register("environment", "custom", CustomEnvironmentConfig)
def custom(config: CustomEnvironmentConfig) -> Environment:
    """The user's environment."""
    return config.load()
