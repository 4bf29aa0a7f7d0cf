"""Lowering without what ExecuTorch and torch repeat dozens of times for graphs that do not need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._export import utils as export_utils
from torch.export import ExportedProgram
from torch.fx.traceback import NodeSource

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
    transform, decompose = _passes._transform, ExportedProgram.run_decompositions  # noqa: SLF001

    def forget(self: NodeSource, *_args: Any, **_options: Any) -> None:
        self.pass_name, self.action, self.from_node = "", [], []
        self.node_info = self._dict = self._action_string = None

    def where_needed(program: Any, pass_: Any) -> Any:
        return transform(program, pass_) if _is_needed(type(pass_).__name__, program) else program

    def where_composite(self: ExportedProgram, table: Any = None, **options: Any) -> ExportedProgram:
        if table == {} and not any(_is_composite(node) for node in self.graph.nodes):
            return self
        result: ExportedProgram = decompose(self, table, **options)
        return result

    register()
    NodeSource.__init__ = forget  # type: ignore[method-assign]
    export_utils._materialize_cpp_cia_ops = lambda: None  # noqa: SLF001
    _passes._transform = where_needed  # noqa: SLF001
    ExportedProgram.run_decompositions = where_composite  # type: ignore[method-assign]
    try:
        yield
    finally:
        NodeSource.__init__ = remember  # type: ignore[method-assign]
        export_utils._materialize_cpp_cia_ops = register  # noqa: SLF001
        _passes._transform = transform  # noqa: SLF001
        ExportedProgram.run_decompositions = decompose  # type: ignore[method-assign]


def _is_needed(name: str, program: Any) -> bool:
    operators = _NEEDED_FOR.get(name)
    if operators is None:
        return True
    found = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return any(operator in target for target in found for operator in operators)


def _is_composite(node: fx.Node) -> bool:
    """Whether a call is not yet one operator without effects, which is what an empty table of decompositions leaves."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd  # noqa: SLF001
    return bool(target._schema.is_mutable or target.has_kernel_for_dispatch_key(key))  # noqa: SLF001
