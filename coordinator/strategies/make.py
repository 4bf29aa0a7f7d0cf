"""A strategy from its settings: a name, or a table with a name and options; strategies of users, too.

    strategy = "fedavg"

    [strategy]
    name = "fedadam"            # a wrapper
    learning_rate = 0.03
    [strategy.inner]            # what it goes around
    name = "trimmed-mean"
    byzantine = 0.1

A factory's keyword arguments are its options: their annotations are checked, their defaults are the defaults.
One called `inner` makes the strategy a wrapper.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from edgetrain.coordinator.strategies.base import Setting, Strategy, described
from edgetrain.coordinator.strategies.bulyan import bulyan
from edgetrain.coordinator.strategies.dp_fedavg import dp_fedavg
from edgetrain.coordinator.strategies.fedadagrad import fedadagrad
from edgetrain.coordinator.strategies.fedadam import fedadam
from edgetrain.coordinator.strategies.fedavg import fedavg
from edgetrain.coordinator.strategies.fedavgm import fedavgm
from edgetrain.coordinator.strategies.fedbuff import fedbuff
from edgetrain.coordinator.strategies.fednova import fednova
from edgetrain.coordinator.strategies.fedprox import fedprox
from edgetrain.coordinator.strategies.fedsgd import fedsgd
from edgetrain.coordinator.strategies.fedyogi import fedyogi
from edgetrain.coordinator.strategies.geometric_median import geometric_median
from edgetrain.coordinator.strategies.krum import krum, multi_krum
from edgetrain.coordinator.strategies.median import median
from edgetrain.coordinator.strategies.norm_bound import norm_bound
from edgetrain.coordinator.strategies.scaffold import scaffold
from edgetrain.coordinator.strategies.trimmed_mean import trimmed_mean
from edgetrain.protocol.config import convert
from edgetrain.protocol.errors import ConfigError

Factory = Callable[..., Strategy]

ENTRY_POINTS = "edgetrain.strategies"

STRATEGIES: dict[str, Factory] = {
    "bulyan": bulyan,
    "dp-fedavg": dp_fedavg,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedbuff": fedbuff,
    "fednova": fednova,
    "fedprox": fedprox,
    "fedsgd": fedsgd,
    "fedyogi": fedyogi,
    "geometric-median": geometric_median,
    "krum": krum,
    "median": median,
    "multi-krum": multi_krum,
    "norm-bound": norm_bound,
    "scaffold": scaffold,
    "trimmed-mean": trimmed_mean,
}

StrategyTable = str | dict[str, Any]
"""A name, or a table with `name`, options, and for a wrapper `inner`, again a name or a table."""


def make_strategy(table: StrategyTable, setting: Setting | None = None) -> Strategy:
    """The strategy of these settings.

    Args:
        table: what `federation.toml` says.
        setting: where it is to work; None to ask later (or never, in tests).

    Raises:
        ConfigError: no such strategy, a wrong option, wrappers that make no sense around each other, or
            something in the setting that the strategy cannot work with.
    """
    strategy = _make(table, "strategy")
    if setting is not None:
        check_strategy(strategy, setting)
    return strategy


def check_strategy(strategy: Strategy, setting: Setting) -> None:
    """Returns if the strategy can work in a setting.

    Raises:
        ConfigError: it cannot; the message says why and what to do.
    """
    setting = replace(setting, training=strategy.training(setting.training))
    if objection := strategy.objection(setting):
        raise ConfigError(f"strategy {described(strategy)!r} cannot work here: {objection}")


def _make(table: StrategyTable, where: str) -> Strategy:
    options = {"name": table} if isinstance(table, str) else dict(table)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f'{where}: needs a name, as in name = "fedavg"')
    factory = _factory(name)
    hints = get_type_hints(factory, include_extras=True)
    parameters = inspect.signature(factory).parameters
    arguments: dict[str, Any] = {}
    if "inner" in parameters and "inner" in options:
        inner = options.pop("inner")
        if not isinstance(inner, str | dict):
            raise ConfigError(f"{where}.inner: a strategy's name or table, not {inner!r}")
        arguments["inner"] = _make(inner, f"{where}.inner")
    fields = [
        (key, hints.get(key, Any))
        if parameter.default is inspect.Parameter.empty
        else (key, hints.get(key, Any), parameter.default)
        for key, parameter in parameters.items()
        if key != "inner"
    ]
    kind = msgspec.defstruct("Options", fields, kw_only=True, forbid_unknown_fields=True)
    checked = convert(options, kind, where=f"{where} {name!r}")
    arguments |= {key: getattr(checked, key) for key in kind.__struct_fields__}
    made = factory(**arguments)
    if not isinstance(made, Strategy):
        raise ConfigError(f"{where} {name!r}: its factory returned a {type(made).__name__}, not a Strategy")
    return made


def _factory(name: str) -> Factory:
    if found := re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", name):
        return _from_file(Path(found[1]), found[2])
    if name in STRATEGIES:
        return STRATEGIES[name]
    others = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name not in others:
        known = ", ".join(sorted({*STRATEGIES, *others}))
        raise ConfigError(f"strategy {name!r} is not known; there is: {known}, or file.py:factory for your own")
    try:
        factory = others[name].load()
    except Exception as error:
        raise ConfigError(f"strategy {name!r}: {others[name].value} cannot be imported: {error}") from error
    return _checked(factory, name)


def _from_file(path: Path, function: str) -> Factory:
    if not path.is_file():
        raise ConfigError(f"strategy {path}:{function}: no such file")
    spec = importlib.util.spec_from_file_location(f"edgetrain_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Annotations are looked up in the module that a function says it is from.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"strategy {path}: raised while it was imported: {error!r}") from error
    return _checked(getattr(module, function, None), f"{path}:{function}")


def _checked(factory: Any, name: str) -> Factory:
    if not callable(factory):
        raise ConfigError(f"strategy {name!r}: is not a function that returns a Strategy")
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(parameter.kind in kinds for parameter in inspect.signature(factory).parameters.values()):
        raise ConfigError(f"strategy {name!r}: name its options as keyword arguments, without * and **")
    checked: Factory = factory
    return checked
