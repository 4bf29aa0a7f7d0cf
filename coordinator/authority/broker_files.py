"""What Mosquitto reads: its configuration, the access rules, the password file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

CONFIG_FILE, RULES_FILE, PASSWORDS_FILE = "mosquitto.conf", "acl", "passwords"
# The coordinator's user name; no client may have it.
COORDINATOR_USER = "coordinator"
# As mosquitto_passwd does. The passwords are 256 random bits: stretching them adds nothing.
_ITERATIONS = 101
# The largest message is a chunk of 60 KiB, or an envelope of 64 KiB, and its topic.
MAX_PACKET_BYTES = 256 << 10
# Of one client that is away or slow; what is lost is asked for again.
MAX_QUEUED_BYTES = 64 << 20


def mosquitto_conf(directory: Path, *, port: int, bind: str, user: str) -> str:
    """mosquitto.conf.

    Args:
        directory: where the other files are; absolute.
        port: to listen on.
        bind: address to listen on, or "" for all.
        user: system user that owns the keys: started by root, Mosquitto becomes it.
    """
    return f"""\
# Written by `edgetrain init`. Run by the coordinator, or by: mosquitto -c {directory / CONFIG_FILE}
user {user}
listener {port}{f" {bind}" if bind else ""}

# TLS 1.2 or newer, with a certificate on either side; revoked ones are in crl.pem.
tls_version tlsv1.2
cafile {directory / "ca.pem"}
certfile {directory / "server.pem"}
keyfile {directory / "server.key"}
crlfile {directory / "crl.pem"}
require_certificate true

# And a password each. A session belongs to its user: nobody can take over another's client id.
allow_anonymous false
password_file {directory / PASSWORDS_FILE}
use_username_as_clientid true
acl_file {directory / RULES_FILE}

# Limits.
max_packet_size {MAX_PACKET_BYTES}
max_inflight_messages 100
max_queued_messages 10000
max_queued_bytes {MAX_QUEUED_BYTES}
max_keepalive 3600
persistent_client_expiration 1d
persistence false
set_tcp_nodelay true
log_type error
log_type warning
log_type notice
"""


def access_rules(federation: str) -> str:
    """acl: a client writes under its own name, and reads its own topics and the broadcasts."""
    return f"""\
# Written by `edgetrain init`. %u is the user name, which is the client's name.
pattern write edgetrain/{federation}/from/%u/#
pattern read edgetrain/{federation}/to/%u/#
pattern read edgetrain/{federation}/all/#

user {COORDINATOR_USER}
topic readwrite edgetrain/{federation}/#
"""


def password_line(user: str, password: str, salt: bytes) -> str:
    """A user's line of the password file: PBKDF2 with SHA-512, in Mosquitto's format 7."""
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS)
    return f"{user}:$7${_ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}\n"


def read_password_lines(path: Path) -> dict[str, str]:
    """Lines of a password file by user."""
    lines = path.read_text(encoding="ascii").splitlines(keepends=True)
    return {line.partition(":")[0]: line for line in lines if ":" in line}


def password_file(lines: Mapping[str, str]) -> bytes:
    """The contents of a password file."""
    return "".join(lines[user] for user in sorted(lines)).encode()
