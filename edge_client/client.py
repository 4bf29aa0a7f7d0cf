"""The client: joins a federation over MQTT, trains when it is asked to, sends compressed updates.

One thread owns all state. It is sequential code (fetch, train, send, wait for the verdict) that looks into
the transport's queue through `_pump` whenever it waits or finishes a micro-batch.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from edgetrain import __version__
from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.data import Dataset, load_dataset
from edgetrain.edge_client.device import device_info, peak_memory_mb
from edgetrain.edge_client.downloads import Download
from edgetrain.edge_client.error_feedback import ErrorFeedback
from edgetrain.edge_client.errors import RefusedError, TrainingError
from edgetrain.edge_client.runtimes import available_runtimes, open_session
from edgetrain.edge_client.runtimes.base import Session, Vector
from edgetrain.edge_client.selftest import run_self_test
from edgetrain.edge_client.state import ClientState
from edgetrain.edge_client.trainer import evaluate, train
from edgetrain.protocol import BlobError, BundleError, CodecError, MessageError
from edgetrain.protocol.blobs import blob_ref, cut, parse_chunk
from edgetrain.protocol.bundle import MAX_MANIFEST_BYTES, Bundle
from edgetrain.protocol.codecs import Limits, decode
from edgetrain.protocol.manifest import MANIFEST_FILE, FileEntry, decode_manifest
from edgetrain.protocol.messages import (
    Announce,
    BlobRef,
    Decline,
    Goodbye,
    Hello,
    Message,
    Offer,
    Plan,
    Ready,
    Refusal,
    Report,
    Resources,
    RoundClosed,
    Verdict,
    Want,
    Welcome,
    decode_from_coordinator,
    encode_message,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import VersionError, seal, unseal, verify
from edgetrain.protocol.transport import Connected, Disconnected, Received, Transport

logger = logging.getLogger(__name__)

COORDINATOR = "coordinator"
# An offer without a verdict is repeated after so long.
VERDICT_SECONDS = 10.0
# Upper bound of one wait for events.
POLL_SECONDS = 0.5


class _RunOver(Exception):
    """The run was paused or has ended, or another one has begun."""


def connection_will(config: ClientConfig, state: ClientState, connection: bytes) -> tuple[str, bytes]:
    """The last will of a connection: (topic, payload), a signed Goodbye."""
    goodbye = Goodbye(reason="connection lost", connection=connection)
    topic = Topics(config.federation).from_client(config.name, "message")
    return topic, seal(state.key, config.federation, config.name, encode_message(goodbye))


class Client:
    """One client.

    Args:
        config: the settings.
        state: its directory.
        transport: connected, with the will of `connection_will`.
        connection: 16 random bytes, the same as in the will.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: ClientConfig,
        *,
        state: ClientState,
        transport: Transport,
        connection: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._state = state
        self._transport = transport
        self._connection = connection
        self._clock = clock
        self._started = clock()
        self._topics = Topics(config.federation)
        self._coordinator_key: bytes | None = None
        self._announce: Announce | None = None
        self._joined_run: bytes | None = None
        self._welcomed = False
        self._ready = False
        # The newest plan that has not been begun.
        self._plan: Plan | None = None
        self._done: set[bytes] = set()
        self._closed: set[bytes] = set()
        self._verdicts: dict[bytes, Verdict] = {}
        self._download: Download | None = None
        self._session: Session | None = None
        self._bundle_digest: bytes | None = None
        self._train_data: Dataset | None = None
        self._validation_data: Dataset | None = None
        self._feedback: ErrorFeedback | None = None

    def run(self) -> None:
        """Takes part until the run ends (or for ever, see `exit_when_done`).

        Raises:
            RefusedError: the coordinator will not have this client.
            ClientError, BundleError: this device cannot take part; the message says why.
            KeyboardInterrupt: after saying goodbye.
        """
        self._transport.subscribe(self._topics.to_client(self._config.name, "#"))
        self._transport.subscribe(self._topics.round)
        self._transport.subscribe(self._topics.announce)
        logger.info("client %s waits for federation %s", self._config.name, self._config.federation)
        reason = "stopped by an error"
        try:
            while True:
                try:
                    self._join()
                    self._take_part()
                except _RunOver as over:
                    if self._finished():
                        reason = "the run has ended"
                        logger.info("the run has ended: %s", self._announce.reason if self._announce else "")
                        return
                    logger.info("%s; waiting", over)
        except KeyboardInterrupt:
            reason = "interrupted"
            raise
        finally:
            self._send(Goodbye(reason=reason, connection=self._connection))
            self._transport.close()

    # --- joining -------------------------------------------------------------------------------------

    def _finished(self) -> bool:
        announce = self._announce
        return (
            self._config.exit_when_done
            and announce is not None
            and announce.status == "ended"
            and announce.run == self._joined_run
        )

    def _join(self) -> None:
        """Hello, Welcome, the bundle, Ready."""
        if self._finished():
            raise _RunOver("the run has ended")
        self._pump_until(lambda: self._announce is not None and self._announce.status == "open")
        announce = self._announce
        assert announce is not None, "just waited for"
        self._welcomed = self._ready = False
        self._joined_run = announce.run
        self._send_hello()
        self._pump_until(lambda: self._welcomed, repeat=self._send_hello)
        if self._bundle_digest != announce.bundle.digest:
            self._open_bundle(announce)
        assert self._session is not None, "the bundle is open"
        if self._feedback is None or self._feedback.run != announce.run:
            self._feedback = self._state.error_feedback(
                bundle=announce.bundle.digest,
                run=announce.run,
                num_parameters=self._session.manifest.num_parameters,
            )
        self._ready = True
        self._send_ready()

    def _open_bundle(self, announce: Announce) -> None:
        digest = announce.bundle.digest
        data = self._state.read_manifest(digest)
        if data is None:
            data = self._fetch(announce.bundle, limit=MAX_MANIFEST_BYTES)
        manifest = decode_manifest(data)
        runtime = self._choose_runtime([program.runtime for program in manifest.programs])
        entries = manifest.files(runtime)
        total = sum(entry.size for entry in entries)
        if total > self._config.max_bundle_bytes:
            raise BundleError(
                f"bundle {manifest.name!r} needs {total} bytes, max_bundle_bytes allows {self._config.max_bundle_bytes}"
            )
        for entry in entries:
            if not self._state.has_file(digest, entry):
                self._state.store_file(digest, entry.file, self._fetch(_file_ref(entry), limit=entry.size))
        # The manifest last: a directory that has it is whole.
        self._state.store_file(digest, MANIFEST_FILE, data)
        bundle = Bundle(self._state.bundle_directory(digest))
        session = open_session(bundle, runtime, threads=self._config.threads)
        run_self_test(bundle, session).raise_if_wrong()
        logger.info("bundle %s runs on %s; self-test passed", manifest.name, runtime)
        dataset = load_dataset(self._config.data, manifest)
        self._train_data, self._validation_data = split_validation(
            dataset, self._config.validation_fraction, self._config.name
        )
        self._session, self._bundle_digest = session, digest

    def _choose_runtime(self, offered: list[str]) -> str:
        here = available_runtimes()
        if self._config.runtime:
            if self._config.runtime not in offered:
                raise BundleError(
                    f"the bundle has no program for runtime {self._config.runtime!r}, only for: {', '.join(offered)}"
                )
            return self._config.runtime
        for name in offered:
            if name in here:
                return name
        raise BundleError(
            f"the bundle runs on {', '.join(offered)}; here there is only: {', '.join(here) or 'no runtime'}. "
            "Install one, e.g. pip install 'edgetrain[client]'."
        )

    # --- rounds --------------------------------------------------------------------------------------

    def _take_part(self) -> None:
        self._settle_pending()
        while True:
            self._pump_until(lambda: self._plan is not None)
            plan, self._plan = self._plan, None
            assert plan is not None, "just waited for"
            if plan.nonce in self._done or plan.nonce in self._closed:
                continue
            if plan.bundle != self._bundle_digest:
                self._decline(plan, "has another bundle")
                continue
            try:
                if plan.task == "train":
                    self._train_round(plan)
                else:
                    self._evaluate_round(plan)
            except (TrainingError, CodecError, BlobError) as error:
                logger.warning("round %d: %s", plan.round, error)
                self._decline(plan, str(error)[:1000])
            self._done.add(plan.nonce)

    def _train_round(self, plan: Plan) -> None:
        assert self._session, "joined"
        assert self._feedback, "joined"
        assert self._train_data, "joined"
        parameters = self._fetch_parameters(plan)
        started = self._clock()
        result = train(
            self._session,
            parameters,
            self._train_data,
            plan.training,
            seed=_mix_seed(plan.seed, self._config.name, plan.round),
            may_continue=lambda: self._may_continue(plan),
        )
        if result.stopped is not None:
            logger.info("round %d: training stopped: %s", plan.round, result.stopped)
            if plan.nonce not in self._closed:
                self._decline(plan, result.stopped)
            return
        offsets = tuple(entry.offset for entry in self._session.manifest.parameters)
        update = self._feedback.prepare(
            result.parameters - parameters,
            plan.codec,
            seed=_mix_seed(plan.seed, self._config.name + "/codec", plan.round),
            offsets=offsets,
        )
        self._feedback.commit(
            Offer(
                run=plan.run,
                round=plan.round,
                nonce=plan.nonce,
                update=blob_ref(update),
                num_examples=result.num_examples,
                steps=result.steps,
                metrics=_scalars(result.loss, result.metrics),
                resources=self._resources(self._clock() - started),
            )
        )
        self._settle_pending()

    def _evaluate_round(self, plan: Plan) -> None:
        assert self._session, "joined"
        parameters = self._fetch_parameters(plan)
        data = self._validation_data or self._train_data
        assert data, "joined"
        started = self._clock()
        summary = evaluate(self._session, parameters, data)
        self._send(
            Report(
                run=plan.run,
                round=plan.round,
                nonce=plan.nonce,
                num_examples=summary.num_examples,
                metrics=_scalars(summary.loss, summary.metrics),
                resources=self._resources(self._clock() - started),
            )
        )

    def _fetch_parameters(self, plan: Plan) -> Vector:
        assert self._session, "joined"
        length = self._session.manifest.num_parameters
        limit = 4 * length + 4096
        data = self._fetch(plan.parameters, limit=limit)
        vector = decode(data, Limits(max_parameters=length)).dense()
        if len(vector) != length:
            raise CodecError(f"the round's parameters are {len(vector)}, the bundle has {length}")
        return vector

    def _settle_pending(self) -> None:
        """Sends the pending update until the coordinator says what became of it."""
        feedback = self._feedback
        if feedback is None or feedback.offer is None:
            return
        offer = feedback.offer
        digest = offer.update.digest
        self._verdicts.pop(digest, None)

        def send() -> None:
            self._send(offer)
            for chunk in cut(offer.update, feedback.update):
                self._transport.publish(self._topics.from_client(self._config.name, "blob"), chunk)

        send()
        self._pump_until(lambda: digest in self._verdicts, repeat=lambda: self._send(offer))
        verdict = self._verdicts.pop(digest)
        feedback.settle(accepted=verdict.accepted)
        if verdict.accepted:
            logger.info("round %d: update of %d bytes accepted", offer.round, offer.update.size)
        else:
            logger.warning("round %d: update refused: %s", offer.round, verdict.reason)

    def _may_continue(self, plan: Plan) -> bool | str:
        self._pump(0)
        if plan.nonce in self._closed:
            return "the round has closed"
        return True

    def _decline(self, plan: Plan, reason: str) -> None:
        self._send(Decline(round=plan.round, nonce=plan.nonce, reason=reason))

    # --- blobs ---------------------------------------------------------------------------------------

    def _fetch(self, ref: BlobRef, *, limit: int) -> bytes:
        """A verified blob. Fan-out and repairs arrive on different topics; both count."""
        topic = self._topics.broadcast_blob(ref.digest)
        self._transport.subscribe(topic)
        download = self._download = Download(ref, limit=limit, ask=self._send, now=self._clock())
        try:
            while not download.complete:
                self._pump(POLL_SECONDS)
                if self._welcomed:
                    download.tick(self._clock())
            return download.finish()
        finally:
            self._download = None
            self._transport.unsubscribe(topic)

    # --- events --------------------------------------------------------------------------------------

    def _pump_until(self, done: Callable[[], bool], *, repeat: Callable[[], None] | None = None) -> None:
        last = self._clock()
        while not done():
            self._pump(POLL_SECONDS)
            if repeat and self._clock() - last >= VERDICT_SECONDS:
                last = self._clock()
                repeat()

    def _pump(self, timeout: float) -> None:
        """Handles what is in the queue; waits for the first event only."""
        event = self._transport.receive(timeout)
        while event is not None:
            match event:
                case Received():
                    self._on_received(event)
                case Connected():
                    # The session may be new to the broker, and we to the coordinator.
                    if self._joined_run is not None:
                        self._introduce_again()
                case Disconnected():
                    logger.warning("lost the broker: %s; reconnecting", event.reason)
            event = self._transport.receive(0)

    def _on_received(self, event: Received) -> None:
        try:
            if "/blob" in event.topic:
                if self._download:
                    self._download.add(parse_chunk(event.payload), self._clock())
                return
            self._on_message(event.payload)
        except VersionError as error:
            raise RefusedError(
                f"the coordinator speaks protocol version {error.version}, another one than this client: install "
                "the same version of edgetrain on both"
            ) from error
        except (MessageError, BlobError) as error:
            logger.warning("ignored a message on %s: %s", event.topic, error)

    def _on_message(self, payload: bytes) -> None:
        envelope = unseal(payload)
        message = decode_from_coordinator(envelope.body)
        if isinstance(message, Announce):
            verify(envelope, self._config.federation, message.public_key)
            self._on_announce(message)
            return
        if self._coordinator_key is None:
            return
        verify(envelope, self._config.federation, self._coordinator_key)
        match message:
            case Welcome():
                self._welcomed = message.run == self._joined_run
            case Refusal():
                raise RefusedError(f"the coordinator refused this client: {message.reason}")
            case Plan():
                if message.run == self._joined_run:
                    self._plan = message
            case Verdict():
                self._verdicts[message.digest] = message
            case RoundClosed():
                self._closed.add(message.nonce)
            case Want():
                self._on_want(message)

    def _on_announce(self, message: Announce) -> None:
        before = self._announce
        if before and before.run == message.run and message.serial < before.serial:
            return
        self._state.pin_coordinator(message.public_key, configured=self._config.coordinator_key)
        self._coordinator_key = message.public_key
        self._announce = message
        if self._joined_run is None:
            return
        if message.run != self._joined_run:
            raise _RunOver("another run has begun")
        if message.status != "open":
            self._joined_run = message.run
            raise _RunOver(f"the run is {message.status}: {message.reason}")
        if before and message.serial > before.serial:
            # The coordinator was started again: it does not know that we are here.
            self._introduce_again()

    def _introduce_again(self) -> None:
        self._send_hello()
        if self._ready:
            self._send_ready()
        if self._download:
            self._download.repeat(self._clock())

    def _on_want(self, want: Want) -> None:
        feedback = self._feedback
        if feedback and feedback.offer and feedback.offer.update.digest == want.digest:
            topic = self._topics.from_client(self._config.name, "blob")
            for chunk in cut(feedback.offer.update, feedback.update, want.ranges):
                self._transport.publish(topic, chunk)

    # --- sending -------------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        payload = seal(self._state.key, self._config.federation, self._config.name, encode_message(message))
        self._transport.publish(self._topics.from_client(self._config.name, "message"), payload)

    def _send_hello(self) -> None:
        self._send(
            Hello(
                public_key=self._state.key.public_key,
                connection=self._connection,
                edgetrain=__version__,
                runtimes=tuple(available_runtimes()),
                device=device_info(),
            )
        )

    def _send_ready(self) -> None:
        assert self._session, "joined"
        assert self._bundle_digest, "joined"
        assert self._train_data, "joined"
        self._send(
            Ready(
                bundle=self._bundle_digest, runtime=self._session.runtime, num_examples=len(self._train_data)
            )
        )

    def _resources(self, seconds: float) -> Resources:
        return Resources(
            seconds=round(seconds, 4),
            peak_memory_mb=peak_memory_mb(),
            bytes_sent=self._transport.bytes_sent,
            bytes_received=self._transport.bytes_received,
        )


def split_validation(dataset: Dataset, fraction: float, name: str) -> tuple[Dataset, Dataset | None]:
    """(training, validation) parts, chosen by the client's name, so that every start chooses the same.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = math.floor(len(dataset) * fraction)
    if count == 0:
        return dataset, None
    order = np.random.Generator(np.random.PCG64(_mix_seed(0, name, 0))).permutation(len(dataset))
    return dataset.subset(np.sort(order[count:])), dataset.subset(np.sort(order[:count]))


def _mix_seed(seed: int, name: str, round_number: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{round_number}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _file_ref(entry: FileEntry) -> BlobRef:
    return BlobRef(digest=bytes.fromhex(entry.sha256), size=entry.size)


def _scalars(loss: float, metrics: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
    """Loss and scalar metrics, finite ones only; the mean of `correct` is the accuracy."""
    values = {"loss": loss}
    for name, value in metrics.items():
        if value.ndim == 0:
            values["accuracy" if name == "correct" else name] = float(value)
    return {name: value for name, value in values.items() if math.isfinite(value)}


def new_connection() -> bytes:
    """Random id of a connection."""
    return os.urandom(16)
