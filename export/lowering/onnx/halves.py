"""Small float32 constants of a model as one float16 constant, which is widened and cut up when the model is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgetrain.protocol.vectors import Vector


def in_half(values: Vector) -> Vector | None:
    """The nearest values that float16 holds with all of its bits; None if one is out of its range."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    sizes = np.abs(half[values != 0])
    if not np.isfinite(half).all() or (sizes < np.finfo(np.float16).smallest_normal).any():
        return None
    return half.astype(np.float32)


def exact_in_half(values: Vector) -> bool:
    """Whether float16 holds these very values."""
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16).astype(np.float32), values)


class Halves:
    """One such constant.

    Args:
        name: begins the names of what is added.
        whole: the values are whole numbers, wanted as int32.
    """

    def __init__(self, name: str, *, whole: bool = False) -> None:
        self._name = name
        self._whole = whole
        self._parts: dict[str, Vector] = {}

    def add(self, name: str, values: Vector) -> None:
        """Adds a vector that is exact in float16, to be found under `name`."""
        assert values.ndim == 1
        assert exact_in_half(values)
        self._parts[name] = values

    def write(self, model: onnx.ModelProto, factor: float = 1.0) -> None:
        """Puts the constant into a model, in front of everything; its values are multiplied by `factor`."""
        if not self._parts:
            return
        tensors = [numpy_helper.from_array(np.concatenate(list(self._parts.values())).astype(np.float16), self._name)]
        nodes: list[onnx.NodeProto] = []

        def then(operator: str, further: tuple[str, ...] = (), **attributes: Any) -> None:
            before = nodes[-1].output[0] if nodes else self._name
            nodes.append(helper.make_node(operator, [before, *further], [f"{self._name}.{len(nodes)}"], **attributes))

        then("Cast", to=onnx.TensorProto.FLOAT)
        if factor != 1:
            tensors.append(numpy_helper.from_array(np.array(factor, np.float32), f"{self._name}.factor"))
            then("Mul", (f"{self._name}.factor",))
        if self._whole:
            then("Round")
            then("Cast", to=onnx.TensorProto.INT32)
        lengths = [len(part) for part in self._parts.values()]
        if len(lengths) > 1:
            # As varints, not as eight bytes each.
            tensors.append(helper.make_tensor(f"{self._name}.lengths", onnx.TensorProto.INT64, [len(lengths)], lengths))
            then("Split", (f"{self._name}.lengths",))
        nodes[-1].output[:] = list(self._parts)
        rest = list(model.graph.node)
        del model.graph.node[:]
        model.graph.initializer.extend(tensors)
        model.graph.node.extend([*nodes, *rest])
