"""Reads GGUF files of the architectures in `gguf_architectures` as the Hugging Face checkpoints that they were made from.

Tensors are dequantized to float32 as they are read, a few rows at a time. Those in Q4_0 and Q4_1 can also be read in four bits
without loss. `gguf_config` makes config.json of the metadata, `gguf_tokenizer` the tokenizer's files. This is the only importer
of gguf.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import gguf
import msgspec
import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import Checkpoint, FourBits, SourceTensor
from storage.checkpoints.gguf_architectures import MODULES, Architecture
from storage.checkpoints.gguf_config import architecture_of, model_config
from storage.checkpoints.gguf_format import GgufHeader, GgufTensor, gguf_parts, read_header
from storage.checkpoints.gguf_tokenizer import tokenizer_files
from storage.checkpoints.safetensors_format import read_exactly
from storage.errors import ArchitectureUnsupported, CheckpointInvalid

_Type = gguf.GGMLQuantizationType
_FLOATS: Final = frozenset({_Type.F64, _Type.F32, _Type.F16, _Type.BF16})
_FOUR_BITS: Final = frozenset({_Type.Q4_0, _Type.Q4_1})
_Q_BYTES: Final = 16
_ROPE_TENSORS: Final = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_TENSOR_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<module>\w+)\.(?P<kind>weight|bias)")


def open_gguf(path: Path, tokenizer: Mapping[str, bytes] | None = None) -> Checkpoint:
    """Opens a GGUF file, or all parts of a split one, as a checkpoint; tensors are read only when they are used.

    tokenizer: files by name to use instead of those made of the file's own tokenizer.

    Raises CheckpointInvalid for anything but a whole GGUF file, ArchitectureUnsupported if the table has no such model.
    """
    parts = gguf_parts(path)
    path, headers = parts[0], [read_header(part) for part in parts]
    header = GgufHeader(headers[0].fields, [tensor for each in headers for tensor in each.tensors])
    if (count := header.fields.get("split.count", 1)) not in (0, len(parts)):
        raise CheckpointInvalid(f"{path} is one of {count} parts; name them -00001-of-{count:05d}.gguf and so on, as they were")
    config, architecture = model_config(path, header), architecture_of(path, header)
    sizes = {part: part.stat().st_size for part in parts}
    tensors: dict[str, SourceTensor] = {}
    for tensor in header.tensors:
        if tensor.name not in _ROPE_TENSORS:
            tensors |= _sources(tensor, architecture, config, sizes[tensor.path])
    config_file = msgspec.json.format(msgspec.json.encode(config), indent=2)
    files = tokenizer_files(path, header.fields) if tokenizer is None else tokenizer
    return Checkpoint(config, {**files, "config.json": config_file}, tensors)


def _sources(
    tensor: GgufTensor, architecture: Architecture, config: Mapping[str, Any], file_bytes: int
) -> dict[str, SourceTensor]:
    """The tensors by their Hugging Face names that a tensor of a GGUF file holds: one, or one for each expert."""
    path = tensor.path
    found = _TENSOR_NAME.fullmatch(tensor.name)
    module = {**MODULES, **architecture.modules}.get(found["module"]) if found else None
    if not found or module is None:
        raise ArchitectureUnsupported(
            f"{path} has a tensor {tensor.name!r} that no {architecture.model_type!r} has; publish it from safetensors"
        )
    prefix = f"model.layers.{found['layer']}." if found["layer"] else ""
    name = f"{prefix}{module}.{found['kind']}"
    shape = tensor.shape[1:] if "{}" in name else tensor.shape
    if len(shape) + ("{}" in name) != len(tensor.shape) or not shape:
        raise CheckpointInvalid(f"{path} has {tensor.name!r} as {list(tensor.shape)}; make it again")
    rows, columns = shape[0], math.prod(shape[1:])
    dequantize, row_bytes = _quantization(path, tensor, columns)
    end = tensor.start + tensor.shape[0] * math.prod(tensor.shape[1:]) // columns * row_bytes
    if end > file_bytes:
        raise CheckpointInvalid(
            f"{path} is no GGUF file, or only its beginning (tensor {tensor.name!r} ends at byte {end} of {file_bytes}); "
            "fetch it again"
        )
    order = _row_order(path, tensor, rows, config, architecture)
    shift = -1 if architecture.norm_plus_one and name.endswith("norm.weight") else 0
    count = tensor.shape[0] if "{}" in name else 1
    return {
        name.format(number): _source(
            tensor,
            shape,
            dequantize,
            partial(_read_rows, path, tensor.start + number * rows * row_bytes, row_bytes, order),
            shift,
        )
        for number in range(count)
    }


def _source(
    tensor: GgufTensor,
    shape: tuple[int, ...],
    dequantize: Callable[[NDArray[np.uint8]], Any],
    read: Callable[[int, int], NDArray[np.uint8]],
    shift: int,
) -> SourceTensor:
    def floats(first: int, last: int) -> memoryview:
        values = np.ascontiguousarray(dequantize(read(first, last)), np.float32)
        return (values + np.float32(shift) if shift else values).reshape(-1).view(np.uint8).data

    return SourceTensor(
        "F32",
        shape,
        floats,
        tensor.kind not in _FLOATS,
        (lambda first, last: _four_bits(tensor.kind, read(first, last))) if tensor.kind in _FOUR_BITS else None,
        _Type(tensor.kind).name,
    )


def _quantization(path: Path, tensor: GgufTensor, columns: int) -> tuple[Callable[[NDArray[np.uint8]], Any], int]:
    """Returns (function from bytes [rows, bytes of a row] to dequantized floats [rows, columns], bytes of a row in the file).

    One block is tried at once, so that an unknown quantization fails before anything is published. Raises CheckpointInvalid.
    """
    try:
        kind = _Type(tensor.kind)
        block_items, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        dequantize: Callable[[NDArray[np.uint8]], Any] = partial(gguf.quants.dequantize, qtype=kind)
        dequantize(np.zeros((1, block_bytes), np.uint8))
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointInvalid(
            f"{path} has {tensor.name!r} quantized as {tensor.kind}, which cannot be read ({error}); use another quantization"
        ) from error
    if columns % block_items:
        raise CheckpointInvalid(f"{path} has {tensor.name!r} as {list(tensor.shape)} in blocks of {block_items}; make it again")
    return dequantize, columns // block_items * block_bytes


def _four_bits(kind: int, rows: NDArray[np.uint8]) -> FourBits:
    """Splits rows of a tensor in Q4_0 or Q4_1, bytes [rows, row_bytes], into 4-bit integers, scales and minima.

    kind: the GGML type, Q4_0 or Q4_1.

    A block is 32 weights of a row (ggml-common.h): float16 `d`, in Q4_1 also float16 `m`, and 16 bytes. Their lower halves are
    q of the first 16 weights, their upper halves q of the others. Q4_1 is d * q + m, Q4_0 is d * (q - 8).
    """
    ends_bytes = 4 if kind == _Type.Q4_1 else 2
    blocks = rows.reshape(len(rows), -1, ends_bytes + _Q_BYTES)
    q = blocks[..., ends_bytes:]
    ends = np.ascontiguousarray(blocks[..., :ends_bytes]).view("<f2")
    scales = ends[..., 0]
    with np.errstate(over="ignore"):  # the publisher refuses infinite values
        minima = ends[..., 1] if kind == _Type.Q4_1 else scales * np.float16(-8)
    return FourBits(np.concatenate([q & 15, q >> 4], axis=-1).reshape(len(rows), -1), scales, minima)


def _row_order(
    path: Path, tensor: GgufTensor, rows: int, config: Mapping[str, Any], architecture: Architecture
) -> Callable[[int, int], NDArray[np.intp]]:
    """Returns a function that maps rows [first, last) of a tensor in Hugging Face's order to their row numbers in the file.

    They differ for queries and keys of some architectures, where llama.cpp interleaves the two halves of each head.
    rows: number of rows of the whole tensor. Raises CheckpointInvalid if they cannot be divided among the heads.
    """
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(tensor.name.split(".")[-2])
    if not architecture.permuted or heads is None:
        return np.arange
    size, odd = divmod(rows, config[heads])
    if odd or size % 2:
        raise CheckpointInvalid(f"{path} has {tensor.name!r} with {rows} rows for {config[heads]} heads; make it again")
    return partial(_interleaved, size)


def _interleaved(head_rows: int, first: int, last: int) -> NDArray[np.intp]:
    places: NDArray[np.intp]
    head, row = np.divmod(np.arange(first, last), head_rows)
    half, pair = np.divmod(row, head_rows // 2)
    places = head * head_rows + 2 * pair + half
    return places


def _read_rows(
    path: Path,
    start: int,
    row_bytes: int,
    order: Callable[[int, int], NDArray[np.intp]],
    first: int,
    last: int,
) -> NDArray[np.uint8]:
    """Reads rows [first, last) of a tensor from a GGUF file, still quantized, as bytes [last - first, row_bytes].

    start: offset of the tensor in the file, in bytes. order: maps rows [first, last), numbered as Hugging Face does, to the
    numbers of these rows in the file, which may have them in another order. Raises OSError and CheckpointInvalid.
    """
    places = order(first, last)
    lowest, count = int(places.min()), int(places.max() - places.min()) + 1
    data = np.empty((count, row_bytes), np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        read_exactly(descriptor, start + lowest * row_bytes, data.reshape(-1).data)
    finally:
        os.close(descriptor)
    return data[places - lowest]
