"""Options that commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


def factory_options(assignments: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` arguments of a model's factory; numbers and true/false as such.

    Raises:
        click.UsageError: one without "=".
    """
    options = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise click.UsageError(f"--set {assignment}: write KEY=VALUE")
        options[key] = _value(value)
    return options


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
