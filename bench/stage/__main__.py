"""What a stage's parts cost: passes of layers by dtype, products, and how near these come to the machine's limits. Random
weights in shapes like SmolLM2's.

    python -m bench.stage                  # all tables, about two minutes
    python -m bench.stage --only shares

Milliseconds of the best of several calls; candidates take turns, so that a machine busy with other work slows all of them.
Tables are Markdown. Use it before and after a change, in one run on one machine.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final

import click
import numpy as np
from numpy.typing import NDArray

from bench.report import machine
from bench.stage.perplexity import converted
from functions.stage.models.floats import Array, narrowed
from functions.stage.models.layer_group import KVDtype, Segment
from functions.stage.models.native.group import NativeGroup
from functions.stage.native.layers import MatrixArrays, NativeLinear, NativeThreads
from functions.stage.native.library import library
from functions.stage.native.records import Dtype as DtypeInC
from storage.checkpoints.checkpoint import Blocks, SourceTensor
from storage.checkpoints.decoder import layer_shapes, outer_shapes
from storage.checkpoints.decoder_config import decoder_of
from storage.models import q4
from storage.models.blocks import FORMATS, BlockFormat, pack, read_blocks
from storage.models.model_repository import Dtype

Ways = Mapping[str, Callable[[], object]]

# Dtypes of weights, and of keys and values if they are not those of activations.
_DTYPES: Final[tuple[tuple[Dtype, KVDtype | None], ...]] = (
    ("float32", None),
    ("bfloat16", None),
    ("bfloat16", "int8"),
    ("int8", None),
    ("q4", None),
)
_SMOLLM2: Final[Mapping[str, Any]] = {
    "model_type": "llama",
    "num_hidden_layers": 10,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
}
_WIDE: Final[Mapping[str, Any]] = {  # widths of 256 · n, which GGUF's K-quants need
    **_SMOLLM2,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
_PASSES: Final = (  # sequences, tokens that each holds, new ones of each
    (1, 128, 1),
    (8, 128, 1),
    (16, 128, 1),
    (1, 4096, 1),
    (1, 8000, 1),
    (4, 4096, 1),
    (1, 4096, 128),
    (1, 0, 128),
    (1, 0, 512),
)
_KV_TOKENS: Final = 20_000
_THREADS: Final = 2
_OUTS: Final = 2048  # of the table of matrices
_WIDTH: Final = 4096
_FAR_BYTES: Final = 2**28  # of weights that no cache holds
_NEAR_OUTS: Final = 1024  # a matrix that L2 holds with its rows
_NEAR_WIDTH: Final = 256
_NEAR_ROWS: Final = 64
_PROMPT_ROWS: Final = 512


def best_milliseconds(ways: Ways, rounds: int = 5, calls: int = 4) -> dict[str, float]:
    """By name, the fastest of all calls; every round tries each way."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            for _ in range(calls):
                begun = time.perf_counter()
                way()
                best[name] = min(best[name], (time.perf_counter() - begun) * 1e3)
    return best


def random_group(config: Mapping[str, Any], dtype: Dtype, kv_dtype: KVDtype | None = None, blocks: str = "") -> NativeGroup:
    """The whole model of a config with random weights. blocks: the format of matrices, with dtype kept."""
    sizes = decoder_of(config)
    dice = np.random.default_rng(1)
    shapes = {
        f"{sizes.names.layers}.{number}.{name}": shape
        for number, layer in enumerate(sizes.layers)
        for name, shape in layer_shapes(sizes, layer).items()
    }
    sources: dict[str, SourceTensor] = {}
    for name, shape in (shapes | outer_shapes(sizes)).items():
        scale = np.float32(shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
        array = dice.standard_normal(shape, np.float32) * scale
        source = SourceTensor("F32", shape, partial(_rows, array))
        if blocks and len(shape) == 2:
            source = replace(source, stored_as=blocks, read_blocks=partial(_random_blocks, FORMATS[blocks], shape[1]))
        sources[name] = source
    kv_bytes = _KV_TOKENS * sizes.num_layers * 2 * 4 * sizes.attention.num_kv_heads * sizes.attention.head_dim
    group = NativeGroup(config, 0, sizes.num_layers, dtype, kv_bytes, kv_dtype)
    group.place(converted(sources, dtype))
    group.finish()
    group.use_threads(_THREADS)
    return group


def _rows(array: Array, first: int, last: int) -> memoryview:
    return array[first:last].data.cast("B")


def _random_blocks(form: BlockFormat, width: int, first: int, last: int) -> Blocks | NDArray[np.uint8]:
    """Small bytes: no float16 of them is infinite."""
    dice, supers = np.random.default_rng(first), width // (32 * form.blocks)
    if form.split:
        return dice.integers(0, 56, (last - first, supers * form.file_bytes)).astype(np.uint8)
    codes = dice.integers(0, min(112, 1 << form.low), (last - first, width)).astype(np.uint8)
    scales = np.full((last - first, supers), 0.01, np.float32)
    return Blocks(codes, scales, zeros=np.full(scales.shape, 7, np.uint8) if form.zero else None)


def passes() -> Iterator[str]:
    """Milliseconds of a pass through ten layers, without the head: by dtype, and by format of blocks, compared with q4."""
    groups = {dtype + (" KV in int8" if kv else ""): random_group(_SMOLLM2, dtype, kv) for dtype, kv in _DTYPES}
    yield "| pass | " + " | ".join(groups) + " |"
    yield "|---" + "|---:" * len(groups) + "|"
    for sequences, held, new in _PASSES:
        what = "a token" if new == 1 else f"{new} tokens"
        name = f"{sequences} × {what}, {held} before" if held else f"prompt of {new}"
        yield f"| {name} | " + " | ".join(f"{taken:.2f}" for taken in _pass(groups, sequences, held, new, 5).values()) + " |"
    groups = {"q4": random_group(_WIDE, "q4"), "int8": random_group(_WIDE, "int8")}
    groups |= {name: random_group(_WIDE, "kept", blocks=name) for name in FORMATS}
    bits = {"q4": 5.0, "int8": 8.0} | {name: form.super_bytes / (64 * form.blocks) for name, form in FORMATS.items()}
    rows = {name: f"| {name} | {bits[name]:.2f} |" for name in groups}
    for sequences, held, new in ((1, 128, 1), (4, 128, 1), (16, 128, 1), (1, 0, 512)):
        best = _pass(groups, sequences, held, new, 8)
        for name, taken in best.items():
            rows[name] += f" {taken:.2f} ({taken / best['q4']:.2f} ×) |"
    yield "\n| format | bits a weight | a token | 4 × a token | 16 × a token | prompt of 512 |"
    yield "|---|---:|---:|---:|---:|---:|"
    yield from rows.values()


def _pass(groups: Mapping[str, NativeGroup], sequences: int, held: int, new: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a pass with `new` tokens of each sequence, after `held` ones, by group."""
    handles = {name: [group.kv.reserve(held + new) for _ in range(sequences)] for name, group in groups.items()}
    for name, group in groups.items():
        for handle in handles[name] if held else ():
            group.forward(np.arange(held), [Segment(handle, 0, held)])
    ways = {name: partial(run_pass, group, handles[name], held, new) for name, group in groups.items()}
    best = best_milliseconds(ways, rounds)
    for name, group in groups.items():
        for handle in handles[name]:
            group.kv.release(handle)
    return best


def _random_matrix(name: str, outs: int, width: int) -> MatrixArrays:
    """A matrix in q4, bfloat16, int8 or a format of blocks."""
    dice = np.random.default_rng(1)
    if name == "q4":
        ends = [(dice.standard_normal((outs, width // 32)) * 0.01).astype(np.float16) for _ in range(2)]
        packed = q4.pack(dice.integers(0, 16, (outs, width)).astype(np.uint8), *ends)
        return MatrixArrays(DtypeInC.Q4, packed, packed_shape=(outs, width))
    if name == "bfloat16":
        return MatrixArrays(DtypeInC.BF16, narrowed(dice.standard_normal((outs, width), np.float32), "BF16").view(np.int16))
    if name == "int8":
        weights = dice.integers(-127, 128, (outs, width)).astype(np.int8)
        return MatrixArrays(DtypeInC.INT8, weights, np.full(outs, 0.01, np.float32))
    form = FORMATS[name]
    rows = _random_blocks(form, width, 0, outs)
    packed = pack(form, rows if isinstance(rows, Blocks) else read_blocks(form, rows))
    dtype = DtypeInC.FLOAT_BLOCKS if form.floats else DtypeInC.BLOCKS
    return MatrixArrays(dtype, packed, packed_shape=(outs, width), parts=((name, outs),))


def matrices() -> Iterator[str]:
    """Milliseconds to multiply some rows by one matrix, by format, compared with q4. One thread."""
    dice = np.random.default_rng(1)
    made = {name: _random_matrix(name, _OUTS, _WIDTH) for name in ("q4", *FORMATS)}
    threads = NativeThreads(library())
    products = {name: NativeLinear(library(), threads, matrix) for name, matrix in made.items()}
    lines = {name: f"| {name} | {8 * matrix.weights.nbytes / (_OUTS * _WIDTH):.2f} |" for name, matrix in made.items()}
    for count in (1, 4, 16, 128):
        x = dice.standard_normal((count, _WIDTH), np.float32)
        ways: dict[str, Callable[[], object]] = {name: partial(product, x, 1) for name, product in products.items()}
        best = best_milliseconds(ways, rounds=16, calls=2)
        for name, taken in best.items():
            lines[name] += f" {taken:.3f} ({taken / best['q4']:.2f} ×) |"
    yield f"| [{_OUTS}, {_WIDTH}] in {library().level} | bits a weight | 1 row | 4 rows | 16 rows | 128 rows |"
    yield "|---|---:|---:|---:|---:|---:|"
    yield from lines.values()


def shares() -> Iterator[str]:
    """How near products come to the machine: one row to its bandwidth, many rows to the same instructions on data in L2.

    Bandwidth is that of numpy's dot product, on all threads. Rows of a prompt run on one thread.
    """
    dice = np.random.default_rng(1)
    halves = [dice.standard_normal(_FAR_BYTES // 4 // _THREADS, np.float32) for _ in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as threads:
        dots = {"": lambda: list(threads.map(np.dot, halves, halves))}
        bandwidth = _FAR_BYTES / best_milliseconds(dots, calls=2)[""] / 1e6
    x = {rows: dice.standard_normal((rows, _WIDTH), np.float32) for rows in (1, _NEAR_ROWS, _PROMPT_ROWS)}
    yield f"| matrix, level | a row: GB/s | of {bandwidth:.1f} GB/s | {_PROMPT_ROWS} rows: GFLOP/s | of those in L2 |"
    yield "|---|---:|---:|---:|---:|"
    best_level = library().level
    for name in ("bfloat16", "int8", "q4", "Q8_0", "Q4_K", "E4M3_128"):
        few = _random_matrix(name, _OUTS, _WIDTH)
        outs = _OUTS * max(1, _FAR_BYTES // few.weights.nbytes)
        far, near = _random_matrix(name, outs, _WIDTH), _random_matrix(name, _NEAR_OUTS, _NEAR_WIDTH)
        for level in library().levels[1:]:
            library().use_level(level)
            of_one, of_all = NativeThreads(library()), NativeThreads(library())
            of_all.count = _THREADS
            sizes = {
                "row": (NativeLinear(library(), of_all, far), x[1], _THREADS),
                "prompt": (NativeLinear(library(), of_one, few), x[_PROMPT_ROWS], 1),
                "near": (NativeLinear(library(), of_one, near), np.ascontiguousarray(x[_NEAR_ROWS][:, :_NEAR_WIDTH]), 1),
            }
            ways: dict[str, Callable[[], object]] = {
                what: partial(product, rows, count) for what, (product, rows, count) in sizes.items()
            }
            best = best_milliseconds(ways, calls=2)
            read = far.weights.nbytes / best["row"] / 1e6
            rate = 2 * _PROMPT_ROWS * _OUTS * _WIDTH / best["prompt"] / 1e6
            peak = 2 * _NEAR_ROWS * _NEAR_OUTS * _NEAR_WIDTH / best["near"] / 1e6
            yield f"| {name}, {level} | {read:.1f} | {read / bandwidth:.2f} | {rate:.0f} | {rate / peak:.2f} |"
            library().use_level(best_level)


def run_pass(group: NativeGroup, handles: Sequence[int], held: int, new: int) -> None:
    """Computes `new` tokens for each sequence after its first `held`."""
    for handle in handles:
        group.kv.truncate(handle, held)
    group.forward(np.arange(len(handles) * new), [Segment(handle, held, new) for handle in handles])


TABLES: Final = {"passes": passes, "matrices": matrices, "shares": shares}


@click.command()
@click.option("--only", type=click.Choice(list(TABLES)), help="One table.")
def main(only: str | None) -> None:
    """Print what a stage's parts cost, as Markdown tables."""
    click.echo(f"{machine()}; {_THREADS} threads\n")
    for name, table in TABLES.items():
        if only in (None, name):
            for line in table():
                click.echo(line)
            click.echo()


if __name__ == "__main__":
    main()
