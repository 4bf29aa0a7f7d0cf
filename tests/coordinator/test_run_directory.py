"""The run directory: one coordinator, one bundle, and never a wrong number taken for a right one."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import sqlite3
import stat
import tomllib

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from edgetrain.coordinator.clients.spread import evaluation_of
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.journal import Journal
from edgetrain.coordinator.run.records import ClientRow, RoundRecord
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import EdgetrainError
from edgetrain.protocol.vectors import vector_digest
from support.tiny_bundle import NUM_PARAMETERS, SHAPES, initial_parameters


@pytest.fixture
def opener(tiny_bundle, ram_path):
    """Opens the run; everything that was opened is closed at the end."""
    bundle, opened = Bundle(tiny_bundle), []

    def open_run(*, digest=bundle.digest, **changes):
        config = FederationConfig(
            **{"federation": "f", "bundle": str(tiny_bundle), "out": str(ram_path / "run")} | changes
        )
        directory = RunDirectory(config, bundle.manifest, digest)
        opened.append(directory)
        return directory

    yield open_run
    for directory in opened:
        directory.close()


def vector(number):
    return np.full(NUM_PARAMETERS, number, np.float32)


def record(number, loss=None):
    return RoundRecord(
        round=number, attempts=1, seconds=1.5, invited=2, accepted=2, declined=0, refused=0, lost=0, loss=loss,
        parameters_sha256=vector_digest(vector(number)).hex(),
    )  # fmt: skip


def close_rounds(directory, *losses):
    start = len(directory.records)
    for number, loss in enumerate(losses, start + 1):
        rows = [ClientRow(round=number, client=name, status="accepted") for name in ("a", "b")]
        Journal(directory.journal_path(number)).close()
        directory.close_round(record(number, loss), vector(number), rows)


def test_a_new_run(opener, ram_path):
    directory = opener()
    number, parameters = directory.load_parameters(initial_parameters())
    assert number == 0
    np.testing.assert_array_equal(parameters, initial_parameters())
    assert len(directory.run) == 16
    for secret in ("../coordinator.key", "config.toml"):  # the settings may hold the broker's password
        assert stat.S_IMODE((ram_path / "run" / secret).stat().st_mode) == 0o600


def test_closed_rounds_survive(opener, ram_path):
    directory = opener()
    run, key = directory.run, directory.key.public_key
    close_rounds(directory, 0.5, 0.25)
    directory.close()
    again = opener()
    assert (again.run, again.key.public_key) == (run, key)
    assert again.records == [record(1, 0.5), record(2, 0.25)]
    number, parameters = again.load_parameters(initial_parameters())
    assert number == 2
    np.testing.assert_array_equal(parameters, vector(2))
    rows = list(csv.DictReader((ram_path / "run" / "clients.csv").read_text().splitlines()))
    assert [(row["round"], row["client"], row["status"]) for row in rows] == [
        (number, client, "accepted") for number in "12" for client in "ab"
    ]
    assert not list((ram_path / "run" / "journal").iterdir())


def test_parameters_have_the_names_of_the_users_module(opener, ram_path):
    directory = opener()
    close_rounds(directory, 0.5)
    for name in ("parameters.safetensors", "parameters/round-00001.safetensors"):
        tensors = safetensors.numpy.load_file(ram_path / "run" / name)
        assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES
        assert all((tensor == 1).all() for tensor in tensors.values())


def test_old_parameters_go_but_for_the_best(opener, ram_path):
    directory = opener()
    (ram_path / "run" / "parameters" / "round-of-mine.safetensors").write_text("not ours")
    close_rounds(directory, 0.9, 0.1, 0.5, 0.4, 0.3, 0.2)
    left = sorted(path.name for path in (ram_path / "run" / "parameters").iterdir())
    assert left == ["round-00002.safetensors", *(f"round-0000{n}.safetensors" for n in (4, 5, 6)),
                    "round-of-mine.safetensors"]  # fmt: skip


def test_two_coordinators_cannot_share_it(opener):
    directory = opener()
    with pytest.raises(RunError, match="another coordinator runs"):
        opener()
    directory.close()
    opener()


@pytest.mark.parametrize("changes", [{"digest": bytes(32)}, {"federation": "g"}])
def test_a_run_of_something_else_is_refused_and_left_as_it_is(opener, ram_path, changes):
    opener().close()
    before = {path.name: path.read_bytes() for path in (ram_path / "run").iterdir() if path.is_file()}
    with pytest.raises(RunError, match="choose another `out`"):
        opener(**changes)
    after = {path.name: path.read_bytes() for path in (ram_path / "run").iterdir() if path.is_file()}
    assert after == before
    opener()


@pytest.mark.parametrize(
    "contents", [b"", b"{}", b'{"run":"zz","federation":"f","bundle":""}', b'{"run":"00","federation":"f","bundle":""}']
)
def test_a_damaged_run_json_is_an_error(opener, ram_path, contents):
    opener().close()
    (ram_path / "run" / "run.json").write_bytes(contents)
    with pytest.raises(RunError, match=r"run\.json"):
        opener()


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc/nothing"])
def test_where_nothing_can_be_written_is_an_error(opener, out):
    with pytest.raises(RunError, match="cannot use the run directory"):
        opener(out=out)


def test_a_file_in_the_way_is_an_error(opener, ram_path):
    (ram_path / "run").write_text("precious")
    with pytest.raises(RunError):
        opener()
    assert (ram_path / "run").read_text() == "precious"


def test_a_damaged_key_is_an_error_and_lets_go_of_the_lock(opener, ram_path):
    directory = opener()
    directory.close()
    key = (ram_path / "coordinator.key").read_bytes()
    (ram_path / "coordinator.key").write_bytes(b"short")
    with pytest.raises(EdgetrainError, match="signing key"):
        opener()
    (ram_path / "coordinator.key").write_bytes(key)
    opener()


def without_database(path):
    for file in path.glob("state.sqlite*"):
        file.unlink()


@pytest.mark.parametrize("name", ["rounds.jsonl", "clients.csv", "evaluations.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "torn", "more", "rubbish"])
def test_text_files_are_put_right(opener, ram_path, name, damage):
    """Whatever a power cut, or an editor, has left of them: the database has the truth."""
    directory = opener()
    close_rounds(directory, 0.5, 0.25)
    directory.add_evaluation(evaluation_of(2, {}, None))
    directory.close()
    path = ram_path / "run" / name
    data = path.read_bytes()
    assert data
    match damage:
        case "missing":
            path.unlink()
        case "torn":
            path.write_bytes(data[:-3])
        case "more":
            path.write_bytes(data + data)
        case "rubbish":
            path.write_bytes(b"\xff\n")
    again = opener()
    assert path.read_bytes() == data
    assert [record.loss for record in again.records] == [0.5, 0.25]
    assert len(again.evaluations) == 1


def test_a_database_that_is_gone_is_made_from_the_text_files(opener, ram_path, caplog):
    directory = opener()
    close_rounds(directory, 0.5, 0.25)
    clients = [("a", b"k" * 32, None), ("b", b"l" * 32, (2, b"d" * 32))]
    directory.save_clients(clients)
    directory.close()
    before = {name: (ram_path / "run" / name).read_bytes() for name in ("rounds.jsonl", "clients.csv", "clients.json")}
    without_database(ram_path / "run")
    again = opener()
    assert "making one from the text files, 2 rounds" in caplog.text
    assert again.records == [record(1, 0.5), record(2, 0.25)]
    assert again.load_clients() == clients
    assert {name: (ram_path / "run" / name).read_bytes() for name in before} == before
    close_rounds(again, 0.125)
    again.close()
    assert [record.loss for record in opener().records] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("damage", ["rubbish", "torn", "a round is missing", "a record is no record"])
def test_a_damaged_database_is_an_error_with_a_way_out(opener, ram_path, damage):
    directory = opener()
    close_rounds(directory, 0.5, 0.25)
    directory.close()
    path = ram_path / "run" / "state.sqlite"
    match damage:
        case "rubbish":
            path.write_bytes(b"x" * 8192)
        case "torn":
            path.write_bytes(path.read_bytes()[:5000])
        case _:
            with contextlib.closing(sqlite3.connect(path)) as connection, connection:
                if damage == "a round is missing":
                    connection.execute("DELETE FROM rounds WHERE round = 1")
                else:
                    connection.execute("""UPDATE rounds SET record = '{"accepted": 1}' WHERE round = 2""")
    with pytest.raises(RunError, match=r"state\.sqlite: damaged.*rounds\.jsonl"):
        opener()
    without_database(ram_path / "run")
    assert opener().records == [record(1, 0.5), record(2, 0.25)]


def test_a_line_torn_anywhere_is_as_if_the_round_had_not_closed(opener, ram_path):
    """Where there is no database to say otherwise."""
    directory = opener()
    close_rounds(directory, 0.5, 0.25)
    directory.close()
    path = ram_path / "run" / "rounds.jsonl"
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for length in sorted({first, first + 1, len(data) - 1, *range(first, len(data), 29)}):
        without_database(ram_path / "run")
        path.write_bytes(data[:length])
        again = opener()
        assert again.records == [record(1, 0.5)], length
        assert again.load_parameters(initial_parameters())[0] == 1
        again.close()
        assert path.read_bytes() == data[:first]


@pytest.mark.parametrize("line", [b"{}\n", b"rubbish\n", b"\n", b'{"round": "1"}\n'])
def test_a_damaged_line_is_an_error(opener, ram_path, line):
    directory = opener()
    close_rounds(directory, 0.5)
    directory.close()
    without_database(ram_path / "run")
    with (ram_path / "run" / "rounds.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(RunError, match=r"rounds\.jsonl: line 2 is damaged"):
        opener()


def test_lines_of_the_wrong_round_are_an_error(opener, ram_path):
    directory = opener()
    close_rounds(directory, 0.5)
    directory.close()
    without_database(ram_path / "run")
    path = ram_path / "run" / "rounds.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(RunError, match=r"rounds\.jsonl: line 2"):
        opener()


@pytest.mark.parametrize("damage", ["missing", "torn", "flipped", "other tensors", "other type", "other values"])
def test_damaged_parameters_are_an_error(opener, ram_path, damage):
    directory = opener()
    close_rounds(directory, 0.5, 0.25)
    path = ram_path / "run" / "parameters" / "round-00002.safetensors"
    data = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "torn":
            path.write_bytes(data[:-3])
        case "flipped":
            path.write_bytes(bytes([data[0] ^ 0x40]) + data[1:])
        case "other tensors":
            path.write_bytes(safetensors.numpy.save({"x": vector(2)}))
        case "other type":
            tensors = safetensors.numpy.load(data)
            path.write_bytes(
                safetensors.numpy.save({name: found.astype(np.float64) for name, found in tensors.items()})
            )
        case "other values":
            path.write_bytes((ram_path / "run" / "parameters" / "round-00001.safetensors").read_bytes())
    directory.close()
    with pytest.raises(RunError, match=r"round-00002\.safetensors"):
        opener().load_parameters(initial_parameters())


def test_clients_are_remembered(opener):
    directory = opener()
    clients = [("a", b"k" * 32, None), ("b", b"l" * 32, (3, b"d" * 32))]
    assert directory.load_clients() == []
    directory.save_clients(clients)
    directory.close()
    assert opener().load_clients() == clients


@pytest.mark.parametrize("contents", [b"", b"{}", b'[{"name":"a","public_key":"zz"}]'])
def test_a_damaged_list_of_clients_is_an_error_where_there_is_no_database(opener, ram_path, contents):
    opener().close()
    without_database(ram_path / "run")
    (ram_path / "run" / "clients.json").write_bytes(contents)
    with pytest.raises(RunError, match=r"clients\.json: damaged"):
        opener()


@pytest.mark.parametrize("fail_at", range(12))
def test_a_disk_that_fails_while_a_round_closes_leaves_it_open_or_closed(opener, ram_path, monkeypatch, fail_at):
    """Whichever sync fails: the next start finds the round before, whole, or this one, whole."""
    directory = opener()
    close_rounds(directory, 0.5)
    calls = []

    def fail(_descriptor):
        calls.append(1)
        if len(calls) == fail_at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    failed = False
    try:
        directory.close_round(record(2, 0.25), vector(2), [ClientRow(round=2, client="a", status="accepted")])
    except RunError as error:
        failed = True
        assert "No space left" in str(error)
    monkeypatch.undo()
    directory.close()
    again = opener()
    number, parameters = again.load_parameters(initial_parameters())
    assert number in ({1, 2} if failed else {2})
    np.testing.assert_array_equal(parameters, vector(number))
    latest = safetensors.numpy.load_file(ram_path / "run" / "parameters.safetensors")
    assert latest["first.bias"][0] == number, "the latest is the latest, also after a failure"
    close_rounds(again, *[0.1] * (2 - number))
    rows = list(csv.DictReader((ram_path / "run" / "clients.csv").read_text().splitlines()))
    assert len({(row["round"], row["client"]) for row in rows}) == len(rows), "no row twice"


def test_journals_of_closed_rounds_are_cleared_away(opener, ram_path):
    """A kill between a round's line and the removal of its journal."""
    directory = opener()
    close_rounds(directory, 0.5)
    for number in (1, 2):
        Journal(directory.journal_path(number)).close()
    directory.close()
    opener().load_parameters(initial_parameters())
    assert [path.name for path in (ram_path / "run" / "journal").iterdir()] == ["round-00002.journal"]


def test_the_config_in_force_is_written(opener, ram_path):
    opener(seed=5)
    written = tomllib.loads((ram_path / "run" / "config.toml").read_text())
    assert msgspec.convert(written, FederationConfig).seed == 5
    assert json.loads((ram_path / "run" / "run.json").read_bytes())["federation"] == "f"
