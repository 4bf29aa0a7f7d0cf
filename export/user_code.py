"""Calling code that the user wrote: when it raises, the user sees their own frames and where we called it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import edgetrain
from edgetrain.export.errors import ExportError, SourceError

# Frames below these folders are ours or torch's; the user's are all others.
_FOREIGN = (
    *(str(Path(folder).resolve()) for folder in edgetrain.__path__),
    str(Path(torch.__file__).parent.resolve()),
    str(Path(__file__).resolve().parent),
    "<frozen importlib",
)


@contextmanager
def user_code(doing: str) -> Iterator[None]:
    """Turns whatever is raised inside into a `SourceError` with the user's traceback.

    Args:
        doing: what we were about, e.g. "calling the module with the example inputs".

    Raises:
        SourceError: the user's code raised. Our own errors pass through.
    """
    try:
        yield
    except ExportError:
        raise
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_foreign(frame)]
        shown = "".join(traceback.format_list(frames) + traceback.format_exception_only(error))
        raise SourceError(f"while {doing}, this was raised:\n{shown.rstrip()}") from error


def is_foreign(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is of edgetrain or torch, not of the user."""
    resolved = frame.filename if frame.filename.startswith("<") else str(Path(frame.filename).resolve())
    return resolved.startswith(_FOREIGN)
