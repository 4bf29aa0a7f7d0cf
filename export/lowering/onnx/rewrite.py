"""What is changed in a traced graph because onnxruntime is slow with it as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from edgetrain.export.graph.attention import MASKED
from edgetrain.export.lowering.onnx.decompositions import GELU_CUBIC, GELU_LINEAR
from edgetrain.export.lowering.onnx.strips import in_strips

aten = torch.ops.aten

_BY_A_NUMBER = (aten.div.Scalar, aten.mul.Scalar, aten.div.Tensor, aten.mul.Tensor)
_BROADCASTING = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)


def for_onnxruntime(module: fx.GraphModule) -> fx.GraphModule:
    """The graph rewritten; shares its tensors with the given one, which stays as it is."""
    module = fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in list(module.graph.nodes):
        if node.target is aten._softmax.default:  # noqa: SLF001
            _raise_masks(module.graph, node)
        elif node.target is aten.sigmoid.default:
            _whole_gelu(module.graph, node)
        elif node.target is aten.expand.default:
            _expand_late(module.graph, node)
    module.graph.eliminate_dead_code()
    module.recompile()
    module = in_strips(module)
    for node in list(module.graph.nodes):
        if node.target is aten.sum.dim_IntList:
            _sum_as_product(module.graph, node)
    module.recompile()
    return module


def _whole_gelu(graph: fx.Graph, gate: fx.Node) -> None:
    """A GELU whose parts no backward pass shares, as one operator: onnxruntime has a kernel for it."""
    if len(gate.users) != 1:
        return
    (product,), argument = gate.users, gate.args[0]
    x = next((other for other in product.args if other is not gate), None)
    if product.target is not aten.mul.Tensor or not isinstance(x, fx.Node) or not isinstance(argument, fx.Node):
        return
    # The square, the argument and the product; a backward pass begins with the same.
    if len(x.users) == 3 and _is_gelu_argument(argument, x):
        with graph.inserting_before(product):
            traced = make_fx(_fast_gelu)(x.meta["val"])
            called: Any = traced.graph.output_node().args[0]
            whole = graph.node_copy(called, lambda _: x)
        product.replace_all_uses_with(whole)


def _fast_gelu(x: torch.Tensor) -> torch.Tensor:
    """One operator: its call is traced and copied."""
    return torch.onnx.ops.symbolic("com.microsoft::FastGelu", (x,), dtype=x.dtype, shape=x.shape, version=1)


def _is_gelu_argument(node: fx.Node, x: fx.Node) -> bool:
    """Whether it is x * (x * x * c + d) with the numbers of `decompositions.gelu`."""
    slope = _other_factor(node, x)
    if slope is None or slope.target is not aten.add.Tensor or slope.args[1] != GELU_LINEAR:
        return False
    cube: Any = slope.args[0]
    if cube.target is not aten.mul.Tensor or cube.args[1] != GELU_CUBIC:
        return False
    return _other_factor(cube.args[0], x) is x


def _other_factor(node: fx.Node, x: fx.Node) -> fx.Node | None:
    if node.target is not aten.mul.Tensor or x not in node.args:
        return None
    other = node.args[1] if node.args[0] is x else node.args[0]
    return other if isinstance(other, fx.Node) else None


def _expand_late(graph: fx.Graph, expand: fx.Node) -> None:
    """Operates on what is expanded before the expansion, and lets arithmetic with a full operand expand by itself.

    The gradient of a mean is one number for a whole image, which is divided and then multiplied with masks.
    """
    small = expand.args[0]
    assert isinstance(small, fx.Node)
    if not _same_rank(small, expand):
        return
    for user in list(expand.users):
        if user.target in _BY_A_NUMBER and not any(isinstance(other, fx.Node) for other in user.args[1:]):
            with graph.inserting_before(user):
                early = graph.call_function(user.target, (small, *user.args[1:]), user.kwargs)
                early.meta["val"] = user.target(small.meta["val"], *user.args[1:], **user.kwargs)
                late = graph.call_function(aten.expand.default, (early, expand.args[1]))
                late.meta["val"] = user.meta["val"]
            user.replace_all_uses_with(late)
            _expand_late(graph, late)
        elif user.target in _BROADCASTING and any(
            isinstance(other, fx.Node) and other is not expand and _shape(other) == _shape(user) for other in user.args
        ):
            user.replace_input_with(expand, small)


def _same_rank(small: fx.Node, large: fx.Node) -> bool:
    shapes = _shape(small), _shape(large)
    return shapes[0] is not None and shapes[1] is not None and len(shapes[0]) == len(shapes[1])


def _shape(node: fx.Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else None


def _raise_masks(graph: fx.Graph, softmax: fx.Node) -> None:
    """Raises attention scores to `MASKED` below the row's largest.

    The exponentials of a mask are denormal numbers, with which onnxruntime's softmax takes ten times as long. Rows that
    are masked whole stay NaN.
    """
    scores, dim, _ = softmax.args
    assert isinstance(scores, fx.Node)
    value = softmax.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim < 3 or scores.target is aten.maximum.default:
        return
    with graph.inserting_before(softmax):
        # Without a last dimension of 1, with which onnxruntime works element by element.
        largest = graph.call_function(aten.amax.default, (scores, [dim]))
        lowest = graph.call_function(aten.sub.Tensor, (largest, MASKED))
        lowest = graph.call_function(aten.unsqueeze.default, (lowest, dim))
        softmax.replace_input_with(scores, graph.call_function(aten.maximum.default, (scores, lowest)))


def _sum_as_product(graph: fx.Graph, node: fx.Node) -> None:
    """The sum of a matrix's rows, such as the gradient of a bias, as a product with ones: half the time."""
    matrix, dims, *rest = node.args
    value = matrix.meta.get("val") if isinstance(matrix, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim != 2 or value.dtype != torch.float32 or dims != [0]:
        return
    with graph.inserting_before(node):
        ones = graph.call_function(aten.full.default, ([1, value.shape[0]], 1.0), {"dtype": value.dtype})
        total = graph.call_function(aten.mm.default, (ones, matrix))
        if not (rest and rest[0]):
            total = graph.call_function(aten.reshape.default, (total, [value.shape[1]]))
    node.replace_all_uses_with(total)
    graph.erase_node(node)
