"""A stage's kernels: ten SmolLM2-shaped layers by dtype, and the ways to compute their parts side by side.

    OMP_NUM_THREADS=1 python -m bench.stage.kernels            # a few minutes
    OMP_NUM_THREADS=1 python -m bench.stage.kernels --only group

One thread, random weights, milliseconds of processor time (which waiting for a processor does not count in) of the best of
several passes; candidates take turns, so that a machine busy with other work slows all of them. Tables are Markdown.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import click
import numpy as np
import torch

from bench.report import machine
from bench.stage import variants as stage_variants
from functions.stage.models.build import build_layer_group
from functions.stage.models.floats import Array, narrowed
from functions.stage.models.layer_group import LayerGroup, Segment
from storage.loading.weight_loader import RawTensor
from storage.models.q4 import pack, quantize

DTYPES: Final = ("float32", "bfloat16", "int8", "q4")
CONFIG: Final[Mapping[str, Any]] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": stage_variants.HIDDEN,
    "intermediate_size": 1536,
    "num_attention_heads": stage_variants.HEADS,
    "num_key_value_heads": stage_variants.KV_HEADS,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
_FIRST, _LAST = 10, 20
_BUDGET_BYTES: Final = 18_000 * (_LAST - _FIRST) * 2 * 4 * stage_variants.KV_HEADS * stage_variants.HEAD_DIM


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
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], stage_variants.KV_HEADS * stage_variants.HEAD_DIM
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


def variant_table(title: str, cases: Mapping[str, Callable[[], stage_variants.Ways]]) -> Iterator[str]:
    """Milliseconds of each way, and how many times as long as the first, which is the one in use."""
    for index, (case, make) in enumerate(cases.items()):
        best = best_milliseconds(make())
        if index == 0:
            yield f"| {title} | " + " | ".join(best) + " |"
            yield "|---" * (len(best) + 1) + "|"
        first, *_ = best.values()
        yield f"| {case} | " + " | ".join(f"{taken:.2f} ({taken / first:.2f})" for taken in best.values()) + " |"
    yield ""


def variant_tables() -> Iterator[str]:
    narrow, wide = torch.bfloat16, torch.float32
    for dtype in (wide, narrow):
        cases = {f"{rows} rows": partial(stage_variants.float_matrices, rows, dtype) for rows in (1, 8, 128)}
        yield from variant_table(f"matrices, {_name(dtype)}", cases)
    cases = {f"{rows} rows": partial(stage_variants.int8_matrices, rows) for rows in (1, 8, 16, 128)}
    yield from variant_table("matrices, int8", cases)
    ragged = [64 + 61 * index % 448 for index in range(16)]
    lengths: dict[str, list[int]] = {"1 of 128": [128], "8 of 128": [128] * 8, "8 of 512": [512] * 8}
    lengths |= {"8 of 64 to 512": ragged[:8], "16 of 128": [128] * 16, "16 of 64 to 512": ragged}
    cases = {case: partial(stage_variants.attention, held, narrow) for case, held in lengths.items()}
    yield from variant_table("attention among bf16 matrices", cases)
    for title, make in (("norm", stage_variants.norms), ("rotation", stage_variants.rotations)):
        sizes = [(rows, dtype) for dtype in (wide, narrow) for rows in (1, 16, 128)]
        yield from variant_table(title, {f"{rows} rows, {_name(dtype)}": partial(make, rows, dtype) for rows, dtype in sizes})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@click.command()
@click.option("--only", type=click.Choice(["group", "variants"]), help="One of the two parts.")
def main(only: str | None) -> None:
    """Print Markdown tables: dtypes of a ten-layer group, and ways to compute its parts."""
    torch.set_num_threads(1)
    click.echo(f"{machine()}; torch {torch.__version__}, one thread; milliseconds\n")
    with torch.inference_mode():
        for part, lines in (("group", group_table), ("variants", variant_tables)):
            if only in (None, part):
                for line in lines():
                    click.echo(line)
                click.echo("")


if __name__ == "__main__":
    main()
