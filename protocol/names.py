"""Names of federations and clients, and the MQTT topics made of them.

    edgetrain/FEDERATION/all/announce        coordinator -> everyone, retained: the state of the run
    edgetrain/FEDERATION/all/round           coordinator -> everyone: a round has closed
    edgetrain/FEDERATION/all/checkpoint      coordinator -> everyone, retained: how far its audit log has come
    edgetrain/FEDERATION/all/blob/DIGEST     coordinator -> whoever asked: chunks, fanned out by the broker
    edgetrain/FEDERATION/to/CLIENT/message   coordinator -> one client
    edgetrain/FEDERATION/to/CLIENT/blob      coordinator -> one client: chunks
    edgetrain/FEDERATION/from/CLIENT/message one client -> coordinator
    edgetrain/FEDERATION/from/CLIENT/blob    one client -> coordinator, or whichever of its workers: chunks

So two broker rules suffice: a client writes `from/<own name>/#`, and reads `to/<own name>/#` and `all/#`.
"""

from __future__ import annotations

import functools
import re

import msgspec

from edgetrain.protocol.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str, what: str) -> str:
    """Returns `name` if it can stand in a topic and a file name.

    Raises:
        ConfigError: it cannot; `what` ("client", "federation") names it in the message.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} name {name!r} is not usable: 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    return name


class Topics(msgspec.Struct, frozen=True):
    """The topics of one federation."""

    federation: str

    def __post_init__(self) -> None:
        check_name(self.federation, "federation")

    @property
    def announce(self) -> str:
        """State of the run, retained."""
        return f"edgetrain/{self.federation}/all/announce"

    @property
    def round(self) -> str:
        """News for everyone about the current round."""
        return f"edgetrain/{self.federation}/all/round"

    @property
    def checkpoint(self) -> str:
        """State of the audit log, retained."""
        return f"edgetrain/{self.federation}/all/checkpoint"

    def broadcast_blob(self, digest: bytes) -> str:
        """Chunks of one blob for all who asked."""
        return f"edgetrain/{self.federation}/all/blob/{digest.hex()}"

    def to_client(self, client: str, kind: str) -> str:
        """`kind` is "message", "blob", or "#" for both."""
        return f"edgetrain/{self.federation}/to/{client}/{kind}"

    def from_client(self, client: str, kind: str) -> str:
        """`kind` is "message", "blob", or "#"; `client` may be "+"."""
        return f"edgetrain/{self.federation}/from/{client}/{kind}"

    @staticmethod
    def shared(group: str, topic: str) -> str:
        """A subscription to `topic` of which every member of a group gets a part (MQTT 5, section 4.8.2)."""
        return f"$share/{group}/{topic}"

    def sender(self, topic: str) -> tuple[str, str] | None:
        """(client, kind) of a topic that a client wrote to, else None."""
        prefix = _prefix(self.federation)
        if not topic.startswith(prefix):
            return None
        client, _, kind = topic[len(prefix) :].partition("/")
        return (client, kind) if _is_name(client) else None


@functools.lru_cache(maxsize=64)
def _prefix(federation: str) -> str:
    return f"edgetrain/{federation}/from/"


@functools.lru_cache(maxsize=1 << 14)
def _is_name(client: str) -> bool:
    """The same come again and again."""
    return _NAME.fullmatch(client) is not None
