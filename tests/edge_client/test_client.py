"""The client against a coordinator that tests script: what it sends, what it believes, what it survives."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import shutil

import msgspec
import numpy as np
import pytest

from edgetrain.coordinator.post import COORDINATOR
from edgetrain.edge_client import open_session
from edgetrain.edge_client.client import Client, connection_will, new_connection
from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.durable.error_feedback import ErrorFeedback
from edgetrain.edge_client.durable.state import ClientState
from edgetrain.edge_client.errors import DataError, RefusedError, SessionError
from edgetrain.edge_client.host.policy import LOOK_SECONDS, Policy, PolicyConfig, Surroundings
from edgetrain.edge_client.training.data import load_dataset
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.trainer import evaluate, train
from edgetrain.edge_client.workplace import split_validation
from edgetrain.protocol import BundleError, EdgetrainError, Limits, decode
from edgetrain.protocol.blobs import HEADER_BYTES, cut
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.files import write_atomically
from edgetrain.protocol.messages import (
    Announce,
    BlobRef,
    Decline,
    DeviceState,
    Goodbye,
    Hello,
    LogPoint,
    Offer,
    Ready,
    Refusal,
    Report,
    encode_message,
)
from edgetrain.protocol.signing import SigningKey, seal
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.transport import MemoryBroker
from support.scripted import FEDERATION, Clock, Crash, DrivenTransport
from support.scripted_coordinator import TRAINING, ScriptedCoordinator
from support.tiny_bundle import NUM_PARAMETERS, initial_parameters, make_data, write_tiny_bundle

START = initial_parameters()


class Scene:
    """A client's directory and data, a broker, and a scripted coordinator."""

    def __init__(self, bundle, path, **settings):
        self.clock = Clock()
        self.broker = MemoryBroker()
        self.coordinator = ScriptedCoordinator(self.broker, self.clock, bundle)
        x, y = make_data(30, seed=4)
        np.savez(path / "data.npz", inputs=x, targets=y)
        self.config = ClientConfig(
            **({"name": "pi", "federation": FEDERATION, "data": str(path / "data.npz"), "state": str(path / "state")}
               | settings)
        )  # fmt: skip
        self.path = path
        self.bundle = bundle
        self.transport = None
        self.transport_type = DrivenTransport
        self.policy = None

    def run(self):
        """One life of the client."""
        state = ClientState(self.path / "state")
        try:
            connection = new_connection()
            inner = self.broker.connect(will=connection_will(self.config, state, connection))
            self.transport = self.transport_type(inner, self.clock, self.coordinator.act)
            try:
                Client(
                    self.config,
                    state=state,
                    transport=self.transport,
                    connection=connection,
                    clock=self.clock,
                    policy=self.policy,
                ).run()
            finally:
                self.coordinator.drain()
                self.broker.drop(inner)
                self.coordinator.drain()
        finally:
            state.close()

    def announce(self, status="open", reason=""):
        self.coordinator.post.announce(status, reason)

    def end(self):
        self.announce("ended", "that is all")

    def heard(self, kind):
        return [message for message in self.coordinator.heard if isinstance(message, kind)]

    def expected_delta(self, plan, parameters=START):
        """What this client's training gives, by the trainer alone."""
        seed = int.from_bytes(hashlib.sha256(f"{plan.seed}/pi/{plan.round}".encode()).digest()[:7], "little")
        return train(self.session(), parameters, self.data()[0], plan.training, seed=seed).parameters - parameters

    def session(self):
        return open_session(self.bundle)

    def data(self):
        dataset = load_dataset(self.config.data, Bundle(self.bundle).manifest)
        return split_validation(dataset, self.config.validation_fraction, "pi")


@pytest.fixture
def scene(tiny_bundle, ram_path):
    return Scene(tiny_bundle, ram_path)


def rounds(scene, count, *, accept=lambda number: True, codec="dense|float32", **changes):
    """Invites for `count` rounds in turn, answers the updates, then ends the run."""
    coordinator = scene.coordinator
    plans = [coordinator.plan(START, number, codec=codec, **changes) for number in range(1, count + 1)]
    left = list(plans)

    def invite(_message=None):
        if left:
            coordinator.send(left.pop(0))
        else:
            scene.end()

    def on_update(offer, _update):
        coordinator.verdict(offer, accepted=accept(offer.round), reason="" if accept(offer.round) else "too late")
        invite()

    coordinator.on_ready, coordinator.on_update = invite, on_update
    return plans


def test_a_whole_life(scene):
    plans = rounds(scene, 2)
    scene.announce()
    scene.run()
    kinds = [type(message).__name__ for message in scene.coordinator.heard if type(message).__name__ != "Want"]
    assert kinds == ["Hello", "Ready", "Offer", "Offer", "Goodbye"]
    (ready,) = scene.heard(Ready)
    assert (ready.runtime, ready.num_examples, ready.bundle) == ("onnxruntime", 27, scene.coordinator.bundle.digest)
    for plan, (offer, update) in zip(plans, scene.coordinator.updates, strict=True):
        assert (offer.run, offer.round, offer.nonce) == (plan.run, plan.round, plan.nonce)
        assert (offer.num_examples, offer.steps) == (27, 7)
        assert offer.resources.peak_memory_mb > 10
        assert offer.resources.bytes_received > 4 * NUM_PARAMETERS
        np.testing.assert_array_equal(
            decode(update, Limits(max_parameters=NUM_PARAMETERS)).dense(), scene.expected_delta(plan)
        )
    assert scene.heard(Goodbye)[0].reason == "the run has ended"


def test_what_was_refused_comes_with_the_next_update(scene):
    plans = rounds(scene, 3, accept=lambda number: number != 1)
    scene.announce()
    scene.run()
    deltas = [scene.expected_delta(plan) for plan in plans]
    sent = [decode(update, Limits(max_parameters=NUM_PARAMETERS)).dense() for _, update in scene.coordinator.updates]
    np.testing.assert_array_equal(sent[0], deltas[0])
    np.testing.assert_array_equal(sent[1], deltas[0] + deltas[1])
    np.testing.assert_array_equal(sent[2], deltas[2])


def test_a_bundle_is_fetched_once_and_for_its_runtime_only(scene):
    rounds(scene, 1)
    scene.announce()
    scene.run()
    manifest = scene.coordinator.bundle.manifest
    digests = {bytes.fromhex(entry.sha256) for entry in manifest.files("onnxruntime")}
    assert digests <= set(scene.coordinator.wanted)
    scene.coordinator.wanted.clear()
    scene.coordinator.new_run(bytes(16))
    rounds(scene, 1)
    scene.announce()
    scene.run()
    assert not digests & set(scene.coordinator.wanted)
    # A file that was damaged meanwhile is fetched again, and only that.
    path = scene.path / "state/bundles" / scene.coordinator.bundle.digest.hex() / "onnxruntime/step.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    scene.coordinator.wanted.clear()
    scene.coordinator.new_run(bytes(range(16)))
    rounds(scene, 1)
    scene.announce()
    scene.run()
    step = bytes.fromhex(manifest.program("onnxruntime").graphs["step"].file.sha256)
    assert digests & set(scene.coordinator.wanted) == {step}


def test_an_evaluation(scene):
    plan = scene.coordinator.plan(START, task="evaluate")
    scene.coordinator.on_ready = lambda _ready: scene.coordinator.send(plan)
    scene.coordinator.on_message = lambda message: scene.end() if isinstance(message, Report) else None
    scene.announce()
    scene.run()
    (report,) = scene.heard(Report)
    expected = evaluate(scene.session(), START, scene.data()[1])
    assert report.num_examples == 3
    assert report.metrics["loss"] == pytest.approx(expected.loss)
    assert report.nonce == plan.nonce


# --- crashes -----------------------------------------------------------------------------------------


def crash_on_publish(matches):
    """Ends the process when it is about to send this."""

    class Fatal(DrivenTransport):
        armed = True

        def publish(self, topic, payload, **options):
            if Fatal.armed and matches(topic):
                Fatal.armed = False
                raise Crash
            self._inner.publish(topic, payload, **options)

        def send_blob(self, topic, *arguments, **options):
            if Fatal.armed and matches(topic):
                Fatal.armed = False
                raise Crash
            self._inner.send_blob(topic, *arguments, **options)

    return Fatal


@pytest.mark.parametrize("at", ["before the chunks", "between update and verdict"])
def test_a_crash_with_an_update_pending_offers_the_same_update_again(scene, at):
    plans = rounds(scene, 2)
    scene.announce()
    if at == "before the chunks":
        scene.transport_type = crash_on_publish(lambda topic: topic.endswith("/from/pi/blob"))
    else:
        good = scene.coordinator.on_update

        def die(_offer, _update):
            scene.coordinator.on_update = good
            raise Crash

        scene.coordinator.on_update = die
    with pytest.raises(Crash):
        scene.run()
    # The coordinator noted an update if it came whole; a real one has it in its journal.
    accepted = {offer.update.digest for offer, _ in scene.coordinator.updates}
    first_ready, take = scene.coordinator.on_ready, scene.coordinator.on_update
    sent = []

    def on_ready(_ready):
        scene.coordinator.send(plans[0])  # as to everyone who comes back in a round

    def on_message(message):
        if isinstance(message, Offer):
            sent.append(message)
            if message.update.digest in accepted:
                scene.coordinator.verdict(message)
                first_ready()

    def on_update(offer, update):
        if offer.update.digest not in accepted:
            take(offer, update)

    scene.coordinator.on_ready, scene.coordinator.on_message = on_ready, on_message
    scene.coordinator.on_update = on_update
    scene.run()
    assert [offer.round for offer in sent] == [1, 2], "the plan that was done already is not done again"
    updates = {offer.round: update for offer, update in scene.coordinator.updates}
    for plan in plans:
        np.testing.assert_array_equal(
            decode(updates[plan.round], Limits(max_parameters=NUM_PARAMETERS)).dense(), scene.expected_delta(plan)
        )


class Disk:
    """A disk that refuses some writes."""

    def __init__(self, monkeypatch, *modules):
        self.full = True
        self.refused = 0
        real = write_atomically

        def write(path, data, **options):
            if self.full:
                self.refused += 1
                raise OSError(28, "No space left on device")
            real(path, data, **options)

        for module in modules:
            monkeypatch.setattr(f"edgetrain.edge_client.{module}.write_atomically", write)


def test_a_full_disk_declines_with_the_reason_sends_nothing_and_is_survived(scene, monkeypatch, caplog):
    disk = Disk(monkeypatch, "durable.checked_file")
    coordinator = scene.coordinator
    plans = [coordinator.plan(START, number, codec="dense|float32") for number in (1, 2)]

    def on_message(message):
        if isinstance(message, Decline):
            assert not scene.heard(Offer), "nothing leaves that is not on the disk"
            disk.full = False
            coordinator.send(plans[1])

    def on_update(offer, _update):
        coordinator.verdict(offer)
        scene.end()

    coordinator.on_ready = lambda _ready: coordinator.send(plans[0])
    coordinator.on_message, coordinator.on_update = on_message, on_update
    scene.announce()
    scene.run()
    assert [(decline.round, "No space left" in decline.reason) for decline in scene.heard(Decline)] == [(1, True)]
    assert "residual.bin: cannot store the residual" in caplog.text
    # As if round 1 had never been: the training that could not be kept is not in the next update.
    ((_, update),) = coordinator.updates
    np.testing.assert_array_equal(
        decode(update, Limits(max_parameters=NUM_PARAMETERS)).dense(), scene.expected_delta(plans[1])
    )


def test_a_disk_that_is_full_when_the_verdict_comes_settles_later(scene, monkeypatch):
    """The update was accepted, the disk does not know: it is offered again, not made again, and settled once."""
    disk = Disk(monkeypatch, "durable.checked_file")
    disk.full = False
    coordinator = scene.coordinator
    plans = [coordinator.plan(START, number, codec="topk:0.1|float32") for number in (1, 2)]
    offers = []

    def on_message(message):
        if isinstance(message, Decline):
            assert (message.round, disk.refused) == (1, 1)
            disk.full = False
            coordinator.send(plans[1])
        elif isinstance(message, Offer):
            offers.append(message.round)
            if offers == [1, 1]:
                coordinator.verdict(message)

    def on_update(offer, _update):
        if len(offers) == 1:
            disk.full = True
            coordinator.verdict(offer)
        elif offer.round == 2:
            coordinator.verdict(offer)
            coordinator.on_idle = scene.end

    coordinator.on_ready = lambda _ready: coordinator.send(plans[0])
    coordinator.on_message, coordinator.on_update = on_message, on_update
    scene.announce()
    scene.run()
    assert offers == [1, 1, 2]
    feedback = ErrorFeedback(
        scene.path / "state/residual.bin", bundle=plans[0].bundle, run=plans[0].run, num_parameters=NUM_PARAMETERS
    )
    assert feedback.offer is None
    updates = {offer.round: update for offer, update in coordinator.updates}
    sent = sum(decode(update, Limits(max_parameters=NUM_PARAMETERS)).dense() for update in updates.values())
    deltas = sum(scene.expected_delta(plan) for plan in plans)
    np.testing.assert_allclose(sent + feedback.residual, deltas, rtol=1e-5, atol=1e-6)


def test_what_the_policy_forbids_is_declined_with_the_reason(scene, caplog):
    batteries = [10.0, 10.0]

    def look():
        device = DeviceState(battery_percent=batteries.pop() if batteries else 90.0, charging=False)
        return Surroundings(device=device, metered=False, throttling=(), time=dt.time(12))

    scene.policy = Policy(PolicyConfig(), clock=scene.clock, look=look)
    coordinator = scene.coordinator
    plan = coordinator.plan(START, 1)

    def on_message(message):
        if isinstance(message, Decline):
            scene.clock.now += LOOK_SECONDS
            coordinator.send(plan)

    def on_update(offer, _update):
        coordinator.verdict(offer)
        scene.end()

    coordinator.on_ready = lambda _ready: coordinator.send(plan)
    coordinator.on_message, coordinator.on_update = on_message, on_update
    scene.announce()
    scene.run()
    declines = [decline.reason for decline in scene.heard(Decline)]
    assert declines == ["battery at 10 % (policy.min_battery_percent = 20)"] * 2
    assert "round 1: declined: battery at 10 %" in caplog.text
    assert [offer.round for offer in scene.heard(Offer)] == [1], "the same plan, when it may"


def test_a_training_that_the_policy_stops_is_declined(scene):
    """Heat comes with the work."""
    temperatures = [40.0, 40.0, 95.0]

    def look():
        # Every look, after LOOK_SECONDS each.
        scene.clock.now += LOOK_SECONDS
        device = DeviceState(temperature_c=temperatures.pop(0) if temperatures else 95.0)
        return Surroundings(device=device, metered=None, throttling=(), time=dt.time(12))

    scene.policy = Policy(PolicyConfig(max_temperature_c=80), clock=scene.clock, look=look)
    coordinator = scene.coordinator
    plan = coordinator.plan(START, 1)
    coordinator.on_ready = lambda _ready: coordinator.send(plan)
    coordinator.on_message = lambda message: scene.end() if isinstance(message, Decline) else None
    scene.announce()
    scene.run()
    assert [decline.reason for decline in scene.heard(Decline)] == ["at 95 °C (policy.max_temperature_c = 80)"]
    assert not scene.heard(Offer)


def test_an_interrupt_says_goodbye(scene):
    def interrupt():
        raise KeyboardInterrupt

    rounds(scene, 1)
    scene.coordinator.on_update = lambda _offer, _update: interrupt()
    scene.announce()
    with pytest.raises(KeyboardInterrupt):
        scene.run()
    assert scene.heard(Goodbye)[0].reason == "interrupted"


def test_the_will_is_a_signed_goodbye(scene):
    rounds(scene, 1)

    def cut_off(_offer, _update):
        scene.broker.drop(scene.transport._inner)
        raise Crash

    scene.coordinator.on_update = cut_off
    scene.announce()
    with pytest.raises(Crash):
        scene.run()
    (hello,) = scene.heard(Hello)
    assert scene.heard(Goodbye)[0] == Goodbye(reason="connection lost", connection=hello.connection)


# --- plans that come twice, late, or not at all ------------------------------------------------------


def test_a_plan_that_comes_twice_is_done_once(scene):
    plan = scene.coordinator.plan(START)

    def on_update(offer, _update):
        scene.coordinator.verdict(offer)
        scene.coordinator.send(plan)
        scene.coordinator.on_idle = scene.end

    scene.coordinator.on_ready = lambda _ready: [scene.coordinator.send(plan) for _ in range(3)]
    scene.coordinator.on_update = on_update
    scene.announce()
    scene.run()
    assert len(scene.heard(Offer)) == 1


def test_a_plan_of_another_run_is_ignored(scene):
    other = scene.coordinator.plan(START, 1, run=bytes(16))
    plan = scene.coordinator.plan(START, 2)

    def on_update(offer, _update):
        scene.coordinator.verdict(offer)
        scene.end()

    scene.coordinator.on_ready = lambda _ready: (scene.coordinator.send(plan), scene.coordinator.send(other))
    scene.coordinator.on_update = on_update
    scene.announce()
    scene.run()
    assert [offer.round for offer in scene.heard(Offer)] == [2]


def test_a_plan_for_another_bundle_is_declined(scene):
    scene.coordinator.on_ready = lambda _ready: scene.coordinator.send(scene.coordinator.plan(START, bundle=bytes(32)))
    scene.coordinator.on_message = lambda message: scene.end() if isinstance(message, Decline) else None
    scene.announce()
    scene.run()
    assert scene.heard(Decline)[0].reason == "has another bundle"


def test_a_round_that_closes_while_parameters_are_on_their_way_is_left_for_the_next(scene):
    """The coordinator has forgotten them: waiting for them would cost the next round, too."""
    coordinator = scene.coordinator
    old, new = coordinator.plan(START, 1), coordinator.plan(START + 1, 2)

    def on_want(want):
        if want.digest == old.parameters.digest:
            coordinator.on_idle = over
            return False
        return True

    def over():
        coordinator.on_idle = lambda: None
        coordinator.close_round(old)
        coordinator.send(new)

    def on_update(offer, _update):
        coordinator.verdict(offer)
        scene.end()

    coordinator.on_want, coordinator.on_update = on_want, on_update
    coordinator.on_ready = lambda _ready: coordinator.send(old)
    scene.announce()
    started = scene.clock.now
    scene.run()
    assert [offer.round for offer in scene.heard(Offer)] == [2]
    assert scene.clock.now - started < 10


def test_training_stops_when_the_round_closes(scene):
    coordinator = scene.coordinator
    long = coordinator.plan(START, 1, training=msgspec.structs.replace(TRAINING, epochs=1000))
    short = coordinator.plan(START, 2)

    def on_want(want):
        if want.digest == long.parameters.digest and not coordinator.updates:
            coordinator.blobs.want("pi", want.digest, want.ranges, coordinator.clock.now)
            coordinator.blobs.tick(coordinator.clock.now + 1)
            coordinator.close_round(long)
            coordinator.send(short)
        return True

    def on_update(offer, _update):
        coordinator.verdict(offer)
        scene.end()

    coordinator.on_want, coordinator.on_update = on_want, on_update
    coordinator.on_ready = lambda _ready: coordinator.send(long)
    scene.announce()
    scene.run()
    assert [offer.round for offer in scene.heard(Offer)] == [2]
    assert scene.heard(Decline) == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow is the point
def test_a_training_that_diverges_is_declined_with_the_reason_each_time_it_is_asked_for(scene):
    coordinator = scene.coordinator
    plan = coordinator.plan(START, training=TrainingConfig(epochs=50, batch_size=4, learning_rate=1e39))

    def on_message(message):
        if isinstance(message, Decline):
            if len(scene.heard(Decline)) < 3:
                coordinator.send(plan)  # the round is tried again
            else:
                scene.end()

    coordinator.on_ready = lambda _ready: coordinator.send(plan)
    coordinator.on_message = on_message
    scene.announce()
    started = scene.clock.now
    scene.run()
    declines = scene.heard(Decline)
    assert len(declines) == 3
    assert all("is not finite (learning rate 1e+39)" in decline.reason for decline in declines)
    assert scene.clock.now - started < 10


def test_a_refused_update_is_declined_when_the_round_is_tried_again(scene):
    coordinator = scene.coordinator
    plan = coordinator.plan(START)

    def on_update(offer, _update):
        coordinator.verdict(offer, accepted=False, reason="too large")
        coordinator.send(plan)

    coordinator.on_ready = lambda _ready: coordinator.send(plan)
    coordinator.on_update = on_update
    coordinator.on_message = lambda message: scene.end() if isinstance(message, Decline) else None
    scene.announce()
    scene.run()
    assert "too large" in scene.heard(Decline)[0].reason


def test_parameters_of_another_length_are_declined(scene):
    coordinator = scene.coordinator
    coordinator.on_ready = lambda _ready: coordinator.send(coordinator.plan(START[:-1]))
    coordinator.on_message = lambda message: scene.end() if isinstance(message, Decline) else None
    scene.announce()
    scene.run()
    assert "not those that the plan names" in scene.heard(Decline)[0].reason


def test_a_codec_that_this_client_does_not_know_is_declined(scene):
    coordinator = scene.coordinator
    coordinator.on_ready = lambda _ready: coordinator.send(coordinator.plan(START, codec="wavelet"))
    coordinator.on_message = lambda message: scene.end() if isinstance(message, Decline) else None
    scene.announce()
    scene.run()
    assert "wavelet" in scene.heard(Decline)[0].reason


def test_parameters_that_are_announced_too_large_are_declined(scene):
    coordinator = scene.coordinator
    plan = coordinator.plan(START)
    plan = msgspec.structs.replace(plan, parameters=msgspec.structs.replace(plan.parameters, size=2**40))
    coordinator.on_ready = lambda _ready: coordinator.send(plan)
    coordinator.on_message = lambda message: scene.end() if isinstance(message, Decline) else None
    scene.announce()
    scene.run()
    assert "exceeds the limit" in scene.heard(Decline)[0].reason


# --- a network that loses, doubles and damages -------------------------------------------------------


def test_lost_messages_are_repeated(scene):
    """The first Welcome, every third Want, the first verdict: each is asked for again."""
    coordinator = scene.coordinator
    rounds(scene, 1)
    lost = {"welcome": False, "want": 0, "verdict": False}
    send = coordinator.send

    def losing(message):
        name = type(message).__name__.lower()
        if name in {"welcome", "verdict"} and not lost[name]:
            lost[name] = True
            return
        send(message)

    def on_want(_want):
        lost["want"] += 1
        return lost["want"] % 3 != 1

    def on_message(message):
        if isinstance(message, Offer) and coordinator.updates:
            coordinator.verdict(message)
            scene.end()

    coordinator.send, coordinator.on_want, coordinator.on_message = losing, on_want, on_message
    coordinator.on_update = lambda offer, _update: coordinator.verdict(offer)
    scene.announce()
    scene.run()
    assert len(scene.heard(Hello)) == 2
    assert len(scene.heard(Offer)) == 2
    assert len({offer.update.digest for offer in scene.heard(Offer)}) == 1


def test_chunks_with_other_bytes_are_found_out_and_fetched_again(scene):
    """While the bundle is fetched and while the parameters are: a damaged blob costs a repetition, not the client."""
    coordinator = scene.coordinator
    rounds(scene, 1)
    poisoned = set()

    def on_want(want):
        if want.digest not in poisoned:
            poisoned.add(want.digest)
            ref = coordinator.blobs._served[want.digest].blob.ref
            wrong = bytes(ref.size)
            for chunk in cut(ref, wrong):
                coordinator.transport.publish(coordinator.topics.to_client("pi", "blob"), chunk)
            return False
        return True

    coordinator.on_want = on_want
    scene.announce()
    scene.run()
    assert len(scene.heard(Offer)) == 1
    assert len(poisoned) >= 5


def test_a_plan_sent_again_with_other_blobs_replaces_the_one_whose_blobs_are_gone(scene):
    """As by a coordinator that was killed after its plans had gone out, and started again."""
    coordinator = scene.coordinator
    (plan,) = rounds(scene, 1)
    gone = msgspec.structs.replace(plan, parameters=BlobRef(digest=bytes(32), size=500))
    invite, coordinator.on_ready = coordinator.on_ready, lambda _ready: coordinator.send(gone)

    def on_want(want):
        if want.digest == bytes(32):
            invite()
        return True

    coordinator.on_want = on_want
    scene.announce()
    scene.run()
    assert [offer.nonce for offer in scene.heard(Offer)] == [plan.nonce]


def test_rubbish_is_ignored(scene):
    rounds(scene, 1)
    key = SigningKey(bytes(32))
    coordinator = scene.coordinator
    good_plan = coordinator.plan(START + 1, 9)
    rubbish = [
        (coordinator.topics.to_client("pi", "message"), payload)
        for payload in (
            b"", b"\0" * 500, b"\x94" * 60_000, bytes(100_000),
            seal(key, FEDERATION, COORDINATOR, encode_message(good_plan)),  # another's signature
            seal(coordinator.key, "other", COORDINATOR, encode_message(good_plan)),  # another federation
            seal(coordinator.key, FEDERATION, COORDINATOR, encode_message(Goodbye(reason="", connection=bytes(16)))),
        )
    ] + [
        (coordinator.topics.to_client("pi", "blob"), payload) for payload in (b"", bytes(HEADER_BYTES + 5), b"EC" * 99)
    ]  # fmt: skip

    def on_want(_want):
        for topic, payload in rubbish:
            coordinator.transport.publish(topic, payload)
        return True

    coordinator.on_want = on_want
    scene.announce()
    scene.run()
    assert [offer.round for offer in scene.heard(Offer)] == [1]


def test_a_coordinator_that_is_away_for_an_hour_is_waited_for(scene):
    """In every phase: while joining, while fetching the bundle, while waiting for parameters and for the verdict."""
    coordinator = scene.coordinator
    rounds(scene, 1)
    away = {"bundle": 0, "parameters": 0}
    manifest = coordinator.manifest.digest

    def on_want(want):
        phase = (
            "bundle" if want.digest == manifest else "parameters" if want.digest == plans[0].parameters.digest else ""
        )
        if phase and not away[phase]:
            away[phase] = 1
            coordinator.transport.subscriptions.clear()
            back_at = scene.clock.now + 3600 / 4

            def idle():
                if scene.clock.now > back_at:
                    coordinator.on_idle = lambda: None
                    coordinator.transport.subscribe(coordinator.topics.from_client("+", "#"))
                    scene.announce()
                    left[:] = plans

            coordinator.on_idle = idle
            return False
        return True

    plans = [coordinator.plan(START, 1)]
    left = list(plans)
    coordinator.on_ready = lambda _ready: coordinator.send(left[0])
    coordinator.on_want = on_want
    coordinator.on_update = lambda offer, _update: (coordinator.verdict(offer), scene.end())
    scene.announce()
    scene.run()
    assert away == {"bundle": 1, "parameters": 1}
    assert len(scene.heard(Offer)) == 1


def test_after_a_reconnect_it_introduces_itself_and_repeats_its_offer_at_once(scene):
    coordinator = scene.coordinator
    rounds(scene, 1)
    seen = []

    def on_update(_offer, _update):
        inner = scene.transport._inner
        scene.broker.drop(inner)
        scene.broker.restore(inner)
        seen.append(scene.clock.now)

    def on_message(message):
        if isinstance(message, Offer) and seen:
            coordinator.verdict(message)
            scene.end()

    coordinator.on_update, coordinator.on_message = on_update, on_message
    scene.announce()
    scene.run()
    assert len(scene.heard(Hello)) == 2
    assert len({hello.connection for hello in scene.heard(Hello)}) == 1
    assert scene.clock.now - seen[0] < 5


# --- trust -------------------------------------------------------------------------------------------


class Impostor:
    """Can write wherever the coordinator can, but has a key of its own."""

    def __init__(self, scene, bundle):
        other = ScriptedCoordinator(scene.broker, scene.clock, bundle, key=SigningKey(b"impostor".ljust(32)))
        self._scene, self._other = scene, other

    def forge(self):
        """Everything that once sent a client home, or might."""
        transport, topics, other = self._other.transport, self._other.topics, self._other
        other.post.announce("open")
        other.post.announce("ended", "go home")
        copied = Announce(
            run=self._scene.coordinator.run, public_key=self._scene.coordinator.key.public_key, edgetrain="0",
            bundle=other.manifest, status="ended", serial=2**50,
        )  # fmt: skip
        transport.publish(topics.announce, seal(other.key, FEDERATION, COORDINATOR, encode_message(copied)))
        transport.publish(topics.announce, msgspec.msgpack.encode([2, COORDINATOR, {"of": "the future"}]))
        other.client = "pi"
        for hello in self._scene.heard(Hello):
            other.send(Refusal(reason="go away", connection=hello.connection))


def test_what_another_key_says_is_ignored_and_only_warned_of(scene, tiny_bundle, caplog):
    """The first coordinator is remembered; forged broadcasts make nobody quit, and nobody runs their bundle."""
    rounds(scene, 1)
    scene.announce()
    scene.run()
    impostor, coordinator = Impostor(scene, tiny_bundle), scene.coordinator
    coordinator.new_run(bytes(range(16)))
    rounds(scene, 1)
    invite = coordinator.on_ready

    def on_ready(ready):
        impostor.forge()
        invite(ready)

    coordinator.on_ready = on_ready
    impostor.forge()
    scene.announce()
    caplog.clear()
    scene.run()
    assert len(scene.heard(Offer)) == 2
    assert {ready.bundle for ready in scene.heard(Ready)} == {coordinator.manifest.digest}
    ignored = [record.message for record in caplog.records if "ignored an announcement with key" in record.message]
    assert len(ignored) == 1
    assert "coordinator.pub" in ignored[0]


def test_a_copy_of_an_earlier_runs_announcement_moves_nobody(scene):
    coordinator = scene.coordinator
    old = coordinator.run
    kept = []
    publish = coordinator.transport.publish

    def keep(topic, payload, *, retain=False):
        if topic == coordinator.topics.announce:
            kept.append(payload)
        publish(topic, payload, retain=retain)

    coordinator.transport.publish = keep
    rounds(scene, 1)
    ended = scene.end

    def next_run():
        if coordinator.run == old:
            coordinator.new_run(bytes(range(16)))
            rounds(scene, 1, nonce=b"of another run".ljust(16))
            invite = coordinator.on_ready

            def on_ready(ready):
                for payload in kept[:1]:
                    publish(coordinator.topics.announce, payload)
                invite(ready)

            coordinator.on_ready = on_ready
            scene.announce()
        else:
            ended()

    scene.end = next_run
    scene.announce()
    scene.run()
    assert [hello.connection for hello in scene.heard(Hello)] == [scene.heard(Hello)[0].connection] * 2
    assert len(scene.heard(Offer)) == 2


def test_a_client_notices_a_rewritten_history(scene, caplog):
    coordinator = scene.coordinator
    rounds(scene, 1)
    scene.announce()
    scene.run()
    honest = [LogPoint(records=5, head=b"a" * 32), LogPoint(records=9, head=b"b" * 32)]
    rewritten = [LogPoint(records=5, head=b"a" * 32), LogPoint(records=8, head=b"c" * 32)]
    for points, noticed in ((honest[:1], False), (honest, False), (rewritten, True)):
        caplog.clear()
        coordinator.post.publish_checkpoints(points)
        coordinator.new_run(coordinator.run)
        scene.announce()
        coordinator.on_ready = lambda _ready: scene.end()
        scene.run()
        said = [record.message for record in caplog.records if "has rewritten the history" in record.message]
        assert bool(said) == noticed
    assert "had 9 lines and now has 8" in said[0]


def test_only_the_configured_coordinator_is_joined(tiny_bundle, ram_path, caplog):
    scene = Scene(tiny_bundle, ram_path, coordinator_key=SigningKey(b"k" * 32).public_key.hex())
    scene.announce()
    with pytest.raises(AssertionError, match="stuck"):
        scene.run()
    assert "not the configured coordinator_key" in caplog.text
    assert scene.heard(Hello) == []
    scene.config = msgspec.structs.replace(scene.config, coordinator_key=scene.coordinator.key.public_key.hex())
    rounds(scene, 1)
    scene.announce()
    scene.run()
    assert len(scene.heard(Offer)) == 1


def test_a_refusal_counts_only_for_the_hello_it_answers(scene):
    coordinator = scene.coordinator
    rounds(scene, 1)
    invite = coordinator.on_ready

    def on_ready(ready):
        coordinator.send(Refusal(reason="of another connection", connection=bytes(16)))
        coordinator.send(Refusal(reason="of another version"))
        invite(ready)

    coordinator.on_ready = on_ready
    scene.announce()
    scene.run()
    assert len(scene.heard(Offer)) == 1
    coordinator.new_run(bytes(16))
    coordinator.on_ready = lambda _ready: coordinator.send(
        Refusal(reason="go away", connection=scene.heard(Hello)[-1].connection)
    )
    scene.announce()
    with pytest.raises(RefusedError, match="refused this client: go away"):
        scene.run()


def test_another_protocol_version_is_refused_with_advice(scene):
    announce = msgspec.msgpack.encode([2, COORDINATOR, {"of": "the future"}])
    scene.coordinator.transport.publish(scene.coordinator.topics.announce, announce, retain=True)
    with pytest.raises(RefusedError, match=r"protocol version 2.*same version of edgetrain"):
        scene.run()


def test_an_old_announcement_is_not_believed(scene):
    coordinator = scene.coordinator
    rounds(scene, 1)
    invite = coordinator.on_ready
    old = Announce(
        run=coordinator.run, public_key=coordinator.key.public_key, edgetrain="0", bundle=coordinator.manifest,
        status="ended", serial=1,
    )  # fmt: skip

    def on_ready(ready):
        payload = seal(coordinator.key, FEDERATION, COORDINATOR, encode_message(old))
        coordinator.transport.publish(coordinator.topics.announce, payload)
        invite(ready)

    coordinator.on_ready = on_ready
    scene.announce()
    scene.run()
    assert len(scene.heard(Offer)) == 1


# --- the state of the run ----------------------------------------------------------------------------


def test_a_paused_run_is_waited_for(scene):
    coordinator = scene.coordinator
    plan = coordinator.plan(START)
    paused_at = []

    def pause(_ready):
        scene.announce("paused", "back soon")
        paused_at.append(scene.clock.now)

        def idle():
            if scene.clock.now > paused_at[0] + 300:
                coordinator.on_idle = lambda: None
                coordinator.on_ready = lambda _ready: coordinator.send(plan)
                scene.announce()

        coordinator.on_idle = idle

    coordinator.on_ready = pause
    coordinator.on_update = lambda offer, _update: (coordinator.verdict(offer), scene.end())
    scene.announce()
    scene.run()
    assert len(scene.heard(Offer)) == 1
    assert scene.clock.now - paused_at[0] > 300


def test_a_run_that_ended_before_is_not_this_clients_end(scene):
    """A retained "ended" of yesterday: wait for the next run."""
    coordinator = scene.coordinator
    scene.end()
    started = scene.clock.now

    def idle():
        if scene.clock.now > started + 50:
            coordinator.on_idle = lambda: None
            scene.announce()

    coordinator.on_idle = idle
    rounds(scene, 1)
    scene.run()
    assert len(scene.heard(Offer)) == 1


def test_another_run_starts_from_no_residual(scene):
    """With `exit_when_done` off it goes on to the next run, and owes it nothing from the last."""
    scene.config = msgspec.structs.replace(scene.config, exit_when_done=False)
    coordinator = scene.coordinator
    plans = rounds(scene, 1, accept=lambda _number: False)
    end = scene.end

    def next_run():
        scene.end = end
        coordinator.new_run(bytes(range(16)))
        plans.extend(rounds(scene, 1))
        scene.announce()

    scene.end = next_run

    def stop():
        raise KeyboardInterrupt

    scene.announce()
    with pytest.raises(KeyboardInterrupt):
        coordinator.on_idle = lambda: stop() if len(coordinator.updates) == 2 else None
        scene.run()
    sent = decode(coordinator.updates[1][1], Limits(max_parameters=NUM_PARAMETERS)).dense()
    np.testing.assert_array_equal(sent, scene.expected_delta(plans[1]))


# --- bundles and data that do not work here ----------------------------------------------------------


def failing(scene, error, match):
    scene.announce()
    with pytest.raises(error, match=match) as caught:
        scene.run()
    assert isinstance(caught.value, EdgetrainError)
    assert scene.heard(Ready) == []
    assert scene.heard(Goodbye)[0].reason == "stopped by an error"


def test_a_bundle_beyond_the_limit(tiny_bundle, ram_path):
    scene = Scene(tiny_bundle, ram_path, max_bundle_bytes=100)
    failing(scene, BundleError, "max_bundle_bytes allows 100")


def test_a_runtime_that_the_bundle_has_not(tiny_bundle, ram_path):
    failing(Scene(tiny_bundle, ram_path, runtime="executorch"), BundleError, "no program for runtime 'executorch'")


def test_a_bundle_for_runtimes_that_are_not_here(ram_path):
    bundle = write_tiny_bundle(ram_path / "other", runtimes=("abacus",))
    failing(Scene(bundle, ram_path), BundleError, "runs on abacus; here there is: onnxruntime")


def test_a_runtime_too_old(ram_path):
    bundle = write_tiny_bundle(ram_path / "new", minimum_version="99.0")
    failing(Scene(bundle, ram_path), SessionError, r"99\.0")


def test_a_bundle_that_fails_its_self_test_here(tiny_bundle, ram_path):
    bundle = shutil.copytree(tiny_bundle, ram_path / "wrong")
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["self_test"]["loss_sum"] *= 1.5
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    failing(Scene(bundle, ram_path), SessionError, "self-test failed")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"inputs": np.zeros((4, 9), np.float32), "targets": np.zeros(4, np.int64)}, "inputs"),
        ({"inputs": np.full((4, 5), np.nan, np.float32), "targets": np.zeros(4, np.int64)}, "inputs"),
        ({"inputs": np.zeros((4, 5), np.float32), "targets": np.zeros(3, np.int64)}, "targets"),
        ({"inputs": np.zeros((0, 5), np.float32), "targets": np.zeros(0, np.int64)}, "data"),
        ({"x": np.zeros(3)}, "inputs"),
    ],
    ids=["shape", "nan", "count", "empty", "names"],
)
def test_data_that_does_not_fit(tiny_bundle, ram_path, arrays, match):
    scene = Scene(tiny_bundle, ram_path)
    np.savez(ram_path / "data.npz", **arrays)
    failing(scene, DataError, match)


def test_the_split_is_by_name_and_disjoint():
    x, y = make_data(50)
    dataset = Dataset(np.arange(50)[:, None] + np.zeros_like(x), y)
    parts = {name: split_validation(dataset, 0.2, name) for name in ("a", "b")}
    for train_part, held in parts.values():
        assert (len(train_part), len(held)) == (40, 10)
        indices = [set(part.take(np.arange(len(part)))[0][0][:, 0].astype(int)) for part in (train_part, held)]
        assert indices[0] | indices[1] == set(range(50))
    assert not np.array_equal(*(part[1].take(np.arange(10))[0][0] for part in parts.values()))
    assert split_validation(dataset, 0.01, "a") == (dataset, None)
