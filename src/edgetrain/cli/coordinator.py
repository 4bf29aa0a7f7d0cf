"""`edgetrain coordinator`."""

from __future__ import annotations

import signal
from typing import Any

import click

from edgetrain.coordinator.config import FederationConfig
from edgetrain.protocol.config import convert, read_toml, set_dotted


@click.command("coordinator")
@click.option("--config", required=True, type=click.Path(), help="TOML file with the settings of the federation.")
@click.option("--broker", metavar="mosquitto|embedded|ADDRESS", help="Start a broker here, or use the one there.")
@click.option(
    "--secure-aggregation/--no-secure-aggregation",
    default=None,
    help="See sums of updates only, never a single one; the rest as --set secure_aggregation.KEY=VALUE.",
)
@click.option(
    "--workers", metavar="ray:N|processes:N", help="Let N other processes take the updates, on Ray or on this machine."
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a setting, as rounds.total=5.")
def command(
    config: str,
    broker: str | None,
    secure_aggregation: bool | None,
    workers: str | None,
    assignments: tuple[str, ...],
) -> None:
    """Run a federation: invite clients, aggregate their updates, evaluate, until a stop condition holds.

    A run that was interrupted goes on where it was when the same command is given again.
    """
    from edgetrain.cli.progress import Progress
    from edgetrain.coordinator.serve import serve
    from edgetrain.protocol.transport.address import parse_address

    tables = read_toml(config)
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise click.UsageError(f"--set {assignment}: write KEY=VALUE")
        set_dotted(tables, key, _toml_value(value))
    if secure_aggregation is not None:
        set_dotted(tables, "secure_aggregation.enabled", secure_aggregation)
    if workers is not None:
        set_dotted(tables, "workers", workers)
    if broker in {"mosquitto", "embedded"}:
        tables["start_broker"] = broker
        set_dotted(tables, "broker.host", "127.0.0.1")
        if broker == "embedded":
            set_dotted(tables, "broker.mqtt_version", "3.1.1")
    elif broker:
        for name, said in parse_address(broker).settings():
            set_dotted(tables, f"broker.{name}", said)
    settings = convert(tables, FederationConfig, where=config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Progress(settings) as progress:
        serve(settings, progress)


def _toml_value(text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
