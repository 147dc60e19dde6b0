"""Packs the matrices of an adapter into the format of `LowRank` in `c/native.h`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from functions.stage.models.adapters import LowRank, WrongAdapter
from functions.stage.models.floats import Array, Float32, narrowed
from functions.stage.models.native.layer_weights import qkv_rows
from functions.stage.native.layers import LowRankArrays
from functions.stage.native.records import GROUP_OUTS, LOW_PARTS, Dtype
from storage.checkpoints.decoder import Decoder, Layer, adaptable, layer_shapes, names_of_feed_forward


def pack_layer(model: Decoder, layer: Layer, found: Mapping[str, LowRank], narrow: bool) -> dict[str, LowRankArrays]:
    """Returns what an adapter adds to the matrices of a layer. Keys are the names of matrices in `c/native.h`.

    found: low-rank matrices by the names of modules, without the layer's prefix. narrow: whether to round numbers to bf16.
    Raises WrongAdapter.
    """
    names, shapes, left = model.names, layer_shapes(model, layer), dict(found)
    if refused := left.keys() - adaptable(model, layer):
        raise WrongAdapter(f"the adapter changes {min(refused)}, to which the layers in C add nothing")
    gate, up, down = names_of_feed_forward(names, layer.experts)
    packed: dict[str, LowRankArrays] = {}

    def take(name: str) -> LowRank | None:
        shape = shapes.get(f"{name}.weight")
        taken = None if shape is None else left.pop(name, None)
        if taken is not None and shape is not None:
            outs, width = shape[::-1] if names.transposed else shape
            rank = len(taken.a)
            if taken.a.shape != (rank, width) or taken.b.shape != (outs, rank):
                seen = f"{list(taken.a.shape)} and {list(taken.b.shape)}"
                raise WrongAdapter(f"the adapter's {name} has {seen}, and the module is [{outs}, {width}]")
        return taken

    of_qkv = qkv_rows(model, layer.attention) if layer.attention is not None else []
    taken_qkv = {name: take(name) for name in dict(of_qkv)}
    parts = [(taken_qkv[name], rows) for name, rows in of_qkv]
    if any(part for part, _ in parts):
        ends = np.cumsum([len(rows) for _, rows in parts])
        packed["qkv"] = _packed([None if part is None else replace(part, b=part.b[rows]) for part, rows in parts], ends, narrow)
    if layer.feed_forward is not None and layer.feed_forward.gated and gate == up:
        inner, both = layer.feed_forward.inner_size, take(up)
        if both is not None:
            packed["gate"] = _packed([replace(both, b=both.b[:inner])], [inner], narrow)
            packed["up"] = _packed([replace(both, b=both.b[inner:])], [inner], narrow)
    for place, name in (("out", names.out), ("gate", gate), ("up", up), ("down", down)):
        if place not in packed and (taken := take(name) if name in left else None) is not None:
            packed[place] = _packed([taken], [len(taken.b)], narrow)
    return packed


def _packed(parts: Sequence[LowRank | None], ends: Sequence[int] | Array, narrow: bool) -> LowRankArrays:
    given = [(part, int(end) - len(part.b)) for part, end in zip(parts, ends, strict=True) if part is not None]
    absent = LOW_PARTS - len(parts)
    return LowRankArrays(
        Dtype.BF16 if narrow else Dtype.F32,
        (*(0 if part is None else len(part.a) for part in parts), *[0] * absent),
        (*(int(end) for end in ends), *[int(ends[-1])] * absent),
        (*(0.0 if part is None else part.scale for part in parts), *[0.0] * absent),
        np.concatenate([_grouped(part.a, 0, narrow) for part, _ in given]),
        np.concatenate([_grouped(part.b, begin, narrow) for part, begin in given]),
    )


def _grouped(matrix: Float32, first: int, narrow: bool) -> Array:
    """Reorders a matrix [n, width] for C: for each group of GROUP_OUTS rows, the transposed rows [width, GROUP_OUTS].

    In bf16, a pair of neighbouring columns counts as one. first: number of the first row, which need not begin a group. Zeros
    fill the first and the last group.
    """
    count, width = matrix.shape
    units = matrix
    if narrow:
        bits = np.zeros((count, width + width % 2), np.uint16)
        bits[:, :width] = narrowed(matrix, "BF16")
        units = bits.view(np.uint32)
    before = first % GROUP_OUTS
    groups = np.zeros((-(-(before + count) // GROUP_OUTS), GROUP_OUTS, units.shape[1]), units.dtype)
    groups.reshape(-1, units.shape[1])[before : before + count] = units
    return np.ascontiguousarray(groups.transpose(0, 2, 1)).ravel()
