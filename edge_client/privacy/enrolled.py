"""Who may take part in secure aggregation beside this client: a file of names, and the CA's word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgetrain.edge_client.config import ClientConfig
from edgetrain.protocol.enrolment import Authority
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.secure_aggregation.member import IsEnrolled


def who_is_enrolled(config: ClientConfig) -> IsEnrolled:
    """Whom this client's settings let take part: by the file of names, and by the CA, where they name them.

    Raises:
        ConfigError: the file cannot be read, or the CA's key is none.
    """
    settings = config.secure_aggregation
    listed = read_enrolled(Path(settings.enrolled)) if settings.enrolled else None
    try:
        authority = Authority(settings.authority, config.federation) if settings.authority else None
    except ValueError as error:
        raise ConfigError(f"secure_aggregation.authority: is no P-256 key as in a device file: {error}") from error

    def is_enrolled(name: str, identity: bytes, proof: bytes) -> bool:
        if listed is not None and not listed(name, identity):
            return False
        return authority is None or authority.has_enrolled(name, identity, proof)

    return is_enrolled


def read_enrolled(path: Path) -> Callable[[str, bytes], bool]:
    """Whether a name and a public key are in a file of them.

    Raises:
        ConfigError: it cannot be read, or a line is not a name and 64 hexadecimal digits.
    """
    known: dict[str, bytes] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"secure_aggregation.enrolled: {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        try:
            name, key = fields
            known[name] = bytes.fromhex(key)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: write a name and its public key in hex") from error
        if len(known[name]) != 32:
            raise ConfigError(f"{path}, line {number}: a public key has 64 hexadecimal digits")
    return lambda name, identity: known.get(name) == identity
