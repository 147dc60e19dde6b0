"""Cuts tensors that contain all experts of a layer into the matrices of each expert, as published models have them.

The table of families says which checkpoints have such tensors.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import Blocks, SourceTensor
from storage.checkpoints.decoder_families import DECODER_FAMILIES
from storage.checkpoints.safetensors_format import ITEM_BYTES
from storage.errors import CheckpointInvalid
from storage.floats import as_bytes

_EXPERTS_AT_ONCE: Final = 4  # that are kept in memory while their rows are read


def split_experts(model_type: str, tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """Replaces each tensor that contains all experts of a layer by the matrices of each expert.

    Raises CheckpointInvalid for tensors that cannot be cut this way.
    """
    if not (merged := dict(merged_experts(model_type))):
        return tensors
    found: dict[str, SourceTensor] = {}
    whole_experts = _WholeExperts(tensors)
    for name, tensor in tensors.items():
        suffix = next((each for each in merged if name.endswith(f".{each}")), None)
        if suffix is None:
            found[name] = tensor
            continue
        parts, kind, transposed = merged[suffix]
        outs = tensor.shape[-1] if transposed else tensor.shape[min(1, len(tensor.shape) - 1)]
        if len(tensor.shape) != (3 if kind == "weight" else 2) or outs % len(parts):
            raise CheckpointInvalid(f"the checkpoint has {name!r} as {list(tensor.shape)}, which are no matrices of experts")
        width = () if kind == "bias" else (tensor.shape[1] if transposed else tensor.shape[2],)
        for expert in range(tensor.shape[0]):
            for number, part in enumerate(parts):
                place = name, expert, number, len(parts), transposed
                in_blocks = kind == "weight" and tensor.read_blocks is not None
                found[f"{name.removesuffix(suffix)}{part.format(expert=expert)}.{kind}"] = SourceTensor(
                    tensor.dtype,
                    (outs // len(parts), *width),
                    partial(whole_experts.rows, *place),
                    tensor.quantized,
                    stored_as=tensor.stored_as,
                    read_blocks=partial(whole_experts.blocks, *place) if in_blocks else None,
                )
    return found


class _WholeExperts:
    """Reads merged tensors by whole experts: a row of such a tensor is an expert. Thread-safe."""

    def __init__(self, tensors: Mapping[str, SourceTensor]) -> None:
        self._tensors = tensors
        self._read = lru_cache(_EXPERTS_AT_ONCE)(self._expert)
        self._read_blocks = lru_cache(_EXPERTS_AT_ONCE)(self._expert_in_blocks)

    def rows(self, name: str, expert: int, part: int, parts: int, transposed: bool, first: int, last: int) -> memoryview:
        """Reads rows [first, last) of a matrix, or numbers of a bias, of one expert in the merged tensor `name`.

        part, parts: number of the matrix among those that are merged, and how many they are.
        """
        whole = self._read(name, expert)
        if transposed:
            own = whole.T[part::parts]
        else:
            size = len(whole) // parts
            own = whole[part * size : (part + 1) * size]
        return as_bytes(np.ascontiguousarray(own[first:last]).copy())

    def blocks(self, name: str, expert: int, part: int, parts: int, transposed: bool, first: int, last: int) -> Blocks:
        """As `rows`, for a matrix in blocks. Its rows are outputs, even if the floats are transposed."""
        whole = self._read_blocks(name, expert)
        size = len(whole.codes) // parts
        rows = slice(part, None, parts) if transposed else slice(part * size, (part + 1) * size)
        return Blocks(whole.codes[rows][first:last], whole.scales[rows][first:last])

    def _expert_in_blocks(self, name: str, expert: int) -> Blocks:
        read = self._tensors[name].read_blocks
        blocks = read(expert, expert + 1) if read else None
        assert isinstance(blocks, Blocks)
        return blocks

    def _expert(self, name: str, expert: int) -> NDArray[Any]:
        tensor = self._tensors[name]
        data = tensor.read_rows(expert, expert + 1)
        return np.frombuffer(data, f"u{ITEM_BYTES[tensor.dtype]}").reshape(tensor.shape[1:])


def merged_experts(model_type: str) -> Iterator[tuple[str, tuple[tuple[str, ...], str, bool]]]:
    """Yields the name of each merged tensor, and what it contains.

    That is: the names of an expert's matrices, their kind (`weight` or `bias`), and whether they are transposed.
    """
    family = DECODER_FAMILIES.get(model_type)
    if family is None or family.merged_experts is None:
        return
    merged, (gate, up, down) = family.merged_experts, family.names.experts
    for name, parts in ((merged.gate_up, (gate, up)), (merged.down, (down,))):
        yield name, (parts, "weight", merged.transposed)
        if merged.transposed:
            yield f"{name}_bias", (parts, "bias", True)
