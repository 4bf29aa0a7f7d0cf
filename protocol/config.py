"""Configuration files: TOML into msgspec structs, with errors that name file, key and remedy."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from edgetrain.protocol.errors import ConfigError

T = TypeVar("T")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: not there, not readable, not TOML.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such configuration file") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_toml(data, where=str(path))


def parse_toml(data: bytes, *, where: str) -> dict[str, Any]:
    """The tables of TOML text.

    Raises:
        ConfigError: not TOML; `where` names the source.
    """
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply") from error


def convert(tables: dict[str, Any], kind: type[T], *, where: str) -> T:
    """Checks plain tables against a struct.

    Raises:
        ConfigError: a key that is unknown, missing, or of the wrong type or range; `where` names the source.
    """
    try:
        return msgspec.convert(tables, kind)
    except msgspec.ValidationError as error:
        # msgspec writes the path as `$.rounds.goal`; people write rounds.goal.
        message = str(error).replace("`$.", "`")
        message = message.replace("Object missing required field", "a setting is missing:")
        message = message.replace("Object contains unknown field", "there is no setting called")
        if unknown := re.fullmatch(r"there is no setting called `(.+?)`(?: - at `(.+)`)?", message):
            message += _instead(kind, *unknown.groups(""))
        raise ConfigError(f"{where}: {message[0].lower()}{message[1:]}") from error


def _instead(kind: Any, unknown: str, table: str) -> str:
    """What may have been meant, of the settings in a table of a struct; nothing for a table in a list."""
    for name in filter(None, table.split(".")):
        kind = get_type_hints(kind).get(name)
        kinds = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, msgspec.Struct)]
        if not kinds:
            return ""
        kind = kinds[0]
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    near = difflib.get_close_matches(unknown, names, n=1)
    return f"; did you mean `{near[0]}`?" if near else f"; there are: {', '.join(names)}"


def set_dotted(tables: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets `tables["a"]["b"] = value` for `a.b`, making tables on the way."""
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = tables.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {parent} is a value, not a table")
        tables = inner
    tables[last] = value
