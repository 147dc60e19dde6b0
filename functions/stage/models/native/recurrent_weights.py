"""Takes the weights of a layer's recurrent mixer out of a model's tensors, in the form that `c/native.h` needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from functions.stage.models.floats import Array
from functions.stage.models.native.weights import NativeWeights, of_one_kind, stacked, with_rows
from functions.stage.native.layers import MatrixArrays, NormArrays, RecurrentArrays
from functions.stage.native.records import NormKind, RecurrentKind
from storage.checkpoints.decoder import Decoder, Layer, Recurrent, TensorNames

_KINDS: Final = {"convolution": RecurrentKind.CONVOLUTION, "delta": RecurrentKind.DELTA, "mamba": RecurrentKind.MAMBA}


@dataclass(frozen=True, slots=True)
class StatePlaces:
    """Where each layer's numbers are in the states of a sequence, and in the numbers that are kept of a draft token.

    tails, matrices and kept have an offset for each layer. The last two fields are the total sizes.
    """

    tails: tuple[int, ...]
    matrices: tuple[int, ...]
    kept: tuple[int, ...]
    state_values: int
    kept_values: int

    @classmethod
    def of(cls, layers: Sequence[Layer], hidden_size: int) -> "StatePlaces":
        tails, matrices, kept, states, values = [], [], [], 0, 0
        for layer in layers:
            own = layer.recurrent
            tails.append(states)
            matrices.append(states if own is None else states + (own.kernel - 1) * (own.channels or hidden_size))
            kept.append(values)
            if own is not None:
                states += own.state_values(hidden_size)
                values += (own.channels or hidden_size) + 2 * own.num_heads
        return cls(tuple(tails), tuple(matrices), tuple(kept), states, values)


def inputs_of(recurrent: Recurrent, hidden_size: int) -> int:
    """Returns how many numbers a mixer's input projection makes of each row."""
    if recurrent.kind == "convolution":
        return 3 * hidden_size
    return recurrent.channels + recurrent.inner_size + (recurrent.num_heads if recurrent.kind == "mamba" else 0)


def take_recurrent(
    model: Decoder, recurrent: Recurrent, places: StatePlaces, slot: int, weights: NativeWeights, residual_scale: float
) -> RecurrentArrays:
    """Removes the tensors of a recurrent mixer from `weights`, and returns them. Raises MissingTensors.

    slot: number of the layer in the group.
    """
    prefix, hidden = model.names.recurrent, model.hidden_size
    gate_scale, *channel_scales, step_scale = recurrent.in_scales
    channels, inner = recurrent.channels or hidden, recurrent.inner_size
    kernel = f"{prefix}.{model.names.recurrent_kernel}"
    numbers: dict[str, float] = {
        "taps": recurrent.kernel,
        "channels": channels,
        "groups": recurrent.num_groups,
        "key_size": recurrent.key_size,
        "heads": recurrent.num_heads,
        "head_size": recurrent.head_size,
        "norm_parts": recurrent.norm_parts,
        "gate_first": recurrent.gate_first,
        "tail_at": places.tails[slot],
        "matrix_at": places.matrices[slot],
        "kept_at": places.kept[slot],
        "gate_scale": gate_scale,
        "step_scale": step_scale,
        "out_scale": residual_scale * recurrent.out_scale,
    }
    matrices = {"out": weights.matrix(f"{prefix}.out_proj", recurrent.biased)}
    if recurrent.kind == "delta":
        matrices["in"], matrices["steps"] = _delta_matrices(model.names, recurrent, weights)
    else:
        (name,) = model.names.recurrent_in
        matrices["in"] = weights.matrix(f"{prefix}.{name}", recurrent.biased)
    vectors = {"kernel": np.ascontiguousarray(weights.vector(f"{kernel}.weight").reshape(channels, recurrent.kernel).T)}
    if recurrent.kernel_bias:
        vectors["kernel_biases"] = weights.vector(f"{kernel}.bias")
    if recurrent.kind == "mamba":  # a convolution of scaled numbers is one with a scaled kernel
        keys = recurrent.num_groups * recurrent.key_size
        vectors["kernel"] *= np.repeat(np.array(channel_scales, np.float32), [inner, keys, keys])
    norm = None
    if recurrent.kind == "convolution":
        numbers["channels_at"] = 2 * hidden
    else:
        numbers |= _places_in_a_row(recurrent)
        vectors |= {"rates": -np.exp(weights.vector(f"{prefix}.A_log")), "step_biases": weights.vector(f"{prefix}.dt_bias")}
    if recurrent.kind == "mamba":
        vectors["skips"] = weights.vector(f"{prefix}.D")
    if recurrent.norm is not None:
        numbers["eps"] = recurrent.norm.eps
        gain = weights.vector(f"{prefix}.norm.weight")
        norm = NormArrays(NormKind.RMS, np.tile(gain, inner // gain.size))
    return RecurrentArrays(_KINDS[recurrent.kind], matrices, vectors, numbers, norm)


def _places_in_a_row(recurrent: Recurrent) -> dict[str, int]:
    """Returns the offsets of the parts of a row after the mixer's input projection, by their names in `c/native.h`."""
    keys, inner = recurrent.num_groups * recurrent.key_size, recurrent.inner_size
    if recurrent.kind == "delta":
        return {"query_at": 0, "key_at": keys, "value_at": 2 * keys, "gate_at": 2 * keys + inner}
    first = {"gate_at": 0, "channels_at": inner, "value_at": inner, "key_at": 2 * inner}
    return {**first, "query_at": 2 * inner + keys, "steps_at": 2 * inner + 2 * keys}


def _delta_matrices(names: TensorNames, recurrent: Recurrent, weights: NativeWeights) -> tuple[MatrixArrays, MatrixArrays]:
    """Returns the two input matrices of a delta rule: queries, keys, values and gates; steps and shares."""
    given = [weights.matrix(f"{names.recurrent}.{name}") for name in names.recurrent_in]
    if len(given) == 4:
        channels, gates, shares, steps = given
        return stacked(of_one_kind([channels, gates])), stacked(of_one_kind([steps, shares]))
    groups = recurrent.num_groups
    values = recurrent.inner_size // groups

    def by_part(*sizes: int) -> list[Array]:
        """Returns the row numbers of each part, in all groups. sizes: sizes of the parts of a group, in order."""
        ends = np.cumsum(sizes)
        first = np.arange(groups)[:, None] * ends[-1]
        return [(first + np.arange(end - size, end)).ravel() for size, end in zip(sizes, ends, strict=True)]

    inputs = np.concatenate(by_part(recurrent.key_size, recurrent.key_size, values, values))
    of_shares, of_steps = by_part(*2 * (recurrent.num_heads // groups,))
    return with_rows(given[0], inputs), with_rows(given[1], np.concatenate((of_steps, of_shares)))
