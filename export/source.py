"""Where a model comes from: a registered name, a function in the user's file, or a configuration."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from edgetrain.export.batch import ExampleBatch, Loss
from edgetrain.export.errors import SourceError
from edgetrain.export.user_code import user_code


class Source(NamedTuple):
    """What `export_bundle` takes."""

    module: nn.Module
    loss: Loss
    example_batch: ExampleBatch


def load_source(source: str, *, task: str | None = None, options: Mapping[str, Any] | None = None) -> Source:
    """Finds a model.

    Args:
        source: a registered name (`digits-cnn`), or `path/to/file.py:callable`, where the callable returns
            (module, loss, example_batch), or `hf:PATH_OR_CONFIG`.
        task: for `hf:` only, see `edgetrain.export.huggingface`.
        options: keyword arguments of the registered factory or of the callable.

    Raises:
        SourceError: nothing there, or the user's code raised, or it returned something else.
    """
    if source.startswith("hf:"):
        from edgetrain.export.huggingface import load_hf  # noqa: PLC0415  # transformers is optional

        return Source(*load_hf(source.removeprefix("hf:"), task, **(options or {})))
    if task is not None:
        raise SourceError(f"--task belongs to hf: models only; {source!r} brings its own loss")
    if ".py:" in source:
        path, _, name = source.rpartition(":")
        return _checked(source, _load_function(Path(path), name), options)
    if source.endswith(".py"):
        raise SourceError(f"{source}: name the function too, as in {source}:make_model")
    return _load_registered(source, options)


def _load_registered(name: str, options: Mapping[str, Any] | None) -> Source:
    from edgetrain import models  # noqa: PLC0415  # imports every reference model

    if name not in models.MODELS:
        raise SourceError(
            f"no model {name!r}. Registered: {', '.join(sorted(models.MODELS))}. "
            "Or give path/to/file.py:callable, or hf:PATH_OR_CONFIG"
        )
    try:
        return Source(*models.get_model(name, **(options or {})))
    except (TypeError, ValueError) as error:
        raise SourceError(f"model {name!r} cannot be made with {dict(options or {})}: {error}") from error


def _load_function(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    module_name = f"edgetrain_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    sys.modules[module_name] = module
    sys.path.insert(0, folder)
    try:
        with user_code(f"importing {path}"):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise SourceError(f"{path} has no function {name!r}; it has: {', '.join(found) or 'none'}")
    return function  # type: ignore[no-any-return]  # callable() was checked


def _checked(source: str, function: Callable[..., Any], options: Mapping[str, Any] | None) -> Source:
    with user_code(f"calling {source}"):
        made = function(**(options or {}))
    if not isinstance(made, tuple | list) or len(made) != 3:
        got = f"{len(made)} values" if isinstance(made, tuple | list) else f"a {type(made).__name__}"
        raise SourceError(f"{source} must return (module, loss, example_batch), it returned {got}")
    module, loss, example_batch = made
    if not isinstance(module, nn.Module):
        raise SourceError(f"{source}: the first value must be a torch.nn.Module, got {type(module).__name__}")
    if not callable(loss):
        raise SourceError(f"{source}: the loss must be callable, got {type(loss).__name__}")
    return Source(module, loss, example_batch)
