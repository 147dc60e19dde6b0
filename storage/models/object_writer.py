"""Writes one object of a published model: lays it out, streams it into the store, and hashes it on the way."""

import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from blake3 import blake3

from storage.checkpoints.safetensors_format import FILLER_PREFIX, TensorSpan, lay_out
from storage.errors import CheckpointInvalid
from storage.models.model_repository import PART_BYTES, StoredObject
from storage.store.object_store import ObjectStore


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """A tensor to write: its type, its shape, and a function that makes its bytes."""

    dtype: str  # a safetensors name
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[memoryview]]  # its bytes; called each time the object is read, in the order of the tensors


@dataclass(frozen=True, slots=True)
class ObjectPlan:
    """A safetensors file to write: its header, its tensors, and the place of each tensor in the file."""

    name: str
    tensors: Mapping[str, TargetTensor]
    header: bytes
    spans: Mapping[str, TensorSpan]  # in the file's order, fillers included
    named_spans: dict[str, TensorSpan]  # without the fillers
    bytes: int


def plan_object(name: str, tensors: Mapping[str, TargetTensor]) -> ObjectPlan:
    header, spans = lay_out({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    named = {name: span for name, span in spans.items() if not name.startswith(FILLER_PREFIX)}
    return ObjectPlan(name, tensors, header, spans, named, max((span.end for span in spans.values()), default=len(header)))


def write_object(store: ObjectStore, key: str, plan: ObjectPlan, on_bytes: Callable[[int], None]) -> StoredObject:
    """Streams an object into the store, with a few MiB in memory at a time. Returns the object's entry in the manifest.

    on_bytes: called with the length of every block.
    """
    stream = _PlanStream(plan, on_bytes)
    store.put_stream(key, cast("BinaryIO", io.BufferedReader(stream, buffer_size=2**20)))
    return StoredObject(key, plan.bytes, PART_BYTES, stream.part_digests(), plan.named_spans)


def planned_digests(plan: ObjectPlan, on_bytes: Callable[[int], None]) -> tuple[str, ...]:
    """The digests of the parts that `write_object` would write. Reads, converts and hashes everything, but sends nothing."""
    stream = _PlanStream(plan, on_bytes)
    deque(stream.blocks(), maxlen=0)
    return stream.part_digests()


class _PlanStream(io.RawIOBase):
    """The bytes of a planned object as a stream that can be read once. It hashes them as they are read."""

    def __init__(self, plan: ObjectPlan, on_bytes: Callable[[int], None]) -> None:
        self._plan = plan
        self._blocks = self.blocks()
        self._block = memoryview(b"")
        self._on_bytes = on_bytes
        self._parts: list[str] = []
        self._hash = blake3()
        self._hashed = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not len(self._block):
            following = next(self._blocks, None)
            if following is None:
                return 0
            self._block = following
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._block))
        view[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def blocks(self) -> Iterator[memoryview]:
        """Yields the stream's bytes, block by block, and hashes them."""
        for block in self._unhashed_blocks():
            rest = block
            while len(rest):
                piece = rest[: PART_BYTES - self._hashed]
                self._hash.update(piece)
                self._hashed += len(piece)
                rest = rest[len(piece) :]
                if self._hashed == PART_BYTES:
                    self._parts.append(self._hash.hexdigest())
                    self._hash.reset()
                    self._hashed = 0
            self._on_bytes(len(block))
            yield block

    def part_digests(self) -> tuple[str, ...]:
        """The digests of all parts. Call this only after the end of the stream."""
        return tuple(self._parts) if not self._hashed else (*self._parts, self._hash.hexdigest())

    def _unhashed_blocks(self) -> Iterator[memoryview]:
        yield memoryview(self._plan.header)
        for name, span in self._plan.spans.items():
            if name not in self._plan.tensors:
                yield memoryview(bytes(span.end - span.start))
                continue
            written = 0
            for block in self._plan.tensors[name].blocks():
                written += len(block)
                yield block
            if written != span.end - span.start:
                raise CheckpointInvalid(f"tensor {name!r} gave {written} bytes instead of {span.end - span.start}")
