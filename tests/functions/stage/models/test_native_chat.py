"""The tiny chat model in C, without torch: the same bits whatever the cut, the chunks and the company, in every dtype."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest

from functions.stage.models.build import build_layer_group
from functions.stage.models.kv_cache import KVCacheFull
from functions.stage.models.layer_group import LayerGroup, Segment
from storage.checkpoints.checkpoint import SourceTensor
from storage.loading.weight_loader import RawTensor
from storage.models.conversion import convert_tensor
from storage.models.model_repository import Dtype
from tests.support.storage.published import CONFIG, VOCAB_SIZE, checkpoint_tensors

PROMPT = [1, *range(60, 81)]
LAYERS = 30
WHOLE = ((0, LAYERS),)


def groups(cut: Sequence[tuple[int, int]], dtype: Dtype = "float32") -> list[LayerGroup]:
    """The tiny chat model in a dtype, with its six layers five times over."""
    config = {**CONFIG, "num_hidden_layers": LAYERS}
    tensors: dict[str, RawTensor] = {}
    for name, array in checkpoint_tensors().items():
        source = SourceTensor("F32", array.shape, lambda first, last, array=array: memoryview(array[first:last]).cast("B"))
        for stored, target in convert_tensor(name, source, dtype).items():
            tensor = RawTensor(target.dtype, target.shape, memoryview(bytearray(b"".join(target.blocks()))))
            found = re.match(r"model\.layers\.(\d+)\.", stored)
            copies = range(int(found[1]), LAYERS, CONFIG["num_hidden_layers"]) if found else ()
            names = [stored.replace(f".{found[1]}.", f".{layer}.", 1) for layer in copies] if found else [stored]
            tensors |= dict.fromkeys(names, tensor)
    return [build_layer_group("native", config, dict(tensors), first, last, dtype, "cpu", 2**22) for first, last in cut]


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


NATIVE_DTYPES = sorted(set(get_args(Dtype)) - {"float16"})


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_every_cut_gives_the_same_bits(dtype: Dtype) -> None:
    whole = logits(groups(WHOLE, dtype), [PROMPT[:-1], PROMPT[-1:]])
    assert whole.shape == (1, VOCAB_SIZE)
    for parts in (2, 3, 5, LAYERS):
        cut = list(pairwise(LAYERS * part // parts for part in range(parts + 1)))
        assert np.array_equal(logits(groups(cut, dtype), [PROMPT[:-1], PROMPT[-1:]]), whole), parts


@pytest.mark.sampled
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
