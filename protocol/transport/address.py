"""Addresses of brokers, as people write them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from edgetrain.protocol.errors import TransportError

_ADDRESS = re.compile(r"(?:(?P<name>[^][:/\s]+)|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?")
_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """What an address says of a broker."""

    host: str
    port: int
    transport: Literal["tcp", "websockets"] = "tcp"
    path: str = "/mqtt"
    tls: bool = False

    def settings(self) -> list[tuple[str, str | int]]:
        """(name, value) of what it says about a `BrokerConfig`; the rest stays as configured."""
        settings: list[tuple[str, str | int]] = [("host", self.host), ("port", self.port)]
        if self.transport == "websockets":
            settings += [("transport", self.transport), ("path", self.path)]
        return [*settings, ("tls_ca", "system")] if self.tls else settings


def parse_address(address: str) -> BrokerAddress:
    """The broker at "HOST[:PORT]" or "SCHEME://HOST[:PORT][/PATH]", SCHEME being mqtt, mqtts, ws or wss.

    Raises:
        TransportError: neither.
    """
    if "://" not in address:
        host, port = parse_broker(address)
        return BrokerAddress(host, port)
    scheme, _, rest = address.partition("://")
    place, _, path = rest.partition("/")
    if scheme not in _PORTS or urlsplit(address).username is not None:
        raise TransportError(
            f"broker {address!r} is not HOST, HOST:PORT or SCHEME://HOST[:PORT][/PATH] with mqtt, mqtts, ws or wss"
        )
    host, port = parse_broker(place, _PORTS[scheme])
    transport: Literal["tcp", "websockets"] = "websockets" if scheme.startswith("ws") else "tcp"
    return BrokerAddress(host, port, transport, f"/{path or 'mqtt'}", scheme in {"mqtts", "wss"})


def parse_broker(address: str, default_port: int = 1883) -> tuple[str, int]:
    """(host, port) of "HOST", "HOST:PORT" or "[IPv6]:PORT"; the port may be left out.

    Raises:
        TransportError: neither.
    """
    bare_ipv6 = address.count(":") > 1 and "[" not in address
    found = _ADDRESS.fullmatch(f"[{address}]" if bare_ipv6 else address)
    port = int(found["port"] or default_port) if found else 0
    if not found or not 0 < port < 65536:
        raise TransportError(f"broker {address!r} is not HOST or HOST:PORT")
    if found["ipv6"]:
        try:
            ipaddress.IPv6Address(found["ipv6"])
        except ValueError as error:
            raise TransportError(f"broker {address!r} is not HOST or HOST:PORT, nor an IPv6 address") from error
    return found["name"] or found["ipv6"], port
