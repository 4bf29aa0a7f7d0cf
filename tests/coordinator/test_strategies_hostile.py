"""What is malformed or absurd never reaches a fold, whatever the strategy."""

import msgspec
import numpy as np
import pytest

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.rounds.collection import Collection
from edgetrain.coordinator.run.journal import RoundOpened
from edgetrain.coordinator.strategies import STRATEGIES, make_strategy
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.codecs import CodecSpec, Limits, encode
from edgetrain.protocol.config import convert
from edgetrain.protocol.messages import Offer, encode_message
from edgetrain.protocol.signing import SigningKey, seal
from edgetrain.protocol.training import TrainingConfig
from support.contributions import contribution, run_round

N = 6
GOOD = np.linspace(-1, 1, N, dtype=np.float32)
TRAINING = TrainingConfig(epochs=2, batch_size=4)
NEEDED = {
    "norm-bound": {"max_norm": 9},
    # Noise far below what a folded lie would change.
    "dp-fedavg": {"clip_norm": 9, "noise_multiplier": 1e-9, "clients_per_round": 1},
}
TABLES = {name: {"name": name} | NEEDED.get(name, {}) for name in STRATEGIES}


class Directory:
    """The part of a run directory that a collection needs, without a disk."""

    def __init__(self, path):
        self.path = path

    def journal_path(self, number):
        return self.path / f"{number}.journal"

    def opened_round(self, _number):
        return None

    def note_opened(self, opened):
        pass


def plain(values):
    return encode(np.asarray(values, np.float32), CodecSpec())


def poisoned(value):
    payload = bytearray(plain(GOOD))
    payload[-4:] = np.float32(value).tobytes()
    return bytes(payload)


def offer(data, *, examples=10, steps=6, control=b""):
    return Offer(
        run=bytes(16),
        round=1,
        nonce=bytes(16),
        update=blob_ref(data + control),
        num_examples=examples,
        steps=steps,
        control_bytes=len(control),
    )


@pytest.fixture
def open_collection(tmp_path):
    opened = []

    def make(table):
        strategy = make_strategy(table)
        collection = Collection(strategy, N, {}, Limits(max_parameters=N), 1000)
        record = RoundOpened(run=bytes(16), round=1, nonce=bytes(16), parameters=bytes(32))
        collection.open(Directory(tmp_path), record)
        opened.append(collection)
        return strategy, collection

    yield make
    for collection in opened:
        collection.close()


HOSTILE = {
    "NaN": ({}, poisoned(np.nan), "not finite"),
    "infinity": ({}, poisoned(-np.inf), "not finite"),
    "too short": ({}, plain(GOOD[:-1]), "5 parameters, the model has 6"),
    "too long": ({}, plain([*GOOD, 1]), "decode"),
    "huge": ({}, plain(GOOD * 1e38), "too large"),
    "garbage": ({}, b"\x00\x01garbage", "decode"),
    "nothing": ({}, b"", "decode"),
    "no examples": ({"examples": 0}, plain(GOOD), "claims 0 examples"),
    "absurd examples": ({"examples": 10**12}, plain(GOOD), "allowed are 1 to 1000"),
    "absurd steps": ({"steps": 7}, plain(GOOD), "claims 7 steps"),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in sorted(TABLES)
        for case in sorted(HOSTILE)
        # These scale them down.
        if case != "huge" or name not in NEEDED
    ],
)
def test_hostile_updates_change_nothing(open_collection, name, case):
    claims, data, reason = HOSTILE[case]
    strategy, collection = open_collection(TABLES[name])
    control = plain(GOOD / 2) if strategy.control else b""
    good = offer(plain(GOOD), control=control)
    collection.accept("honest", good, b"", plain(GOOD) + control, TRAINING)
    with pytest.raises(UpdateRefused, match=reason):
        collection.accept("liar", offer(data, control=control, **claims), b"", data + control, TRAINING)
    assert list(collection.digests) == ["honest"]
    after, _ = strategy.finish(collection.partial, np.zeros(N, np.float32), {})
    # As if the liar had never been there.
    honest = contribution("honest", GOOD, examples=10, steps=6, training=TRAINING, control=GOOD / 2)
    expected, _ = run_round(strategy, np.zeros(N), [honest])
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-6 if strategy.private else 0)


def test_control_variates_are_checked_like_updates(open_collection):
    _, collection = open_collection("scaffold")
    for control, reason in (
        (b"", "has no control variate"),
        (plain(GOOD[:3]), "control variate has 3 parameters"),
        (poisoned(np.nan), "control variate does not decode"),
        (plain(GOOD * 1e38), "too large"),
    ):
        with pytest.raises(UpdateRefused, match=reason):
            collection.accept("liar", offer(plain(GOOD), control=control), b"", plain(GOOD) + control, TRAINING)
    lie = Offer(
        run=bytes(16),
        round=1,
        nonce=bytes(16),
        update=blob_ref(plain(GOOD)),
        num_examples=10,
        steps=6,
        control_bytes=10**9,
    )
    with pytest.raises(UpdateRefused, match="claims 1000000000 bytes"):
        collection.accept("liar", lie, b"", plain(GOOD), TRAINING)
    assert collection.digests == {}
    assert collection.partial.deltas.count == collection.partial.controls.count == 0


def test_a_table_in_the_settings_file():
    tables = {
        "federation": "f",
        "bundle": "b",
        "out": "o",
        "strategy": {"name": "fedadam", "learning_rate": 0.05, "inner": {"name": "median"}},
        "devices": [{"machine": "armv7*", "epochs": 1}],
        "selection": {"method": "utility"},
    }
    config = convert(tables, FederationConfig, where="federation.toml")
    assert make_strategy(config.strategy).layers == ("fedadam", "median")
    assert config.devices[0].epochs == 1
    assert convert(tables | {"strategy": "krum"}, FederationConfig, where="").strategy == "krum"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_journal_gives_back_what_was_folded(open_collection, name):
    """Also how each client was told to train, which FedNova needs, and the control variates."""
    strategy, collection = open_collection(TABLES[name])
    key, told = SigningKey.generate(), (TRAINING, TrainingConfig(batch_size=2, momentum=0.5), TRAINING)
    for number, training in enumerate(told):
        control = plain(GOOD / (number + 2)) if strategy.control else b""
        data = plain(GOOD * (number + 1)) + control
        made = offer(plain(GOOD * (number + 1)), control=control, examples=5 + number, steps=number + 1)
        made = msgspec.structs.replace(made, update=blob_ref(data))
        envelope = seal(key, "f", f"c{number}", encode_message(made))
        collection.accept(f"c{number}", made, envelope, data, training)
    collection.commit()
    collection.close()
    _, again = open_collection(TABLES[name])
    start = np.zeros(N, np.float32)
    before, state = strategy.finish(collection.partial, start, {})
    after, replayed = strategy.finish(again.partial, start, {})
    assert np.abs(before).max() > 0
    assert before.tobytes() == after.tobytes()
    assert state.keys() == replayed.keys()
    assert all(state[entry].tobytes() == replayed[entry].tobytes() for entry in state)
