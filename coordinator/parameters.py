"""Parameters as safetensors files: the tensors by the names they have in the user's module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from edgetrain.protocol.manifest import Manifest
from edgetrain.protocol.vectors import Vector


def encode_parameters(vector: Vector, manifest: Manifest, number: int) -> bytes:
    """A safetensors file of the parameters after round `number`."""
    tensors = {entry.name: entry.of(vector) for entry in manifest.parameters}
    return safetensors.numpy.save(tensors, metadata={"round": str(number), "bundle": manifest.name})


def decode_parameters(data: bytes, manifest: Manifest) -> Vector:
    """The flat vector of such a file, float32 [num_parameters].

    Raises:
        ValueError: not safetensors, or not the tensors that the manifest lists.
    """
    try:
        tensors = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    vector = np.empty(manifest.num_parameters, np.float32)
    for entry in manifest.parameters:
        tensor = tensors.get(entry.name)
        if tensor is None or tensor.shape != tuple(entry.shape) or tensor.dtype != np.float32:
            raise ValueError(f"no float32 tensor {entry.name!r} of shape {list(entry.shape)} in it")
        entry.of(vector)[...] = tensor
    return vector


def encode_state(state: Mapping[str, npt.NDArray[Any]], strategy: str) -> bytes:
    """A safetensors file of what a strategy remembers."""
    tensors = {name: np.ascontiguousarray(array) for name, array in state.items()}
    return safetensors.numpy.save(tensors, metadata={"strategy": strategy})


def decode_state(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The inverse.

    Raises:
        ValueError: not safetensors.
    """
    try:
        return safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
