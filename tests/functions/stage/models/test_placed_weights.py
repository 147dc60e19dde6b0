"""What a native group keeps of the memory that weights were read into."""

import mmap

import pytest
import torch

from functions.stage.models.native.group import NativeGroup
from storage.loading.memory import address_of, freed_with_last_view, new_memory, resident_bytes
from storage.loading.weight_loader import RawTensor
from tests.support.functions.borders import raw
from tests.support.functions.int8_checkpoints import int8_checkpoint
from tests.support.functions.q4_checkpoints import q4_checkpoint
from tests.support.storage import tiny_models

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
CHECKPOINTS = {"float32": dict, "int8": int8_checkpoint, "q4": q4_checkpoint}


@pytest.mark.parametrize("dtype", CHECKPOINTS)
def test_queries_and_keys_are_held_once(dtype: str) -> None:
    """C has them in one matrix, which is a copy, and the others where they were read."""
    plain: dict[str, torch.Tensor] = tiny_models.checkpoint_tensors(tiny_models.whole_model("llama", **SIZES))
    prefix = "model.layers.1."
    read = {name: each for name, each in raw(CHECKPOINTS[dtype](plain)).items() if name.startswith(prefix)}
    whole = new_memory(sum(pages(each) for each in read.values()))
    tensors, places, end = dict[str, RawTensor](), dict[str, tuple[int, int]](), 0
    for name, each in read.items():
        memory = freed_with_last_view(whole[end : end + len(each.data)])
        memory[:] = each.data.cast("B")
        tensors[name] = RawTensor(each.dtype, each.shape, memory)
        places[name.removeprefix(prefix).removesuffix(".weight")] = (address_of(whole) + end, len(memory))
        end += pages(each)
    del memory
    group = NativeGroup(tiny_models.tiny_config("llama", **SIZES), 1, 2, dtype, 2**22)
    group.place(tensors)
    matrices = {name: place for name, place in places.items() if place[1] > mmap.PAGESIZE}
    copied = {f"self_attn.{name}_proj" for name in ("q", "k", "v")}
    assert copied < matrices.keys()
    for name, (address, size) in matrices.items():
        in_whole_pages = size - size % mmap.PAGESIZE
        assert resident_bytes(address, in_whole_pages) == (0 if name in copied else in_whole_pages), name


def pages(tensor: RawTensor) -> int:
    """Bytes of the whole pages that the tensor takes."""
    return -(-len(tensor.data) // mmap.PAGESIZE) * mmap.PAGESIZE
