"""Two-phase error feedback: what compression leaves out is sent later, and nothing is ever counted twice.

Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD".

    prepare(delta):  target = residual + delta, encoded and sent; both are on disk before anything leaves
    settle(True):    residual = target - decoded       what was not sent
    settle(False):   residual = target                 refused, late or lost: everything returns

So at every moment  sum(accepted) + residual [+ pending] = sum(deltas),  also after a crash: the file holds the
target and the bytes that were sent, and the coordinator is asked again what became of them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.durable.checked_file import CheckedFile
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.codecs import encode, residual
from edgetrain.protocol.messages import Offer, split_update
from edgetrain.protocol.privacy.clipping import clip
from edgetrain.protocol.vectors import Vector

logger = logging.getLogger(__name__)


class _Masked(msgspec.Struct, frozen=True, kw_only=True):
    # What of the target the sum will hold: uint32 positions and float32 values, little-endian.
    positions: bytes
    values: bytes


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    bundle: bytes
    run: bytes
    num_parameters: int
    # The offer of the pending update, or None.
    offer: Offer | None
    update_bytes: int
    # The parameters whose training is already in the residual, and what the pending update says if it is masked.
    trained_on: bytes = b""
    masked: _Masked | None = None


class ErrorFeedback:
    """The residual of one client in one run, kept in a file.

    Args:
        path: the file; what is there is taken up if it is of the same bundle and run, else dropped.
        bundle: digest of the bundle.
        run: id of the run.
        num_parameters: length of the vectors.
    """

    def __init__(self, path: Path, *, bundle: bytes, run: bytes, num_parameters: int) -> None:
        self._file = CheckedFile(path, b"ER", "the residual")
        self._bundle = bundle
        self.run = run
        self.residual: Vector = np.zeros(num_parameters, np.float32)
        # What was offered and not yet answered.
        self.offer: Offer | None = None
        self.update = b""
        # SHA-256 of the parameters whose local training is in the residual, and waits to be sent; b"" for none.
        self.trained_on = b""
        self._masked: _Masked | None = None
        # Whether what was prepared was within the norm; None if there was none.
        self.unclipped: bool | None = None
        self._load()

    def prepare(
        self,
        delta: Vector,
        codec: str,
        *,
        seed: int,
        offsets: tuple[int, ...] | None = None,
        max_norm: float = 0.0,
    ) -> bytes:
        """Encodes `residual + delta`. Nothing is stored yet: `commit` follows with the offer.

        With a `max_norm` above 0, their sum is clipped to it first. What clipping takes away does not come back
        later.
        """
        assert self.offer is None, "settle the pending update first"
        target = self.residual + delta
        self.unclipped = None
        if max_norm:
            clipped, norm = clip(target, max_norm)
            target, self.unclipped = clipped.astype(np.float32), norm <= max_norm
        self.update = encode(target, codec, seed=seed, offsets=offsets)
        self.residual = target
        return self.update

    def commit(self, offer: Offer, control: bytes = b"") -> None:
        """Stores the pending update; after this it may be sent.

        Args:
            offer: of what was prepared.
            control: what is sent behind it, see `Offer.control_bytes`.

        Raises:
            StateError: not writable; nothing must be sent then.
        """
        self.update += control
        assert offer.update == blob_ref(self.update), "the offer is of what was prepared"
        self.offer = offer
        self._save()

    def hold(self, delta: Vector, *, trained_on: bytes) -> None:
        """Adds a delta to the residual and stores it: for secure aggregation, which may take several attempts.

        Args:
            delta: of the local training.
            trained_on: SHA-256 of the parameters that it started from.

        Raises:
            StateError: not writable.
        """
        assert self.offer is None, "settle the pending update first"
        self.residual = self.residual + delta
        self.trained_on = trained_on
        self._save()

    def commit_masked(self, offer: Offer, payload: bytes, positions: npt.NDArray[np.int64], values: Vector) -> None:
        """Stores a pending update that only its sender can read; after this it may be sent.

        Args:
            offer: of the payload.
            payload: the masked vector.
            positions: int64 [m], what it is of.
            values: float32 [m], what of the residual it holds.

        Raises:
            StateError: not writable; nothing must be sent then.
        """
        assert self.offer is None, "settle the pending update first"
        self.offer, self.update = offer, payload
        self._masked = _Masked(positions=positions.astype("<u4").tobytes(), values=values.astype("<f4").tobytes())
        self._save()

    def settle(self, *, accepted: bool) -> None:
        """The coordinator's verdict on the pending update."""
        if accepted:
            assert self.offer, "there is something to settle"
            if self._masked:
                positions = np.frombuffer(self._masked.positions, "<u4").astype(np.int64)
                self.residual[positions] -= np.frombuffer(self._masked.values, "<f4")
            else:
                self.residual = residual(self.residual, split_update(self.offer, self.update)[0])
            self.trained_on = b""
        self.offer, self.update, self._masked = None, b"", None
        self._save()

    def _save(self) -> None:
        header = _Header(
            bundle=self._bundle,
            run=self.run,
            num_parameters=len(self.residual),
            offer=self.offer,
            update_bytes=len(self.update),
            trained_on=self.trained_on,
            masked=self._masked,
        )
        self._file.write(header, self.residual.astype("<f4").tobytes() + self.update)

    def _load(self) -> None:
        found = self._file.read(_Header)
        if found is None:
            return
        header, body = found
        if (header.bundle, header.run, header.num_parameters) != (self._bundle, self.run, len(self.residual)):
            logger.info("the residual in %s is of another run: dropped", self._file.path)
            return
        stop = 4 * header.num_parameters
        self.residual = np.frombuffer(body[:stop], dtype="<f4").astype(np.float32)
        self.update = body[stop : stop + header.update_bytes]
        self.offer = header.offer
        self.trained_on, self._masked = header.trained_on, header.masked
