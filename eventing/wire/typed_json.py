"""JSON into structs, whichever threads do so first.

msgspec (0.22) looks at a struct's fields when it is first decoded, and runs Python meanwhile where one of them is a struct,
too: another thread that decodes the same struct then reads a table that is half filled, and the process ends by SIGSEGV.
Decoders are complete when they are made; here one thread at a time makes them.
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
