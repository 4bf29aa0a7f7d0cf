"""The client's mail: signed messages out, verified ones in, blobs on request.

Whoever waits for something calls `pump`; what arrives is noted here and looked at by the client's flow.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from edgetrain.edge_client.downloads import Download
from edgetrain.edge_client.durable.state import ClientState
from edgetrain.edge_client.errors import RefusedError, StateError
from edgetrain.protocol import BlobError, MessageError
from edgetrain.protocol.blobs import Assembler, Blob, parse_chunk
from edgetrain.protocol.messages import (
    Announce,
    BlobRef,
    Checkpoint,
    Message,
    Plan,
    Refusal,
    RoundClosed,
    Secure,
    Verdict,
    Want,
    Welcome,
    decode_from_coordinator,
    encode_message,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.partial import PartialBlob, assemble
from edgetrain.protocol.signing import VersionError, seal, unseal, verify
from edgetrain.protocol.transport import Connected, Disconnected, Received, Transport
from edgetrain.protocol.transport.pacing import RateMeter, TokenBucket

logger = logging.getLogger(__name__)

B = TypeVar("B", Assembler, PartialBlob, Assembler | PartialBlob)
T = TypeVar("T")

# A question without an answer is repeated after so long.
REPEAT_SECONDS = 10.0
# After a restart the coordinator may have most of an update already: it gets so long to ask for the rest. It does so
# at once if it has a part, and after 3 s if it has nothing.
RESUME_SECONDS = 5.0
# Upper bound of one wait for events.
POLL_SECONDS = 0.5
# So many damaged copies of a blob are no accident.
MAX_DAMAGED = 5
# Plans come one after the other; a copy of an older one than this does not come any more.
REMEMBERED_PLANS = 64
# Different warnings of a kind that anybody can provoke.
MAX_WARNINGS = 20
REMEMBERED_RUNS = 64


class RunOver(Exception):
    """The run was paused or has ended, or another one has begun."""


class Abandoned(Exception):
    """What was waited for is not wanted any more."""


class Mailbox:
    """One client's mail.

    Args:
        name: of the client.
        topics: of the federation.
        state: holds the key and the pinned coordinator.
        transport: connected.
        connection: as in this client's Hello.
        coordinator_key: the configured key in hex, or "".
        download_rate: cap of what is asked for, bytes per second; 0 for none.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        topics: Topics,
        *,
        state: ClientState,
        transport: Transport,
        connection: bytes,
        coordinator_key: str,
        download_rate: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._topics = topics
        self._state = state
        self._transport = transport
        self._connection = connection
        # What it signs counts; until there is one, the first announcement decides.
        self._coordinator_key = state.trusted_coordinator(coordinator_key)
        self._key_source = "the configured coordinator_key" if coordinator_key else str(state.path / "coordinator.pub")
        self._warned: set[str] = set()
        # Of the newest announcement by run: an older one of any run is a copy.
        self._serials: dict[bytes, int] = {}
        self._clock = clock
        # The state of the run as announced last.
        self.announce: Announce | None = None
        # The run that this client takes part in.
        self.joined: bytes | None = None
        self.welcomed = False
        # The newest plan that nobody has taken yet.
        self.plan: Plan | None = None
        # Nonces of plans whose round has closed.
        self.closed: deque[bytes] = deque(maxlen=REMEMBERED_PLANS)
        self.verdicts: dict[bytes, Verdict] = {}
        # What may be sent on request: the pending update.
        self.upload: tuple[BlobRef, bytes] | None = None
        # Called when the coordinator may not know that we are here.
        self.introduce: Callable[[], None] = lambda: None
        # Called for every step of secure aggregation; must not wait for anything.
        self.on_secure: Callable[[Secure], None] = lambda _message: None
        self._download: Download | None = None
        # When the whole upload goes out if nobody has asked for a part of it.
        self._upload_due: float | None = None
        self._link = RateMeter()
        self._cap = TokenBucket(download_rate)

    def open(self) -> None:
        """Subscribes."""
        self._transport.subscribe(self._topics.to_client(self._name, "message"))
        # What is lost of a blob is asked for again: a broker that kept it for us would send it twice.
        self._transport.subscribe(self._topics.to_client(self._name, "blob"), qos=0)
        self._transport.subscribe(self._topics.round)
        self._transport.subscribe(self._topics.announce)
        self._transport.subscribe(self._topics.checkpoint)

    # --- out -----------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Signs and sends."""
        payload = seal(self._state.key, self._topics.federation, self._name, encode_message(message))
        # After a reconnect we ask anew, for what is missing then.
        transient = isinstance(message, Want)
        self._transport.publish(self._topics.from_client(self._name, "message"), payload, transient=transient)

    def send_upload(self, ranges: tuple[tuple[int, int], ...] = (), *, chunk_bytes: int = 0) -> None:
        """Sends chunks of the upload; all of it, or the ranges that were asked for."""
        self._upload_due = None
        if self.upload:
            ref, data = self.upload
            topic = self._topics.from_client(self._name, "blob")
            # After a reconnect the coordinator is offered it again, and says what it lacks.
            self._transport.send_blob(topic, Blob(data, ref), ranges, chunk_bytes=chunk_bytes, resend=False)

    def resume_upload(self) -> None:
        """Waits a moment for the coordinator to say what it lacks of the upload, then sends all of it."""
        self._upload_due = self._clock() + RESUME_SECONDS

    def end_upload(self) -> None:
        """Nobody wants it any more."""
        if self.upload:
            self._transport.forget_blob(self.upload[0].digest)
        self.upload = self._upload_due = None

    # --- in ------------------------------------------------------------------------------------------

    def fetch(self, ref: BlobRef, *, limit: int, abandon: Callable[[], bool] = lambda: False) -> bytes:
        """A verified blob. Fan-out and repairs arrive on different topics; both count.

        Args:
            ref: what is wanted.
            limit: most bytes allowed.
            abandon: whether it is not wanted any more; without it, a silent coordinator is waited for.

        Raises:
            BlobError: larger than the limit, or again and again other bytes than announced.
            Abandoned: `abandon` said so.
            RunOver: the run ended meanwhile.
            StateError: it cannot be stored.
        """
        with _storing(self._partial):
            return self._fetch(ref, assemble(ref, self._partial, limit=limit), lambda blob: blob.finish(), abandon)

    def fetch_to(self, ref: BlobRef, path: Path, *, limit: int) -> None:
        """A verified blob, straight into a file: of any size, in little memory.

        Raises:
            BlobError, RunOver, StateError: as `fetch`.
        """
        with _storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            blob = PartialBlob(ref, self._partial, limit=limit)
            self._fetch(ref, blob, lambda blob: blob.finish_to(path), lambda: False)

    @property
    def _partial(self) -> Path:
        return self._state.path / "partial"

    def _fetch(self, ref: BlobRef, blob: B, finish: Callable[[B], T], abandon: Callable[[], bool]) -> T:
        topic = self._topics.broadcast_blob(ref.digest)
        self._transport.subscribe(topic, qos=0)
        download = self._download = Download(blob, ask=self.send, link=self._link, cap=self._cap, now=self._clock())
        try:
            for attempt in range(1, MAX_DAMAGED + 1):
                while not download.complete:
                    self.pump(min(POLL_SECONDS, download.patience(self._clock())))
                    if abandon():
                        raise Abandoned
                    download.tick(self._clock())
                try:
                    return finish(blob)
                except BlobError as error:
                    logger.warning("blob %s…: %s", ref.digest.hex()[:12], error)
                    if attempt == MAX_DAMAGED:
                        raise
                    download.repeat(self._clock())
            raise AssertionError("the last attempt returns or raises")
        finally:
            self._download = None
            self._transport.unsubscribe(topic)

    def wait(self, done: Callable[[], bool], *, repeat: Callable[[], None] | None = None) -> None:
        """Handles events until `done`; calls `repeat` whenever nothing has come of it for a while."""
        last = self._clock()
        while not done():
            self.pump(POLL_SECONDS)
            if repeat and self._clock() - last >= REPEAT_SECONDS:
                last = self._clock()
                repeat()

    def pump(self, timeout: float) -> None:
        """Handles what is in the queue; waits for the first event only.

        Raises:
            RunOver: the run was paused or has ended.
            RefusedError: the coordinator will not have us.
        """
        if self._upload_due is not None and self._clock() >= self._upload_due:
            self.send_upload()
        event = self._transport.receive(timeout)
        while event is not None:
            match event:
                case Received():
                    self._on_received(event)
                case Connected():
                    self._introduce_again()
                case Disconnected():
                    logger.warning("lost the broker: %s; reconnecting", event.reason)
            event = self._transport.receive(0)

    def _on_received(self, event: Received) -> None:
        try:
            if event.topic == self._topics.to_client(self._name, "blob") or "/all/blob/" in event.topic:
                if self._download:
                    self._download.add(parse_chunk(event.payload), self._clock())
            else:
                self._on_message(event.payload)
        except VersionError as error:
            if self._coordinator_key is not None:
                # Nobody has signed it that we know: it is no reason to leave.
                self._warn_once(f"ignored: {error}. If that is the coordinator, install the same version on both")
                return
            raise RefusedError(
                f"the coordinator speaks protocol version {error.version}, another one than this client: "
                "install the same version of edgetrain on both"
            ) from error
        except (MessageError, BlobError) as error:
            logger.warning("ignored a message on %s: %s", event.topic, error)

    def _on_message(self, payload: bytes) -> None:
        envelope = unseal(payload)
        message = decode_from_coordinator(envelope.body)
        if self._coordinator_key is None:
            if isinstance(message, Announce):
                verify(envelope, self._topics.federation, message.public_key)
                self._state.pin_coordinator(message.public_key)
                self._coordinator_key = message.public_key
                self._on_announce(message)
            return
        if isinstance(message, Announce) and message.public_key != self._coordinator_key:
            # Whoever can write there could send all clients home otherwise.
            self._warn_once(
                f"ignored an announcement with key {message.public_key.hex()[:16]}…, which is not "
                f"{self._key_source} ({self._coordinator_key.hex()[:16]}…). If the coordinator was set up anew on "
                "purpose, change or remove that"
            )
            return
        verify(envelope, self._topics.federation, self._coordinator_key)
        match message:
            case Announce():
                self._on_announce(message)
            case Checkpoint():
                self._on_checkpoint(message)
            case Welcome():
                self.welcomed = message.run == self.joined
            case Refusal() if message.connection == self._connection:
                raise RefusedError(f"the coordinator refused this client: {message.reason}")
            case Plan():
                if message.run == self.joined:
                    self.plan = message
            case Verdict():
                self.verdicts[message.digest] = message
            case RoundClosed():
                self.closed.append(message.nonce)
            case Secure():
                if message.run == self.joined:
                    self.on_secure(message)
            case Want():
                if self.upload and self.upload[0].digest == message.digest:
                    self.send_upload(message.ranges, chunk_bytes=message.chunk_bytes)

    def _on_announce(self, message: Announce) -> None:
        before = self.announce
        last = self._serials.get(message.run, -1)
        if message.serial < last or (message.serial == last and before is not None and before.run != message.run):
            return  # a copy: of this run, or of one that was before it
        if len(self._serials) >= REMEMBERED_RUNS and message.run not in self._serials:
            del self._serials[next(iter(self._serials))]
        self._serials[message.run] = message.serial
        self.announce = message
        if self.joined is None:
            if message.status != "open":
                logger.info(
                    "the run is %s: %s; waiting for it to go on, or for the next", message.status, message.reason
                )
            return
        if message.run != self.joined:
            raise RunOver("another run has begun")
        if message.status != "open":
            raise RunOver(f"the run is {message.status}: {message.reason}")
        if before and message.serial > before.serial:
            # The coordinator was started again: it does not know that we are here.
            self._introduce_again()

    def _on_checkpoint(self, message: Checkpoint) -> None:
        try:
            reason = self._state.checkpoints.take(message)
        except OSError as error:
            logger.warning("cannot remember a checkpoint of the coordinator: %s", error)
            return
        if reason:
            logger.error(
                "the coordinator has rewritten the history of run %s: %s. What this client remembers is in %s",
                message.run.hex(),
                reason,
                self._state.path / "checkpoints.jsonl",
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(text)
            logger.warning("%s", text)

    def _introduce_again(self) -> None:
        if self.joined is not None:
            self.introduce()
            if self._download:
                self._download.repeat(self._clock())


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(f"{path}: cannot store a blob: {error}") from error
