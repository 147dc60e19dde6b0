"""Takes the weights of a layer out of a model's tensors, in the form that `c/native.h` needs.

The description of the layer says which weights there are.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import Final

import numpy as np

from functions.stage.models.floats import Array, Float32
from functions.stage.models.llama.rope import interleaved_rows
from functions.stage.models.native.weights import NativeWeights, converted, of_one_kind, stacked, transposed, with_rows
from functions.stage.native.layers import LatentArrays, LayerArrays, MatrixArrays, NormArrays, StreamArrays
from functions.stage.native.records import Activation, Dtype, NormKind
from storage.checkpoints.decoder import Attention, Decoder, FeedForward, Layer, Norm, Streams, names_of_feed_forward

_NORMS: Final = {"rms": NormKind.RMS, "layer": NormKind.LAYER}


def row_heads(attention: Attention) -> int:
    """Returns the number of heads in the matrix qkv of a layer: queries, the layer's own keys and values, and gates."""
    own_kv = 0 if attention.kv_layer is not None else 2 * attention.num_kv_heads
    return attention.num_heads * (2 if attention.output_gate else 1) + own_kv


def latent_sizes(attention: Attention) -> dict[str, int]:
    """Returns the sizes of latent attention, by their names in Group of `c/native.h`. Empty for other attention."""
    if (latent := attention.latent) is None:
        return {}
    query_size = latent.nope_size + latent.rope_size
    return {
        "latent_outs": (latent.query_rank or attention.num_heads * query_size) + attention.head_dim,
        "query_size": query_size,
        "value_size": latent.value_size,
    }


def take_layer(model: Decoder, layer: Layer, weights: NativeWeights) -> LayerArrays:
    """Removes a layer's tensors from `weights` and returns its arrays.

    Rows of queries and keys are reordered so that the two halves of each rotated pair are adjacent. The caller must add the
    numbers that depend on the group: window, ring, rotations, and the places of KV. Raises MissingTensors.
    """
    names, attention, feed_forward = model.names, layer.attention, layer.feed_forward
    matrices: dict[str, MatrixArrays] = {}
    norms: dict[str, NormArrays] = {}
    vectors: dict[str, Array] = {}
    latent: LatentArrays | None = None
    numbers: dict[str, float | tuple[float, ...]] = {
        "parallel": layer.parallel,
        "output_scale": weights.vector(names.output_scale).item() if layer.output_scale else 1.0,
    }
    taken: dict[str, NormArrays] = {}  # parallel layers may have one norm before both parts
    for place, name, norm in (
        ("before_attention", names.before_attention, layer.before_attention),
        ("after_attention", names.after_attention, layer.after_attention),
        ("before_mlp", names.before_feed_forward, layer.before_feed_forward),
        ("after_mlp", names.after_feed_forward, layer.after_feed_forward),
    ):
        if norm is not None:
            if name not in taken:
                taken[name] = take_norm(name, norm, weights)
            norms[place] = taken[name]
    if attention is not None:
        matrices["out"] = weights.matrix(names.out, attention.out_bias)
        if attention.latent is None:
            matrices["qkv"] = _qkv(model, attention, weights)
        else:
            latent = _latent(model, attention, weights)
        numbers |= {
            "kv_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
            "reads_kv": attention.kv_layer is not None,
            "gates": attention.output_gate,
            "score_scale": attention.scale,
            "attention_scale": layer.residual_scale * attention.out_scale,
            "score_cap": attention.soft_cap or 0.0,
        }
        if attention.sinks:
            vectors["sinks"] = weights.vector(names.sinks)
        if attention.qk_norm is not None:
            norms["qk"] = _qk_norm(model, attention, weights)
            numbers |= {"qk_as_one": attention.qk_norm.over == "all_heads", "qk_rotated": attention.qk_norm.after_rope}
        if attention.value_norm is not None and attention.kv_layer is None:
            norms["value"] = NormArrays(_NORMS[attention.value_norm.kind], np.ones(attention.head_dim, np.float32))
    if model.layer_input is not None:
        matrices |= {"input_gate": weights.matrix(names.input_gate), "input_out": weights.matrix(names.input_out)}
        norms["after_input"] = take_norm(names.after_input, model.layer_input.norm, weights)
    if feed_forward is not None:
        if feed_forward.sparsity > 0:
            numbers |= {"sparse": 1, "cutoff": NormalDist().inv_cdf(feed_forward.sparsity)}
        matrices |= take_feed_forward(feed_forward, names_of_feed_forward(names, layer.experts), weights)
        if feed_forward.activation == "xielu":
            numbers["xielu"] = _xielu(names.activation, weights)
    # The shared expert has the activation of the others.
    if (one := layer.feed_forward if layer.experts is None else layer.experts.each) is not None:
        numbers |= {
            "activation": Activation[one.activation.upper()],
            "gate_scale": one.gate_scale,
            "mlp_scale": layer.residual_scale * one.out_scale,
        }
        if one.swiglu is not None:
            numbers["swiglu"] = one.swiglu
    streams = None if model.streams is None else _streams(model, model.streams, weights)
    return LayerArrays(matrices, norms, vectors, numbers, latent=latent, streams=streams)


def _streams(model: Decoder, streams: Streams, weights: NativeWeights) -> StreamArrays:
    names = model.names
    norm = take_norm(names.stream_norm, streams.norm, weights)
    scale = weights.vector(names.stream_scale)
    floats = {"router": names.stream_router, "predict": names.predict, "correct": names.correct}
    return StreamArrays(
        {key: converted(weights.matrix(name), Dtype.F32) for key, name in floats.items()}
        | {"narrow": weights.matrix(names.narrow_beside), "widen": weights.matrix(names.widen_beside)},
        {
            "norm": replace(norm, gain=norm.gain / np.float32(model.hidden_size)),  # what the router gets is divided by it
            "after": take_norm(names.after_beside, streams.norm, weights),
        },
        scale if streams.scaled else np.ones_like(scale),
    )


def take_norm(name: str, norm: Norm, weights: NativeWeights) -> NormArrays:
    """Removes the gain and biases of a norm from `weights`. Raises MissingTensors."""
    return _norm(norm, lambda part: weights.vector(f"{name}.{part}"))


def _norm(norm: Norm, vector: Callable[[str], Float32]) -> NormArrays:
    gain = vector("weight")
    return NormArrays(
        _NORMS[norm.kind], gain + np.float32(1) if norm.gain_plus_one else gain, vector("bias") if norm.biased else None
    )


def _head_order(model: Decoder, attention: Attention) -> Array:
    """Returns the order in which C needs the numbers of each query and key."""
    rotation = None if attention.rope is None else model.ropes[attention.rope]
    if rotation is None or rotation.adjacent:
        return np.arange(attention.head_dim)
    return interleaved_rows(1, attention.head_dim, rotation.rotated)


def qkv_rows(model: Decoder, attention: Attention) -> list[tuple[str, Array]]:
    """Returns the parts of which C's single matrix of queries, keys, values and gates is stacked.

    Each part is the name of a matrix in the checkpoint, and the numbers of the rows (outputs) to take from it, in order.
    """
    names, size = model.names, attention.head_dim
    order, counts = _head_order(model, attention), (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
    orders = (order, order, np.arange(size))

    def rows(first: int, step: int, count: int, order: Array) -> Array:
        numbers: Array = (first + step * np.arange(count)[:, None] + order).ravel()
        return numbers

    if len(names.qkv) == 1:
        if names.qkv_by_head:
            parts = [rows(which * size, 3 * size, counts[which], orders[which]) for which in range(3)]
        else:
            firsts = (0, size * counts[0], size * (counts[0] + counts[1]))
            parts = [rows(firsts[which], size, counts[which], orders[which]) for which in range(3)]
        return [(names.qkv[0], np.concatenate(parts))]
    step = 2 if attention.output_gate else 1  # each head's query comes before its gate
    steps, modules = (step, 1, 1), names.qkv
    if attention.values_are_keys:
        modules = (names.qkv[0], names.qkv[1], names.qkv[1])
    found = [
        (name, rows(0, step * size, count, order))
        for name, step, count, order in zip(modules, steps, counts, orders, strict=True)
    ][: 1 if attention.kv_layer is not None else 3]
    return [*found, (names.qkv[0], rows(size, 2 * size, counts[0], np.arange(size)))] if attention.output_gate else found


def _qkv(model: Decoder, attention: Attention, weights: NativeWeights) -> MatrixArrays:
    """Returns one matrix with the rows of all queries, then all keys, then all values, then all gates."""
    parts = qkv_rows(model, attention)
    taken = {name: weights.matrix(name, attention.qkv_bias) for name in dict(parts)}
    ordered = [
        taken[name] if np.array_equal(rows, np.arange(taken[name].shape[0])) else with_rows(taken[name], rows)
        for name, rows in parts
    ]
    return ordered[0] if len(ordered) == 1 else stacked(of_one_kind(ordered))


def _latent(model: Decoder, attention: Attention, weights: NativeWeights) -> LatentArrays:
    """Returns the weights of latent attention. Each head has a matrix for keys and one for values.

    The matrix for keys is transposed, because it is applied to queries.
    """
    names, latent = model.names, attention.latent
    assert latent is not None
    queries, query_norm = None, None
    if latent.query_rank is None:
        first = weights.matrix(names.qkv[0])
    else:
        first, queries = weights.matrix(names.query_down, attention.qkv_bias), weights.matrix(names.query_up)
        query_norm = take_norm(names.query_down_norm, latent.norm, weights)
    up, nope, value_size = weights.matrix(names.kv_up), latent.nope_size, latent.value_size
    of_heads = [head * (nope + value_size) for head in range(attention.num_heads)]
    return LatentArrays(
        down=stacked(of_one_kind([first, weights.matrix(names.kv_down, attention.qkv_bias)])),
        query_norm=query_norm,
        queries=queries,
        norm=take_norm(names.kv_down_norm, latent.norm, weights),
        absorb=[transposed(up, row + np.arange(nope)) for row in of_heads],
        expand=[with_rows(up, row + nope + np.arange(value_size)) for row in of_heads],
        rank=latent.rank,
        nope=nope,
        rope=latent.rope_size,
        value_size=value_size,
        eps=latent.norm.eps,
    )


def take_feed_forward(
    feed_forward: FeedForward, names: tuple[str, str, str], weights: NativeWeights
) -> dict[str, MatrixArrays]:
    """Removes the matrices of a feed-forward from `weights` and returns them, by their names in `c/native.h`.

    names: names of gate, up and down in the checkpoint. Raises MissingTensors.
    """
    gate_name, up_name, down_name = names
    down = {"down": weights.matrix(down_name, feed_forward.biased)}
    if not feed_forward.gated:
        return {"up": weights.matrix(up_name, feed_forward.biased), **down}
    if gate_name == up_name:
        both = weights.matrix(up_name, feed_forward.biased)
        rows = np.arange(feed_forward.inner_size)
        return {"gate": with_rows(both, rows), "up": with_rows(both, feed_forward.inner_size + rows), **down}
    gate, up = of_one_kind([weights.matrix(name, feed_forward.biased) for name in (gate_name, up_name)])
    return {"gate": gate, "up": up, **down}


def _qk_norm(model: Decoder, attention: Attention, weights: NativeWeights) -> NormArrays:
    """Returns the norm of queries and keys: gains and biases [heads + kv heads, head_dim], in the order of qkv's rows."""
    order = _head_order(model, attention)
    assert attention.qk_norm is not None

    def of_heads(part: str, name: str, heads: int) -> Float32:
        if "{head}" in name:
            numbers: Float32 = np.stack([weights.vector(f"{name.format(head=head)}.{part}") for head in range(heads)])
        else:
            numbers = weights.vector(f"{name}.{part}")
        if numbers.size == attention.head_dim:
            numbers = np.tile(numbers, (heads, 1))
        return numbers.reshape(heads, attention.head_dim)[:, order]

    def all_heads(part: str) -> Float32:
        parts = [of_heads(part, model.names.query_norm, attention.num_heads)]
        if attention.kv_layer is None:
            parts.append(of_heads(part, model.names.key_norm, attention.num_kv_heads))
        return np.ascontiguousarray(np.concatenate(parts))

    return _norm(attention.qk_norm.norm, all_heads)


def _xielu(name: str, weights: NativeWeights) -> tuple[float, ...]:
    """Returns the four numbers of xIELU in `c/native.h`, computed as in transformers.activations.

    See https://arxiv.org/abs/2411.13010.
    """
    positive, negative, beta, eps = (weights.vector(f"{name}.{part}").item() for part in ("alpha_p", "alpha_n", "beta", "eps"))
    return (float(np.logaddexp(0, positive)), beta + float(np.logaddexp(0, negative)), beta, eps)
