"""Bringing a database to the schema of this version, by numbered SQL files.

`schema/0001_name.sql`, `0002_…`: each runs once, in one transaction with the number that says so
(`PRAGMA user_version`). A file that has been released never changes.
"""

from __future__ import annotations

import sqlite3
from importlib import resources

from edgetrain.coordinator.errors import RunError


def schema_files() -> list[tuple[int, str]]:
    """(number, SQL) of every file, in order; the numbers count from 1."""
    folder = resources.files("edgetrain.coordinator.run.database") / "schema"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda entry: entry.name)
    numbered = [(int(entry.name.partition("_")[0]), entry.read_text(encoding="utf-8")) for entry in files]
    assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1)), "schema files are numbered 1, 2, …"
    return numbered


def migrate(connection: sqlite3.Connection, *, name: str, upto: int | None = None) -> None:
    """Runs the schema files that a database lacks.

    Args:
        connection: in autocommit mode.
        name: of the database, for messages.
        upto: the last file to run; None for all.

    Raises:
        RunError: the database was made by a later version.
        sqlite3.Error: not writable, or damaged; the database is as it was.
    """
    files = schema_files()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(files):
        raise RunError(
            f"{name}: has schema {version}, this edgetrain knows {len(files)}: "
            "use the version that wrote it, or a newer one"
        )
    for number, sql in files[version:upto]:
        try:
            connection.executescript(f"BEGIN IMMEDIATE;\n{sql}\nPRAGMA user_version = {number};\nCOMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
