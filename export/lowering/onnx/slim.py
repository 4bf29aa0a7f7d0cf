"""What an ONNX model can lose without computing anything else: texts, defaults, copies.

In a model of 100 kB of int8 weights, names and the like are a tenth of the file.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper, numpy_helper

_WINDOW = {"dilations": 1, "strides": 1, "pads": 0}
# Attributes whose absence means the same: operator -> attribute -> what each element is then.
_REPEATED = {
    "Conv": _WINDOW,
    "QLinearConv": _WINDOW,
    "ConvTranspose": {**_WINDOW, "output_padding": 0},
    "MaxPool": _WINDOW,
    "AveragePool": {"strides": 1, "pads": 0},
}


def slim(model: onnx.ModelProto) -> None:
    """Changes a model in place; names of inputs and outputs stay."""
    graph = model.graph
    model.producer_name = "edgetrain"
    _clear(model, "producer_version", "doc_string", "metadata_props")
    _clear(graph, "value_info", "doc_string", "metadata_props")
    for tensor in graph.initializer:
        _clear(tensor, "doc_string", "metadata_props")
    versions = {opset.domain: opset.version for opset in model.opset_import}
    for node in graph.node:
        _clear(node, "name", "doc_string", "overload", "metadata_props")
        _drop_defaults(node, versions.get(node.domain, 0))
    _drop_zero_points(graph)
    if not any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        # A branch of its own sees names from outside.
        _share_constants(graph)
        _shorten_names(graph)
    used = {node.domain for node in graph.node} | {""}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _clear(message: Any, *fields: str) -> None:
    for field in fields:
        message.ClearField(field)


def _drop_defaults(node: onnx.NodeProto, version: int) -> None:
    repeated = _REPEATED.get(node.op_type, {})
    declared = {}
    if onnx.defs.has(node.op_type, node.domain):
        declared = onnx.defs.get_schema(node.op_type, version, node.domain).attributes
    kept = []
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        default = declared[attribute.name].default_value if attribute.name in declared else None
        if attribute.name in repeated and set(value) == {repeated[attribute.name]}:
            continue
        # The kernel's shape is that of the weight.
        if attribute.name == "kernel_shape" and "Conv" in node.op_type:
            continue
        if default is not None and default.name and helper.get_attribute_value(default) == value:
            continue
        _clear(attribute, "doc_string")
        kept.append(attribute)
    del node.attribute[:]
    node.attribute.extend(kept)


def _drop_zero_points(graph: onnx.GraphProto) -> None:
    """A zero point of zero is the default where it only says what the values' own dtype says, too."""
    pointed = [node for node in graph.node if node.op_type == "DequantizeLinear" and len(node.input) > 2]
    named = {node.input[2] for node in pointed}
    needless = {
        tensor.name
        for tensor in graph.initializer
        if tensor.name in named
        and tensor.data_type != onnx.TensorProto.UINT8
        and not numpy_helper.to_array(tensor).any()
    }
    for node in pointed:
        if node.input[2] in needless:
            del node.input[2]


def _share_constants(graph: onnx.GraphProto) -> None:
    """One of several equal constants, and none that nobody reads."""
    outputs = {value.name for value in graph.output}
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        key = (tensor.data_type, tuple(tensor.dims), array.tobytes())
        names[tensor.name] = tensor.name if tensor.name in outputs else first.setdefault(key, tensor.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    used = {name for node in graph.node for name in node.input} | outputs
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _shorten_names(graph: onnx.GraphProto) -> None:
    names: dict[str, str] = {"": "", **{value.name: value.name for value in (*graph.input, *graph.output)}}
    taken = set(names)
    count = 0

    def short(old: str) -> str:
        nonlocal count
        while old not in names:
            new = _word(count)
            count += 1
            if new not in taken:
                names[old] = new
        return names[old]

    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    for node in graph.node:
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]


def _word(number: int) -> str:
    """A number in base 62."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    word = digits[number % 62]
    while number := number // 62:
        word = digits[number % 62] + word
    return word
