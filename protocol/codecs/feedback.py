"""What the receiver sees, for error feedback (Seide et al. 2014; Karimireddy et al. 2019).

    target = delta + residual;  payload = encode(target);  next residual = target - received(target, payload)

Both ends decode the same bytes to the same float32, so the residual is exactly what was not delivered. Which
residual counts (the update may be refused or lost) is decided by whoever keeps it.
"""

from __future__ import annotations

import numpy as np

from edgetrain.protocol.codecs.layout import decode
from edgetrain.protocol.codecs.result import Limits, SparseOrDense
from edgetrain.protocol.errors import CodecError
from edgetrain.protocol.vectors import Vector


def received(target: Vector, payload: bytes | bytearray | memoryview) -> SparseOrDense:
    """What the receiver of `payload` decodes.

    Args:
        target: float32 [n], what was encoded.
        payload: from `encode(target, ...)`.

    Raises:
        CodecError: the payload is not for n parameters, or does not decode.
    """
    decoded = decode(payload, Limits(max_parameters=len(target)))
    if decoded.num_parameters != len(target):
        raise CodecError(f"a payload for {decoded.num_parameters} parameters, the target has {len(target)}")
    return decoded


def residual(target: Vector, payload: bytes | bytearray | memoryview) -> Vector:
    """`target` minus what the receiver of `payload` decodes, float32 [n].

    Arguments and errors as in `received`.
    """
    rest: Vector = target.astype(np.float32)
    received(target, payload).add_to(rest, -1.0)
    return rest
