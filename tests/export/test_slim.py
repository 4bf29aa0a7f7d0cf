"""A slimmer model computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgetrain.export.lowering.onnx.slim import slim


def convolution():
    """Two convolutions with everything said, a constant that is there twice, and one that nobody reads."""
    rng = np.random.default_rng(0)
    constants = {
        "a.long.name.of.a.weight": rng.normal(size=(4, 2, 3, 3)),
        "another.long.name.of.a.weight": rng.normal(size=(4, 4, 3, 3)),
        "bias.once": np.arange(4),
        "bias.twice": np.arange(4),
        "nobody": np.zeros(1000),
    }
    said = {"dilations": [1, 1], "group": 1, "kernel_shape": [3, 3], "strides": [1, 1]}
    nodes = [
        helper.make_node(
            "Conv", ["x", "a.long.name.of.a.weight", "bias.once"], ["hidden"], name="n1", pads=[0] * 4, **said
        ),
        helper.make_node("LeakyRelu", ["hidden"], ["activated"], name="n2", alpha=0.01),
        helper.make_node(
            "Conv",
            ["activated", "another.long.name.of.a.weight", "bias.twice"],
            ["y"],
            doc_string="made here",
            pads=[1, 1, 1, 1],
            **said,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
        value_info=[helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [1, 4, 6, 6])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def run(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.linspace(-1, 1, 128, dtype=np.float32).reshape(1, 2, 8, 8)})[0]


def test_it_computes_the_same_in_fewer_bytes():
    model = convolution()
    expected, before = run(model), model.ByteSize()
    slim(model)
    onnx.checker.check_model(model)
    np.testing.assert_array_equal(run(model), expected)
    # 216 numbers, 4 of them once; what nobody reads was 4,000 bytes.
    assert 4 * (72 + 144 + 4) < model.ByteSize() < 4 * (72 + 144 + 4) + 300
    assert before > 5500
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    assert max(len(tensor.name) for tensor in model.graph.initializer) == 1
    assert {attribute.name for node in model.graph.node for attribute in node.attribute} == {"pads"}


def test_names_that_a_branch_sees_stay():
    branch = helper.make_graph(
        [helper.make_node("Add", ["outer", "outer"], ["sum"])],
        "b",
        [],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, [2])],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Neg", ["x"], ["outer"]),
            helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.array(True), "yes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    slim(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.float32([1, 2])})[0].tolist() == [-2, -4]
