"""Does this machine compute what eager torch computed when the bundle was exported?

A client runs this before it takes part, and `edgetrain verify` prints it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgetrain.edge_client.errors import SessionError
from edgetrain.edge_client.runtimes.base import Batch, Session
from edgetrain.edge_client.runtimes.leaves import Array, flatten, halves, leaf_key, unflatten
from edgetrain.edge_client.runtimes.torch_precision import TOLERANCES
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import Manifest, probe_signs
from edgetrain.protocol.vectors import Vector

# A gradient below this share of the largest one is zero but for rounding: measured against that share.
_ZERO_SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class GradientReport:
    """Relative errors of one parameter's gradient."""

    name: str
    norm_error: float
    projection_error: float

    @property
    def error(self) -> float:
        """The larger of the two."""
        return max(self.norm_error, self.projection_error)


@dataclass(frozen=True, slots=True)
class SelfTestReport:
    """Relative errors against the manifest; NaN where this machine computed no number."""

    runtime: str
    loss_error: float
    weight_error: float
    metric_errors: dict[str, float]
    gradients: tuple[GradientReport, ...]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest error; NaN if any is."""
        errors = [self.loss_error, self.weight_error, *self.metric_errors.values()]
        return float(np.max([*errors, *(gradient.error for gradient in self.gradients)]))

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance."""
        return self.worst <= self.tolerance

    def raise_if_wrong(self) -> None:
        """Refuses to go on.

        Raises:
            SessionError: names what is wrong.
        """
        if self.ok:
            return
        wrong = {"loss": self.loss_error, "weight sum": self.weight_error, **self.metric_errors}
        wrong |= {f"gradient of {gradient.name}": gradient.error for gradient in self.gradients}
        named = [f"{name} by {error:.1e}" for name, error in wrong.items() if not error <= self.tolerance]
        raise SessionError(
            f"the self-test failed on {self.runtime} (relative tolerance {self.tolerance:g}): off are "
            f"{', '.join(named[:5])}{' and others' if len(named) > 5 else ''}. This runtime computes wrong "
            "numbers here: try another version of it, or another runtime."
        )


def run_self_test(
    bundle: Bundle, session: Session, *, tolerance: float | None = None, in_parts: bool = False
) -> SelfTestReport:
    """Runs the bundle's example batch with its initial parameters, whole, or the trunk and then the head.

    Errors are relative: of the loss and metrics to their own value (or 1, if that is larger, for metrics,
    which may be 0), of a gradient to its norm. The norm of a gradient that is zero but for rounding is taken
    as 0.1 % of the largest norm.

    Raises:
        BundleError: the self-test's file is missing or corrupt.
        SessionError: the step does not run at all.
    """
    manifest = bundle.manifest
    expected = manifest.self_test
    if tolerance is None:
        tolerance = max(expected.tolerance, TOLERANCES[session.precision])
    batch, weights = read_self_test(bundle)
    if in_parts:
        session, batch = on_features(session, batch)
    result = session.step(bundle.initial_parameters(), batch, weights)
    floor = max(_ZERO_SHARE * max((check.norm for check in expected.gradients), default=0.0), 1e-30)
    gradients = []
    for entry, check in zip(manifest.parameters, expected.gradients, strict=True):
        part = entry.of(result.gradients).astype(np.float64).ravel()
        scale = max(check.norm, floor)
        gradients.append(
            GradientReport(
                name=entry.name,
                norm_error=abs(float(np.linalg.norm(part)) - check.norm) / scale,
                projection_error=abs(float(part @ probe_signs(entry.numel)) - check.projection) / scale,
            )
        )
    return SelfTestReport(
        runtime=session.runtime,
        loss_error=_relative(result.loss_sum, expected.loss_sum),
        weight_error=_relative(result.weight_sum, expected.weight_sum),
        metric_errors={
            name: _relative(float(result.metrics[name].sum()), value, floor=1.0)
            for name, value in expected.metrics.items()
        },
        gradients=tuple(gradients),
        tolerance=tolerance,
    )


def on_features(session: Session, batch: Batch) -> tuple[Session, Batch]:
    """The head of a session, and a batch with features for inputs.

    Raises:
        SessionError: the program is not split.
    """
    structure = session.manifest.batch.inputs
    inputs = dict(session.features(batch[0]))
    session.release()
    head = session.head()
    assert head is not None, "it has features"
    for leaf, array in zip(structure.leaves, flatten("inputs", structure, batch[0]), strict=True):
        inputs[leaf_key("inputs", leaf)] = array
    keys = [leaf_key("inputs", leaf) for leaf in head.manifest.batch.inputs.leaves]
    return head, ({key: inputs[key] for key in keys}, batch[1])


def read_self_test(bundle: Bundle) -> tuple[Batch, Vector]:
    """The example batch and its weights.

    Raises:
        BundleError: missing or corrupt.
        SessionError: the file is not as long as the manifest's shapes need.
    """
    manifest: Manifest = bundle.manifest
    data = bundle.read(manifest.self_test.file)
    structures = halves(manifest.batch)
    specs = [leaf for _, structure in structures for leaf in structure.leaves] + [manifest.batch.weights]
    if len(data) != sum(spec.nbytes for spec in specs):
        raise SessionError(
            f"{bundle.path}: the self-test has {len(data)} bytes, its shapes need {sum(spec.nbytes for spec in specs)}"
        )
    arrays: list[Array] = []
    offset = 0
    for spec in specs:
        little_endian = np.dtype(spec.dtype).newbyteorder("<")
        array = np.frombuffer(data, little_endian, math.prod(spec.shape), offset)
        arrays.append(array.reshape(spec.shape).astype(spec.dtype))
        offset += spec.nbytes
    rest = iter(arrays)
    inputs, targets = (
        unflatten(name, structure, [next(rest) for _ in structure.leaves]) for name, structure in structures
    )
    return (inputs, targets), next(rest).astype(np.float32)


def _relative(value: float, expected: float, *, floor: float = 1e-12) -> float:
    return abs(value - expected) / max(abs(expected), floor)
