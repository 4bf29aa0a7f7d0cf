"""Which nodes XNNPACK is given: all that it takes, but for views at the border, which cost nothing outside."""

from __future__ import annotations

from typing import Any

from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import ViewCopyConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.dialects._ops import ops
from torch import fx
from torch.export import ExportedProgram


class BorderViewConfig(ViewCopyConfig):  # type: ignore[misc]  # executorch is untyped
    """ExecuTorch's memory plan makes a view of a kernel's result free; XNNPACK would copy it."""

    def check_constraints(self, node: fx.Node, ep: ExportedProgram) -> bool:
        """Whether the view is given to XNNPACK."""
        source = node.args[0]
        gathered = isinstance(source, fx.Node) and source.target == ops.edge.aten.as_strided_copy.default
        return not gathered and bool(super().check_constraints(node, ep))


def partitioner() -> Any:
    """The partitioner for one program."""
    configs = [BorderViewConfig if c is ViewCopyConfig else c for c in ALL_PARTITIONER_CONFIGS]
    return XnnpackPartitioner(configs=configs)
