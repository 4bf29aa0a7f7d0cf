"""Rewrites a traced graph into operators that XNNPACK takes, knowing what is frozen and what is variable.

The graph is interpreted once more under a tracer: what depends on no input is computed now, and operators with
a rule are replaced by it. So a rule is an ordinary function on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.joint import TracedGraph
from edgetrain.export.lowering import executorch_convolution as conv
from edgetrain.export.lowering.executorch_pooling import max_pool, max_pool_backward

aten = torch.ops.aten

# Sums of fewer elements stay with ExecuTorch's own kernel.
SMALL = 512
# A mask's minus infinity: far below any score, and XNNPACK's exp makes no NaN of it.
MASKED = -1e30


def rewrite(graph: TracedGraph) -> fx.GraphModule:
    """The same function of the same inputs, in the operators of this module's rules."""
    once = fx.GraphModule(graph.module, fx_graph_cse(graph.module.graph))
    with torch.no_grad():
        module = make_fx(_Rewriter(once).run)(*graph.example)
    _tidy(module)
    return module


def _tidy(module: fx.GraphModule) -> None:
    """Removes what nobody reads, what is computed twice, views that change nothing, and views of views."""
    module.graph.eliminate_dead_code()
    module.graph = fx_graph_cse(module.graph)
    for node in module.graph.nodes:
        if node.op != "call_function" or any(user.op == "output" for user in node.users):
            continue
        if node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
        elif node.target == aten.view.default:
            source = node.args[0]
            if source.target == aten.view.default:
                source = source.args[0]
                node.update_arg(0, source)
            if source.meta["val"].shape == node.meta["val"].shape:
                node.replace_all_uses_with(source)
    module.graph.eliminate_dead_code()
    module.recompile()


class _Rewriter(fx.Interpreter):
    """Interprets a graph; see the module."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.node: fx.Node = next(iter(module.graph.nodes))
        self._constants: dict[tuple[object, ...], Tensor] = {}
        self.static: set[fx.Node] = set()
        for node in module.graph.nodes:
            if node.op == "get_attr" or (
                node.op == "call_function" and all(n in self.static for n in node.all_input_nodes)
            ):
                self.static.add(node)

    def run_node(self, n: fx.Node) -> Any:
        """Remembers the node, for the rules."""
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Computes, replaces or keeps one call."""
        if self.node in self.static:
            with disable_proxy_modes_tracing():
                return target(*args, **kwargs)
        rule = _RULES.get(target)
        result = rule(self, *args, **kwargs) if rule else NotImplemented
        if result is NotImplemented:
            return super().call_function(target, args, kwargs)
        # Views that follow were traced on the strides of the original.
        if isinstance(result, tuple):
            return tuple(part if part is None else part.contiguous() for part in result)
        return result.contiguous()

    def is_static(self, index: int) -> bool:
        """Whether an argument of the current call is known now."""
        argument = self.node.args[index]
        return not isinstance(argument, fx.Node) or argument in self.static

    def value(self, node: fx.Node) -> Any:
        """What an earlier node computed."""
        return self.env[node]

    def shape(self) -> torch.Size:
        """Of the current call's (first) result, computed now."""
        with disable_proxy_modes_tracing():
            arguments = fx.node.map_arg(self.node.args, lambda node: self.env[node])
            assert callable(self.node.target), "a call"
            result = self.node.target(*arguments, **self.node.kwargs)
        first: Tensor = result[0] if isinstance(result, tuple) else result
        return first.shape

    def constant(self, make: Callable[..., Tensor], *args: Any) -> Tensor:
        """A tensor that is computed now; the same for the same call."""
        key = (make, *args)
        if key not in self._constants:
            with disable_proxy_modes_tracing():
                self._constants[key] = make(*args).contiguous()
        return self._constants[key]

    def now(self, make: Callable[..., Tensor], *args: Any) -> Tensor:
        """A tensor that is computed now."""
        with disable_proxy_modes_tracing():
            return make(*args).contiguous()


def _sum(
    rewriter: _Rewriter, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    """Products with ones."""
    if x.dtype != torch.float32 or x.numel() < SMALL or kwargs:
        return NotImplemented
    summed = sorted(dim % x.ndim for dim in dims) if dims else list(range(x.ndim))
    return _weighted_sum(rewriter, x, summed, 1.0, keepdim=keepdim)


def _mean(
    rewriter: _Rewriter, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    """Global pooling, which XNNPACK has, or a sum."""
    if x.dtype != torch.float32 or x.numel() < SMALL or kwargs:
        return NotImplemented
    summed = sorted(dim % x.ndim for dim in dims) if dims else list(range(x.ndim))
    if x.ndim == 4 and summed == [2, 3]:
        pooled = aten.mean.dim(x, summed, True)
        return pooled if keepdim else pooled.reshape(x.shape[:2])
    return _weighted_sum(rewriter, x, summed, 1 / math.prod(x.shape[dim] for dim in summed), keepdim=keepdim)


def _weighted_sum(rewriter: _Rewriter, x: Tensor, dims: list[int], weight: float, *, keepdim: bool) -> Tensor:
    shape = x.shape
    for first, last in reversed(_runs(dims)):
        before, count = math.prod(shape[:first]), math.prod(shape[first : last + 1])
        after = x.numel() // (before * count)
        if after == 1:
            ones = rewriter.constant(torch.full, (1, count, 1), weight)
            x = torch.bmm(x.reshape(1, before, count), ones)
        else:
            ones = rewriter.constant(torch.full, (before, 1, count), weight)
            x = torch.bmm(ones, x.reshape(before, count, after))
        weight = 1.0
    if keepdim:
        return x.reshape([1 if dim in dims else size for dim, size in enumerate(shape)])
    return x.reshape([size for dim, size in enumerate(shape) if dim not in dims])


def _runs(dims: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbouring dimensions."""
    runs: list[tuple[int, int]] = []
    for dim in dims:
        if runs and runs[-1][1] == dim - 1:
            runs[-1] = runs[-1][0], dim
        else:
            runs.append((dim, dim))
    return runs


def _mm(rewriter: _Rewriter, a: Tensor, b: Tensor) -> Any:
    """XNNPACK multiplies by a constant matrix, or two variable ones as a batch."""
    if a.dtype != torch.float32 or rewriter.is_static(1):
        return NotImplemented
    return _mm_variable(a, b)


def _addmm(rewriter: _Rewriter, bias: Tensor, a: Tensor, b: Tensor, **scales: Any) -> Any:
    if scales or a.dtype != torch.float32 or (rewriter.is_static(0) and rewriter.is_static(2)):
        return NotImplemented
    if rewriter.is_static(2):
        return torch.mm(a, b) + bias
    return _mm_variable(a, b) + bias


def _mm_variable(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.reshape(1, *a.shape), b.reshape(1, *b.shape)).reshape(a.shape[0], b.shape[1])


def _expand(rewriter: _Rewriter, x: Tensor, size: Sequence[int], **kwargs: Any) -> Any:
    """Nothing to do where the shape is the same, or where the reader broadcasts by itself."""
    del kwargs
    wanted = [x.shape[i - len(size)] if n == -1 else n for i, n in enumerate(size)]
    if wanted == list(x.shape):
        return x
    if len(size) != x.ndim or not all(_broadcasts(rewriter, user, wanted) for user in rewriter.node.users):
        return NotImplemented
    return x


def _broadcasts(rewriter: _Rewriter, user: fx.Node, size: Sequence[int]) -> bool:
    """Whether a reader of an expanded tensor brings another operand of the full size."""
    if user.target == aten.div.Scalar:
        return all(_broadcasts(rewriter, reader, size) for reader in user.users)
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not rewriter.node]
    return user.target in _ELEMENTWISE and any(
        list(other.meta["val"].shape) == list(size) and other.target not in _UNEXPANDED for other in others
    )


def _div(rewriter: _Rewriter, x: Tensor, divisor: float) -> Any:
    """By a number: a product, before it is expanded rather than after."""
    del rewriter
    return x * (1 / divisor)


def _unsqueeze(rewriter: _Rewriter, x: Tensor, dim: int) -> Tensor:
    """A view, which XNNPACK takes for any dimension."""
    del rewriter
    dim %= x.ndim + 1
    return x.reshape([*x.shape[:dim], 1, *x.shape[dim:]])


def _squeeze(_rewriter: _Rewriter, x: Tensor, dims: Sequence[int] | int) -> Tensor:
    dims = [dims] if isinstance(dims, int) else dims
    gone = {dim % x.ndim for dim in dims if x.shape[dim] == 1}
    return x.reshape([size for dim, size in enumerate(x.shape) if dim not in gone])


def _add(rewriter: _Rewriter, a: Tensor, b: Any, *, alpha: float = 1) -> Any:
    """Attention masks in finite numbers; `alpha` spelled out."""
    if alpha != 1:
        return a + b * alpha
    node = rewriter.node
    if all(user.target in _SOFTMAX for user in node.users) and rewriter.is_static(1) and isinstance(b, Tensor):
        return a + rewriter.now(lambda: b.clamp(min=MASKED))
    return NotImplemented


def _safe_softmax(rewriter: _Rewriter, x: Tensor, dim: int, dtype: Any = None) -> Any:
    """Softmax that gives zeros where a whole row is masked: only a variable mask can do that."""
    if dtype not in (None, torch.float32):
        return NotImplemented
    source = rewriter.node.args[0]
    assert isinstance(source, fx.Node)
    if source.target == aten.add.Tensor:
        mask = source.args[1]
        known = rewriter.value(mask) if isinstance(mask, fx.Node) and mask in rewriter.static else None
        with disable_proxy_modes_tracing():
            may_hide_all = known is None or bool((known <= MASKED).all(-1).any())
    else:
        may_hide_all = source.target in (aten.where.self, aten.masked_fill.Scalar)
    if not may_hide_all:
        return aten._softmax.default(x, dim, False)  # noqa: SLF001
    # 0 where the score is minus infinity, 1 elsewhere.
    alive = aten.clamp.default(x - MASKED, 0.0, 1.0)
    return aten._softmax.default(aten.clamp.default(x, MASKED), dim, False) * alive  # noqa: SLF001


def _batch_norm(
    rewriter: _Rewriter,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *rest: Any,
) -> Any:
    """With running statistics: a scale and a shift; what a convolution could take was folded before."""
    training, eps = (False, rest[1]) if len(rest) == 2 else (rest[0], rest[2])
    if training:
        return NotImplemented
    channels = [1, -1, *[1] * (x.ndim - 2)]
    inverse = rewriter.now(lambda: torch.rsqrt(var + eps))
    scale = inverse if weight is None else weight * inverse
    shift = -mean * scale if bias is None else bias - mean * scale
    empty = rewriter.constant(torch.zeros, (0,))
    return x * scale.reshape(channels) + shift.reshape(channels), empty, empty


def _pair(values: Sequence[int], rank: int, missing: int) -> tuple[int, ...]:
    """Settings of a 1-d or 2-d convolution as rows, columns."""
    values = list(values) * rank if len(values) == 1 else list(values)
    return (missing, *values) if rank == 1 else tuple(values)


def _image(x: Tensor) -> Tensor:
    """[N, C, L] as [N, C, 1, L]."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], 1, x.shape[-1])


def _geometry(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> conv.Geometry:
    rank = weight.ndim - 2
    return conv.Geometry(
        kernel=tuple(_image(weight).shape[2:]),
        stride=_pair(stride, rank, 1),
        padding=_pair(padding, rank, 0),
        dilation=_pair(dilation, rank, 1),
        groups=groups,
    )


def _convolution(
    rewriter: _Rewriter,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    if weight.ndim > 4:
        return NotImplemented
    if rewriter.is_static(1):
        if rewriter.is_static(2):
            return NotImplemented
        y = aten.convolution.default(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)
    else:
        geometry = _geometry(weight, stride, padding, dilation, groups)
        shape = rewriter.shape()
        if transposed:
            y = conv.input_gradient(_image(x), _image(weight), geometry, _image_size(shape)).reshape(shape)
        else:
            y = conv.convolution(_image(x), _image(weight), geometry).reshape(shape)
    return y if bias is None else y + bias.reshape(1, -1, *[1] * (y.ndim - 2))


def _image_size(shape: Sequence[int]) -> Sequence[int]:
    return shape[2:] if len(shape) == 4 else (1, shape[2])


def _convolution_backward(
    rewriter: _Rewriter,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    del bias_sizes, output_padding
    if weight.ndim > 4:
        raise UnsupportedError(
            "executorch: no gradient of a three-dimensional convolution; freeze it and what comes before it"
        )
    geometry = _geometry(weight, stride, padding, dilation, groups)
    images = _image(grad), _image(x)
    grad_x = grad_w = grad_b = None
    if output_mask[0]:
        if transposed:
            grad_x = _product(rewriter, images[0], weight, geometry).reshape(x.shape)
        else:
            grad_x = _input_gradient(rewriter, images[0], weight, geometry, images[1].shape[2:])
            grad_x = grad_x.reshape(x.shape)
    if output_mask[1]:
        inputs, outputs = images if transposed else images[::-1]
        grad_w = conv.weight_gradient(inputs, outputs, geometry).reshape(weight.shape)
    if output_mask[2]:
        dims = [0, *range(2, grad.ndim)]
        grad_b = _sum(rewriter, grad, dims)
        if grad_b is NotImplemented:
            grad_b = grad.sum(dims)
    return grad_x, grad_w, grad_b


def _product(rewriter: _Rewriter, x: Tensor, weight: Tensor, geometry: conv.Geometry) -> Tensor:
    if not rewriter.is_static(2):
        return conv.convolution(x, _image(weight), geometry)
    return _constant_convolution(rewriter, x, weight, geometry, geometry.padding, geometry.stride)


def _constant_convolution(
    rewriter: _Rewriter,
    x: Tensor,
    weight: Tensor,
    geometry: conv.Geometry,
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    weight = rewriter.now(lambda: _image(weight))
    result: Tensor = aten.convolution.default(
        x, weight, None, list(stride), list(padding), list(geometry.dilation), False, [0, 0], geometry.groups
    )
    return result


def _input_gradient(
    rewriter: _Rewriter, grad: Tensor, weight: Tensor, geometry: conv.Geometry, size: Sequence[int]
) -> Tensor:
    """With constant weights XNNPACK convolves: forwards at stride 1, else transposed."""
    if not rewriter.is_static(2):
        return conv.input_gradient(grad, _image(weight), geometry, size)
    padding = [geometry.dilation[i] * (geometry.kernel[i] - 1) - geometry.padding[i] for i in range(2)]
    if geometry.stride == (1, 1) and min(padding) >= 0:
        mirrored = rewriter.now(lambda: _mirror(_image(weight), geometry.groups))
        return _constant_convolution(rewriter, grad, mirrored, geometry, padding, geometry.stride)
    rest = [
        size[i]
        - (
            (grad.shape[2 + i] - 1) * geometry.stride[i]
            + geometry.dilation[i] * (geometry.kernel[i] - 1)
            + 1
            - 2 * geometry.padding[i]
        )
        for i in range(2)
    ]
    result: Tensor = aten.convolution.default(
        grad,
        rewriter.now(lambda: _image(weight)),
        None,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        True,
        rest,
        geometry.groups,
    )
    return result


def _mirror(weight: Tensor, groups: int) -> Tensor:
    """Weights of the convolution that is the transpose: [G*O, I, kh, kw] -> [G*I, O, kh, kw], turned around."""
    O, I, *kernel = weight.shape
    grouped = weight.reshape(groups, O // groups, I, *kernel).transpose(1, 2)
    return grouped.reshape(groups * I, O // groups, *kernel).flip(-1, -2)


def _max_pool(rewriter: _Rewriter, x: Tensor, *settings: Any) -> Any:
    """The indices are kept only if somebody other than the backward pass reads them."""
    backward = aten.max_pool2d_with_indices_backward.default
    for user in rewriter.node.users:
        if user.args[1] == 1 and any(reader.target != backward for reader in user.users):
            return NotImplemented
    if x.ndim != 4:
        return NotImplemented
    return max_pool(x, rewriter.shape()[2:], *settings), None


def _max_pool_backward(rewriter: _Rewriter, grad: Tensor, x: Tensor, *settings: Any) -> Any:
    del rewriter
    if x.ndim == 3:
        grad, image = grad.reshape(1, *grad.shape), x.reshape(1, *x.shape)
        return max_pool_backward(grad, image, *settings[:-1]).reshape(x.shape)
    return max_pool_backward(grad, x, *settings[:-1])


_ELEMENTWISE = (aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor)
_UNEXPANDED = (aten.div.Scalar, aten.expand.default)
_SOFTMAX = (aten._safe_softmax.default, aten._softmax.default)  # noqa: SLF001
_RULES: dict[Any, Callable[..., Any]] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,  # noqa: SLF001
    aten._safe_softmax.default: _safe_softmax,  # noqa: SLF001
    aten.add.Tensor: _add,
    aten.addmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.div.Scalar: _div,
    aten.expand.default: _expand,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.mean.dim: _mean,
    aten.mm.default: _mm,
    aten.native_batch_norm.default: _batch_norm,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.unsqueeze.default: _unsqueeze,
}
