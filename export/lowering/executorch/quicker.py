"""Lowering without what ExecuTorch and torch repeat dozens of times for graphs that do not need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._export import utils as export_utils
from torch.fx.traceback import NodeSource

from edgetrain.export.lowering.decomposed import decomposed_once

# XNNPACK's passes trace each partition anew, whether they have changed it or not. Those that change nothing without one
# of some operators, by what their names hold.
_NEEDED_FOR = {
    "DimOrderOpsRevertPass": ("dim_order",),
    "ConvertToUpsampleBilinear2d": ("index", "upsample"),
    "ConvertToLinearPass": ("aten.mm.", "aten.addmm.", "aten.linear."),
    "PropagateCustomMetaPass": ("quantize",),
    "ConvertToSDPAPass": ("softmax",),
    "FuseBatchNormPass": ("batch_norm",),
    "DecomposeBatchNorm": ("batch_norm",),
    "FuseActivationPass": ("relu", "hardtanh"),
    "DecomposeConcatenate": ("aten.cat.",),
    "RemoveGetItemPass": ("aten.max",),
    "InsertPadQDQPass": ("pad",),
    "Conv1dUnsqueezePass": ("convolution",),
    "PReLUReshapePass": ("prelu",),
    "RemoveRedundantCopyPass": ("_to_copy",),
}


@contextmanager
def quicker() -> Iterator[None]:
    """Without copying what nodes were made from, reading a registry of all operators, tracing what stays as it is."""
    from executorch.backends.xnnpack import _passes  # noqa: PLC0415  # slow to import

    remember, register = NodeSource.__init__, export_utils._materialize_cpp_cia_ops  # noqa: SLF001
    transform = _passes._transform  # noqa: SLF001

    def forget(self: NodeSource, *_args: Any, **_options: Any) -> None:
        self.pass_name, self.action, self.from_node = "", [], []
        self.node_info = self._dict = self._action_string = None

    def where_needed(program: Any, pass_: Any) -> Any:
        return transform(program, pass_) if _is_needed(type(pass_).__name__, program) else program

    register()
    NodeSource.__init__ = forget  # type: ignore[method-assign]
    export_utils._materialize_cpp_cia_ops = lambda: None  # noqa: SLF001
    _passes._transform = where_needed  # noqa: SLF001
    try:
        with decomposed_once():
            yield
    finally:
        NodeSource.__init__ = remember  # type: ignore[method-assign]
        export_utils._materialize_cpp_cia_ops = register  # noqa: SLF001
        _passes._transform = transform  # noqa: SLF001


def _is_needed(name: str, program: Any) -> bool:
    operators = _NEEDED_FOR.get(name)
    if operators is None:
        return True
    found = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return any(operator in target for target in found for operator in operators)
