"""The trunk in int8 arithmetic: pt2e quantization with ExecuTorch's XNNPACK quantizer.

Static: the range of every quantized activation is measured on calibration data; weights have a scale for each output
channel. Quantized are convolutions and linear layers, with the relu that follows, and sums of images (residual
connections). Norms, attention and sums of token vectors stay float32: their few operations are not worth the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from torch import Tensor, fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.graph.nodes import is_constant, shape_of
from edgetrain.export.graph.partition import Split
from edgetrain.export.graph.tidy import frozen_attribute
from edgetrain.export.lowering.executorch.rewrite import rewrite
from edgetrain.export.lowering.exported import exported

aten = torch.ops.aten

_LAYERS = (aten.conv2d.default, aten.linear.default)
# Shared quantization would round averages with the range of what they average.
_FLOAT = (aten.mean.dim,)
# What reads a table of vectors, or adds one.
_NO_LAYERS = (aten.embedding.default, aten.index.Tensor, aten.add.Tensor)
_ARITHMETIC = (aten.add.Tensor, aten.mul.Tensor)


def quantized_module(trunk: TracedGraph, batches: Sequence[Sequence[Tensor]]) -> fx.GraphModule | None:
    """The trunk as torch runs it with quantize and dequantize operators, which XNNPACK fuses; None without any layer.

    Args:
        trunk: with contiguous example inputs.
        batches: its inputs in order, for the ranges.
    """
    module = rewrite(trunk)
    layers(module)
    if not any(node.target in _LAYERS for node in module.graph.nodes):
        return None
    program = exported(module, trunk.example).module(check_guards=False)
    quantizer = _Quantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(_worth_it)
    prepared: Any = prepare_pt2e(program, quantizer)
    for batch in batches:
        prepared(*batch)
    converted: fx.GraphModule = convert_pt2e(prepared)
    return converted


def in_layers(names: Sequence[str], parts: Split) -> list[str]:
    """Of some frozen tensors the weights of the trunk's layers; those that the head reads, too, stay float32."""
    float32 = {str(node.target) for node in parts.head_step.module.graph.nodes if node.op == "get_attr"}
    for node in parts.trunk.module.graph.nodes:
        if node.op == "get_attr" and any(user.target in _NO_LAYERS for user in node.users):
            float32.add(str(node.target))
    return [name for name in names if frozen_attribute(name) not in float32]


def layers(module: fx.GraphModule) -> None:
    """Convolutions and products with constant weights as the layers that the quantizer looks for, in place."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in _FORMS:
            continue
        with module.graph.inserting_before(node):
            layer = _FORMS[node.target](module, node)
        if layer is not None:
            layer.meta = dict(node.meta)
            node.replace_all_uses_with(layer)
    module.graph.eliminate_dead_code()
    module.recompile()


def _convolution(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    if transposed or not is_constant(weight) or _value(module, weight).ndim != 4:
        return None
    return module.graph.call_function(aten.conv2d.default, (x, weight, bias, stride, padding, dilation, groups))


def _mm(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, weight = node.args
    return _linear(module, x, weight, ())


def _addmm(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    bias, x, weight = node.args
    return _linear(module, x, weight, (bias,)) if is_constant(bias) else None


def _linear(module: fx.GraphModule, x: Any, weight: Any, bias: tuple[Any, ...]) -> fx.Node | None:
    if not is_constant(weight):
        return None
    name = f"{weight.target}_transposed".replace(".", "_")
    if not hasattr(module, name):
        module.register_buffer(name, _value(module, weight).t().contiguous())
    return module.graph.call_function(aten.linear.default, (x, module.graph.get_attr(name), *bias))


_FORMS: dict[Any, Callable[[fx.GraphModule, fx.Node], fx.Node | None]] = {
    aten.addmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten.mm.default: _mm,
}


def _value(module: fx.GraphModule, node: Any) -> Tensor:
    tensor: Tensor = getattr(module, node.target)
    return tensor


def _worth_it(node: fx.Node) -> bool:
    """Layers; and of sums those of two images."""
    if node.target not in _ARITHMETIC:
        return True
    images = [a for a in node.args if isinstance(a, fx.Node) and shape_of(a) == shape_of(node)]
    return node.target is aten.add.Tensor and len(shape_of(node)) == 4 and len(images) == 2


class _Quantizer(XNNPACKQuantizer):  # type: ignore[misc]  # executorch is untyped
    """XNNPACK's, which knows relu behind a layer, and relu6 too, which XNNPACK fuses as well."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Says which values are to be quantized, and how."""
        config = self.global_config
        for node in model.graph.nodes:
            if node.target in _FLOAT:
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)
            if node.target is not aten.hardtanh.default:
                continue
            layer = node.args[0]
            if layer.target not in _LAYERS or len(layer.users) > 1:
                continue
            x, weight = layer.args[:2]
            layer.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map={x: config.input_activation, weight: config.weight}, _annotated=True
            )
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=config.output_activation, _annotated=True)
        annotated: fx.GraphModule = super().annotate(model)
        return annotated
