"""Which parameters learn.

A selection is one or more terms separated by ";". A term names parameters, and a leading "!" takes them away:

- `all`: everything
- `last:K`: the last K modules that own parameters, in the order of registration
- `head`: the last module that owns a matrix (a linear layer, a convolution), and what comes after it
- `bias`: every bias
- `norm`: the affine parameters of every normalisation
- anything else: a regular expression, searched in the parameter names (`re:` in front forces this reading)

`lora:` and `sparse:` terms add adapters and are read by `edgetrain.export.selection.adapters`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from edgetrain.export.errors import SelectionError

MAX_LISTED = 40


@dataclass(frozen=True)
class OwnedParameters:
    """The parameters of a module in order, each once, and who owns them."""

    # In registration order.
    names: tuple[str, ...]
    # Module path -> canonical names of the parameters that it owns itself. A tied parameter has the name
    # under which it was registered first, and is listed at every module that owns it.
    by_module: dict[str, tuple[str, ...]]


def owned_parameters(module: nn.Module) -> OwnedParameters:
    """Lists the parameters of `module` by owner."""
    canonical = {id(parameter): name for name, parameter in module.named_parameters()}
    by_module: dict[str, tuple[str, ...]] = {}
    for path, owner in module.named_modules():
        own = [parameter for _, parameter in owner.named_parameters(recurse=False)]
        if own:
            by_module[path] = tuple(canonical[id(parameter)] for parameter in own)
    return OwnedParameters(tuple(canonical.values()), by_module)


def terms(selection: str) -> list[str]:
    """The terms of a selection.

    Raises:
        SelectionError: there is none.
    """
    found = [term.strip() for term in selection.split(";") if term.strip()]
    if not found:
        raise SelectionError("the selection is empty; 'all' trains everything")
    return found


def select(module: nn.Module, selection: str, added: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Names of the parameters that a selection matches, in registration order.

    Args:
        module: with the adapters that the selection asks for.
        selection: see the head of this file.
        added: the parameters that each `lora:` or `sparse:` term stands for.

    Raises:
        SelectionError: a term cannot be read, or nothing is left; the message lists what could be selected.
    """
    owned = owned_parameters(module)
    if not owned.names:
        raise SelectionError(
            f"{type(module).__name__} has no parameters: there is nothing to train. "
            "Register tensors that learn as nn.Parameter"
        )
    chosen: set[str] = set()
    for index, term in enumerate(terms(selection)):
        excludes = term.startswith("!")
        matched = set(added.get(term) or _match(module, owned, term.removeprefix("!").strip()))
        if not matched:
            raise SelectionError(f"selection term {term!r} matches no parameter. {choices(owned)}")
        if excludes and index == 0:
            chosen = set(owned.names)
        chosen = chosen - matched if excludes else chosen | matched
    if not chosen:
        raise SelectionError(f"selection {selection!r} leaves no parameter to train. {choices(owned)}")
    return tuple(name for name in owned.names if name in chosen)


def choices(owned: OwnedParameters) -> str:
    """What could be selected, for error messages."""
    shown = ", ".join(owned.names[:MAX_LISTED])
    more = f", … ({len(owned.names) - MAX_LISTED} more)" if len(owned.names) > MAX_LISTED else ""
    return (
        "Possible: all, last:K, head, bias, norm, lora:…, sparse:…, or a regular expression over these "
        f"parameters: {shown}{more}"
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, by its class name (covers RMSNorm classes of other libraries)."""
    return "norm" in type(module).__name__.lower()


def _match(module: nn.Module, owned: OwnedParameters, term: str) -> tuple[str, ...]:
    if term == "all":
        return owned.names
    if term == "bias":
        return tuple(name for name in owned.names if name.rpartition(".")[2].endswith("bias"))
    if term == "norm":
        return _of_modules(owned, [path for path in owned.by_module if is_norm(module.get_submodule(path))])
    if term == "head":
        shapes = {name: parameter.ndim for name, parameter in module.named_parameters()}
        paths = list(owned.by_module)
        last = max(
            (i for i, path in enumerate(paths) if any(shapes[n] > 1 for n in owned.by_module[path])),
            default=len(paths) - 1,
        )
        return _of_modules(owned, paths[last:])
    if term.startswith("last:"):
        count = _positive_int(term)
        if count > len(owned.by_module):
            raise SelectionError(
                f"selection {term!r}: the model has only {len(owned.by_module)} modules with parameters: "
                + ", ".join(path or "(the model itself)" for path in owned.by_module)
            )
        return _of_modules(owned, list(owned.by_module)[-count:])
    try:
        pattern = re.compile(term.removeprefix("re:"))
    except re.error as error:
        raise SelectionError(
            f"selection term {term!r} is no keyword and no regular expression: {error}. {choices(owned)}"
        ) from error
    return tuple(name for name in owned.names if pattern.search(name))


def _of_modules(owned: OwnedParameters, paths: list[str]) -> tuple[str, ...]:
    return tuple(name for path in paths for name in owned.by_module[path])


def _positive_int(term: str) -> int:
    digits = term.partition(":")[2]
    if not digits.isdecimal() or int(digits) < 1:
        raise SelectionError(f"selection {term!r}: K must be a whole number of at least 1, as in last:2")
    return int(digits)
