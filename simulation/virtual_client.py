"""One client of a simulation: the device's mathematics, its state in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.durable.control_variate import control_change
from edgetrain.edge_client.runtimes import Session
from edgetrain.edge_client.training.data import Dataset
from edgetrain.edge_client.training.trainer import train
from edgetrain.protocol.codecs import CodecSpec, Limits, decode, encode, residual
from edgetrain.protocol.privacy.clipping import clip
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.vectors import Vector


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a client would send."""

    num_examples: int
    steps: int
    # Mean training loss.
    loss: float
    # Encoded delta, and what it was before: the delta and the residual.
    update: bytes
    target: Vector
    # Encoded change of the control variate, or nothing.
    control: bytes = b""
    # Whether the target was within the norm that it was clipped to; None if there was none.
    unclipped: bool | None = None


class VirtualClient:
    """One client.

    Args:
        session: shared with others.
        shard: its data.
        codec: of its updates.
        error_feedback: whether it keeps what the codec left out.
        personal: elements that stay with it, bool [num_parameters].
    """

    def __init__(
        self,
        session: Session,
        shard: Dataset,
        codec: CodecSpec,
        *,
        error_feedback: bool,
        personal: npt.NDArray[np.bool_],
    ) -> None:
        self._session = session
        self._shard = shard
        self._codec = codec
        self._error_feedback = error_feedback
        self._mask = personal
        # None until the first training, so that thousands of clients that never train cost nothing.
        self._own: Vector | None = None
        self._residual: Vector | None = None
        self._control: Vector | None = None

    def personalized(self, parameters: Vector) -> Vector:
        """The parameters with this client's own in their places."""
        mixed = parameters.copy()
        if self._own is not None:
            mixed[self._mask] = self._own
        return mixed

    def train(self, parameters: Vector, training: TrainingConfig, *, control: Vector | None, seed: int) -> LocalResult:
        """One local training; nothing is settled yet, but personal parameters are kept.

        Args:
            parameters: of the round.
            training: how.
            control: the coordinator's control variate, if the strategy has one.
            seed: of shuffling and stochastic codecs.
        """
        start = self.personalized(parameters)
        correction = None
        if control is not None:
            correction = control if self._control is None else control - self._control
        result = train(self._session, start, self._shard, training, seed=seed, gradient_correction=correction)
        offsets = tuple(entry.offset for entry in self._session.manifest.parameters)
        target = result.parameters - start
        target[self._mask] = 0
        if self._residual is not None:
            target += self._residual
        unclipped = None
        if training.max_delta_norm:
            clipped, norm = clip(target, training.max_delta_norm)
            target, unclipped = clipped.astype(np.float32), norm <= training.max_delta_norm
        encoded = b""
        if control is not None:
            change = control_change(control, start, result.parameters, training, result.steps)
            change[self._mask] = 0
            encoded = encode(change, self._codec, seed=seed + 1, offsets=offsets)
        self._own = result.parameters[self._mask]
        update = encode(target, self._codec, seed=seed, offsets=offsets)
        return LocalResult(result.num_examples, result.steps, result.loss, update, target, encoded, unclipped)

    def settle(self, result: LocalResult, *, accepted: bool) -> None:
        """The coordinator's verdict on a result."""
        if self._error_feedback:
            self._residual = residual(result.target, result.update) if accepted else result.target
        if accepted and result.control:
            if self._control is None:
                self._control = np.zeros(len(result.target), np.float32)
            decode(result.control, Limits(max_parameters=len(result.target))).add_to(self._control)
