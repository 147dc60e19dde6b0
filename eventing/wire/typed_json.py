"""Decodes JSON into structs, safely for threads.

msgspec 0.22 prepares a struct's fields when it is first decoded, and may run Python code meanwhile. Another thread that decodes
the same struct then reads a half-filled table, and the process ends with SIGSEGV. So decoders are made here, one at a time.
"""

import threading
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")

_making: Final = threading.Lock()
_decoders: Final[dict[type, msgspec.json.Decoder[Any]]] = {}


def decode_json(data: bytes | memoryview, type_: type[T]) -> T:
    """Raises msgspec.DecodeError, UnicodeDecodeError and RecursionError."""
    decoder = _decoders.get(type_)
    if decoder is None:
        with _making:
            decoder = _decoders.setdefault(type_, msgspec.json.Decoder(type_))
    decoded: T = decoder.decode(data)
    return decoded
