"""Settings from a file and from flags, made from the configuration structs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_type_hints

import click
import msgspec

from edgetrain.protocol.config import convert, read_toml, set_dotted

T = TypeVar("T", bound=msgspec.Struct)

# Names of click's parameters: identifiers only.
_PREFIX, _DOT = "setting_", "__"


def flags(kind: type[msgspec.Struct]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One flag per field: `--data`, and `--broker-host` for `broker.host`. Values are checked by the struct."""
    fields = list(_fields(kind, ""))

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for dotted, description, default, python_type in reversed(fields):
            flag = "--" + dotted.replace(".", "-").replace("_", "-")
            shown = description
            if default not in {None, ""}:
                shown = f"{description} [default: {default}]"
            negatable = f"/--no-{flag[2:]}" if python_type is bool else ""
            function = click.option(
                flag + negatable,
                setting(dotted),
                default=None,
                help=_sentence(shown),
                type=_click_type(python_type),
            )(function)
        return function

    return decorate


def load_settings(kind: type[T], path: str | None, given: dict[str, Any]) -> T:
    """The file's settings, overridden by the flags that were given.

    Args:
        kind: the configuration struct.
        path: TOML file, or None.
        given: click's parameters; those that `flags` made count.

    Raises:
        ConfigError: see `edgetrain.protocol.config.convert`.
    """
    tables = read_toml(path) if path else {}
    for name, value in given.items():
        if name.startswith(_PREFIX) and value is not None:
            set_dotted(tables, name.removeprefix(_PREFIX).replace(_DOT, "."), value)
    return convert(tables, kind, where=path or "without --config")


def setting(dotted: str) -> str:
    """The click parameter of a setting, e.g. of "broker.host"."""
    return _PREFIX + dotted.replace(".", _DOT)


def _fields(kind: type[msgspec.Struct], prefix: str) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        hint = hints[field.name]
        python_type, description = hint, ""
        if metadata := getattr(hint, "__metadata__", None):
            python_type = get_args(hint)[0]
            description = next((meta.description for meta in metadata if meta.description), "")
        if isinstance(python_type, type) and issubclass(python_type, msgspec.Struct):
            yield from _fields(python_type, f"{prefix}{field.name}.")
        else:
            default = None if field.default is msgspec.NODEFAULT else field.default
            yield f"{prefix}{field.name}", description, default, python_type


def _click_type(python_type: Any) -> Any:
    if python_type in {int, float, bool, str}:
        return python_type
    return click.Choice(get_args(python_type))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
