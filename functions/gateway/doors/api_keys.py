"""API keys of clients as they are kept: by their hashes, which tell them apart and let nobody ask."""

import hashlib
from typing import Final

HASHED: Final = "sha256:"
"""Before the hexadecimal SHA-256 of a key, where it stands for the key."""
_ID_DIGITS: Final = 12


def sha256_of(key: str) -> str:
    """64 hexadecimal digits. A key has 256 bits of its own, so nobody finds it by trying, and no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_id(hashed: str) -> str:
    """What a key is called in logs and lists; no secret."""
    return hashed.removeprefix(HASHED)[:_ID_DIGITS]
