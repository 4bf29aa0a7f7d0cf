"""Schema files: numbered, run once, whole or not at all."""

from __future__ import annotations

import contextlib
import sqlite3

import msgspec
import pytest

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.database import RunDatabase, migrations
from edgetrain.coordinator.run.database.migrations import migrate, schema_files
from edgetrain.coordinator.run.journal import RoundOpened
from edgetrain.coordinator.run.records import ClientRow, RoundRecord

RECORD = RoundRecord(
    round=1, attempts=1, seconds=1.5, invited=2, accepted=2, declined=0, refused=0, lost=0, loss=0.5,
    parameters_sha256="00",
)  # fmt: skip
ROWS = [ClientRow(round=1, client=name, status="accepted") for name in ("b", "a")]


@pytest.fixture
def connection(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "state.sqlite", isolation_level=None)) as connection:
        yield connection


def schema_of(connection):
    return connection.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall()


def version_of(connection):
    return connection.execute("PRAGMA user_version").fetchone()[0]


@pytest.mark.parametrize("start", range(len(schema_files())))
def test_a_database_of_any_version_gets_todays_schema_and_keeps_its_contents(tmp_path, connection, start):
    migrate(connection, name="state.sqlite", upto=start)
    assert version_of(connection) == start
    if start:
        record = '{"round":1,"attempts":1,"seconds":1.5,"invited":2,"accepted":2,"declined":0,"refused":0,"lost":0,'
        record += '"loss":0.5,"parameters_sha256":"00"}'  # as the first version wrote it
        connection.execute("INSERT INTO rounds (round, record) VALUES (1, ?)", (record,))
        connection.execute("INSERT INTO clients VALUES ('a', x'01', NULL, NULL)")
    database = RunDatabase(tmp_path)
    assert database.records() == ([RECORD] if start else [])
    assert database.clients() == ([("a", b"\x01", None)] if start else [])
    database.close()
    assert version_of(connection) == len(schema_files())
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        migrate(fresh, name="fresh")
        assert schema_of(connection) == schema_of(fresh)


def test_a_migration_that_fails_half_way_changes_nothing(connection, monkeypatch):
    files = schema_files()
    broken = (len(files) + 1, "CREATE TABLE half (x); CREATE TABLE rounds (taken);")
    migrate(connection, name="state.sqlite")
    before = schema_of(connection)
    monkeypatch.setattr(migrations, "schema_files", lambda: [*files, broken])
    with pytest.raises(sqlite3.Error, match="already exists"):
        migrate(connection, name="state.sqlite")
    assert (schema_of(connection), version_of(connection)) == (before, len(files))


def test_a_later_version_is_refused(tmp_path, connection):
    connection.execute("PRAGMA user_version = 99")
    with pytest.raises(RunError, match=r"has schema 99, this edgetrain knows \d+: use the version that wrote it"):
        RunDatabase(tmp_path)


def test_what_is_committed_is_read_by_the_next_and_by_plain_sql(tmp_path, connection):
    database = RunDatabase(tmp_path)
    opened = RoundOpened(run=bytes(16), round=1, nonce=b"n" * 16, parameters=b"p" * 32)
    database.note_opened(opened)
    assert database.opened(1) == opened
    database.close_rounds([(RECORD, ROWS)])
    assert database.opened(1) is None
    with pytest.raises(RunError, match="UNIQUE"):
        database.close_rounds([(RECORD, ROWS)])
    database.close()
    again = RunDatabase(tmp_path)
    assert (again.records(), list(again.rows())) == ([RECORD], ROWS)
    again.close()
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("SELECT round, accepted, loss, accuracy FROM rounds").fetchall() == [(1, 2, 0.5, None)]
    assert connection.execute("SELECT client, status FROM client_rounds").fetchall() == [
        ("b", "accepted"),
        ("a", "accepted"),
    ]
    assert connection.execute("SELECT value FROM metrics WHERE name = 'loss'").fetchall() == [(0.5,)]


def test_a_key_stays_the_first(tmp_path):
    """Whatever is saved later under a name: the key that is pinned does not change."""
    database = RunDatabase(tmp_path)
    database.save_clients([("a", b"k" * 32, None)])
    database.save_clients([("a", b"thief".ljust(32), (3, b"d" * 32))])
    assert database.clients() == [("a", b"k" * 32, (3, b"d" * 32))]
    database.close()


def test_a_note_that_does_not_wait_for_the_disk_is_read_by_the_next_and_the_rest_waits(tmp_path, connection):
    database = RunDatabase(tmp_path)
    opened = RoundOpened(run=bytes(16), round=1, nonce=bytes(16), parameters=bytes(32))
    database.note_opened(opened)
    # As after kill -9: nothing was closed.
    [(noted,)] = connection.execute("SELECT opened FROM opened_rounds").fetchall()
    assert msgspec.msgpack.decode(noted, type=RoundOpened) == opened
    assert database._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    database.close()
