"""Ways to check what comes in, each in place of the loader's own digest and in pieces of its own size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol
from unittest.mock import patch

import xxhash
from blake3 import blake3

from storage.loading import weight_loader
from storage.models.model_repository import new_digest
from storage.store import object_reader


class Digest(Protocol):
    def update(self, piece: memoryview, /) -> Any: ...

    def hexdigest(self) -> str: ...


class _Right(str):
    """A digest that passes for whatever was published: only BLAKE3's are in the manifest."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True


class Unchecked:
    def update(self, piece: memoryview, /) -> None:
        pass

    def hexdigest(self) -> str:
        return _Right()


class Xxh3:
    """A fast check against corruption, and no proof against forgery."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, piece: memoryview, /) -> None:
        self._hash.update(piece)

    def hexdigest(self) -> str:
        return _Right(self._hash.hexdigest())


@dataclass(frozen=True)
class Contender:
    digest: Callable[[], Digest]
    piece_bytes: int


_AS_IT_IS: Final = object_reader._READ_BYTES
CONTENDERS: Final = {
    "unchecked": Contender(Unchecked, _AS_IT_IS),
    "xxh3 only": Contender(Xxh3, _AS_IT_IS),
    "BLAKE3, as stages do": Contender(new_digest, _AS_IT_IS),
    "BLAKE3, pieces of 256 KiB": Contender(new_digest, 2**18),
    "BLAKE3, pieces of 4 MiB": Contender(new_digest, 2**22),
    "BLAKE3, two threads": Contender(lambda: blake3(max_threads=2), _AS_IT_IS),
}
"""The first two are what the others are compared with."""


@contextmanager
def checking_by(contender: Contender) -> Iterator[None]:
    """While inside, the loader checks so."""
    with (
        patch.object(weight_loader, "new_digest", contender.digest),
        patch.object(object_reader, "_READ_BYTES", contender.piece_bytes),
    ):
        yield
