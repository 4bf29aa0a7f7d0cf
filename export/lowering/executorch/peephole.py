"""XNNPACK subgraphs, once more before they are written: turned operands are read as they lie.

XNNPACK's batched product packs its second operand anyway, and can turn it while doing so. ExecuTorch has no operator
that says so; the written format has: a flag of the product's node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from edgetrain.export.lowering.executorch.order import put_inside_in_order
from edgetrain.export.lowering.executorch.subgraph import operands, tensor_of

TRANSPOSE_B = 1
_TURNED = [0, 2, 1]


@contextmanager
def peephole() -> Iterator[None]:
    """While it is active, ExecuTorch writes subgraphs as the functions below leave them, in order."""
    from executorch.backends.xnnpack import xnnpack_preprocess  # noqa: PLC0415  # slow to import

    write: Callable[..., bytes] = xnnpack_preprocess.serialize_xnnpack_binary

    def improved(graph: Any, *args: Any, **kwargs: Any) -> bytes:
        turn_inside(graph)
        shape_once(graph)
        convert_at_borders(graph)
        put_inside_in_order(graph)
        return write(graph, *args, **kwargs)

    xnnpack_preprocess.serialize_xnnpack_binary = improved
    try:
        yield
    finally:
        xnnpack_preprocess.serialize_xnnpack_binary = write


def turn_inside(graph: Any) -> None:
    """Products read their second operand before it is turned; who nobody reads any more goes.

    Args:
        graph: an `XNNGraph` of ExecuTorch's, changed in place.
    """
    nodes = [node.xnode_union for node in graph.xnodes]
    turned = {n.output_id: n for n in nodes if type(n).__name__ == "XNNStaticTranspose" and n.perm == _TURNED}
    products = [n for n in nodes if type(n).__name__ == "XNNBatchMatrixMultiply"]
    for product in products:
        if product.input2_id in turned:
            product.input2_id = turned[product.input2_id].input_id
            product.flags |= TRANSPOSE_B
    read = Counter(number for node in nodes for number in operands(node, "input").values())
    _remove(graph, {n for n in turned if not read[n] and n not in graph.output_ids})


def shape_once(graph: Any) -> None:
    """Of copies of one tensor in one shape, the first is kept.

    Args:
        graph: as for `turn_inside`.
    """
    first: dict[tuple[int, tuple[int, ...]], int] = {}
    same: dict[int, int] = {}
    for node in (node.xnode_union for node in graph.xnodes):
        _read_instead(node, same)
        if type(node).__name__ == "XNNStaticReshape" and node.output_id not in graph.output_ids:
            kept = first.setdefault((node.input_id, tuple(node.new_shape)), node.output_id)
            if kept != node.output_id:
                same[node.output_id] = kept
    _remove(graph, set(same))


def convert_at_borders(graph: Any) -> None:
    """Zeros and ones that became bytes and floats again within the subgraph stay floats.

    Args:
        graph: as for `turn_inside`.
    """
    maker: dict[int, Any] = {n.xnode_union.output_id: n for n in graph.xnodes if hasattr(n.xnode_union, "output_id")}
    converts = {number: n.xnode_union for number, n in maker.items() if type(n.xnode_union).__name__ == "XNNConvert"}
    quantized = {tensor_of(v).id_out: v.xvalue_union.quant_params for v in graph.xvalues if _is_quantized(v)}
    same: dict[int, int] = {}
    for number, back in converts.items():
        forth = converts.get(back.input_id)
        if forth is None or number in graph.output_ids or not _is_zero_or_one(maker.get(forth.input_id)):
            continue
        scale = quantized[back.input_id]
        if (scale.scale, scale.zero_point) == (1.0, 0):
            same[number] = forth.input_id
    for node in graph.xnodes:
        _read_instead(node.xnode_union, same)
    _remove(graph, set(same))
    read = {number for node in graph.xnodes for number in operands(node.xnode_union, "input").values()}
    _remove(graph, converts.keys() - read - set(graph.output_ids))


def _is_quantized(value: Any) -> bool:
    return hasattr(value.xvalue_union, "quant_params")


def _is_zero_or_one(node: Any) -> bool:
    if node is None or type(node.xnode_union).__name__ != "XNNClamp":
        return False
    bounds = node.output_min_max
    return (float(bounds.output_min), float(bounds.output_max)) == (0.0, 1.0)


def _read_instead(node: Any, same: Mapping[int, int]) -> None:
    """The node reads other values in place of some."""
    for name, number in operands(node, "input").items():
        setattr(node, name, same.get(number, number))


def _remove(graph: Any, gone: set[int]) -> None:
    """What makes these values, and the values."""
    graph.xnodes = [node for node in graph.xnodes if getattr(node.xnode_union, "output_id", None) not in gone]
    graph.xvalues = [value for value in graph.xvalues if tensor_of(value).id_out not in gone]
