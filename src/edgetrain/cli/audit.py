"""`edgetrain audit`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from edgetrain.coordinator.errors import CoordinatorError

_FORMAT = click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="Of the output.")


@click.group("audit")
def command() -> None:
    """Check and read the audit log of a run: who took part with what, and what became of it."""


@command.command("verify")
@click.argument("run", type=click.Path())
@click.option("--key", "key_hex", default="", help="The coordinator's public key in hex, as in every device file.")
@click.option(
    "--seen", type=click.Path(), multiple=True, help="checkpoints.jsonl of a client: compare with what it was told."
)
@_FORMAT
def verify(run: str, key_hex: str, seen: tuple[str, ...], form: str) -> None:
    """Check that a run's audit log is whole: any edit, deletion, insertion, truncation or reorder is found.

    The exit status is 1 if it is not.
    """
    from edgetrain.coordinator.audit import verify_audit
    from edgetrain.coordinator.audit.compare import coordinator_key, seen_by

    key, source = coordinator_key(Path(run), key_hex)
    report = verify_audit(Path(run), public_key=key, seen=seen_by([Path(path) for path in seen], Path(run)))
    if form == "json":
        click.echo(
            json.dumps(
                {
                    "run": report.run,
                    "federation": report.federation,
                    "public_key": report.public_key.hex(),
                    "key_from": source,
                    "records": report.records,
                    "kinds": dict(sorted(report.kinds.items())),
                    "compared": report.compared,
                }
            )
        )
        return
    click.echo(f"{run}: whole: {report.records} lines of run {report.run}, federation {report.federation}")
    click.echo("  " + ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items())))
    click.echo(f"  sealed by key {report.public_key.hex()} ({source})")
    if seen:
        click.echo(f"  {report.compared} checkpoints of clients are in it")


@command.command("show")
@click.argument("run", type=click.Path())
@click.option("--client", help="Only what concerns this client.")
@click.option("--type", "kind", help="Only records of this type, e.g. refused_update.")
@_FORMAT
def show(run: str, client: str | None, kind: str | None, form: str) -> None:
    """Show a run's audit log, or what it holds of one client. Says so if the log is not whole."""
    from edgetrain.coordinator.audit import AuditError, verify_audit
    from edgetrain.coordinator.audit.compare import coordinator_key
    from edgetrain.coordinator.audit.verify import records_of

    problem: AuditError | None = None
    try:
        verify_audit(Path(run), public_key=coordinator_key(Path(run), "")[0])
    except AuditError as error:
        if not (Path(run) / "audit.jsonl").exists():
            raise
        problem = error
    found = 0
    for record in records_of(Path(run), client):
        if kind is None or record.get("type") == kind:
            found += 1
            click.echo(json.dumps(record) if form == "json" else _text(record))
    if client is not None and not found:
        click.echo(f"nothing about {client}", err=True)
    if problem is not None:
        sys.stdout.flush()
        raise CoordinatorError(f"do not trust the above: {problem}")


def _text(record: dict[str, Any]) -> str:
    shown = [
        f"{key}={value[:16] + '…' if isinstance(value, str) and len(value) >= 64 and ' ' not in value else value}"
        for key, value in record.items()
        if key not in {"n", "at", "type", "hash"}
    ]
    return f"{record.get('n'):>6} {record.get('at')} {record.get('type'):<15} {' '.join(shown)}"
