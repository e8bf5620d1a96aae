"""The registry of parts. Imports no torch.

A part (estimator, loss, reward, environment, data set, rollout engine, model source) is one file holding its config
dataclass and its function under ``@register(group, name, Config)``; importing the file makes ``group=name`` a choice.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rltrain.errors import ConfigError, require, require_one_of
from rltrain.types import Need

F = TypeVar("F", bound=Callable[..., Any])

MISSING: Any = "???"  # the default of an option that must be set

PART_MODULES = ("rltrain.policy.load", "rltrain.policy.tiny")
PART_PACKAGES = ("rltrain.advantages", "rltrain.losses", "rltrain.rewards", "rltrain.data", "rltrain.rollout")
PART_PACKAGES += ("rltrain.environments",)


@dataclass(frozen=True)
class Part:
    """A registered choice: ``function`` is called with an instance of ``config``."""

    group: str
    name: str
    config: type
    function: Callable[..., Any]
    needs: frozenset[Need]


_PARTS: dict[tuple[str, str], Part] = {}


def register(group: str, name: str, config: type, *, needs: Iterable[Need] = ()) -> Callable[[F], F]:
    """Make the decorated function (or class) the choice ``group=name``, configured by ``config``."""

    def add(function: F) -> F:
        known = _PARTS.get((group, name))
        if known and known.config.__qualname__ != config.__qualname__:
            raise ValueError(f"{group}={name} is registered twice ({known.config} and {config}); choose another name")
        _PARTS[group, name] = Part(group, name, config, function, frozenset(needs))
        return function

    return add


def parts(group: str | None = None) -> list[Part]:
    """All registered parts (of one group), sorted by name."""
    return [part for (part_group, _), part in sorted(_PARTS.items()) if group in (None, part_group)]


def part_of(config: Any) -> Part:
    """The part that a config instance belongs to."""
    for part in _PARTS.values():
        if type(config) is part.config:
            return part
    raise ConfigError(f"{type(config).__name__}: no registered part has this config; import the file that registers it")


def needs_of(config: Any) -> frozenset[Need]:
    """What a part declares: where it is registered, and, of a function of a user's, in its config or on itself."""
    return part_of(config).needs | config.user_needs()


def declared_needs(function: Callable[..., Any], names: Iterable[str], *, setting: str) -> frozenset[Need]:
    """The needs in a config's ``needs=[scorer]`` and in the attribute ``function.needs = {Need.SCORER}``."""
    known = {need.name.lower(): need for need in Need}
    for name in names:
        require_one_of(known, f"{setting}.needs", name)
    attribute = getattr(function, "needs", ())
    is_collection = isinstance(attribute, set | frozenset | list | tuple)
    require(is_collection, f"{setting}: its attribute needs is {attribute!r}; give a set such as {{Need.SCORER}}")
    wrong = [need for need in attribute if not isinstance(need, Need)]
    require(not wrong, f"{setting}: its attribute needs holds {wrong}; give a set such as {{Need.SCORER}}")
    return frozenset(attribute) | {known[name] for name in names}


def discover() -> None:
    """Import every in-tree plug-in file, so that its parts are registered."""
    for module_name in PART_MODULES:
        importlib.import_module(module_name)
    for package_name in PART_PACKAGES:
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module.name}")


def load_callable(import_path: str, *, key: str) -> Callable[..., Any]:
    """The callable that ``module:attribute`` names; ``key`` is the setting that an error message points to."""
    setting = f"{key}={import_path}"
    module_name, _, attribute = import_path.partition(":")
    well_formed = bool(module_name and attribute and not module_name.startswith("."))
    require(well_formed, f"{setting}: not of the form my_package.my_module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{setting}: no module named {error.name}; install it or add its folder to PYTHONPATH"
            ) from None
        missing = error.name or error
        raise ConfigError(f"{setting}: {module_name} imports {missing}, which is not installed; install it") from error
    except Exception as error:  # the module is the user's and may raise anything
        raised = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ConfigError(f"{setting}: importing {module_name} raised {raised}; mend it") from error
    require(hasattr(module, attribute), f"{setting}: {module_name} has no {attribute}; name one of its functions")
    function = getattr(module, attribute)
    require(callable(function), f"{setting}: {attribute} is {type(function).__name__}, not callable; name a function")
    return function


def check_arguments(function: Callable[..., Any], names: Sequence[str], *, setting: str) -> None:
    """``ConfigError`` unless ``function`` can be called with as many positional arguments as there are ``names``."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function written in C may have none
        return
    try:
        signature.bind(*names)
    except TypeError:
        taken = ", ".join(signature.parameters)
        raise ConfigError(f"{setting}: takes ({taken}); give it the arguments ({', '.join(names)})") from None
