"""Encryption of stored keys and values: AES-256-GCM, with names that reveal nothing without the key.

Two keys are derived from the configured key: one for names and one for contents. A nonce is 96 random bits, which NIST SP
800-38D (section 8.3) allows for 2³² objects under one key. Name and contents are authenticated together, so an object cannot
take the place of another.
"""

import os
from functools import cached_property
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from storage.errors import SealBroken

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
_MAGIC: Final = b"LMS1"
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_HEAD_BYTES: Final = len(_MAGIC) + _NONCE_BYTES
_NAME_BYTES: Final = 20
SEAL_BYTES: Final = _HEAD_BYTES + _TAG_BYTES  # that a sealed object has more than its contents


class Sealer:
    """Encrypts and decrypts the objects that contain stored keys and values, and derives their secret names. Thread-safe.

    Without the configured key, nobody can read an object or compute the name that the KV of a prompt would have.
    """

    def __init__(self, key: bytes) -> None:
        """Derives the keys for names and for contents from the configured key `key`.

        Raises ValueError if `key` does not have KEY_BYTES.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes; it has {KEY_BYTES}")
        self._names = blake3(key, derive_key_context="lamina 2026-11 kv names").digest()
        self._contents = blake3(key, derive_key_context="lamina 2026-11 kv contents").digest()

    @cached_property
    def _cipher(self) -> "AESGCM":
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # 24 ms that no start of a function needs

        return AESGCM(self._contents)

    def name(self, *parts: bytes) -> str:
        """Returns the name of the object that is identified by `parts`: their keyed hash, 40 hexadecimal digits."""
        hasher = blake3(key=self._names)
        for part in parts:
            hasher.update(len(part).to_bytes(4, "little") + part)
        return hasher.digest(length=_NAME_BYTES).hex()

    def seal(self, name: str, plain: bytes | bytearray | memoryview) -> bytearray:
        """Encrypts the contents `plain` of the object `name`. Returns the bytes to store: magic, nonce, ciphertext and tag.

        Only `open` with the same name decrypts them.
        """
        nonce = os.urandom(_NONCE_BYTES)
        sealed = bytearray(len(plain) + SEAL_BYTES)
        sealed[:_HEAD_BYTES] = _MAGIC + nonce
        self._cipher.encrypt_into(nonce, plain, _MAGIC + name.encode(), memoryview(sealed)[_HEAD_BYTES:])
        return sealed

    def open(self, name: str, sealed: bytes | bytearray | memoryview) -> bytearray:
        """Decrypts the stored bytes `sealed` of the object `name`, as `seal` returned them.

        Raises SealBroken if they were altered, or were sealed under another name or with another key.
        """
        from cryptography.exceptions import InvalidTag

        view = memoryview(sealed)
        if len(view) < SEAL_BYTES or bytes(view[: len(_MAGIC)]) != _MAGIC:
            raise SealBroken(f"{name}: {len(view)} bytes that are no sealed object; it is computed again, and can be deleted")
        plain = bytearray(len(view) - SEAL_BYTES)
        nonce = bytes(view[len(_MAGIC) : _HEAD_BYTES])
        try:
            self._cipher.decrypt_into(nonce, view[_HEAD_BYTES:], _MAGIC + name.encode(), plain)
        except InvalidTag as error:
            raise SealBroken(
                f"{name}: altered, or sealed with another key; it is computed again, and can be deleted"
            ) from error
        return plain
