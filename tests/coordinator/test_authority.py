"""The federation directory: what it holds, who may read it, and what it refuses."""

from __future__ import annotations

import datetime as dt
import stat
import subprocess
import tomllib

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edgetrain.coordinator.authority import AuthorityError, FederationDirectory, InitOptions, read_registry
from edgetrain.coordinator.authority.broker_files import password_line
from edgetrain.coordinator.authority.certificates import make_authority, revocation_list
from edgetrain.coordinator.clients.enrolments import Enrolments
from edgetrain.coordinator.config import FederationConfig
from edgetrain.edge_client.config import ClientConfig, SecureAggregationConfig
from edgetrain.edge_client.privacy.enrolled import who_is_enrolled
from edgetrain.protocol.config import convert, read_toml
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.signing import SigningKey

NOW = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
OPTIONS = InitOptions(federation="f", host="broker.example.org", bundle="bundle", port=8884)


@pytest.fixture
def directory(tmp_path):
    made = FederationDirectory(tmp_path / "fed", clock=lambda: NOW)
    made.init(OPTIONS)
    return made


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def device(path):
    return convert(read_toml(path), ClientConfig, where=str(path))


def test_private_files_are_their_owners_alone(directory, tmp_path):
    path = directory.enroll("pi", output=tmp_path, data="d.npz")
    assert mode(directory.path) == 0o700
    assert mode(path) == 0o600
    private = {"ca.key", "server.key", "coordinator.key", "coordinator.tls.key", "passwords", "federation.toml", "acl"}
    for file in directory.path.iterdir():
        assert (mode(file) == 0o600) == (file.name in private), file
        if file.name not in private:
            assert b"PRIVATE" not in file.read_bytes()


def test_what_the_files_say(directory, tmp_path):
    config = convert(read_toml(directory.path / "federation.toml"), FederationConfig, where="federation.toml")
    assert (config.federation, config.start_broker, config.broker.username) == ("f", "mosquitto", "coordinator")
    settings = device(directory.enroll("pi", output=tmp_path / "x.toml", data="d.npz"))
    assert (settings.name, settings.broker.host, settings.broker.port) == ("pi", "broker.example.org", 8884)
    assert settings.coordinator_key == SigningKey.load_or_create(directory.path / "coordinator.key").public_key.hex()
    [entry] = read_registry(directory.path)
    assert SigningKey.from_setting(settings.signing_key).public_key.hex() == entry.public_key
    certificate = x509.load_pem_x509_certificate(settings.broker.tls_certificate.encode())
    assert certificate.subject.rfc4514_string() == "CN=pi"
    assert f"{certificate.serial_number:x}" == entry.serial
    server = x509.load_pem_x509_certificate((directory.path / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example.org", "localhost"]
    # No private key of a device stays here.
    kept = b"".join(file.read_bytes() for file in directory.path.iterdir() if file.is_file())
    assert settings.signing_key.encode() not in kept
    assert bytes.fromhex(settings.signing_key) not in kept
    assert settings.broker.password.encode() not in kept


def test_a_device_can_show_that_it_is_enrolled_and_check_others(directory, tmp_path):
    pi, pj = (device(directory.enroll(name, output=tmp_path, data="")) for name in ("pi", "pj"))
    assert pi.secure_aggregation.authority == pj.secure_aggregation.authority
    point = bytes.fromhex(pi.secure_aggregation.authority)
    ca = x509.load_pem_x509_certificate((directory.path / "ca.pem").read_bytes()).public_key()
    assert point == ca.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    key = SigningKey.from_setting(pj.signing_key).public_key
    is_enrolled = who_is_enrolled(pi)
    assert is_enrolled("pj", key, bytes.fromhex(pj.enrolment))
    assert not is_enrolled("pj", key, bytes.fromhex(pi.enrolment))
    assert not is_enrolled("pj", key, b"")
    assert who_is_enrolled(msgspec.structs.replace(pi, secure_aggregation=SecureAggregationConfig()))("x", key, b"")
    spoiled = msgspec.structs.replace(pi.secure_aggregation, authority="02" + "ff" * 32)
    with pytest.raises(ConfigError, match=r"secure_aggregation\.authority: is no P-256 key"):
        who_is_enrolled(msgspec.structs.replace(pi, secure_aggregation=spoiled))


def test_settings_do_not_show_their_secrets(directory, tmp_path):
    """Whoever logs a configuration logs no key."""
    settings = device(directory.enroll("pi", output=tmp_path, data=""))
    federation = convert(read_toml(directory.path / "federation.toml"), FederationConfig, where="federation.toml")
    for shown in (repr(settings), str(settings.broker), repr(federation)):
        assert "PRIVATE" not in shown
        assert settings.signing_key not in shown
        assert settings.broker.password not in shown
        assert federation.broker.password not in shown


def test_openssl_and_mosquitto_agree(directory, tmp_path):
    """The chain, the purposes, and the format of the password file, by the programs that others use."""
    path = directory.enroll("pi", output=tmp_path, data="")
    (tmp_path / "pi.pem").write_text(device(path).broker.tls_certificate)
    for file, purpose in ((directory.path / "server.pem", "sslserver"), (tmp_path / "pi.pem", "sslclient")):
        command = ["openssl", "verify", "-attime", str(int(NOW.timestamp())), "-purpose", purpose, "-x509_strict",
                   "-CAfile", directory.path / "ca.pem", file]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    # A line as mosquitto_passwd (2.0) writes it for the password "right".
    passwords = tmp_path / "passwords"
    passwords.touch()
    try:
        subprocess.run(["mosquitto_passwd", "-b", passwords, "pi", "right"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("mosquitto_passwd is not installed")
    import base64

    line = passwords.read_text()
    salt = base64.b64decode(line.split("$")[3])
    assert password_line("pi", "right", salt) == line


def test_every_list_of_revoked_certificates_is_later_than_the_one_before_and_not_of_the_future():
    authority = make_authority("f", NOW)
    previous, serials = None, []
    for number in range(1, 50):
        serials.append(f"{number:x}")
        previous = revocation_list(authority, serials, NOW, previous=previous)
        parsed = x509.load_pem_x509_crl(previous)
        assert parsed.last_update_utc == NOW - dt.timedelta(days=1) + dt.timedelta(seconds=number - 1)
        assert parsed.last_update_utc < NOW
        assert [entry.serial_number for entry in parsed] == list(range(1, number + 1))
    assert parsed.next_update_utc > NOW + dt.timedelta(days=19 * 365)


def test_what_is_refused_changes_nothing(directory, tmp_path):
    directory.enroll("pi", output=tmp_path, data="")
    before = {file.name: file.read_bytes() for file in directory.path.iterdir() if file.is_file()}
    for refused, error, text in (
        (lambda: directory.init(OPTIONS), AuthorityError, "is a federation directory already"),
        (lambda: directory.enroll("pi", output=tmp_path, data=""), AuthorityError, "is enrolled already; --renew"),
        (lambda: directory.enroll("a/b", output=tmp_path, data=""), ConfigError, "client name 'a/b'"),
        (lambda: directory.enroll("Coordinator", output=tmp_path, data=""), AuthorityError, "the coordinator's own"),
        (lambda: directory.revoke("zero"), AuthorityError, "'zero' is not enrolled here: pi"),
        (lambda: directory.enroll("q", output=tmp_path / "no/where", data=""), AuthorityError, "no/where"),
        (lambda: directory.enroll("q", output=tmp_path / "pi.toml", data=""), AuthorityError, r"pi\.toml: exists"),
    ):
        with pytest.raises(error, match=text):
            refused()
        assert {file.name: file.read_bytes() for file in directory.path.iterdir() if file.is_file()} == before


def test_no_federation_directory(tmp_path):
    nowhere = FederationDirectory(tmp_path / "nowhere")
    for act in (lambda: nowhere.enroll("pi", output=tmp_path, data=""), lambda: nowhere.revoke("pi")):
        with pytest.raises(AuthorityError, match="is no federation directory; make one with: edgetrain init DIR"):
            act()
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_registry_or_key_says_so(directory, tmp_path):
    (directory.path / "ca.key").write_text("no key")
    with pytest.raises(AuthorityError, match="a key or certificate is damaged"):
        directory.enroll("pi", output=tmp_path, data="")
    (directory.path / "enrolled.json").write_text('[{"name": "../x"}]')
    with pytest.raises(AuthorityError, match=r"enrolled\.json: damaged"):
        directory.revoke("pi")


def test_revoked_and_renewed(directory, tmp_path):
    first = device(directory.enroll("pi", output=tmp_path, data=""))
    directory.revoke("pi")
    with pytest.raises(AuthorityError, match="was revoked on 2026-05-01T12:00:00Z"):
        directory.revoke("pi")
    with pytest.raises(AuthorityError, match="was revoked"):
        directory.enroll("pi", output=tmp_path, data="")
    assert "pi:" not in (directory.path / "passwords").read_text()
    second = device(directory.enroll("pi", output=tmp_path, data="", renew=True))
    assert second.signing_key != first.signing_key
    [entry] = read_registry(directory.path)
    assert entry.revoked_at == ""
    revoked = {one.serial_number for one in x509.load_pem_x509_crl((directory.path / "crl.pem").read_bytes())}
    old = x509.load_pem_x509_certificate(first.broker.tls_certificate.encode()).serial_number
    assert revoked == {old}


def test_a_new_server_certificate_of_the_same_authority(directory):
    before = (directory.path / "server.pem").read_bytes()
    ca = (directory.path / "ca.pem").read_bytes()
    assert directory.renew_server("other.example.org").address == "other.example.org:8884"
    assert (directory.path / "server.pem").read_bytes() != before
    assert (directory.path / "ca.pem").read_bytes() == ca


def test_the_registry_is_followed_while_it_changes(directory, tmp_path):
    enrolments = Enrolments(directory.path)
    assert enrolments.changes() == []
    directory.enroll("pi", output=tmp_path, data="")
    assert [entry.name for entry in enrolments.changes()] == ["pi"]
    assert enrolments.changes() == []
    key = bytes.fromhex(read_registry(directory.path)[0].public_key)
    assert enrolments.objection("pi", key) is None
    assert enrolments.objection("pi", bytes(32))[0] == "not_enrolled"
    assert enrolments.objection("other", key)[0] == "not_enrolled"
    directory.revoke("pi")
    assert [entry.revoked_at for entry in enrolments.changes()] == ["2026-05-01T12:00:00Z"]
    assert enrolments.objection("pi", key)[0] == "revoked"
    directory.enroll("new", output=tmp_path, data="")
    registry = directory.path / "enrolled.json"
    whole = registry.read_bytes()
    for damage in (b"", b"[{", None):
        registry.unlink() if damage is None else registry.write_bytes(damage)
        assert enrolments.changes() == []
        assert enrolments.objection("pi", key)[0] == "revoked"
    registry.write_bytes(whole)
    assert [entry.name for entry in enrolments.changes()] == ["new"]


def test_the_coordinators_toml_is_toml_whatever_the_path(tmp_path):
    made = FederationDirectory(tmp_path / 'odd "name" é', clock=lambda: NOW)
    made.init(msgspec.structs.replace(OPTIONS, bundle='x "y"\\z'))
    tables = tomllib.loads((made.path / "federation.toml").read_text(encoding="utf-8"))
    assert tables["enrolments"] == str(made.path)
