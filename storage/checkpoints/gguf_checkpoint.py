"""Reads GGUF files of the architectures in `gguf_architectures` as the Hugging Face checkpoints that they were made from.

Tensors are dequantized to float32 as they are read, a few rows at a time. Those in Q4_0 and Q4_1 can also be read in four bits
without loss. `gguf_config` makes config.json from the metadata, `gguf_tokenizer` the tokenizer's files. This is the only
importer of gguf.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import gguf
import msgspec
import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import Checkpoint, FourBits, SourceTensor
from storage.checkpoints.gguf_architectures import MODULES, Architecture, Merge, Stack
from storage.checkpoints.gguf_config import architecture_of, model_config
from storage.checkpoints.gguf_format import GgufHeader, GgufTensor, gguf_parts, read_header
from storage.checkpoints.gguf_tokenizer import tokenizer_files
from storage.checkpoints.safetensors_format import read_exactly
from storage.errors import ArchitectureUnsupported, CheckpointInvalid
from storage.floats import as_bytes

_Type = gguf.GGMLQuantizationType
_FLOATS: Final = frozenset({_Type.F64, _Type.F32, _Type.F16, _Type.BF16})
_FOUR_BITS: Final = frozenset({_Type.Q4_0, _Type.Q4_1})
_Q_BYTES: Final = 16
_ROPE_TENSORS: Final = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_TENSOR_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<module>\w+(?:\.\w+)*?)(?:\.(?P<kind>weight|bias))?")


def open_gguf(path: Path, tokenizer: Mapping[str, bytes] | None = None) -> Checkpoint:
    """Opens a GGUF file, or all parts of a split one, as a checkpoint. Tensors are read only when they are used.

    tokenizer: tokenizer files by name. If it is None, they are made from the file's own tokenizer.

    Raises CheckpointInvalid for anything but a whole GGUF file, ArchitectureUnsupported if the table has no such model.
    """
    parts = gguf_parts(path)
    path, headers = parts[0], [read_header(part) for part in parts]
    header = GgufHeader(headers[0].fields, [tensor for each in headers for tensor in each.tensors])
    if (count := header.fields.get("split.count", 1)) not in (0, len(parts)):
        raise CheckpointInvalid(f"{path} is one of {count} parts; name them -00001-of-{count:05d}.gguf and so on, as they were")
    config, architecture = model_config(path, header), architecture_of(path, header)
    sizes = {part: part.stat().st_size for part in parts}
    stored = {tensor.name: tensor for tensor in header.tensors if tensor.name not in _ROPE_TENSORS}
    layers = range(config["num_hidden_layers"])
    further = header.fields.get(f"{header.fields['general.architecture']}.nextn_predict_layers", 0)
    for name in [*stored]:
        if name.startswith(tuple(f"blk.{layers.stop + number}." for number in range(further))):
            del stored[name]
    tensors: dict[str, SourceTensor] = {}
    for layer in layers:
        prefix = f"{architecture.layers}.{layer}."
        for name, merge in architecture.merges.items():
            whole = [stored.pop(f"blk.{layer}.{part}") for part in merge.parts if f"blk.{layer}.{part}" in stored]
            if len(whole) == len(merge.parts):
                found = [_whole(tensor, architecture, config, sizes[tensor.path]) for tensor in whole]
                if isinstance(merge, Stack):
                    tensors[prefix + name] = _stacked(found, merge.order(config) if merge.order else None)
                else:
                    tensors[prefix + name] = _merged(merge, found)
            elif whole:
                raise CheckpointInvalid(f"{path} has {whole[0].name!r}, but not all of {merge.parts}; make it again")
        for key, (name, shape) in architecture.numbers.items():
            tensors[prefix + name] = _number(path, key, header.fields.get(key), layer, shape)
    for tensor in stored.values():
        tensors |= _sources(tensor, architecture, config, sizes[tensor.path])
    config_file = msgspec.json.format(msgspec.json.encode(config), indent=2)
    files = tokenizer_files(path, header.fields) if tokenizer is None else tokenizer
    left_out = [f"{further} layers that predict further tokens"] if further else []
    if architecture.unsaid and not config.get("sliding_window"):
        left_out.append(architecture.unsaid)
    return Checkpoint(config, {**files, "config.json": config_file}, tensors, left_out=tuple(left_out))


def _sources(
    tensor: GgufTensor, architecture: Architecture, config: Mapping[str, Any], file_bytes: int
) -> dict[str, SourceTensor]:
    """The Hugging Face tensors that one tensor of a GGUF file contains, by name.

    There are several if the file stacks their rows, as it does with experts.
    """
    names = {**MODULES, **architecture.modules}
    found = _TENSOR_NAME.fullmatch(tensor.name)
    module, kind = (found["module"], found["kind"] or "weight") if found else ("", "")
    prefix = f"{architecture.layers}.{found['layer']}." if found and found["layer"] else ""
    name = names.get(f"{module}.{kind}", f"{names[module]}.{kind}" if module in names else None)
    if name is None and module == "attn_qkv":
        sizes = [config["head_dim"] * config[heads] for heads in ("num_attention_heads", *["num_key_value_heads"] * 2)]
        sources, first = {}, 0
        for part, rows in zip(("attn_q", "attn_k", "attn_v"), sizes, strict=True):
            order = _row_order(tensor, part, rows, config, architecture)
            sources[f"{prefix}{MODULES[part]}.{kind}"] = _source(tensor, file_bytes, rows, first, order)
            first += rows
        if first != tensor.shape[0]:
            raise CheckpointInvalid(
                f"{tensor.path} has {tensor.name!r} with {tensor.shape[0]} rows, not {first}; make it again"
            )
        return sources
    if name is None:
        raise ArchitectureUnsupported(
            f"{tensor.path} has a tensor {tensor.name!r} that no {architecture.model_type!r} has; publish it from safetensors"
        )
    if "{}" in name:
        if len(tensor.shape) != (2 if kind == "bias" else 3):
            raise CheckpointInvalid(f"{tensor.path} has {tensor.name!r} as {list(tensor.shape)}; make it again")
        experts, rows, *columns = tensor.shape
        tensor, parts = replace(tensor, shape=(experts * rows, *columns)), name.split("|")
        rows //= len(parts)
        return {
            prefix + part.format(number): _source(tensor, file_bytes, rows, (number * len(parts) + place) * rows)
            for number in range(experts)
            for place, part in enumerate(parts)
        }
    return {prefix + name: _whole(tensor, architecture, config, file_bytes)}


def _whole(tensor: GgufTensor, architecture: Architecture, config: Mapping[str, Any], file_bytes: int) -> SourceTensor:
    """Translates a tensor of a GGUF file to one tensor of Hugging Face.

    Rows and columns get Hugging Face's order, and weights of norms get their value there.
    """
    in_layer = tensor.name.split(".", 2)[2] if tensor.name.startswith("blk.") else tensor.name
    module = in_layer.removesuffix(".weight").removesuffix(".bias")
    columns = None
    if in_layer in architecture.rows:
        order = _listed(architecture.rows[in_layer](config), tensor, tensor.shape[0])
    else:
        order = _row_order(tensor, module, tensor.shape[0], config, architecture)
    if in_layer in architecture.columns:
        columns = _listed(architecture.columns[in_layer](config), tensor, tensor.shape[-1])(0, tensor.shape[-1])
    is_shifted = architecture.norm_plus_one and module.endswith("norm") and module != "ssm_norm"
    shift = -1 if is_shifted and not tensor.name.endswith(".bias") else 0
    return _source(tensor, file_bytes, tensor.shape[0], 0, order, shift, columns)


def _listed(places: NDArray[np.intp], tensor: GgufTensor, count: int) -> Callable[[int, int], NDArray[np.intp]]:
    """Returns a function that maps rows (or columns) [first, last) to their numbers in the file, which `places` lists.

    Raises CheckpointInvalid if `places` does not have `count` entries.
    """
    if len(places) != count:
        raise CheckpointInvalid(f"{tensor.path} has {tensor.name!r} as {list(tensor.shape)}, not {len(places)}; make it again")
    return lambda first, last: places[first:last]


def _source(
    tensor: GgufTensor,
    file_bytes: int,
    rows: int | None = None,
    first_row: int = 0,
    order: Callable[[int, int], NDArray[np.intp]] = np.arange,
    shift: int = 0,
    columns: NDArray[np.intp] | None = None,
) -> SourceTensor:
    """Makes a SourceTensor of floats from a tensor of a GGUF file, or from `rows` of its rows from `first_row` on.

    file_bytes: size of the file. order: maps row numbers of the result to those in the file, counted from first_row. shift:
    number that is added to all values. columns: for each column of the result, its number in the file; None if they are equal.
    Raises CheckpointInvalid if the file does not have the whole tensor, or has it in an unknown format.
    """
    dequantize, row_bytes = _quantization(tensor, math.prod(tensor.shape[1:]))
    end = tensor.start + tensor.shape[0] * row_bytes
    if end > file_bytes:
        raise CheckpointInvalid(
            f"{tensor.path} is no GGUF file, or only its beginning (tensor {tensor.name!r} ends at byte {end} of "
            f"{file_bytes}); fetch it again"
        )
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    in_order = columns is None
    read = partial(_read_rows, tensor.path, tensor.start + first_row * row_bytes, row_bytes, order)

    def floats(first: int, last: int) -> memoryview:
        values = np.ascontiguousarray(dequantize(read(first, last)), np.float32)
        if columns is not None:
            values = values[:, columns]
        return as_bytes(values + np.float32(shift) if shift else values)

    return SourceTensor(
        "F32",
        shape,
        floats,
        tensor.kind not in _FLOATS,
        (lambda first, last: _four_bits(tensor.kind, read(first, last))) if tensor.kind in _FOUR_BITS and in_order else None,
        _Type(tensor.kind).name,
        None if tensor.kind in _FLOATS or shift or not in_order else read,
    )


def _merged(merge: Merge, parts: list[SourceTensor]) -> SourceTensor:
    """The tensor that `merge` makes from `parts`. Any read loads the whole tensor into memory."""

    def rows(first: int, last: int) -> memoryview:
        whole = (np.frombuffer(part.read_rows(0, part.rows), np.float32).reshape(part.shape) for part in parts)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = merge.join(*whole)[first:last]
        if not np.isfinite(found).all():
            raise CheckpointInvalid(f"tensors {merge.parts} have values that mean nothing; make the GGUF file again")
        return as_bytes(found)

    shapes = [part.shape for part in parts]
    try:
        shape = merge.join(*(np.broadcast_to(np.float32(-1), each) for each in shapes)).shape
    except (ValueError, IndexError) as error:
        raise CheckpointInvalid(
            f"tensors {merge.parts} as {shapes} do not fit together ({error}); make the GGUF file again"
        ) from error
    return SourceTensor("F32", shape, rows, any(part.quantized for part in parts), None, parts[0].stored_as)


def _stacked(parts: list[SourceTensor], order: NDArray[np.intp] | None) -> SourceTensor:
    """A tensor with the rows of all parts, one part after another.

    order: the numbers of these rows in the order of the result; None if it is the same. If all parts have one format, the
    result can be read in this format, too.
    """
    ends = np.cumsum([part.rows for part in parts])
    shape, total = parts[0].shape[1:], int(ends[-1])
    places = np.arange(total) if order is None else order
    if len(places) != total or any(part.shape[1:] != shape for part in parts):
        raise CheckpointInvalid(
            f"tensors as {[part.shape for part in parts]} do not make one of {len(places)} rows; make the GGUF file again"
        )

    def gathered(read: Callable[[SourceTensor, int, int], NDArray[Any]], first: int, last: int) -> NDArray[Any]:
        wanted, found = places[first:last], []
        owners = np.searchsorted(ends, wanted, side="right")
        for number in np.unique(owners):
            rows = wanted[owners == number] - (ends[number] - parts[number].rows)
            low = int(rows.min())
            found.append(read(parts[number], low, int(rows.max()) + 1)[rows - low])
        back = np.empty(len(wanted), np.intp)
        back[np.argsort(owners, kind="stable")] = np.arange(len(wanted))
        return np.concatenate(found)[back]

    def floats(part: SourceTensor, first: int, last: int) -> NDArray[np.float32]:
        return np.frombuffer(part.read_rows(first, last), np.float32).reshape(last - first, -1)

    def blocks(part: SourceTensor, first: int, last: int) -> NDArray[np.uint8]:
        rows = part.read_blocks(first, last) if part.read_blocks else None
        assert isinstance(rows, np.ndarray)
        return rows

    one_format = len({part.stored_as for part in parts}) == 1 and all(part.read_blocks for part in parts)
    return SourceTensor(
        "F32",
        (total, *shape),
        lambda first, last: as_bytes(gathered(floats, first, last)),
        any(part.quantized for part in parts),
        None,
        parts[0].stored_as,
        partial(gathered, blocks) if one_format else None,
    )


def _number(path: Path, key: str, numbers: object, layer: int, shape: tuple[int, ...]) -> SourceTensor:
    """A tensor with one number: the entry of a layer in a list of the metadata. Raises CheckpointInvalid if there is none."""
    if not isinstance(numbers, list) or layer >= len(numbers) or not isinstance(numbers[layer], float):
        raise CheckpointInvalid(f"{path} has no {key} for layer {layer}; make the GGUF file again")
    number = np.float32(numbers[layer])
    return SourceTensor("F32", shape, lambda first, last: np.full(1, number).view(np.uint8).data)


def _quantization(tensor: GgufTensor, columns: int) -> tuple[Callable[[NDArray[np.uint8]], Any], int]:
    """Returns (function from bytes [rows, bytes of a row] to dequantized floats [rows, columns], bytes of a row in the file).

    One block is dequantized as a trial, so that an unknown quantization fails before anything is published. Raises
    CheckpointInvalid.
    """
    try:
        kind = _Type(tensor.kind)
        block_items, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        dequantize: Callable[[NDArray[np.uint8]], Any] = partial(gguf.quants.dequantize, qtype=kind)
        dequantize(np.zeros((1, block_bytes), np.uint8))
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointInvalid(
            f"{tensor.path} has {tensor.name!r} quantized as {tensor.kind}, which cannot be read ({error}); "
            "use another quantization"
        ) from error
    if columns % block_items:
        raise CheckpointInvalid(
            f"{tensor.path} has {tensor.name!r} as {list(tensor.shape)} in blocks of {block_items}; make it again"
        )
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
    tensor: GgufTensor, module: str, rows: int, config: Mapping[str, Any], architecture: Architecture
) -> Callable[[int, int], NDArray[np.intp]]:
    """Returns a function that maps rows [first, last) of a tensor in Hugging Face's order to their row numbers in the file.

    The numbers differ in some architectures: for queries and keys, if llama.cpp interleaves the two halves of each head, and
    for attn_qkv. module: name of the module that the rows belong to. rows: how many there are. Raises CheckpointInvalid if they
    cannot be divided among the heads.
    """
    heads, kv_heads = (config.get(name, 0) for name in ("num_attention_heads", "num_key_value_heads"))
    if module in ("attn_q", "attn_k") and architecture.permuted:
        count, divisor = (heads if module == "attn_q" else kv_heads), 2
        order: Callable[[int, int, int], NDArray[np.intp]] = _interleaved
    elif module == "attn_qkv" and architecture.grouped_qkv:
        count, divisor, order = heads + 2 * kv_heads, 1, partial(_by_kv_head, heads, kv_heads)
    else:
        return np.arange
    size, odd = divmod(rows, count)
    if odd or size % divisor or heads % kv_heads:
        raise CheckpointInvalid(f"{tensor.path} has {tensor.name!r} with {rows} rows for {count} heads; make it again")
    return partial(order, size)


def _interleaved(head_rows: int, first: int, last: int) -> NDArray[np.intp]:
    places: NDArray[np.intp]
    head, row = np.divmod(np.arange(first, last), head_rows)
    half, pair = np.divmod(row, head_rows // 2)
    places = head * head_rows + 2 * pair + half
    return places


def _by_kv_head(heads: int, kv_heads: int, head_rows: int, first: int, last: int) -> NDArray[np.intp]:
    """Maps rows [first, last) of attn_qkv to their row numbers in the file.

    Hugging Face has queries, key and value of each KV head together. The file has all queries, then all keys, then all values.
    """
    head, row = np.divmod(np.arange(first, last), head_rows)
    group, member = np.divmod(head, heads // kv_heads + 2)
    queries = heads // kv_heads
    places: NDArray[np.intp] = np.where(
        member < queries, group * queries + member, heads + (member - queries) * kv_heads + group
    )
    return places * head_rows + row


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
