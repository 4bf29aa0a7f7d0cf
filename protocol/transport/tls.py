"""TLS for the connection to the broker: 1.2 or newer, with certificates from files or from the settings themselves."""

from __future__ import annotations

import contextlib
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgetrain.protocol.errors import TransportError

_PEM = "-----BEGIN "


def tls_context(*, ca: str, certificate: str, key: str) -> ssl.SSLContext:
    """A context that checks the broker's certificate and name.

    Args:
        ca: file with the CA of the broker's certificate, or its PEM text; "system" for those of the system.
        certificate: file with our own, or its PEM text; "" for none.
        key: file with its private key, or the PEM text.

    Raises:
        TransportError: one of them cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if ca == "system":
            context.load_default_certs()
        elif _PEM in ca:
            context.load_verify_locations(cadata=ca[ca.index(_PEM) :])
        else:
            context.load_verify_locations(cafile=ca)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise TransportError(f"{_name(ca)}: cannot be used as the broker's CA: {error}") from error
    if bool(certificate) != bool(key):
        raise TransportError("broker.tls_certificate and broker.tls_key go together: give both")
    if certificate:
        try:
            with _as_file(certificate) as certificate_file, _as_file(key) as key_file:
                # A key with a passphrase is refused; asking would hang a device.
                context.load_cert_chain(certificate_file, key_file, password=lambda: b"")
        except (OSError, ssl.SSLError, ValueError) as error:
            raise TransportError(
                f"{_name(certificate)} and {_name(key)}: cannot be used as certificate and key: {error}"
            ) from error
    return context


def _name(setting: str) -> str:
    """For messages: never the text of a key."""
    return "the PEM text in the settings" if "\n" in setting or len(setting) > 200 else setting


@contextlib.contextmanager
def _as_file(setting: str) -> Iterator[str]:
    """A path; text is there (mode 0600) only as long as OpenSSL reads it, for it reads files only."""
    if _PEM not in setting:
        yield setting
        return
    with tempfile.TemporaryDirectory(prefix="edgetrain-") as directory:
        path = Path(directory) / "pem"
        path.touch(mode=0o600)
        path.write_text(setting, encoding="ascii")
        yield str(path)
