"""Mixed precision in torch: matrix products and convolutions in 16 bits, everything else in float32.

As autocast does it (Micikevicius et al. 2018, arXiv:1710.03740): the inputs of a product are rounded when it is
computed, its result is widened again, and the parameters stay float32. The gradients of a step are linear in the
weights of the samples, so scaling the loss is scaling the weights: exact, by a power of two.

Importing this module does not import torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import fx

# Relative error of the self-test that passes: 11 and 8 significant bits, through all layers.
TOLERANCES = {"fp32": 0.0, "fp16": 2e-2, "bf16": 1e-1}
PRECISIONS = tuple(TOLERANCES)

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "convolution_backward")


class LossScale:
    """A power of two that keeps float16 gradients from vanishing; halved when they overflow, doubled when they do not.

    Args:
        start: log2 of the first scale.
        patience: steps without overflow before it is doubled.
    """

    def __init__(self, start: int = 12, patience: int = 200) -> None:
        self._power = start
        self._patience = patience
        self._good = 0

    @property
    def value(self) -> float:
        """The scale."""
        return math.ldexp(1.0, self._power)

    def overflowed(self) -> bool:
        """Notes an overflow; whether a smaller scale is left to try."""
        self._good = 0
        if self._power == 0:
            return False
        self._power -= 1
        return True

    def succeeded(self) -> None:
        """Notes a step whose gradients are finite."""
        self._good += 1
        if self._good >= self._patience and self._power < 24:
            self._power, self._good = self._power + 1, 0


def in_low_precision(module: fx.GraphModule, precision: str) -> Any:
    """A function that runs the graph with its products in `precision`, "fp16" or "bf16"."""
    import torch
    from torch import fx

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    products = {
        getattr(torch.ops.aten, name).default for name in _PRODUCTS if hasattr(getattr(torch.ops.aten, name), "default")
    }

    def cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(target) if value.dtype == source else value
        if isinstance(value, tuple | list):
            return type(value)(cast(item, source, target) for item in value)
        return value

    class Rounding(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target not in products:
                return super().call_function(target, args, kwargs)
            result = target(*cast(args, torch.float32, dtype), **kwargs)
            return cast(result, dtype, torch.float32)

    runner = Rounding(module)
    return lambda *arguments: runner.run(*arguments, enable_io_processing=False)
