"""`edgetrain client`."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import click
import msgspec

from edgetrain.cli.settings import flags, load_settings, setting
from edgetrain.edge_client.config import ClientConfig

logger = logging.getLogger(__name__)


@click.command("client")
@click.option("--config", type=click.Path(), help="TOML file with the settings; flags override it.")
@click.option(
    "--broker",
    metavar="ADDRESS",
    help="Of the MQTT broker: HOST[:PORT], or mqtts://, ws:// or wss://HOST[:PORT][/PATH].",
)
@flags(ClientConfig)
def command(config: str | None, broker: str | None, **given: Any) -> None:
    """Take part in a federation: train the coordinator's bundle on local data, send compressed updates."""
    from edgetrain.edge_client.client import Client, connection_will, new_connection
    from edgetrain.edge_client.durable.state import ClientState
    from edgetrain.edge_client.host.memory import return_what_is_freed
    from edgetrain.edge_client.host.service import LivingTransport, Service
    from edgetrain.edge_client.training.data import find_source
    from edgetrain.protocol.names import check_name
    from edgetrain.protocol.signing import SigningKey
    from edgetrain.protocol.transport.address import parse_address
    from edgetrain.protocol.transport.mqtt import MqttTransport

    return_what_is_freed()
    if broker:
        for name, value in parse_address(broker).settings():
            given[setting(f"broker.{name}")] = value
    settings = load_settings(ClientConfig, config, given)
    check_name(settings.name, "client")
    check_name(settings.federation, "federation")
    find_source(settings.data)
    if not settings.state:
        settings = msgspec.structs.replace(settings, state=f"state-{settings.name}")
    # A service manager's stop is like Ctrl-C: say goodbye, leave nothing half done.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    service = Service()
    if config:
        warn_if_readable(Path(config), settings)
    key = SigningKey.from_setting(settings.signing_key) if settings.signing_key else None
    state = ClientState(Path(settings.state), key)
    try:
        run: bytes | None = None
        while True:
            connection = new_connection()
            transport = MqttTransport(
                settings.broker,
                client_id=f"edgetrain/{settings.federation}/{settings.name}",
                will=connection_will(settings, state, connection),
            )
            service.ready()
            client = Client(
                settings, state=state, transport=LivingTransport(transport, service), connection=connection, run=run
            )
            pause = client.run()
            if pause is None:
                break
            run = client.joined
            logger.info("not needed for %.0f s: disconnected until then", pause)
            service.sleep(pause)
    finally:
        service.stopping()
        state.close()


def warn_if_readable(path: Path, settings: ClientConfig) -> None:
    """Says so if others can read a file that holds private keys."""
    secret = settings.signing_key or settings.broker.tls_key or settings.broker.password
    if secret and path.stat().st_mode & 0o077:
        logger.warning("%s holds keys and can be read by others: chmod 600 %s", path, path)
