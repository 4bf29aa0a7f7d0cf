"""Which nodes XNNPACK is given: all that it takes, but for views at the border, which cost nothing outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import ViewCopyConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.canonical_partitioners.config_partitioner import is_constant_data
from executorch.exir.dialects._ops import ops
from torch import fx
from torch.export import ExportedProgram

from edgetrain.export.lowering.executorch.early import compute_early
from edgetrain.export.lowering.executorch.pieces import is_piece
from edgetrain.export.lowering.executorch.turns import VIEW

_TAG = "delegation_tag"
# Bytes of windows that may wait together: a processor's second cache. To multiply them apart costs a call for each.
TOGETHER = 2 << 20


class BorderViewConfig(ViewCopyConfig):  # type: ignore[misc]  # executorch is untyped
    """ExecuTorch's memory plan makes a view of a kernel's result free; XNNPACK would copy it."""

    def check_constraints(self, node: fx.Node, ep: ExportedProgram) -> bool:
        """Whether the view is given to XNNPACK."""
        source = node.args[0]
        gathered = isinstance(source, fx.Node) and source.target == ops.edge.aten.as_strided_copy.default
        return not gathered and bool(super().check_constraints(node, ep))


class BorderPartitioner(XnnpackPartitioner):  # type: ignore[misc]  # executorch is untyped
    """XNNPACK's, but views at the border of a partition stand outside.

    Args:
        held_inputs: the program will hold some of its inputs itself; of such, ExecuTorch has no views.
    """

    def __init__(self, *, held_inputs: bool, **options: Any) -> None:
        super().__init__(**options)
        self._held_inputs = held_inputs

    def partition(self, exported_program: ExportedProgram) -> Any:
        """See `executorch.exir.backend.partitioner.Partitioner`."""
        result = super().partition(exported_program)
        nodes = list(result.tagged_exported_program.graph_module.graph.nodes)
        for node, tag in compute_early(nodes, {node: tag for node in nodes if (tag := _tag(node)) is not None}).items():
            node.meta[_TAG] = tag
        # What enters comes first, what leaves last: chains of views go out one after the other.
        for node in nodes:
            if _is_view(node) and _tag(node) != _tag(node.args[0]) and not self._stays(node.args[0], exported_program):
                node.meta.pop(_TAG, None)
        for node in reversed(nodes):
            # Results of the program are copied in any case.
            alone = all(_tag(user) != _tag(node) and user.op != "output" for user in node.users)
            if _is_view(node) and alone and not self._is_held(node.args[0]):
                node.meta.pop(_TAG, None)
        _separate(nodes, result.partition_tags)
        left = {_tag(node) for node in nodes}
        result.partition_tags = {tag: spec for tag, spec in result.partition_tags.items() if tag in left}
        return result

    def ops_to_not_decompose(self, ep: ExportedProgram) -> Any:
        """Operators all of whose nodes XNNPACK takes as they are: so the graph is not traced twice more to find out."""
        operators, is_taken = super().ops_to_not_decompose(ep)
        refused = {node.target for node in ep.graph.nodes if node.target in operators and not is_taken(node)}
        return [operator for operator in operators if operator not in refused], None

    def _stays(self, source: fx.Node, program: ExportedProgram) -> bool:
        """Whether a view of something outside must be XNNPACK's."""
        return bool(is_constant_data(program, source)) or self._is_held(source)

    def _is_held(self, source: fx.Node) -> bool:
        return self._held_inputs and source.op == "placeholder"


def _separate(nodes: Sequence[fx.Node], specs: dict[str, Any]) -> None:
    """Makes a partition of every connected piece that reads windows, so that it runs as soon as they are gathered.

    Else the windows of all layers would wait for one another, to be multiplied in the same partition.
    """
    pieces: dict[fx.Node, set[fx.Node]] = {}
    windows: dict[str, set[fx.Node]] = {}
    for node in nodes:
        tag = _tag(node)
        if tag is None or node.op != "call_function":
            continue
        piece = {node}
        for source in node.all_input_nodes:
            if source in pieces and _tag(source) == tag and source not in piece:
                piece |= pieces[source]
        for member in piece:
            pieces[member] = piece
        windows.setdefault(tag, set()).update(found for source in node.all_input_nodes if (found := _gathered(source)))
    large = {tag for tag, found in windows.items() if sum(node.meta["val"].nbytes for node in found) > TOGETHER}
    place = {node: index for index, node in enumerate(nodes)}
    for piece in {id(piece): piece for piece in pieces.values()}.values():
        first = min(piece, key=place.__getitem__)
        tag = str(_tag(first))
        if tag in large and any(_gathered(source) for member in piece for source in member.all_input_nodes):
            own = f"{tag} from {place[first]}"
            specs[own] = specs[tag]
            for member in piece:
                member.meta[_TAG] = own
    for node in nodes:
        if node.op == "placeholder" and _tag(node) is not None:
            # A constant is whose who reads it; ExecuTorch copies it for all others.
            node.meta[_TAG] = min(str(_tag(user)) for user in node.users if _tag(user) is not None)


def _gathered(node: fx.Node) -> fx.Node | None:
    """The windows, of which this is a view or a piece."""
    while _is_view(node) or is_piece(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node if node.target == ops.edge.aten.as_strided_copy.default else None


def _is_view(node: fx.Node) -> bool:
    return bool(node.target == VIEW)


def _tag(node: fx.Node) -> str | None:
    return node.meta.get(_TAG)


def partitioner(*, held_inputs: bool) -> Any:
    """The partitioner for one program."""
    configs = [BorderViewConfig if c is ViewCopyConfig else c for c in ALL_PARTITIONER_CONFIGS]
    return BorderPartitioner(configs=configs, held_inputs=held_inputs)
