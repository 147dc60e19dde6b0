"""Layers in C are nearer to torch's float32 than torch's bfloat16, and their bits do not depend on chunks and other rows.

The bound, 1.1 to 7 % of the length of the logits, finds a single error in one of six layers: two exchanged heads of a matrix, a
missing bias or gain, a window one token too short or too long, an additional rotation. Each moves the exact logits at least 1.7
times as far.
"""

import gc
import itertools
import os
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Final

import numpy as np
import pytest
import torch

from functions.stage.models.floats import Array
from functions.stage.models.layer_group import LayerGroup, Segment
from functions.stage.models.native.group import NativeGroup
from tests.support.functions.borders import forwarded, raw, states
from tests.support.functions.group_chain import GroupChain, by_plan, logits_by_plan, tokens_of
from tests.support.functions.int8_checkpoints import MATRICES
from tests.support.functions.native_models import (
    NAMES,
    checkpoint,
    config,
    error,
    exact_groups,
    finished,
    native_group,
    native_groups,
    torch_groups,
)

DTYPES: Final = ("bfloat16", "int8", "q4", "bfloat16/int8")  # of weights; after / of keys and values
ALL_DTYPES: Final = (*DTYPES, "float32")
# Each column is a pass: 1 to 5 rows, chunks with steps, more rows than go through a matrix at once.
PLAN: Final = {
    "a": (1, 2, 2, 3, 3, 7, 1, 9, 1, 8),
    "b": (0, 0, 1, 1, 1, 5, 20, 1, 0, 1),
    "c": (0, 0, 0, 0, 1, 1, 1, 6, 1, 4),
    "d": (0, 0, 0, 0, 0, 9, 1, 1, 66, 3),
}
TEXTS: Final = {id: tokens_of(seed, sum(lengths)) for seed, (id, lengths) in enumerate(PLAN.items())}


def logits_of(groups: Sequence[LayerGroup]) -> torch.Tensor:
    return logits_by_plan(groups, TEXTS, PLAN)


def test_only_native_layers_share_their_threads() -> None:
    assert all(group.shares_work for group in native_groups("llama", "bfloat16"))
    assert not any(group.shares_work for group in torch_groups("llama", "bfloat16"))


@cache
def error_of_torch(name: str) -> float:
    return error(logits_of(torch_groups(name, "bfloat16")), logits_of(exact_groups(name, "bfloat16")))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_nearer_to_float32_than_those_of_torchs_layers(name: str, dtype: str) -> None:
    exact, groups = logits_of(exact_groups(name, dtype)), native_groups(name, dtype)
    for group in groups:
        group.use_threads(2)
    assert error(logits_of(groups), exact) < error_of_torch(name) * (1.65 if dtype == "bfloat16/int8" else 1)


@pytest.mark.parametrize("cut", [((0, 6),), ((0, 1), (1, 6))])
@pytest.mark.parametrize("name", ["llama_tied", "smollm3", "qwen2_sliding"])
def test_any_cut_is_as_exact(name: str, cut: Sequence[tuple[int, int]]) -> None:
    exact = logits_of(exact_groups(name, "int8"))
    assert error(logits_of(native_groups(name, "int8", cut)), exact) < error_of_torch(name)


@pytest.mark.parametrize("dtype", ["int8", "q4"])
@pytest.mark.parametrize(
    "keep_wide",
    [
        ("down_proj",),
        ("o_proj",),
        ("q_proj",),
        ("gate_proj",),
        ("v_proj", "up_proj"),
        ("q_proj", "k_proj", "v_proj", "lm_head"),
        MATRICES,
    ],
)
def test_any_matrix_of_a_quantized_model_may_stay_wide(keep_wide: Collection[str], dtype: str) -> None:
    exact = logits_of(exact_groups("llama_biased", dtype, keep_wide))
    found = logits_of(native_groups("llama_biased", dtype, keep_wide=keep_wide))
    assert error(found, exact) < error_of_torch("llama_biased")


def first_layers(name: str, dtype: str) -> NativeGroup:
    """Layers whose hidden states are not rounded for the wire."""
    (group,) = native_groups(name, dtype, ((0, 4),))
    group.hidden_dtype = "F32"
    return group


def states_of(
    group: NativeGroup, texts: Mapping[str, Sequence[int]], plan: Mapping[str, Sequence[int]]
) -> dict[str, torch.Tensor]:
    chain = GroupChain([group])
    chain.reserve(*texts, tokens=100)
    states = by_plan(chain.states, texts, plan)
    for id in texts:
        chain.release(id)
    return states


LENGTHS: Final = (97, 60, 33, 16, 5)
PASSES: Final = 8


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_sequences_bits_do_not_depend_on_chunks_other_rows_or_threads(name: str, dtype: str) -> None:
    """They are the bits of the sequence alone, token by token, on one thread."""
    group = first_layers(name, dtype)
    texts = {str(number): tokens_of(number, length) for number, length in enumerate(LENGTHS)}
    group.use_threads(1)
    alone = {id: states_of(group, {id: text}, {id: (1,) * len(text)})[id] for id, text in texts.items()}
    dice = random.Random(f"{name} {dtype}")
    for threads in (1, 2, 3, 2):
        group.use_threads(threads)
        plan = {id: any_chunks(dice, len(text)) for id, text in texts.items()}
        together = states_of(group, texts, plan)
        for id in texts:
            assert torch.equal(together[id], alone[id]), (threads, plan)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [17, 21, 33, 50])
def test_windows_longer_than_a_block_give_the_same_bits_in_steps_and_chunks(window: int, dtype: str) -> None:
    """All queries of a chunk begin to read at the block of the first query's window."""
    windowed = {**config("mistral_sliding"), "sliding_window": window}
    group = finished(native_group(windowed, 0, 6, dtype), dict(checkpoint("mistral_sliding", dtype)))
    text = {"a": tokens_of(1, 90)}
    in_steps = states_of(group, text, {"a": (1,) * 90})["a"]
    for chunks in ((90,), (27, 8, 55), (5, 43, 1, 41)):
        assert torch.equal(states_of(group, text, {"a": chunks})["a"], in_steps)


def any_chunks(dice: random.Random, tokens: int) -> tuple[int, ...]:
    """Lengths of chunks for PASSES passes; some may be 0."""
    cuts = [0, *sorted(dice.choices(range(tokens + 1), k=PASSES - 1)), tokens]
    return tuple(end - begin for begin, end in itertools.pairwise(cuts))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_a_sequence_that_was_cut_back_gets_the_same_bits(dtype: str) -> None:
    """Whatever was held behind the position, be it not finite."""
    group = first_layers("mistral_sliding", dtype)
    text = tokens_of(1, 40)
    wanted = states_of(group, {"a": text}, {"a": (40,)})["a"]
    for position in (7, 16, 21, 32):
        handle = group.kv.reserve(60)
        forwarded(group, text[:position], [Segment(handle, 0, position)])
        assert group._embedding is not None
        weights, scales = group._embedding.weights, group._embedding.scales
        # In rows of bytes only the scale can be NaN.
        spoilt = weights if scales is None else scales
        kept = spoilt[text[0]].copy()
        spoilt[text[0]] = 0x7FC0 if spoilt.dtype == np.uint16 else np.nan
        forwarded(group, [text[0]] * 20, [Segment(handle, position, 20)])
        spoilt[text[0]] = kept
        group.kv.truncate(handle, position)
        rest = [forwarded(group, [text[at]], [Segment(handle, at, 1)]) for at in range(position, 40)]
        assert torch.equal(torch.cat(rest), wanted[position:])
        group.kv.release(handle)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_bits_are_the_same_with_more_threads_than_cores_and_in_a_forked_process(dtype: str) -> None:
    """Most of the many come late, and a process that was forked from one that has computed begins with one thread."""
    (group,) = native_groups("llama_biased", dtype, ((2, 5),))
    hidden = torch.randn(75, group.hidden_size, generator=torch.Generator().manual_seed(3))
    lengths = (1, 70, 1, 3)
    group.use_threads(3)
    wanted = new_sequences(group, hidden, lengths)
    group.use_threads(40)
    assert torch.equal(new_sequences(group, hidden, lengths), wanted)
    if not (child := os.fork()):
        same = torch.equal(new_sequences(group, hidden, lengths), wanted)
        del group
        gc.collect()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_a_row_that_is_not_finite_does_not_affect_others(dtype: str) -> None:
    (group,) = native_groups("llama_biased", dtype, ((2, 5),))
    lengths = (5, 1, 3, 1, 4, 2)
    hidden = torch.randn(sum(lengths), group.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    good = new_sequences(group, hidden, lengths).split(lengths)
    hidden[5, 3] = float("inf")
    hidden[8, 60] = float("nan")
    hidden[9] = 3e38  # whose square is infinite
    found = new_sequences(group, hidden, lengths).split(lengths)
    assert not found[1].isfinite().any()
    assert not found[2][2].isfinite().any()
    assert torch.equal(found[2][:2], good[2][:2]), "what came before it in the same chunk"
    for index in (0, 4, 5):
        assert torch.equal(found[index], good[index])
        assert found[index].isfinite().all()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rows_of_zeros_get_what_biases_make_of_them(dtype: str) -> None:
    (group,), (exact,) = native_groups("llama_biased", dtype, ((0, 6),)), exact_groups("llama_biased", dtype)
    assert group._embedding is not None
    group._embedding = replace(group._embedding, weights=np.zeros_like(group._embedding.weights))
    assert exact._embedding is not None
    exact._embedding = torch.zeros_like(exact._embedding)
    tokens = torch.arange(5)
    wanted = new_sequences(exact, tokens, (1, 4))
    assert wanted.abs().max() > 0.1
    assert error(new_sequences(group, tokens, (1, 4)).float(), wanted) < 0.02


def new_sequences(group: LayerGroup, inputs: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """One pass of them."""
    segments = [Segment(group.kv.reserve(length), 0, length) for length in lengths]
    result = forwarded(group, inputs, segments)
    for segment in segments:
        group.kv.release(segment.handle)
    return result


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_inputs_may_have_any_memory_order_and_are_not_changed(dtype: str) -> None:
    (group,) = native_groups("llama", dtype, ((2, 5),))
    hidden = states(group, torch.randn(6, group.hidden_size, generator=torch.Generator().manual_seed(2)))
    wanted = passed(group, hidden)
    before = hidden.copy()
    turned = hidden.T.copy().T
    assert not turned.flags.c_contiguous
    assert np.array_equal(passed(group, turned), wanted)
    read_only = np.frombuffer(hidden.tobytes(), hidden.dtype).reshape(hidden.shape)
    assert np.array_equal(passed(group, read_only), wanted)
    assert np.array_equal(hidden, before)


def passed(group: NativeGroup, hidden: Array) -> Array:
    handle = group.kv.reserve(len(hidden))
    result = group.forward(hidden, [Segment(handle, 0, len(hidden))])
    group.kv.release(handle)
    return result


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_matrices_are_kept_once_and_in_place(dtype: str) -> None:
    tensors = {name: tensor for name, tensor in checkpoint("llama_biased", dtype).items() if ".layers.3." in name}
    group = native_group(config("llama_biased"), 3, 4, dtype)
    given = raw(tensors)
    group.place(given)
    assert not given
    layers = group._layers
    for field, name in (
        ("out", "self_attn.o_proj"),
        ("gate", "mlp.gate_proj"),
        ("up", "mlp.up_proj"),
        ("down", "mlp.down_proj"),
    ):
        assert getattr(layers._layers[0], field).weights.data == tensors[f"model.layers.3.{name}.weight"].data_ptr()
    kept = [array for array in layers._kept if array is not group.kv.arena]
    matrices = [array for array in kept if array.ndim == 2 and array.shape[1] > 32]
    assert sum(array.size for array in matrices) == sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 2)
