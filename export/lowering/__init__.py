"""One lowering per runtime. Others can be added by the entry-point group `edgetrain.lowerings`."""

from __future__ import annotations

from importlib.metadata import entry_points

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.lowering.base import Lowering
from edgetrain.export.lowering.executorch import ExecutorchLowering
from edgetrain.export.lowering.onnx import OnnxLowering
from edgetrain.export.lowering.ort_training import OrtTrainingLowering
from edgetrain.export.lowering.torch import TorchLowering

_BUILTIN: dict[str, type[Lowering]] = {
    "onnxruntime": OnnxLowering,
    "executorch": ExecutorchLowering,
    "ort-training": OrtTrainingLowering,
    "torch": TorchLowering,
}


def get_lowering(runtime: str) -> Lowering:
    """The lowering for a runtime.

    Raises:
        UnsupportedError: nobody provides one; the message lists those that exist.
    """
    if runtime in _BUILTIN:
        return _BUILTIN[runtime]()
    found = {entry.name: entry for entry in entry_points(group="edgetrain.lowerings")}
    if runtime in found:
        lowering: Lowering = found[runtime].load()()
        return lowering
    known = ", ".join(sorted({*_BUILTIN, *found}))
    raise UnsupportedError(f"there is no export for runtime {runtime!r}; there is for: {known}")
