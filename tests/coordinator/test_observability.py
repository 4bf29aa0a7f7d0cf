"""What a run shows: spread over clients, metrics, event files, logs."""

import json
import struct
import urllib.error
import urllib.request

import pytest

from edgetrain.coordinator import events
from edgetrain.coordinator.clients.spread import evaluation_of, spread_of
from edgetrain.coordinator.config import StopConfig
from edgetrain.coordinator.errors import CoordinatorError
from edgetrain.coordinator.observability import ObservabilityConfig, observers
from edgetrain.coordinator.observability.prometheus import Counters, PrometheusServer
from edgetrain.coordinator.observability.tensorboard import TensorBoardWriter, crc32c
from edgetrain.coordinator.run.records import RoundRecord
from edgetrain.coordinator.stopping import best_round, metric_series, stop_reason
from edgetrain.protocol.messages import Report


def report(accuracy, loss=1.0, examples=10):
    return Report(
        run=bytes(16),
        round=1,
        nonce=bytes(16),
        num_examples=examples,
        metrics={"accuracy": accuracy, "loss": loss},
    )


def record(number, **more):
    defaults = {
        "attempts": 1,
        "seconds": 2.0,
        "invited": 3,
        "accepted": 2,
        "declined": 0,
        "refused": 1,
        "lost": 0,
        "bytes_up": 100,
        "bytes_down": 50,
        "parameters_sha256": "",
    }
    return RoundRecord(round=number, **(defaults | more))


EVENTS = [
    events.ClientJoined("a", 5),
    events.ClientJoined("b", 5),
    events.ClientLeft("a", "bye"),
    events.RoundStarted(1, 1, 2),
    events.UpdateAccepted(1, "b", 40, 1),
    events.Refused("c", 'a "bad"\nthing', "forged"),
    events.Evaluated(1, 0.75, 0.5),
    events.ClientsEvaluated(evaluation_of(1, {"a": report(0.5), "b": report(1.0)}, None)),
    events.RoundEnded(record(1, train_loss=0.125)),
    events.Paused(),
]


def test_the_spread_by_hand():
    spread = spread_of([0.0, 0.5, 1.0, 1.0], [1, 1, 1, 5])
    assert spread.mean == pytest.approx(6.5 / 8)
    assert (spread.minimum, spread.median, spread.maximum) == (0.0, 0.75, 1.0)
    assert spread.p10 == pytest.approx(0.15)
    assert spread.deviation == pytest.approx((0.625**2 + 0.125**2 + 2 * 0.375**2) ** 0.5 / 2)
    assert spread.fairness == pytest.approx(2.5**2 / (4 * 2.25))
    assert spread_of([0.0, 0.0], [0, 0]).fairness == 1.0


def test_who_got_worse():
    before = evaluation_of(1, {"a": report(0.5), "b": report(0.6), "c": report(0.7)}, None)
    after = evaluation_of(2, {"a": report(0.4), "b": report(0.6), "c": report(0.9), "d": report(0.1)}, before)
    assert before.worse == ()
    assert after.worse == ("a",)


def test_stopping_on_any_metric():
    records = [record(number, train_loss=loss) for number, loss in enumerate([3.0, 2.0, 2.0, 2.0], 1)]
    evaluations = [evaluation_of(n, {"a": report(value)}, None) for n, value in ((1, 0.5), (3, 0.9))]
    assert metric_series("train_loss", records, evaluations) == [3.0, 2.0, 2.0, 2.0]
    series = metric_series("clients.accuracy", records, evaluations)
    assert series == [0.5, None, 0.9, None]
    assert best_round("clients.accuracy", records, series) == 3
    assert best_round("train_loss", records, [3.0, 2.0, 2.0, 2.0]) == 2
    assert best_round("loss", records, [None] * 4) is None
    history = [(None, None)] * 4
    assert "train_loss has not improved" in str(
        stop_reason(StopConfig(patience=2, metric="train_loss"), history, [3.0, 2.0, 2.0, 2.0])
    )
    assert stop_reason(StopConfig(patience=1, metric="clients.accuracy"), history, series) is None


# --- Prometheus --------------------------------------------------------------------------------------


def test_prometheus_serves_what_happened():
    counters = Counters("test")
    for event in EVENTS:
        counters(event)
    with PrometheusServer(counters) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            lines = answer.read().decode().splitlines()
        with pytest.raises(urllib.error.HTTPError, match="404") as refusal:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=5)
        refusal.value.close()
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    expected = {
        "edgetrain_clients_ready": 1,
        "edgetrain_updates_accepted_total": 1,
        "edgetrain_update_bytes_total": 40,
        "edgetrain_refusals_total": 1,
        "edgetrain_rounds_total": 1,
        "edgetrain_accuracy": 0.5,
        "edgetrain_train_loss": 0.125,
        "edgetrain_bytes_up_total": 100,
    }
    assert {name: float(samples[f'{name}{{federation="test"}}']) for name in expected} == expected
    assert samples['edgetrain_refusals_by_kind_total{federation="test",kind="forged"}'] == "1"
    labels = 'federation="test",metric="accuracy",statistic="mean"'
    assert samples[f"edgetrain_clients_metric{{{labels}}}"] == "0.75"
    helped = {line.split()[2] for line in lines if line.startswith("# HELP")}
    assert helped == {sample.split("{")[0] for sample in samples}


def test_a_taken_port_is_an_error_that_says_which():
    with (
        PrometheusServer(Counters("test")) as server,
        pytest.raises(CoordinatorError, match=f"prometheus_port.*{server.port}"),
    ):
        PrometheusServer(Counters("test"), port=server.port)


def test_names_that_clients_choose_break_nothing_and_do_not_pile_up():
    counters = Counters("test")
    for name in ('evil"} 1\n# \\', "later"):
        hostile = Report(run=bytes(16), round=1, nonce=bytes(16), num_examples=1, metrics={name: 1.0})
        counters(events.ClientsEvaluated(evaluation_of(1, {"a": hostile}, None)))
        lines = [line for line in counters.text().splitlines() if "clients_metric{" in line]
        assert len(lines) == 5
        escaped = r"evil\"} 1\n# \\" if name != "later" else name
        assert all(f'metric="{escaped}",statistic=' in line for line in lines)


# --- TensorBoard -------------------------------------------------------------------------------------


def test_crc32c_has_the_rfcs_test_vectors():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E


def fields(data):
    """A protobuf message as (field, value) pairs; independent of the writer."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while data[at] >= 0x80:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
        at += 1
        return value | data[at - 1] << shift

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, data[at : at + size]
            at += size


def test_tensorboard_files_hold_the_scalars(tmp_path):
    writer = TensorBoardWriter(tmp_path / "tb", clock=lambda: 123.5)
    for event in EVENTS:
        writer(event)
    assert "tfevents" in writer.path.name
    data, at, scalars, versions = writer.path.read_bytes(), 0, {}, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = dict(fields(data[at + 12 : at + 12 + length]))
        at += 16 + length
        assert struct.unpack("<d", event[1]) == (123.5,)
        if 3 in event:
            versions.append(event[3])
            continue
        for _, value in fields(event[5]):
            scalar = dict(fields(value))
            scalars[scalar[1].decode(), event[2]] = struct.unpack("<f", scalar[2])[0]
    assert versions == [b"brain.Event:2"]
    assert scalars["server/loss", 1] == 0.75
    assert scalars["clients/accuracy/mean", 1] == 0.75
    assert scalars["round/accepted", 1] == 2.0
    assert scalars["clients/train_loss", 1] == 0.125


# --- together ----------------------------------------------------------------------------------------


def test_all_observers_are_told(tmp_path):
    seen = []
    config = ObservabilityConfig(tensorboard=True)
    with observers(config, federation="test", directory=tmp_path, also=seen.append) as observe:
        for event in EVENTS:
            observe(event)
    assert seen == EVENTS
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == [type(event).__name__ for event in EVENTS]
    assert lines[5]["reason"] == 'a "bad"\nthing'
    assert lines[8]["record"]["round"] == 1
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
