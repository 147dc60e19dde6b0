"""Checks certificates in Secrets before pods use them: their time, name and key, and the CA."""

import base64
import binascii
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


def certificate_problems(secret: dict[str, Any], authority: str | None, name: str) -> Iterator[str]:
    """Yields what is wrong with tls.crt and tls.key of a Secret of pods, each with what to do. tls.crt: may be a chain.

    authority: the CA certificates in PEM; None: ca.crt of the Secret. name: the DNS name that the certificate must have.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        data = {key: base64.b64decode(value, validate=True) for key, value in (secret.get("data") or {}).items()}
        chain = x509.load_pem_x509_certificates(data["tls.crt"])
        authorities = x509.load_pem_x509_certificates(data["ca.crt"] if authority is None else authority.encode())
        key = load_pem_private_key(data["tls.key"], None)
    except (ValueError, TypeError, binascii.Error) as error:
        yield f"tls.crt, tls.key or the CA is not PEM: {error}"
        return
    certificate, now = chain[0], datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        yield f"the certificate has expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; renew it"
    if now < certificate.not_valid_before_utc:
        yield f"the certificate is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    if key.public_key() != certificate.public_key():
        yield "tls.key is not the key of tls.crt; put both of one certificate there"
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = found.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        names = []
    if name not in names:
        yield (
            f"the certificate has the DNS names {', '.join(names) or '(none)'}, not {name}; add that, or set network.tls.name"
        )
    if not _leads_to(certificate, chain[1:], authorities):
        yield "the certificate is not signed by the CA in ca.crt; give the CA that signed it"


def _leads_to(certificate: "Certificate", intermediates: "list[Certificate]", authorities: "list[Certificate]") -> bool:
    from cryptography.exceptions import InvalidSignature

    def signed_by(issuer: "Certificate") -> bool:
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    if any(map(signed_by, authorities)):
        return True
    return any(
        signed_by(each) and _leads_to(each, intermediates[:at] + intermediates[at + 1 :], authorities)
        for at, each in enumerate(intermediates)
    )
