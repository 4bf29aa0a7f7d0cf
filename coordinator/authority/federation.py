"""The federation directory and what is done to it.

federation.toml              what `edgetrain coordinator --config` runs as it is
authority.json               name, address and port; written last: it says that the directory is complete
ca.pem, ca.key               the private CA; the key is needed by enroll and revoke only
server.pem, server.key       the broker's certificate
coordinator.pem, .tls.key    the coordinator's, as a client of the broker
coordinator.key              Ed25519: signs plans, announcements, verdicts and the audit log
crl.pem                      revoked certificates
passwords, acl, mosquitto.conf
enrolled.json                who is enrolled; the coordinator follows it

Private keys, passwords and what holds them have mode 0600, the directory 0700.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import pwd
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import tomli_w
from msgspec import Meta

from edgetrain.coordinator.authority.broker_files import (
    CONFIG_FILE,
    COORDINATOR_USER,
    PASSWORDS_FILE,
    RULES_FILE,
    access_rules,
    mosquitto_conf,
    password_file,
    password_line,
    read_password_lines,
)
from edgetrain.coordinator.authority.certificates import (
    Issued,
    enrolment_proof,
    issue_client,
    issue_server,
    key_for_devices,
    make_authority,
    revocation_list,
)
from edgetrain.coordinator.authority.registry import AuthorityError, Enrolment, read_registry, write_registry
from edgetrain.protocol.files import write_atomically
from edgetrain.protocol.names import check_name
from edgetrain.protocol.signing import SigningKey

AUTHORITY_FILE = "authority.json"
SECRET = 0o600
# The coordinator, on the broker's machine, connects to one of these.
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class InitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `edgetrain init` is told."""

    # Part of every topic.
    federation: str
    # Name or address under which devices reach the broker.
    host: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,253}$")]
    port: Annotated[int, Meta(ge=1, le=65535)] = 8883
    # Address that the broker listens on; empty for all.
    bind: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{0,253}$")] = ""
    # The bundle to train.
    bundle: str


class _Authority(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int = 1
    federation: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What was made or changed, for people."""

    federation: str
    address: str
    coordinator_key: str


class FederationDirectory:
    """A federation directory.

    Args:
        path: of the directory.
        clock: the time.
    """

    def __init__(self, path: Path, *, clock: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)) -> None:
        self.path = path.absolute()
        self._clock = clock

    def init(self, options: InitOptions) -> Summary:
        """Makes the directory.

        Raises:
            ConfigError: the name is not usable.
            AuthorityError: there is one already, or it cannot be written.
        """
        check_name(options.federation, "federation")
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                return self._init(options)
        except OSError as error:
            raise AuthorityError(f"{self.path}: cannot be written: {error}") from error

    def _init(self, options: InitOptions) -> Summary:
        if (self.path / AUTHORITY_FILE).exists():
            raise AuthorityError(
                f"{self.path}: is a federation directory already; `edgetrain init --renew` gives its broker a new "
                "certificate"
            )
        now = self._clock()
        authority = make_authority(options.federation, now)
        coordinator = issue_client(authority, COORDINATOR_USER, now)
        password = secrets.token_urlsafe(32)
        key = SigningKey.load_or_create(self.path / "coordinator.key")
        self._write("ca.key", authority.key, SECRET)
        self._write("ca.pem", authority.certificate)
        self._write_server(authority, options.host)
        self._write("coordinator.tls.key", coordinator.key, SECRET)
        self._write("coordinator.pem", coordinator.certificate)
        self._write("crl.pem", revocation_list(authority, [], now))
        line = password_line(COORDINATOR_USER, password, os.urandom(12))
        self._write(PASSWORDS_FILE, password_file({COORDINATOR_USER: line}), SECRET)
        # Mosquitto may insist that nobody else can read its rules.
        self._write(RULES_FILE, access_rules(options.federation).encode(), SECRET)
        user = pwd.getpwuid(os.getuid()).pw_name
        conf = mosquitto_conf(self.path, port=options.port, bind=options.bind, user=user)
        self._write(CONFIG_FILE, conf.encode())
        self._write("federation.toml", self._federation_toml(options, password).encode(), SECRET)
        write_registry(self.path, [])
        summary = _Authority(federation=options.federation, host=options.host, port=options.port)
        self._write(AUTHORITY_FILE, msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n")
        return self._summary(summary, key)

    def renew_server(self, host: str = "") -> Summary:
        """Gives the broker a new certificate of the same CA: devices need not be told.

        Args:
            host: another name or address for devices that are enrolled from now on; "" for the same.

        Raises:
            AuthorityError: no federation directory, or not writable.
        """
        with self._changing():
            known = self._authority()
            if host:
                known = msgspec.structs.replace(known, host=host)
                self._write(AUTHORITY_FILE, msgspec.json.format(msgspec.json.encode(known), indent=1) + b"\n")
            self._write_server(self._ca(), known.host)
            return self._summary(known, SigningKey.load_or_create(self.path / "coordinator.key"))

    def enroll(self, name: str, *, output: Path, data: str, renew: bool = False) -> Path:
        """Enrols a client and writes its device file.

        Args:
            name: of the client.
            output: the device file, or a directory for it.
            data: where the device finds its local data.
            renew: replace the keys and the certificate of a client that is enrolled or was revoked.

        Raises:
            ConfigError: the name is not usable.
            AuthorityError: the name is taken, the file is there, or something cannot be written.
        """
        check_name(name, "client")
        if name.lower() == COORDINATOR_USER:
            raise AuthorityError(f"client name {name!r} is the coordinator's own: choose another")
        path = output / f"{name}.toml" if output.is_dir() else output
        with self._changing():
            known, now = self._authority(), self._clock()
            entries = {entry.name: entry for entry in read_registry(self.path)}
            before = entries.get(name)
            if before and not renew:
                state = f"was revoked on {before.revoked_at}" if before.revoked_at else "is enrolled already"
                raise AuthorityError(f"{name!r} {state}; --renew gives it new keys, which makes its old file useless")
            if path.exists() and not renew:
                raise AuthorityError(f"{path}: exists; move it away or choose another --output")
            ca = self._ca()
            certificate, key, password = issue_client(ca, name, now), SigningKey.generate(), secrets.token_urlsafe(32)
            # The file first: enrolled without a file would be worse than a file that nobody has enrolled.
            text = self._device_file(known, name, data, ca, certificate, key, password)
            try:
                write_atomically(path, text.encode(), mode=SECRET)
            except OSError as error:
                raise AuthorityError(f"{path}: cannot be written: {error}") from error
            entries[name] = Enrolment(
                name=name,
                public_key=key.public_key.hex(),
                serial=certificate.serial,
                enrolled_at=_iso(now),
                earlier_serials=(*before.earlier_serials, before.serial) if before else (),
            )
            lines = read_password_lines(self.path / PASSWORDS_FILE)
            lines[name] = password_line(name, password, os.urandom(12))
            self._publish(entries, lines, ca, now)
        return path

    def revoke(self, name: str) -> None:
        """Takes a client's enrolment back: the broker and the coordinator refuse it from now on.

        Raises:
            AuthorityError: not enrolled, revoked before, or something cannot be written.
        """
        with self._changing():
            now = self._clock()
            entries = {entry.name: entry for entry in read_registry(self.path)}
            entry = entries.get(name)
            if entry is None:
                raise AuthorityError(f"{name!r} is not enrolled here: {', '.join(sorted(entries)) or 'nobody is'}")
            if entry.revoked_at:
                raise AuthorityError(f"{name!r} was revoked on {entry.revoked_at} already")
            entries[name] = msgspec.structs.replace(entry, revoked_at=_iso(now))
            lines = read_password_lines(self.path / PASSWORDS_FILE)
            lines.pop(name, None)
            self._publish(entries, lines, self._ca(), now)

    def _publish(self, entries: dict[str, Enrolment], lines: dict[str, str], ca: Issued, now: dt.datetime) -> None:
        """What the broker reads first, then what the coordinator follows: it then tells the broker to look."""
        previous = (self.path / "crl.pem").read_bytes()
        serials = [serial for entry in entries.values() for serial in entry.earlier_serials]
        serials += [entry.serial for entry in entries.values() if entry.revoked_at]
        self._write("crl.pem", revocation_list(ca, serials, now, previous=previous))
        self._write(PASSWORDS_FILE, password_file(lines), SECRET)
        write_registry(self.path, list(entries.values()))

    # --- files ---------------------------------------------------------------------------------------

    def _write(self, name: str, data: bytes, mode: int = 0o644) -> None:
        write_atomically(self.path / name, data, mode=mode)

    def _write_server(self, authority: Issued, host: str) -> None:
        server = issue_server(authority, [host, *LOCAL_NAMES], self._clock())
        self._write("server.key", server.key, SECRET)
        self._write("server.pem", server.certificate)

    def _federation_toml(self, options: InitOptions, password: str) -> str:
        settings = {
            "federation": options.federation,
            "bundle": str(Path(options.bundle).absolute()),
            "out": str(self.path / "run"),
            "key": str(self.path / "coordinator.key"),
            "enrolments": str(self.path),
            "start_broker": "mosquitto",
            "broker": {
                "host": "127.0.0.1" if options.bind in {"", "127.0.0.1", "0.0.0.0"} else options.bind,  # noqa: S104
                "port": options.port,
                "username": COORDINATOR_USER,
                "password": password,
                "tls_ca": str(self.path / "ca.pem"),
                "tls_certificate": str(self.path / "coordinator.pem"),
                "tls_key": str(self.path / "coordinator.tls.key"),
            },
            "rounds": {"total": 20, "goal": 2},
        }
        return (
            "# Written by `edgetrain init`: edgetrain coordinator --config federation.toml\n"
            "# Holds the coordinator's broker password: keep it to yourself. A broker that runs elsewhere: remove\n"
            "# start_broker, give that broker mosquitto.conf, and set reload_command.\n" + tomli_w.dumps(settings)
        )

    def _device_file(
        self, known: _Authority, name: str, data: str, ca: Issued, certificate: Issued, key: SigningKey, password: str
    ) -> str:
        settings = {
            "name": name,
            "federation": known.federation,
            "data": data,
            "coordinator_key": SigningKey.load_or_create(self.path / "coordinator.key").public_key.hex(),
            "signing_key": key.secret(),
            "enrolment": enrolment_proof(ca, known.federation, name, key.public_key).hex(),
            "secure_aggregation": {"authority": key_for_devices(ca)},
            "broker": {
                "host": known.host,
                "port": known.port,
                "username": name,
                "password": password,
                "tls_ca": (self.path / "ca.pem").read_text(encoding="ascii"),
                "tls_certificate": certificate.certificate.decode(),
                "tls_key": certificate.key.decode(),
            },
        }
        return (
            f"# Device file of {name}, written by `edgetrain enroll`: edgetrain client --config {name}.toml\n"
            "# It holds private keys: copy it to that device over a safe channel, and keep no other copy.\n"
            "# data: an .npz, a .csv, or file.py:callable on the device.\n"
            + tomli_w.dumps(settings, multiline_strings=True)
        )

    def _ca(self) -> Issued:
        return Issued((self.path / "ca.pem").read_bytes(), (self.path / "ca.key").read_bytes(), "")

    def _authority(self) -> _Authority:
        path = self.path / AUTHORITY_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Authority)
        except FileNotFoundError as error:
            raise AuthorityError(
                f"{self.path}: is no federation directory; make one with: edgetrain init DIR"
            ) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise AuthorityError(f"{path}: damaged: {error}") from error

    def _summary(self, known: _Authority, key: SigningKey) -> Summary:
        return Summary(known.federation, f"{known.host}:{known.port}", key.public_key.hex())

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        self._authority()
        try:
            with self._locked():
                yield
        except OSError as error:
            raise AuthorityError(f"{self.path}: {error}") from error
        except ValueError as error:
            raise AuthorityError(f"{self.path}: a key or certificate is damaged: {error}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One command at a time."""
        with (self.path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _iso(now: dt.datetime) -> str:
    return now.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
