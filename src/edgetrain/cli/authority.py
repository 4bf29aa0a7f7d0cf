"""`edgetrain init`, `enroll` and `revoke`: who may take part in a federation."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import click

_DIRECTORY = click.option(
    "--dir", "directory", type=click.Path(), default=".", show_default="the current one", help="Federation directory."
)


@click.command("init")
@click.argument("directory", type=click.Path())
@click.option("--name", help="Name of the federation.  [default: that of the directory]")
@click.option("--host", help="Name or address under which devices reach the broker.  [default: this machine's name]")
@click.option("--port", type=click.IntRange(1, 65535), default=8883, show_default=True, help="Port of the broker.")
@click.option("--bind", help="Address the broker listens on.  [default: all; 127.0.0.1 if the host is that]")
@click.option("--bundle", type=click.Path(), help="The bundle to train.  [default: DIRECTORY/bundle]")
@click.option("--renew", is_flag=True, help="Give the broker of an existing directory a new certificate, no more.")
def init(
    directory: str, name: str | None, host: str | None, port: int, bind: str | None, bundle: str | None, *, renew: bool
) -> None:
    """Make a federation directory: a private CA, the broker's and the coordinator's keys and settings.

    Then enroll devices, and run: edgetrain coordinator --config DIRECTORY/federation.toml
    """
    from edgetrain.coordinator.authority import FederationDirectory, InitOptions
    from edgetrain.protocol.config import convert

    path = Path(directory)
    federation = FederationDirectory(path)
    if renew:
        made = federation.renew_server(host or "")
        click.echo(f"{path}: the broker has a new certificate for {made.address}; restart it or the coordinator")
        return
    host = host or socket.gethostname()
    loopback = host in {"localhost", "::1"} or host.startswith("127.")
    options = {
        "federation": name or re.sub(r"[^A-Za-z0-9._-]", "-", path.absolute().name),
        "host": host,
        "port": port,
        "bind": bind if bind is not None else ("127.0.0.1" if loopback else ""),
        "bundle": bundle or str(path / "bundle"),
    }
    made = federation.init(convert(options, InitOptions, where="init"))
    click.echo(f"{path}: federation {made.federation}, broker at {made.address}")
    click.echo(f"  coordinator key {made.coordinator_key}")
    click.echo(f"  next: edgetrain enroll NAME --dir {path}   (once per device)")
    click.echo(f"        edgetrain coordinator --config {path / 'federation.toml'}")


@click.command("enroll")
@click.argument("name")
@_DIRECTORY
@click.option(
    "-o", "--output", type=click.Path(), default=".", help="Device file, or directory for it.  [default: ./NAME.toml]"
)
@click.option("--data", default="data.npz", show_default=True, help="Where the device finds its local data.")
@click.option("--renew", is_flag=True, help="New keys for a client that is enrolled, or was revoked.")
def enroll(name: str, directory: str, output: str, data: str, *, renew: bool) -> None:
    """Enroll a client: writes NAME.toml, all that a device needs to join. It holds private keys."""
    from edgetrain.coordinator.authority import FederationDirectory

    path = FederationDirectory(Path(directory)).enroll(name, output=Path(output), data=data, renew=renew)
    click.echo(f"{path}: copy it to the device over a safe channel, then there: edgetrain client --config {path.name}")


@click.command("revoke")
@click.argument("name")
@_DIRECTORY
def revoke(name: str, directory: str) -> None:
    """Take a client's enrolment back: a running coordinator refuses it at once, and so does the broker it started."""
    from edgetrain.coordinator.authority import FederationDirectory

    FederationDirectory(Path(directory)).revoke(name)
    click.echo(
        f"{name} is revoked. A broker that the coordinator did not start has to read its files again: "
        "kill -HUP its process"
    )
