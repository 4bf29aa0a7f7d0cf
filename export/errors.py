"""The exceptions of `edgetrain.export`.

EdgetrainError
└── ExportError
    ├── SourceError         the model cannot be found, or the user's file raised
    ├── BatchError          the example batch, the loss or a metric has a wrong structure or value
    ├── SelectionError      the selection matches nothing, or cannot be read
    ├── UnsupportedError    an op, a control flow or a combination that cannot be exported
    │   └── OperatorError   an operator that a lowering cannot translate
    ├── ToleranceError      storing weights in fewer bytes changes the loss too much
    ├── ParityError         the exported numbers are not those of eager torch
    │   └── GradientError   a gradient is not
    └── MergeError          parameters that do not belong to the bundle, or an unknown output format
"""

from edgetrain.protocol.errors import EdgetrainError


class ExportError(EdgetrainError):
    """A model cannot become a bundle, or a bundle no model."""


class SourceError(ExportError):
    """The model cannot be found, or the user's own code raised; then the message holds its traceback."""


class BatchError(ExportError, ValueError):
    """The example batch, the loss or a metric has a wrong structure, shape, dtype or value."""


class SelectionError(ExportError, ValueError):
    """A selection of trainable parameters that matches nothing or cannot be read."""


class UnsupportedError(ExportError):
    """An op, a control flow, or a combination of runtime, selection and model that cannot be exported."""


class OperatorError(UnsupportedError):
    """A lowering met an operator that it cannot translate.

    Args:
        operator: as torch names it, e.g. `aten.histc.default`.
        cause: what the translator said.
    """

    def __init__(self, operator: str, cause: str) -> None:
        super().__init__(f"no translation for {operator}: {cause}")
        self.operator = operator
        self.cause = cause


class ParityError(ExportError):
    """The exported graph computes other numbers than eager torch; nothing was written."""


class GradientError(ParityError):
    """A gradient differs, by `share` of the largest element of its parameter's."""

    def __init__(self, share: float, message: str) -> None:
        super().__init__(message)
        self.share = share


class ToleranceError(ExportError):
    """Storing weights in fewer bytes changes the loss by more than the user allows; nothing was written."""


class MergeError(ExportError):
    """Parameters that do not belong to the bundle, or an output that cannot be written."""
