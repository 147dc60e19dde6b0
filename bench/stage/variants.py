"""Ways to compute the parts of a decoder layer, tried against those that the lean group uses.

Each maker returns ways by name: functions that run one pass over ten layers' worth of one part, SmolLM2-shaped (hidden 576,
inner 1536, 9 heads on 3, head size 64), random values. The first of them is what the group does.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch.nn import functional

from functions.stage.models.llama.layer import RmsNorm, rotate
from functions.stage.models.llama.linear import Int8Linear, OneDnnLinear, PlainLinear

Ways = dict[str, Callable[[], object]]

LAYERS: Final = 10
HIDDEN: Final = 576
HEADS: Final = 9
KV_HEADS: Final = 3
HEAD_DIM: Final = 64
SHAPES: Final = ((960, HIDDEN), (HIDDEN, HIDDEN), (3072, HIDDEN), (HIDDEN, 1536))
"""[out, in] of qkv, o, gate and up, down."""


def float_matrices(rows: int, dtype: torch.dtype) -> Ways:
    """All matrices of ten layers: laid out for oneDNN, or as they are."""
    weights = [torch.randn(shape).to(dtype) for _ in range(LAYERS) for shape in SHAPES]
    x = {size: torch.randn(rows, size).to(dtype) for size in (HIDDEN, 1536)}
    packed = [OneDnnLinear(weight, None) for weight in weights]
    plain = [PlainLinear(weight, None) for weight in weights]
    return {
        "packed for oneDNN": lambda: [each(x[weight.shape[1]]) for each, weight in zip(packed, weights, strict=True)],
        "F.linear": lambda: [each(x[weight.shape[1]]) for each, weight in zip(plain, weights, strict=True)],
    }


def int8_matrices(rows: int) -> Ways:
    """The same in int8. Only the first has 14 bits for an activation; the others are bare products of 8, or weight-only."""
    weights = [torch.randint(-127, 128, shape, dtype=torch.int8) for _ in range(LAYERS) for shape in SHAPES]
    scales = [torch.rand(len(weight)) for weight in weights]
    x = {size: torch.randn(rows, size) for size in (HIDDEN, 1536)}
    own = [Int8Linear(weight, scale, None) for weight, scale in zip(weights, scales, strict=True)]
    return {
        "oneDNN, 14-bit activations": lambda: [each(x[weight.shape[1]]) for each, weight in zip(own, weights, strict=True)],
        "oneDNN, 8-bit, product only": _onednn_products(weights, scales, rows),
        "fbgemm, 8-bit, product only": _fbgemm_products(weights, scales, x),
        "_int_mm, 8-bit, product only": _int_mm_products(weights, rows),
        "weight only (_weight_int8pack_mm)": _weight_only(weights, scales, x),
    }


def _onednn_products(weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], rows: int) -> Callable[[], object]:
    packed = [torch.ops.onednn.qlinear_prepack.default(weight, None) for weight in weights]
    zeros = [torch.zeros(len(scale), dtype=torch.int32) for scale in scales]
    quantized = {size: torch.randint(-127, 128, (rows, size), dtype=torch.int8) for size in (HIDDEN, 1536)}
    product = torch.ops.onednn.qlinear_pointwise.default
    return lambda: [
        product(quantized[weight.shape[1]], 1.0, 0, each, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
        for weight, each, scale, zero in zip(weights, packed, scales, zeros, strict=True)
    ]


def _fbgemm_products(
    weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], x: dict[int, torch.Tensor]
) -> Callable[[], object]:
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is giving this API up, one reason not to build on it
        packed = [
            torch.ops.quantized.linear_prepack(
                torch._make_per_channel_quantized_tensor(weight, scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0),
                None,
            )
            for weight, scale in zip(weights, scales, strict=True)
        ]
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    return lambda: [product(x[weight.shape[1]], 1.0, 128, each) for weight, each in zip(weights, packed, strict=True)]


def _int_mm_products(weights: Sequence[torch.Tensor], rows: int) -> Callable[[], object]:
    quantized = {size: torch.randint(-127, 128, (rows, size), dtype=torch.int8) for size in (HIDDEN, 1536)}
    return lambda: [torch._int_mm(quantized[weight.shape[1]], weight.T) for weight in weights]


def _weight_only(
    weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], x: dict[int, torch.Tensor]
) -> Callable[[], object]:
    short = [scale.bfloat16() for scale in scales]
    narrow = {size: each.bfloat16() for size, each in x.items()}
    product = torch._weight_int8pack_mm
    return lambda: [product(narrow[weight.shape[1]], weight, scale) for weight, scale in zip(weights, short, strict=True)]


def attention(lengths: Sequence[int], dtype: torch.dtype) -> Ways:
    """One decode step of sequences of these lengths: a call for each, slots under a mask, tokens gathered into slots.

    Ten layers' matrices are read between the calls, as in a real pass: without them everything would be in the cache.
    """
    count, longest = len(lengths), max(lengths)
    starts = [sum(lengths[:index]) for index in range(count)]
    arena = torch.randn(LAYERS, 2, KV_HEADS, sum(lengths), HEAD_DIM).to(dtype)
    slots = torch.randn(LAYERS, 2, KV_HEADS, count, longest, HEAD_DIM).to(dtype)
    queries = torch.randn(count, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM).to(dtype)
    mask = torch.zeros(1, count, 1, longest, dtype=dtype)
    for index, length in enumerate(lengths):
        mask[0, index, 0, length:] = -math.inf
    padded = torch.cat(
        [
            torch.arange(start, start + longest).clamp(max=start + length - 1)
            for start, length in zip(starts, lengths, strict=True)
        ]
    )
    weights = [[OneDnnLinear(torch.randn(shape).to(torch.bfloat16), None) for shape in SHAPES] for _ in range(LAYERS)]
    x = {size: torch.randn(count, size).to(torch.bfloat16) for size in (HIDDEN, 1536)}

    def by_range(layer: int) -> torch.Tensor:
        attended = [
            functional.scaled_dot_product_attention(query.transpose(0, 1), *arena[layer].narrow(2, start, length).unsqueeze(2))
            for query, start, length in zip(queries.split(1), starts, lengths, strict=True)  # type: ignore[no-untyped-call]
        ]
        return torch.cat(attended)

    def in_slots(layer: int) -> torch.Tensor:
        return functional.scaled_dot_product_attention(queries.transpose(0, 1), slots[layer, 0], slots[layer, 1], mask)

    def gathered(layer: int) -> torch.Tensor:
        tokens = arena[layer].index_select(2, padded).view(2, KV_HEADS, count, longest, HEAD_DIM)
        return functional.scaled_dot_product_attention(queries.transpose(0, 1), tokens[0], tokens[1], mask)

    def among_matrices(way: Callable[[int], torch.Tensor]) -> Callable[[], object]:
        def one_pass() -> None:
            for layer in range(LAYERS):
                for matrix, (_, size) in zip(weights[layer], SHAPES, strict=True):
                    matrix(x[size])
                way(layer)

        return one_pass

    return {
        "a range each": among_matrices(by_range),
        "slots of one size, masked": among_matrices(in_slots),
        "gathered into slots": among_matrices(gathered),
    }


def norms(rows: int, dtype: torch.dtype) -> Ways:
    """RMSNorm, twenty times. LayerNorm is another function: it shows what one fused kernel would take."""
    x, weight = torch.randn(rows, HIDDEN).to(dtype), torch.rand(HIDDEN).to(dtype)
    own = RmsNorm(weight, 1e-5)
    times = range(2 * LAYERS)
    return {
        "RmsNorm": lambda: [own(x) for _ in times],
        "F.rms_norm": lambda: [functional.rms_norm(x, (HIDDEN,), weight, 1e-5) for _ in times],
        "(F.layer_norm)": lambda: [functional.layer_norm(x, (HIDDEN,), weight) for _ in times],
    }


def rotations(rows: int, dtype: torch.dtype) -> Ways:
    """Queries and keys turned, ten times: as complex numbers in place, or half rotated as transformers does."""
    heads = torch.randn(rows, HEADS + KV_HEADS, HEAD_DIM).to(dtype)
    angles = torch.rand(rows, 1, HEAD_DIM // 2)
    turns = torch.polar(torch.ones_like(angles), angles)
    cos, sin = (part(torch.cat((angles, angles), -1)).to(dtype) for part in (torch.cos, torch.sin))

    def half_rotated() -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin

    def complex_in_place() -> None:
        for _ in range(LAYERS):
            rotate(heads, turns)

    return {
        "complex, in place": complex_in_place,
        "rotate half": lambda: [half_rotated() for _ in range(LAYERS)],
    }
