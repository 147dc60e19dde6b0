"""The tiny chat model in C, without torch: the same bits whatever the cut, the chunks and the company."""

from collections.abc import Sequence

import numpy as np
import pytest

from functions.stage.models.build import build_layer_group
from functions.stage.models.layer_group import KVCacheFull, LayerGroup, Segment
from storage.loading.weight_loader import RawTensor
from tests.support.storage.published import CONFIG, CUT, VOCAB_SIZE, checkpoint_tensors

PROMPT = [1, *range(60, 81)]
WHOLE = ((0, 6),)


def groups(cut: Sequence[tuple[int, int]]) -> list[LayerGroup]:
    tensors = {name: RawTensor("F32", array.shape, memoryview(array).cast("B")) for name, array in checkpoint_tensors().items()}
    return [build_layer_group("native", CONFIG, dict(tensors), first, last, "float32", "cpu", 2**20) for first, last in cut]


def logits(chain: Sequence[LayerGroup], chunks: Sequence[Sequence[int]], others: int = 0) -> np.ndarray:
    """Of the prompt's last token. others: sequences in the same passes, with other tokens."""
    handles = [[group.kv.reserve(len(PROMPT)) for _ in range(1 + others)] for group in chain]
    position = 0
    for chunk in chunks:
        hidden = np.array([*chunk, *(token + 1 + other for other in range(others) for token in chunk)], np.int64)
        for group, own in zip(chain, handles, strict=True):
            hidden = group.forward(hidden, [Segment(handle, position, len(chunk)) for handle in own])
        position += len(chunk)
    return chain[-1].logits(hidden[len(chunks[-1]) - 1 : len(chunks[-1])])


def test_a_cut_gives_the_same_bits_in_float32() -> None:
    whole, cut = logits(groups(WHOLE), [PROMPT]), logits(groups(CUT), [PROMPT])
    assert whole.shape == (1, VOCAB_SIZE)
    assert np.array_equal(whole, cut)


@pytest.mark.parametrize("sizes", [[22], [1] * 22, [16, 6], [3, 7, 12]])
@pytest.mark.parametrize("others", [0, 3])
def test_chunks_and_company_change_no_bit(sizes: list[int], others: int) -> None:
    ends = np.cumsum(sizes).tolist()
    chunks = [PROMPT[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    assert np.array_equal(logits(groups(WHOLE), chunks, others), logits(groups(WHOLE), [PROMPT]))


def test_what_does_not_fit_is_refused_and_costs_nothing() -> None:
    (group,) = groups(WHOLE)
    free = group.kv.free_tokens
    with pytest.raises(KVCacheFull):
        group.kv.reserve(group.kv.capacity_tokens + 1)
    assert group.kv.free_tokens == free
