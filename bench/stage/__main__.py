"""Compares a stage's dtypes: the time of a pass of ten SmolLM2-shaped layers, decoding and prefilling.

    OMP_NUM_THREADS=1 python -m bench.stage            # a few minutes

One thread, random weights, milliseconds of processor time (without waiting for a processor), the best of several passes. Dtypes
take turns, so that other work on the machine slows all of them.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import click
import numpy as np
import torch

from bench.report import machine
from functions.stage.models.build import build_layer_group
from functions.stage.models.floats import Array, narrowed
from functions.stage.models.layer_group import LayerGroup, Segment
from storage.loading.weight_loader import RawTensor
from storage.models.q4 import pack, quantize

DTYPES: Final = ("float32", "bfloat16", "int8", "q4")
_KV_HEADS: Final = 3
_HEAD_DIM: Final = 64
CONFIG: Final[Mapping[str, Any]] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": _KV_HEADS,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
_FIRST, _LAST = 10, 20
_BUDGET_BYTES: Final = 18_000 * (_LAST - _FIRST) * 2 * 4 * _KV_HEADS * _HEAD_DIM


def best_milliseconds(ways: Mapping[str, Callable[[], object]], rounds: int = 7, passes: int = 5) -> dict[str, float]:
    """By name, the fastest of all passes; every round tries each way."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            for _ in range(passes):
                begun = time.thread_time()
                way()
                best[name] = min(best[name], (time.thread_time() - begun) * 1e3)
    return best


def random_group(dtype: str) -> LayerGroup:
    tensors: dict[str, RawTensor] = {}
    dice = np.random.default_rng(1)
    for layer in range(_FIRST, _LAST):
        for name, shape in _layer_shapes():
            weight = dice.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
            full_name = f"model.layers.{layer}.{name}.weight"
            if dtype == "int8" and len(shape) == 2:
                scale = np.abs(weight).max(axis=1) / np.float32(127)
                tensors[full_name] = _raw("I8", np.rint(weight / scale[:, None]).astype(np.int8))
                tensors[f"{full_name}_scale"] = _raw("F32", scale)
            elif dtype == "q4" and len(shape) == 2:
                tensors[full_name] = _raw("U8", pack(*quantize(weight)))
            else:
                tensors[full_name] = _raw("F32", weight)
    return build_layer_group("auto", CONFIG, tensors, _FIRST, _LAST, dtype, "cpu", _BUDGET_BYTES)


def _raw(dtype: str, array: Array) -> RawTensor:
    return RawTensor(dtype, array.shape, array.data.cast("B"))


def _states(group: LayerGroup, rows: int) -> Array:
    numbers = np.random.default_rng(2).standard_normal((rows, group.hidden_size), np.float32)
    return narrowed(numbers, group.hidden_dtype)


def _layer_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], _KV_HEADS * _HEAD_DIM
    yield from (("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,)))
    yield from ((f"self_attn.{name}_proj", (size, hidden)) for name, size in (("q", hidden), ("k", kv), ("v", kv)))
    yield from (("self_attn.o_proj", (hidden, hidden)), ("mlp.down_proj", (hidden, inner)))
    yield from ((f"mlp.{name}_proj", (inner, hidden)) for name in ("gate", "up"))


def decode_step(group: LayerGroup, sequences: int, held: int) -> Callable[[], object]:
    """A pass of one token for each sequence; the next call repeats it."""
    handles = [group.kv.reserve(held + 1) for _ in range(sequences)]
    for handle in handles:
        group.forward(_states(group, held), [Segment(handle, 0, held)])
    inputs = _states(group, sequences)

    def step() -> None:
        for handle in handles:
            group.kv.truncate(handle, held)
        group.forward(inputs, [Segment(handle, held, 1) for handle in handles])

    return step


def prompt_chunk(group: LayerGroup, length: int) -> Callable[[], object]:
    handle = group.kv.reserve(length)
    inputs = _states(group, length)

    def chunk() -> None:
        group.kv.truncate(handle, 0)
        group.forward(inputs, [Segment(handle, 0, length)])

    return chunk


def group_table() -> Iterator[str]:
    """Milliseconds of a pass by dtype, and how many times as fast as float32."""
    yield "| pass | " + " | ".join(DTYPES) + " |"
    yield "|---" * (len(DTYPES) + 1) + "|"
    groups = {dtype: random_group(dtype) for dtype in DTYPES}
    for sequences in (1, 8, 16):
        for held in (128, 512):
            ways = {dtype: decode_step(group, sequences, held) for dtype, group in groups.items()}
            yield _row(f"decode {sequences}, {held} held", best_milliseconds(ways))
    for length in (128, 512):
        ways = {dtype: prompt_chunk(group, length) for dtype, group in groups.items()}
        yield _row(f"prompt of {length}", best_milliseconds(ways, passes=2))


def _row(name: str, best: Mapping[str, float]) -> str:
    first, *_ = best.values()
    cells = [f"{milliseconds:.2f} ({first / milliseconds:.2f} ×)" for milliseconds in best.values()]
    return f"| {name} | " + " | ".join(cells) + " |"


@click.command()
def main() -> None:
    """Print a Markdown table: passes of a ten-layer group by dtype."""
    torch.set_num_threads(1)
    click.echo(f"{machine()}; torch {torch.__version__}, one thread; milliseconds\n")
    with torch.inference_mode():
        click.echo("\n".join(group_table()))


if __name__ == "__main__":
    main()
