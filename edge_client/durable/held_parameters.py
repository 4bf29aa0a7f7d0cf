"""The parameters that this client holds, and how they become those of the next round."""

from __future__ import annotations

import logging

from edgetrain.edge_client.durable.installation import Fetch
from edgetrain.protocol import BlobError, CodecError
from edgetrain.protocol.codecs import Limits, decode
from edgetrain.protocol.messages import Plan
from edgetrain.protocol.vectors import Vector, vector_digest

logger = logging.getLogger(__name__)


class HeldParameters:
    """The last parameters received, so that later ones can come as patches.

    Args:
        num_parameters: length of the vector.
    """

    def __init__(self, num_parameters: int) -> None:
        self._length = num_parameters
        self._vector: Vector | None = None
        self._digest = b""

    def advance(self, plan: Plan, fetch: Fetch) -> Vector:
        """The parameters of a plan, float32 [num_parameters]; by patches from those held, else whole.

        Raises:
            CodecError: what the coordinator sent is not what it announced.
            BlobError: it did not arrive.
        """
        limit = 8 * self._length + 4096
        if self._digest != plan.vector:
            vector = self._patched(plan, fetch, limit)
            if vector is None:
                vector = decode(fetch(plan.parameters, limit=limit), self._limits()).dense()
                if len(vector) != self._length or vector_digest(vector) != plan.vector:
                    raise CodecError("the round's parameters are not those that the plan names")
            self._vector, self._digest = vector, plan.vector
        assert self._vector is not None, "it has a digest"
        return self._vector.copy()

    def _patched(self, plan: Plan, fetch: Fetch, limit: int) -> Vector | None:
        """By patches, if we hold a base of theirs and they lead where they should."""
        bases = [patch.base for patch in plan.patches]
        if self._vector is None or self._digest not in bases:
            return None
        vector = self._vector.copy()
        try:
            for patch in plan.patches[bases.index(self._digest) :]:
                decode(fetch(patch.blob, limit=limit), self._limits()).add_to(vector)
            if vector_digest(vector) != plan.vector:
                raise CodecError("they lead to other parameters")
        except (BlobError, CodecError) as error:
            logger.warning("round %d: the patches are of no use: %s; taking the whole", plan.round, error)
            return None
        return vector

    def _limits(self) -> Limits:
        return Limits(max_parameters=self._length)
