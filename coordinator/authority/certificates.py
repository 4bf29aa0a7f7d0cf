"""A private certificate authority: X.509 with P-256 keys (RFC 5280), which every TLS library knows.

Pure but for the operating system's random generator; the time is passed in.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgetrain.protocol.enrolment import authority_key, prove_enrolment

CA_DAYS = 20 * 365
SERVER_DAYS = 825
CLIENT_DAYS = 10 * 365
# A device whose clock is somewhat slow takes a new certificate all the same.
BACKDATED = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    # Serial number in hex.
    serial: str


def make_authority(federation: str, now: dt.datetime) -> Issued:
    """A CA that signs itself, and may sign end certificates only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"edgetrain {federation} CA")
    builder = (
        _builder(name, name, key.public_key(), now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    return _signed(builder, key, key)


def issue_server(authority: Issued, hosts: Sequence[str], now: dt.datetime) -> Issued:
    """A certificate for the broker at these names and addresses."""
    alternatives: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            alternatives.append(x509.DNSName(host))
    return _issue(
        authority,
        hosts[0],
        now,
        SERVER_DAYS,
        ExtendedKeyUsageOID.SERVER_AUTH,
        x509.SubjectAlternativeName(alternatives),
    )


def issue_client(authority: Issued, name: str, now: dt.datetime) -> Issued:
    """A certificate with which `name` may connect to the broker."""
    return _issue(authority, name, now, CLIENT_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH, None)


def revocation_list(
    authority: Issued, serials: Sequence[str], now: dt.datetime, *, previous: bytes | None = None
) -> bytes:
    """The CRL that revokes these serials, PEM. It stays valid as long as the CA.

    Args:
        authority: the CA.
        serials: hex.
        now: the time.
        previous: the list before; the new one is dated later, for that is how OpenSSL chooses between two.
    """
    certificate = x509.load_pem_x509_certificate(authority.certificate)
    # Dated back, so that later ones have room before now: a list from the future counts for nothing.
    at = (now - BACKDATED).replace(microsecond=0)
    if previous:
        last = x509.load_pem_x509_crl(previous).last_update_utc
        at = max(at, last + dt.timedelta(seconds=1))
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(certificate.subject)
        .last_update(at)
        .next_update(certificate.not_valid_after_utc)
    )
    for serial in dict.fromkeys(serials):
        revoked = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(at).build()
        builder = builder.add_revoked_certificate(revoked)
    return builder.sign(_private_key(authority), hashes.SHA256()).public_bytes(Encoding.PEM)


def enrolment_proof(authority: Issued, federation: str, name: str, public_key: bytes) -> bytes:
    """The CA's proof that a client is enrolled with an Ed25519 key."""
    return prove_enrolment(_private_key(authority), federation=federation, name=name, public_key=public_key)


def key_for_devices(authority: Issued) -> str:
    """The CA's public key, as devices have it."""
    return authority_key(_private_key(authority).public_key())


def _issue(
    authority: Issued,
    name: str,
    now: dt.datetime,
    days: int,
    purpose: x509.ObjectIdentifier,
    alternatives: x509.SubjectAlternativeName | None,
) -> Issued:
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_name(name), issuer.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    if alternatives:
        builder = builder.add_extension(alternatives, critical=False)
    return _signed(builder, key, _private_key(authority))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> Issued:
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
    )
    certificate = builder.sign(signer, hashes.SHA256())
    return Issued(
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        f"{certificate.serial_number:x}",
    )


def _private_key(authority: Issued) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(authority.key, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("the CA's key is not one that we made")
    return key


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
