"""Runs a group's layers in C on numpy arrays. One call computes a whole pass of prompt chunks and decode steps."""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from functions.stage.native.library import Library
from functions.stage.native.records import (
    BLOCK_FORMATS,
    GROUP_OUTS,
    MOST_THREADS,
    PARTS,
    STEP,
    AdapterLayerRecord,
    Array,
    BudgetRecord,
    Dtype,
    ExpertRecord,
    ExpertsRecord,
    GroupRecord,
    LatentRecord,
    LayerRecord,
    LowRankRecord,
    MatrixRecord,
    MemoryRecord,
    NormKind,
    NormRecord,
    PassRecord,
    ProductRecord,
    RecurrentKind,
    SegmentRecord,
    StreamsRecord,
    memory_of,
    new_workspace,
)


@dataclass(frozen=True, slots=True)
class MatrixArrays:
    """A weight matrix [outs, width] with its scales and biases, in the arrays that C reads."""

    dtype: Dtype
    weights: Array  # [outs, width]: bf16 as its bits in int16; q4 and blocks in uint8, packed by storage/models
    scales: Array | None = None  # float32 [outs], with int8
    biases: Array | None = None  # float32 [outs]
    packed_shape: tuple[int, int] | None = None  # [outs, width] of a matrix in q4 or blocks, whose weights have another shape
    parts: Sequence[tuple[str, int]] = ()  # of a matrix in blocks, at most PARTS: formats and numbers of outputs
    order: Array | None = None  # int32 [width]: number of the input that each column is multiplied by; None: its own

    @property
    def is_padded(self) -> bool:
        """Whether C reads a copy of the weights that is padded to a width that is a multiple of STEP."""
        return self.packed_shape is None and self.weights.shape[1] % STEP != 0

    @property
    def shape(self) -> tuple[int, int]:
        """[outs, width], for packed weights too."""
        outs, width = self.packed_shape or self.weights.shape
        return outs, width


@dataclass(frozen=True, slots=True)
class NormArrays:
    """A norm with its gain and biases, float32 [size]."""

    kind: NormKind
    gain: Array
    biases: Array | None = None

    def __call__(self, x: Array, eps: float) -> Array:
        """Normalizes each row of contiguous x [..., size], independently of other rows. Returns a new array.

        RMSNorm takes 12 µs for one row of 576, and 160 µs for 256 rows (Xeon with AMX, one thread).
        """
        with np.errstate(over="ignore", invalid="ignore"):  # the engine finds rows that are not finite
            if self.kind is NormKind.LAYER:
                x = x - x.mean(axis=-1, keepdims=True)
            lengths = np.square(x).sum(axis=-1, keepdims=True)
            lengths /= x.shape[-1]
            lengths += np.float32(eps)
            y: Array = x / np.sqrt(lengths, out=lengths)
            y *= self.gain
            if self.biases is not None:
                y += self.biases
        return y


@dataclass(frozen=True, slots=True)
class LatentArrays:
    """The weights and sizes of latent attention. `Latent` in `c/native.h` explains the fields."""

    down: MatrixArrays
    query_norm: NormArrays | None
    queries: MatrixArrays | None
    norm: NormArrays
    absorb: Sequence[MatrixArrays]
    expand: Sequence[MatrixArrays]
    rank: int
    nope: int
    rope: int
    value_size: int
    eps: float


@dataclass(frozen=True, slots=True)
class RecurrentArrays:
    """The weights and numbers of a recurrent mixer, by their names in `c/native.h`. Missing entries are absent or 0."""

    kind: RecurrentKind
    matrices: Mapping[str, MatrixArrays]
    vectors: Mapping[str, Array]  # float32
    numbers: Mapping[str, float]
    norm: NormArrays | None = None


@dataclass(frozen=True, slots=True)
class StreamArrays:
    """The weights of a layer with several streams of hidden states, by their names in Streams of `c/native.h`."""

    matrices: Mapping[str, MatrixArrays]
    norms: Mapping[str, NormArrays]
    scale: Array  # float32 [hidden_size]


@dataclass(slots=True)
class LayerArrays:
    """The weights and numbers of one layer, by their names in `c/native.h`. Missing entries are absent or 0."""

    matrices: dict[str, MatrixArrays]
    norms: dict[str, NormArrays]
    vectors: dict[str, Array]  # float32
    numbers: dict[str, float | tuple[float, ...]]
    recurrent: RecurrentArrays | None = None
    latent: LatentArrays | None = None
    streams: StreamArrays | None = None


@dataclass(frozen=True, slots=True)
class StateArrays:
    """The recurrent states of a sequence, and the arrays into which a pass copies them at some positions."""

    states: Array  # float32 [state_values]
    copies: Array  # float32 [copies, state_values]: the pass writes them
    copied_at: Array  # int64 [copies]: positions at which the states are copied, in tokens of the sequence
    kept: Array  # float32 [draft tokens, kept_values]: written, to change the states by draft tokens again; no rows: not kept
    kept_from: int = 0  # position of the first draft token


class SegmentArrays(NamedTuple):
    """The new tokens of one sequence in a pass."""

    pages: Array  # int32 [layers with attention, pages]: numbers of the sequence's pages in the KV arena
    position: int  # tokens that the sequence already holds
    length: int  # new tokens
    states: StateArrays | None = None  # with recurrent mixers
    adapter: int = 0  # number of its adapter; 0: none


@dataclass(frozen=True, slots=True)
class ExpertsArrays:
    """The router and the experts of a layer."""

    router: MatrixArrays  # float32 [experts, hidden_size], and one output more for the gate of the shared expert
    correction: Array | None  # float32 [experts]
    experts: Sequence[Mapping[str, MatrixArrays]]  # gate, up and down of each; gate may be absent
    numbers: Mapping[str, float]  # by their names in `c/native.h`
    used: Array  # int64 [experts]: passes add the rows of each expert
    used_at: Array | None = None  # int64 [experts], zeros: experts need not stay in memory (`c/native.h`)
    scales: Array | None = None  # float32 [experts]
    norms: Mapping[str, NormArrays] = field(default_factory=dict)  # by their names in `c/native.h`
    latent: tuple[MatrixArrays, MatrixArrays] | None = None  # narrow and widen


@dataclass(frozen=True, slots=True)
class LowRankArrays:
    """What an adapter adds to a matrix, in the arrays that C reads. `LowRank` in `c/native.h` explains the fields."""

    dtype: Dtype
    ranks: tuple[int, ...]  # [LOW_PARTS], as the next two
    ends: tuple[int, ...]
    scales: tuple[float, ...]
    a: Array
    b: Array

    @property
    def low_floats(self) -> int:
        """Number of floats that A x takes for one row. Each rank is rounded up to whole groups of GROUP_OUTS."""
        return sum(-(-rank // GROUP_OUTS) * GROUP_OUTS for rank in self.ranks)


@dataclass(frozen=True, slots=True)
class AdapterArrays:
    """The part of an adapter for the layers of a group, in the form that C reads."""

    records: "ctypes.Array[AdapterLayerRecord]"  # [layers]
    kept: list[Array]  # the arrays whose addresses are in the records, to keep them alive
    low_floats: int  # most floats that A x takes for one row in a layer

    @classmethod
    def of(cls, layers: Sequence[Mapping[str, LowRankArrays]]) -> "AdapterArrays":
        """Makes the records. layers: for each layer of the group, what is added to its matrices, by names in `c/native.h`."""
        records = (AdapterLayerRecord * len(layers))()
        kept: list[Array] = []
        low_floats = 0
        for record, layer in zip(records, layers, strict=True):
            for name, low in layer.items():
                own = LowRankRecord(low.dtype, low.ranks, low.ends, low.scales, memory_of(low.a), memory_of(low.b))
                setattr(record, name, own)
                kept += [low.a, low.b]
            together = sum(layer[name].low_floats for name in ("gate", "up") if name in layer)
            low_floats = max([low_floats, together, *(low.low_floats for low in layer.values())])
        return cls(records, kept, low_floats)


class NativeThreads:
    """A pool of C threads that share the work of a pass. They end when this object is garbage-collected."""

    def __init__(self, library: Library) -> None:
        self.pool: int | None = library.functions["lamina_new_pool"]()
        if self.pool is None:
            raise MemoryError("no memory for a pool of threads")
        self.count = 1  # threads that compute, the caller's included
        weakref.finalize(self, library.functions["lamina_free_pool"], self.pool)


class NativeLayers:
    """The layers of one group in C. Uses the given arrays without copying them, so the caller must not change them."""

    def __init__(self, library: Library, group: GroupRecord, arena: Array) -> None:
        """Creates a pool of threads and `num_layers` empty layers. Call `place` for each layer before the first `run`.

        group: all sizes of the group; its fields `layers`, `arena` and `budget` are overwritten. arena: the KV arena, to which
        `run` writes.
        """
        self._library = library
        self.threads = NativeThreads(library)
        self._layers = (LayerRecord * group.num_layers)()
        self._kept: list[Any] = [arena]  # arrays and records whose addresses other records have
        self._group = group
        group.arena = memory_of(arena)
        self.budget = BudgetRecord()
        group.budget = MemoryRecord(ctypes.addressof(self.budget), ctypes.sizeof(self.budget))
        group.layers = MemoryRecord(ctypes.addressof(self._layers), ctypes.sizeof(self._layers))
        self._adapters = (AdapterLayerRecord * 0)()
        self._kept_of_adapters: dict[int, AdapterArrays | None] = {}
        self._workspace_array = np.empty(0, np.uint8)
        self._workspace = memory_of(self._workspace_array)

    def place(self, slot: int, arrays: LayerArrays) -> None:
        """Sets the weights and numbers of one layer. slot: number of the layer in the group, from 0."""
        layer = self._layers[slot]
        for name, matrix in arrays.matrices.items():
            setattr(layer, name, matrix_record(matrix, self._kept))
        for name, vector in arrays.vectors.items():
            setattr(layer, name, memory_of(vector))
            self._kept.append(vector)
        for name, norm in arrays.norms.items():
            setattr(layer, name, self._norm_record(norm))
        if arrays.latent is not None:
            layer.latent = self._latent(arrays.latent)
        if arrays.streams is not None:
            layer.streams = self._streams(arrays.streams)
        for name, number in arrays.numbers.items():
            setattr(layer, name, number)
        if (mixer := arrays.recurrent) is None:
            return
        layer.recurrent.kind = mixer.kind
        for name, matrix in mixer.matrices.items():
            setattr(layer.recurrent, name, matrix_record(matrix, self._kept))
        for name, vector in mixer.vectors.items():
            setattr(layer.recurrent, name, memory_of(vector))
            self._kept.append(vector)
        for name, number in mixer.numbers.items():
            setattr(layer.recurrent, name, number)
        if mixer.norm is not None:
            layer.recurrent.norm = self._norm_record(mixer.norm)

    def place_experts(self, slot: int, arrays: ExpertsArrays) -> None:
        """Sets the router and the experts of one layer. slot: number of the layer in the group, from 0."""
        experts = (ExpertRecord * len(arrays.experts))()
        for record, matrices in zip(experts, arrays.experts, strict=True):
            for name, matrix in matrices.items():
                setattr(record, name, matrix_record(matrix, self._kept))
        router = matrix_record(arrays.router, self._kept)
        record = ExpertsRecord(
            experts=MemoryRecord(ctypes.addressof(experts), ctypes.sizeof(experts)),
            router=router,
            correction=memory_of(arrays.correction),
            used=memory_of(arrays.used),
            used_at=memory_of(arrays.used_at),
            scales=memory_of(arrays.scales),
            num_experts=len(arrays.experts),
            **arrays.numbers,
            **{name: self._norm_record(norm) for name, norm in arrays.norms.items()},
        )
        if arrays.latent is not None:
            record.narrow, record.widen = (matrix_record(matrix, self._kept) for matrix in arrays.latent)
        self._kept += [experts, record, arrays.correction, arrays.used, arrays.used_at, arrays.scales]
        self._layers[slot].experts = MemoryRecord(ctypes.addressof(record), ctypes.sizeof(record))

    def _latent(self, arrays: LatentArrays) -> MemoryRecord:
        own = LatentRecord(rank=arrays.rank, nope=arrays.nope, rope=arrays.rope, value_size=arrays.value_size, eps=arrays.eps)
        own.down, own.norm = matrix_record(arrays.down, self._kept), self._norm_record(arrays.norm)
        if arrays.queries is not None and arrays.query_norm is not None:
            own.queries, own.query_norm = matrix_record(arrays.queries, self._kept), self._norm_record(arrays.query_norm)
        for name, matrices in (("absorb", arrays.absorb), ("expand", arrays.expand)):
            heads = (MatrixRecord * len(matrices))(*(matrix_record(matrix, self._kept) for matrix in matrices))
            setattr(own, name, MemoryRecord(ctypes.addressof(heads), ctypes.sizeof(heads)))
            self._kept.append(heads)
        self._kept.append(own)
        return MemoryRecord(ctypes.addressof(own), ctypes.sizeof(own))

    def _streams(self, arrays: StreamArrays) -> MemoryRecord:
        own = StreamsRecord(
            scale=memory_of(arrays.scale),
            **{name: matrix_record(matrix, self._kept) for name, matrix in arrays.matrices.items()},
            **{name: self._norm_record(norm) for name, norm in arrays.norms.items()},
        )
        self._kept += [own, arrays.scale]
        return MemoryRecord(ctypes.addressof(own), ctypes.sizeof(own))

    def _norm_record(self, norm: NormArrays) -> NormRecord:
        self._kept += [array for array in (norm.gain, norm.biases) if array is not None]
        return NormRecord(norm.kind, memory_of(norm.gain), memory_of(norm.biases))

    def place_adapter(self, number: int, adapter: AdapterArrays | None) -> None:
        """Sets the adapter of a number. If `adapter` is None, removes it. Do not call this during a pass.

        Numbers begin at 1.
        """
        size = self._group.num_layers * ctypes.sizeof(AdapterLayerRecord)
        if ctypes.sizeof(self._adapters) < number * size:
            grown = (AdapterLayerRecord * (number * self._group.num_layers))()
            ctypes.memmove(grown, self._adapters, ctypes.sizeof(self._adapters))
            self._adapters = grown
            self._group.adapters = MemoryRecord(ctypes.addressof(grown), ctypes.sizeof(grown))
        place = ctypes.addressof(self._adapters) + (number - 1) * size
        self._kept_of_adapters[number] = adapter
        if adapter is None:
            ctypes.memset(place, 0, size)
        else:
            ctypes.memmove(place, adapter.records, size)
            self._group.low_floats = max(self._group.low_floats, adapter.low_floats)

    def run(
        self,
        hidden: Array | None,
        rotations: Array | None,
        segments: Sequence[SegmentArrays],
        threads: int,
        inputs: Array | None = None,
    ) -> None:
        """Computes one pass, and overwrites `hidden` with the output of the layers. Raises NativeError.

        hidden: float32 [n, streams, hidden_size]. rotations: cosines and sines, float32 [rotations, n, head_dim / 2, 2].
        threads: how many threads compute, including the calling one. inputs: inputs of layers besides hidden states, float32
        [layers, n, input_size].

        If `hidden` and `rotations` are None, computes no pass. It then updates the recurrent states of the only segment again,
        with the draft tokens [position, position + length) that the last pass kept in `StateArrays.kept`.
        """
        rows = segments[0].length if hidden is None else len(hidden)
        threads = min(threads, MOST_THREADS)
        most_tokens = 0
        records = (SegmentRecord * len(segments))()
        for record, (pages, position, length, states, adapter) in zip(records, segments, strict=True):
            record.pages, record.position, record.length, record.adapter = memory_of(pages), position, length, adapter
            if states is not None:
                record.states, record.kept, record.kept_from = (
                    memory_of(states.states),
                    memory_of(states.kept),
                    states.kept_from,
                )
                record.copies, record.copied_at = memory_of(states.copies), memory_of(states.copied_at)
            most_tokens = max(most_tokens, position + length)
        needed = self._library.bytes_for("lamina_pass_bytes", self._group, rows, most_tokens, threads)
        if self._workspace.bytes < needed:
            self._workspace_array = new_workspace(needed)
            self._workspace = memory_of(self._workspace_array)
        forward_pass = PassRecord(
            rows=rows,
            threads=threads,
            repeats=hidden is None,
            hidden=memory_of(hidden),
            inputs=memory_of(inputs),
            rotations=memory_of(rotations),
            segments=MemoryRecord(ctypes.addressof(records), ctypes.sizeof(records)),
            workspace=self._workspace,
        )
        self._library.call("lamina_run_layers", self.threads.pool, self._group, forward_pass)


class NativeLinear:
    """Multiplies by one matrix W with biases b in C."""

    def __init__(self, library: Library, threads: NativeThreads, matrix: MatrixArrays) -> None:
        self._library = library
        self._threads = threads
        self._kept: list[Array] = []
        self._matrix = matrix_record(matrix, self._kept)

    def __call__(self, x: Array, threads: int) -> Array:
        """Returns x Wᵀ + b, float32 [n, outs], for x, float32 [n, width]. Raises NativeError.

        threads: how many threads compute, including the calling one.
        """
        threads = min(threads, MOST_THREADS)
        y = np.empty((len(x), self._matrix.outs), np.float32)
        if len(x) == 0:
            return y
        workspace = new_workspace(self._library.bytes_for("lamina_product_bytes", self._matrix, len(x), threads))
        product = ProductRecord(
            matrix=self._matrix,
            rows=len(x),
            threads=threads,
            x=memory_of(x),
            y=memory_of(y),
            workspace=memory_of(workspace),
        )
        self._library.call("lamina_multiply", self._threads.pool, product)
        return y


def matrix_record(matrix: MatrixArrays, kept: list[Any]) -> MatrixRecord:
    """Returns the C record of a matrix, with the addresses of its arrays. Adds the arrays to `kept`, to keep them alive.

    Copies the weights only if they must be padded to a width that is a multiple of STEP.
    """
    outs, width = matrix.shape
    weights = matrix.weights
    if matrix.is_padded:
        weights = np.pad(weights, ((0, 0), (0, -width % STEP)))
    kept += [array for array in (weights, matrix.scales, matrix.biases, matrix.order) if array is not None]
    formats, ends, end = [0] * PARTS, [outs] * PARTS, 0
    for number, (name, part_outs) in enumerate(matrix.parts):
        end += part_outs
        formats[number], ends[number] = BLOCK_FORMATS.index(name), end
    return MatrixRecord(
        dtype=matrix.dtype,
        outs=outs,
        width=width,
        weights=memory_of(weights),
        scales=memory_of(matrix.scales),
        biases=memory_of(matrix.biases),
        order=memory_of(matrix.order),
        formats=(ctypes.c_int64 * PARTS)(*formats),
        ends=(ctypes.c_int64 * PARTS)(*ends),
    )
