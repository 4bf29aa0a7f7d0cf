"""The way down: parameters as compressed changes against those that clients already hold.

Clients follow a chain of *public* parameters. Round by round

    patch = encode(parameters - public);  public = public + decode(patch)

so what a patch loses stays in the next difference: error feedback at the server (Tang et al. 2019,
"DoubleSqueeze"), and the public parameters cannot drift from the true ones. The same patch serves every client
that holds the base, so the broker fans it out; whoever holds an older link of the chain applies several, whoever
holds none takes the public parameters whole.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from edgetrain.coordinator.beside import Beside
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.codecs import CodecSpec, Encoding, begin_encoding, encode
from edgetrain.protocol.messages import BlobRef
from edgetrain.protocol.vectors import Vector, vector_digest

WHOLE = "dense|float32"
# Older links are not worth their memory: whoever is further behind takes the parameters whole.
KEEP_PATCHES = 8
# Parameters from which on a patch is packed beside what else is to be done.
WORTH_A_THREAD = 1 << 18


@dataclass(frozen=True, slots=True)
class EncodedPatch:
    """A link of the chain: the base's digest, and the encoded change."""

    base: bytes
    data: bytes
    # Of `data`.
    ref: BlobRef


@dataclass(frozen=True, slots=True)
class Release:
    """What the clients of a round are given."""

    # They train from these.
    public: Vector
    # SHA-256 of `public`.
    digest: bytes
    # `public`, encoded whole.
    whole: bytes
    whole_ref: BlobRef
    # Oldest first, ending at `public`.
    patches: tuple[EncodedPatch, ...]


class Downlink:
    """The chain of public parameters.

    Args:
        codec: of the patches; `dense|float32` makes none and releases the parameters as they are.
        public: the last public parameters, if an earlier process has released some.
    """

    def __init__(self, codec: CodecSpec, public: Vector | None = None) -> None:
        self._codec = codec
        self._public = public
        # Of `_public`, where it is known.
        self._digest: bytes | None = None
        self._patches: deque[EncodedPatch] = deque(maxlen=KEEP_PATCHES)
        # The last patch, until its bytes are made: its base, and it.
        self._unpacked: tuple[bytes, Encoding] | None = None

    def advance(self, parameters: Vector, *, seed: int) -> Vector:
        """Makes the next link; `current` gives it out.

        Args:
            parameters: the true ones, float32 [num_parameters].
            seed: of stochastic codecs.

        Returns:
            The public parameters.
        """
        self._pack()
        if self._public is None or not self.compresses:
            self._public, self._digest = parameters, None
            self._patches.clear()
        else:
            base, digest = self._public, self._public_digest()
            encoding = begin_encoding(parameters - base, self._codec, seed=seed)
            # float32 additions in order: clients do the same and get the same bits.
            public = base.copy()
            encoding.restored().add_to(public)
            self._public, self._digest = public, None
            self._unpacked = (digest, encoding)
        return self._public

    def release(self, parameters: Vector, *, seed: int) -> Release:
        """The next link, given out; arguments as of `advance`."""
        self.advance(parameters, seed=seed)
        return self.current()

    @property
    def compresses(self) -> bool:
        """Whether public parameters differ from the true ones, so that they have to be remembered."""
        return str(self._codec) != str(CodecSpec.parse(WHOLE))

    def encode(self, vector: Vector, *, seed: int) -> bytes:
        """Another vector for the way down, by the patches' codec where that keeps every element."""
        codec = self._codec if self._codec.select == "dense" else CodecSpec.parse(WHOLE)
        return encode(vector, codec, seed=seed)

    def holds(self, digest: bytes) -> bool:
        """Whether the last link is the one with this digest."""
        return self._public is not None and self._public_digest() == digest

    def current(self) -> Release:
        """The last link again."""
        assert self._public is not None, "advance comes first"
        packing = Beside(self._pack) if len(self._public) >= WORTH_A_THREAD else None
        digest = self._public_digest()
        whole = encode(self._public, WHOLE)
        ref = blob_ref(whole)
        if packing:
            packing.result()
        self._pack()
        return Release(public=self._public, digest=digest, whole=whole, whole_ref=ref, patches=tuple(self._patches))

    def _pack(self) -> None:
        if self._unpacked:
            base, encoding = self._unpacked
            data = encoding.payload()
            self._patches.append(EncodedPatch(base, data, blob_ref(data)))
            self._unpacked = None

    def _public_digest(self) -> bytes:
        assert self._public is not None
        if self._digest is None:
            self._digest = vector_digest(self._public)
        return self._digest
