"""CAs and certificates made on the spot, as the files of a Secret that cert-manager writes."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY: Final = timedelta(days=1)


class CertificateAuthority:
    def __init__(self, name: str = "test CA") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = _builder(self._name, self._key.public_key(), timedelta(days=-2), timedelta(days=30))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self._certificate = builder.add_extension(usage, critical=True).issuer_name(self._name).sign(self._key, hashes.SHA256())

    @property
    def pem(self) -> str:
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def secret(self, *names: str, until: timedelta = DAY) -> dict[str, str]:
        """ca.crt, tls.crt and tls.key of a certificate with these DNS names. until: end of its validity, from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(x509.Name([]), key.public_key(), -DAY, until).issuer_name(self._name)
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        certificate = builder.add_extension(alternatives, critical=True).sign(self._key, hashes.SHA256())
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return {
            "ca.crt": self.pem,
            "tls.crt": certificate.public_bytes(serialization.Encoding.PEM).decode(),
            "tls.key": private.decode(),
        }


def write(secret: dict[str, str], folder: Path) -> Path:
    """Writes, or replaces as the kubelet does, a file for each key."""
    folder.mkdir(exist_ok=True)
    for key, value in secret.items():
        (folder / f"{key}.new").write_text(value)
        (folder / f"{key}.new").replace(folder / key)
    return folder


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, begins: timedelta, ends: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).public_key(key).serial_number(x509.random_serial_number())
    return builder.not_valid_before(now + begins).not_valid_after(now + ends)
