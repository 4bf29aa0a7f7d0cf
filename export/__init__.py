"""Module + loss + example batch -> training step as a pure graph -> bundle, with proven gradients."""

from edgetrain.export.errors import (
    BatchError,
    ExportError,
    MergeError,
    ParityError,
    SelectionError,
    SourceError,
    ToleranceError,
    UnsupportedError,
)
from edgetrain.export.exporter import export_bundle
from edgetrain.export.merge import merge
from edgetrain.export.source import Source, load_source
from edgetrain.export.storage.settings import Storage

__all__ = [
    "BatchError",
    "ExportError",
    "MergeError",
    "ParityError",
    "SelectionError",
    "Source",
    "SourceError",
    "Storage",
    "ToleranceError",
    "UnsupportedError",
    "export_bundle",
    "load_source",
    "merge",
]
