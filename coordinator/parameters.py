"""Parameters as safetensors files: the tensors by the names they have in the user's module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from edgetrain.protocol.manifest import Manifest
from edgetrain.protocol.vectors import Vector, from_named


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
    for entry in manifest.parameters:
        if entry.name in tensors and tensors[entry.name].dtype != np.float32:
            raise ValueError(f"{entry.name!r} is {tensors[entry.name].dtype}, not float32")
    return from_named(tensors, manifest.parameters)


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
