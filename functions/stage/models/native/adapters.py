"""Packs an adapter's matrices as `LowRank` of `c/native.h` has them."""

from collections.abc import Mapping, Sequence

import numpy as np

from functions.stage.models.adapters import LowRank, WrongAdapter
from functions.stage.models.floats import Array, Float32, narrowed
from functions.stage.models.native.layer_weights import qkv_rows
from functions.stage.native.layers import LowRankArrays
from functions.stage.native.records import GROUP_OUTS, LOW_PARTS, Dtype
from storage.checkpoints.decoder import Decoder, Layer, adaptable, layer_shapes, names_of_feed_forward


def pack_layer(model: Decoder, layer: Layer, found: Mapping[str, LowRank], narrow: bool) -> dict[str, LowRankArrays]:
    """What an adapter adds to the matrices of a layer, by their names in `c/native.h`.

    found: by the modules' names without the layer's prefix. narrow: numbers are bf16, not float32; they must be rounded
    already. Raises WrongAdapter.
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
        packed["qkv"] = _packed([None if part is None else _with_rows(part, rows) for part, rows in parts], ends, narrow)
    if layer.feed_forward is not None and layer.feed_forward.gated and gate == up:
        inner, both = layer.feed_forward.inner_size, take(up)
        if both is not None:
            packed["gate"] = _packed([_with_rows(both, np.arange(inner))], [inner], narrow)
            packed["up"] = _packed([_with_rows(both, inner + np.arange(inner))], [inner], narrow)
    for place, name in (("out", names.out), ("gate", gate), ("up", up), ("down", down)):
        if place not in packed and (taken := take(name) if name in left else None) is not None:
            packed[place] = _packed([taken], [len(taken.b)], narrow)
    return packed


def _with_rows(low: LowRank, rows: Array) -> LowRank:
    return LowRank(low.a, low.b[rows], low.scale)


def _packed(parts: Sequence[LowRank | None], ends: Sequence[int] | Array, narrow: bool) -> LowRankArrays:
    a = [_packed_a(part.a, narrow) for part in parts if part is not None]
    b = [_packed_b(part.b, narrow) for part in parts if part is not None]
    absent = LOW_PARTS - len(parts)
    return LowRankArrays(
        Dtype.BF16 if narrow else Dtype.F32,
        (*(0 if part is None else len(part.a) for part in parts), *[0] * absent),
        (*(int(end) for end in ends), *[int(ends[-1])] * absent),
        (*(0.0 if part is None else part.scale for part in parts), *[0.0] * absent),
        np.concatenate(a),
        np.concatenate(b),
    )


def _packed_a(a: Float32, narrow: bool) -> Array:
    """[rank, width] → for each group of ranks [width, ranks], or of pairs in bf16."""
    rank, width = a.shape
    groups = np.pad(a, ((0, -rank % GROUP_OUTS), (0, width % 2 if narrow else 0))).reshape(
        -1, GROUP_OUTS, width + (width % 2) * narrow
    )
    if not narrow:
        return np.ascontiguousarray(groups.transpose(0, 2, 1)).ravel()
    pairs = groups.reshape(len(groups), GROUP_OUTS, -1, 2).transpose(0, 2, 1, 3)
    return narrowed(np.ascontiguousarray(pairs), "BF16").ravel()


def _packed_b(b: Float32, narrow: bool) -> Array:
    """[outs, rank] → [rank, outs], or of pairs in bf16."""
    if not narrow:
        return np.ascontiguousarray(b.T).ravel()
    outs, rank = b.shape
    pairs = np.pad(b, ((0, 0), (0, rank % 2))).reshape(outs, -1, 2).transpose(1, 0, 2)
    return narrowed(np.ascontiguousarray(pairs), "BF16").ravel()
