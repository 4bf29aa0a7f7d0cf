"""`edgetrain privacy show`: what has been spent, of the federation's budget and by each client's part in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import msgspec

if TYPE_CHECKING:
    from edgetrain.protocol.privacy.accountant import Accountant
    from edgetrain.protocol.privacy.dp_accounting import AccountantName
    from edgetrain.protocol.privacy.ledger_file import LedgerFile


@click.command("show")
@click.argument("where", type=click.Path(path_type=Path))
@click.option("--client", help="Only this client.")
@click.option(
    "--accountant",
    type=click.Choice(["rdp", "pld", "dp-accounting-rdp"]),
    default="rdp",
    show_default=True,
    help="Works out the costs.",
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def show(where: Path, client: str | None, accountant: str, form: str) -> None:
    """Show what a privacy ledger says: of a run directory, a device's state directory, or the file itself.

    A client's own epsilon is what whoever knows which rounds it was in could have learnt about it: sampling does not
    count there.
    """
    from edgetrain.protocol.privacy import dp_accounting
    from edgetrain.protocol.privacy.ledger_file import read_ledger

    ledger = read_ledger(_find(where))
    found = _found(ledger, client, dp_accounting.accountant(cast("AccountantName", accountant)))
    click.echo(json.dumps(found) if form == "json" else _text(found))
    if client is not None and not found["clients"]:
        click.echo(f"nothing about {client}", err=True)


def _find(where: Path) -> Path:
    if (where / "run.json").is_file():
        from edgetrain.coordinator.privacy.budget import ledger_path
        from edgetrain.coordinator.run.past_run import PastRun

        # It may have been moved, or be looked at from elsewhere.
        return ledger_path(msgspec.structs.replace(PastRun.open(where).config, out=str(where.absolute())))
    return where / "privacy.json" if where.is_dir() else where


def _found(ledger: LedgerFile, client: str | None, accountant: Accountant) -> dict[str, Any]:
    from edgetrain.protocol.privacy.ledger_file import releases_with

    # Many have the same costs.
    costs: dict[tuple[int, ...], float] = {}
    clients = []
    for name, steps in sorted(ledger.participants.items()):
        if client in {None, name}:
            if steps not in costs:
                costs[steps] = accountant(releases_with(ledger, name), ledger.delta)
            clients.append({"client": name, "sums": sum(steps), "epsilon": costs[steps]})
    return {
        "owner": ledger.owner,
        "epsilon": accountant(ledger.releases, ledger.delta),
        "budget": ledger.epsilon,
        "delta": ledger.delta,
        "releases": [{"what": release.words, "sums": release.steps} for release in ledger.releases],
        "clients": clients,
    }


def _text(found: dict[str, Any]) -> str:
    limit = "no limit" if found["budget"] is None else f"of {found['budget']:g}"
    lines = [f"{found['owner']}: epsilon {found['epsilon']:.4g} {limit} at delta {found['delta']:g}"]
    lines += [f"  {release['sums']} sums with {release['what']}" for release in found["releases"]]
    if found["clients"]:
        lines += ["", f"{'client':<32} {'sums':>6} {'epsilon':>8}   to whoever knows the rounds that it was in"]
        lines += [f"{row['client']:<32} {row['sums']:>6} {row['epsilon']:>8.4f}" for row in found["clients"]]
    return "\n".join(lines)
