"""Reads quantized Hugging Face checkpoints: replaces the packed parts of each matrix by the matrix as floats.

`_METHODS` maps the `quant_method` of a config.json to its reader. The packing rules are those of the libraries that write these
checkpoints, cited by file, line and commit. No library is needed to read them. Scales of activations are ignored, because
Lamina does not quantize activations to 8 bits or fewer as these libraries do.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from storage.checkpoints.checkpoint import Blocks, SourceTensor
from storage.checkpoints.packed_matrix import (
    E2M1,
    Array,
    PackedMatrix,
    float_source,
    powers_of_two,
    read_array,
    unpack,
    values_of_halves,
)
from storage.checkpoints.safetensors_format import ITEM_BYTES
from storage.errors import CheckpointInvalid

Settings = Mapping[str, Any]  # a quantization_config


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tensors that store one matrix. A suffix is the name of such a tensor without `prefix`."""

    prefix: str
    tensors: Mapping[str, SourceTensor]
    whole: Callable[[str], Array]  # a whole tensor by its full name; the last few are kept in memory
    metadata: Mapping[str, str]  # of the safetensors files

    def get(self, suffix: str) -> SourceTensor | None:
        return self.tensors.get(self.prefix + suffix)

    def __getitem__(self, suffix: str) -> SourceTensor:
        if (tensor := self.get(suffix)) is None:
            raise self.invalid(f"lacks {self.prefix + suffix!r}. Is a shard missing?")
        return tensor

    def matrix(self, suffix: str, *dtypes: str) -> SourceTensor:
        """The tensor with this suffix. Raises CheckpointInvalid unless it has two dimensions and one of these types."""
        tensor = self[suffix]
        if len(tensor.shape) != 2 or tensor.dtype not in dtypes:
            raise self.invalid(
                f"has {self.prefix + suffix!r} as {tensor.dtype} {list(tensor.shape)}; known are matrices of "
                f"{' or '.join(dtypes)}."
            )
        return tensor

    def vector(self, suffix: str, length: int, *dtypes: str) -> SourceTensor:
        """The tensor with this suffix. Raises CheckpointInvalid unless its shape is [length] and its type one of these."""
        tensor = self[suffix]
        if tensor.shape != (length,) or tensor.dtype not in dtypes:
            raise self.invalid(
                f"has {self.prefix + suffix!r} as {tensor.dtype} {list(tensor.shape)}, which should be {' or '.join(dtypes)} "
                f"[{length}]."
            )
        return tensor

    def group_of(self, suffix: str, inputs: int, groups: int) -> Array:
        """The group of each input, from the tensor with this suffix.

        If there is no such tensor, each group has the same number of successive inputs.
        """
        if self.get(suffix) is None:
            return np.arange(inputs) // (inputs // groups)
        group_of = read_array(self.vector(suffix, inputs, "I32", "I64")).astype(np.intp)
        if group_of.min(initial=0) < 0 or group_of.max(initial=0) >= groups:
            raise self.invalid(f"has groups up to {group_of.max()} in {self.prefix + suffix!r}, and {groups} scales.")
        return group_of

    def array(self, suffix: str) -> Array:
        return read_array(self[suffix])

    def columns(self, suffix: str, first: int, last: int) -> Array:
        """Columns [first, last) of a matrix that is kept in memory as a whole.

        Libraries that pack along the rows store a matrix transposed, so its rows are columns here.
        """
        return self.whole(self.prefix + suffix)[:, first:last]

    def invalid(self, what: str) -> CheckpointInvalid:
        return CheckpointInvalid(f"the checkpoint {what} Publish the unquantized checkpoint instead, if there is one")


@dataclass(frozen=True, slots=True)
class _Method:
    """Says how a quantization method stores a matrix. Each such matrix has a tensor whose name ends with one of `markers`."""

    read: Callable[[_Parts, Settings], SourceTensor]
    markers: tuple[str, ...]
    parts: tuple[str, ...]  # ends of the names of the tensors that the matrix replaces
    target: str = ".weight"  # end of the matrix's name


def _block_scaled(
    parts: _Parts,
    weight: SourceTensor,
    grid: Array,
    block: object = None,
    zeros: Array | None = None,
    kind: str = "INT8",
    offset: int = 128,
) -> SourceTensor:
    """Reads a matrix with one scale per block; `grid` contains the scales.

    A block is the whole matrix, a row, a group of columns of a row, or a tile. weight: float8, or int8. block: [rows, columns]
    of a block, if the checkpoint says so; blocks at the edges of the matrix may be smaller. kind, offset: for integers,
    `stored_as` and `offset` of PackedMatrix.
    """
    shape = weight.shape[0], weight.shape[1]
    grid = grid.reshape(len(grid), -1)
    sizes = []
    for length, count, wanted in zip(shape, grid.shape, block if isinstance(block, list) else (None, None), strict=True):
        size = wanted if wanted and -(-length // wanted) == count else length // max(1, count)
        if not size or -(-length // size) != count:
            raise parts.invalid(f"has scales {list(grid.shape)} for {parts.prefix!r} {list(shape)}, which do not divide it.")
        sizes.append(size)
    block_rows, block_columns = sizes

    def rows_of(numbers: Array, first: int, last: int) -> Array:
        in_rows: Array = numbers[np.arange(first, last) // block_rows]
        return in_rows

    group_of = np.arange(shape[1]) // block_columns
    zero_rows = None if zeros is None else partial(rows_of, zeros.reshape(grid.shape))
    if weight.dtype != "I8":
        kind = weight.dtype.removeprefix("F8_")
    elif zeros is not None and not ((zeros == np.rint(zeros)) & (np.abs(zeros + offset - 127.5) <= 127.5)).all():
        kind = "integers with zero points between integers"
    in_bytes = None if weight.dtype == "I8" else partial(_bytes, weight)
    return PackedMatrix(
        shape, partial(read_array, weight), partial(rows_of, grid), group_of, kind, zero_rows, offset, in_bytes
    ).source()


def _bytes(tensor: SourceTensor, first: int, last: int) -> Array:
    """Reads rows [first, last) of a matrix whose items are bytes."""
    return np.frombuffer(tensor.read_rows(first, last), np.uint8).reshape(last - first, -1)


def _fp8(parts: _Parts, settings: Settings) -> SourceTensor:
    """Reads float8 with a scale for the matrix, each row, or each tile (such as 128 x 128).

    A scale of a tile may be an exponent (E8M0). transformers, integrations/finegrained_fp8.py:1130 (5.24.0). AutoFP8 and fbgemm
    name the scale weight_scale.
    """
    weight = parts.matrix(".weight", "F8_E4M3", "F8_E5M2")
    scale = ".weight_scale_inv" if parts.get(".weight_scale_inv") else ".weight_scale"
    grid = parts.array(scale)
    if parts[scale].dtype == "U8":
        grid = powers_of_two(grid)
    return _block_scaled(parts, weight, grid, _block(settings))


def _block(settings: Settings) -> object:
    """[rows, columns] of a tile, from transformers' weight_block_size or compressed-tensors' block_structure; None if unset."""
    groups = settings.get("config_groups") or {}
    structures = [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
    return settings.get("weight_block_size") or next(filter(None, structures), None)


def _awq(parts: _Parts, settings: Settings) -> SourceTensor:
    """Reads AWQ: integers of four bits, with scales and zero points for groups of inputs.

    A word of 32 bits has eight outputs, in an order of their own. AutoAWQ, awq/utils/packing_utils.py:4 (order), :87 (value),
    awq/modules/linear/gemm.py:135 (shapes), 88e4c76.
    """
    version = settings.get("version") or settings.get("format") or settings.get("checkpoint_format") or "gemm"
    if str(version).lower() != "gemm":
        raise parts.invalid(f"is packed by AWQ's version {version!r}; known is 'gemm'.")
    qweight, qzeros = parts.matrix(".qweight", "I32"), parts.matrix(".qzeros", "I32")
    inputs, outputs = qweight.shape[0], qweight.shape[1] * 8

    def unpacked(suffix: str, first: int, last: int) -> Array:
        words = parts.columns(suffix, first // 8, -(-last // 8))
        nibbles = unpack(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)
        in_order = nibbles[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1)
        return in_order[:, first % 8 : first % 8 + last - first].T

    groups = _groups(parts, inputs, outputs, qzeros.shape[1] * 8, qzeros.shape[0])
    return PackedMatrix(
        (outputs, inputs),
        partial(unpacked, ".qweight"),
        lambda first, last: parts.columns(".scales", first, last).T,
        np.arange(inputs) // (inputs // groups),
        "INT4",
        partial(unpacked, ".qzeros"),
        is_q4=_scales_are_float16(parts, ".scales"),
    ).source()


def _gptq(parts: _Parts, settings: Settings) -> SourceTensor:
    """Reads GPTQ: integers of 2, 3, 4 or 8 bits, with scales and zero points for groups of inputs.

    The integers are packed one after another along the inputs, their zero points along the outputs. g_idx has the group of each
    input.

    AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py:123 (packing), :301 (zeros are stored less one, in the format
    `gptq`), qlinear_cuda.py:302 (g_idx), 9f7d370; GPTQModel, gptqmodel/utils/model.py:755 (`gptq_v2` stores zeros), f4c327a17.
    """
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise parts.invalid(f"is packed in GPTQ's format {layout!r}; known are 'gptq' and 'gptq_v2'.")
    qweight, qzeros = parts.matrix(".qweight", "I32"), parts.matrix(".qzeros", "I32")
    ordered, outputs = parts.get(".g_idx"), qweight.shape[1]
    inputs = ordered.rows if ordered else 32 * qweight.shape[0] // int(settings.get("bits") or 4)
    bits = 32 * qweight.shape[0] // max(1, inputs)
    if bits not in (2, 3, 4, 8) or qweight.shape[0] * 32 != inputs * bits:
        raise parts.invalid(f"has {parts.prefix!r} in {bits} bits for {inputs} inputs; GPTQ has 2, 3, 4 or 8 bits.")
    groups = _groups(parts, inputs, outputs, qzeros.shape[1] * 32 // bits, qzeros.shape[0], any_size=ordered is not None)
    less = 1 if layout == "gptq" else 0

    def zeros(first: int, last: int) -> Array:
        stored = unpack(parts.columns(".qzeros", 0, qzeros.shape[1]), bits, outputs)[:, first:last].T
        return (stored + np.uint8(less)) & np.uint8(2**bits - 1)

    return PackedMatrix(
        (outputs, inputs),
        lambda first, last: unpack(parts.columns(".qweight", first, last).T, bits, inputs),
        lambda first, last: parts.columns(".scales", first, last).T,
        parts.group_of(".g_idx", inputs, groups),
        "INT4" if bits <= 4 else "INT8",
        zeros,
        is_q4=bits == 4 and _scales_are_float16(parts, ".scales"),
    ).source()


def _groups(parts: _Parts, inputs: int, outputs: int, zero_columns: int, zero_rows: int, any_size: bool = False) -> int:
    """The number of groups of inputs in a matrix of AWQ or GPTQ. Raises CheckpointInvalid if shapes do not match.

    Scales and zeros must be [groups, outputs]. zero_rows, zero_columns: shape of the unpacked zeros. any_size: whether groups
    may differ in size.
    """
    groups, columns = parts.matrix(".scales", "F16", "BF16", "F32").shape
    if (columns, zero_columns, zero_rows) != (outputs, outputs, groups) or not groups or (not any_size and inputs % groups):
        raise parts.invalid(
            f"has scales [{groups}, {columns}] and zeros [{zero_rows}, {zero_columns}] for {parts.prefix!r} "
            f"[{outputs}, {inputs}], which do not fit."
        )
    return groups


def _scales_are_float16(parts: _Parts, suffix: str) -> bool:
    """Whether all scales can be converted to float16 without rounding."""
    if parts[suffix].dtype == "F16":
        return True
    scales = parts.array(suffix)
    with np.errstate(all="ignore"):
        return bool((scales.astype(np.float16).astype(np.float32) == scales).all())


def _compressed_tensors(parts: _Parts, settings: Settings) -> SourceTensor:
    """Reads compressed-tensors: bytes with scales, packed integers, or a format with blocks.

    The bytes are float8 or int8 with a scale by tensor, row, group or tile. Integers have 1 to 8 bits and are packed in rows.
    Formats with blocks are NVFP4, MXFP4 and MXFP8.

    compressed_tensors 0.20.1: compressors/pack_quantized/helpers.py:105 (a stream of bits, offset 2^(bits-1)), base.py:168
    (zeros packed along the outputs), compressors/nvfp4/base.py:101, compressors/mx_utils.py:33,
    quantization/lifecycle/forward_helpers.py:548 (the value).
    """
    groups = (settings.get("config_groups") or {}).values()
    formats = {str(each.get("format")) for each in (settings, *groups)} - {"None"}
    sparse = str((settings.get("sparsity_config") or {}).get("format") or "dense")
    known = {"float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized"}
    known |= {"mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"}
    if unknown := sorted((formats | {sparse}) - known):
        raise parts.invalid(f"has compressed-tensors' format {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise parts.invalid("rotates activations (transform_config), which Lamina does not.")
    if parts.get(".weight_packed") is None:
        return _scaled_bytes(parts, settings)
    packed = parts.matrix(".weight_packed", "I32", "U8")
    if packed.dtype == "U8":
        return _e2m1(parts, ".weight_packed", ".weight_global_scale", divide=True)
    return _packed_stream(parts, packed)


def _scaled_bytes(parts: _Parts, settings: Settings) -> SourceTensor:
    if parts[".weight"].dtype != "I8":
        return _fp8(parts, settings)
    zeros = parts.array(".weight_zero_point").astype(np.float32) if parts.get(".weight_zero_point") else None
    return _block_scaled(parts, parts.matrix(".weight", "I8"), parts.array(".weight_scale"), _block(settings), zeros)


def _packed_stream(parts: _Parts, packed: SourceTensor) -> SourceTensor:
    outputs, inputs = (int(length) for length in parts.array(".weight_shape").reshape(-1)[-2:])
    scales, zero_point = parts.matrix(".weight_scale", "F16", "BF16", "F32"), parts.get(".weight_zero_point")
    bits = 32 * packed.shape[1] // max(1, inputs)
    groups = scales.shape[1]
    fits = 1 <= bits <= 8 and packed.shape == (outputs, -(-inputs * bits // 32)) and scales.shape[0] == outputs
    if zero_point and parts.matrix(".weight_zero_point", "I32").shape != (-(-outputs * bits // 32), groups):
        fits = False
    if not fits or not groups or inputs % groups:
        raise parts.invalid(
            f"has {parts.prefix!r} [{outputs}, {inputs}] packed as {list(packed.shape)} with scales {list(scales.shape)}, "
            "which do not fit."
        )

    def zeros(first: int, last: int) -> Array:
        if zero_point is None:
            return np.full((last - first, groups), 1 << (bits - 1), np.uint8)
        return unpack(parts.columns(".weight_zero_point", 0, groups).T, bits, outputs)[:, first:last].T

    return PackedMatrix(
        (outputs, inputs),
        lambda first, last: unpack(read_array(packed, first, last), bits, inputs),
        partial(read_array, scales),
        parts.group_of(".weight_g_idx", inputs, groups),
        "INT4" if bits <= 4 else "INT8",
        zeros,
        is_q4=bits == 4 and _scales_are_float16(parts, ".weight_scale"),
    ).source()


def _e2m1(parts: _Parts, suffix: str, global_suffix: str, divide: bool) -> SourceTensor:
    """Reads float4 (E2M1), two numbers in a byte, the lower half first. Each group of inputs and the matrix have a scale.

    divide: if it is set, the scale of the matrix divides the others; if not, it multiplies them.
    """
    packed, scales = parts.matrix(suffix, "U8"), parts.matrix(".weight_scale", "F8_E4M3", "U8", "F8_E8M0")
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    matrix_scale = read_array(found).reshape(-1) if (found := parts.get(global_suffix)) else np.ones(1, np.float32)
    if len(matrix_scale) != 1 or scales.shape[0] != outputs or not scales.shape[1] or inputs % scales.shape[1]:
        raise parts.invalid(f"has scales {list(scales.shape)} for {parts.prefix!r} [{outputs}, {inputs}], which do not fit.")

    def scale_rows(first: int, last: int) -> Array:
        rows = read_array(scales, first, last)
        if scales.dtype == "U8":
            rows = powers_of_two(rows)
        scaled: Array = rows / matrix_scale if divide else rows * matrix_scale
        return scaled

    tensor = PackedMatrix(
        (outputs, inputs),
        lambda first, last: values_of_halves(read_array(packed, first, last), E2M1),
        scale_rows,
        np.arange(inputs) // (inputs // scales.shape[1]),
        "NVFP4",
    ).source()
    if scales.dtype == "F8_E4M3" or found or inputs != 32 * scales.shape[1]:
        return tensor

    def blocks(first: int, last: int) -> Blocks:
        return Blocks(unpack(read_array(packed, first, last), 4, inputs), _bytes(scales, first, last))

    return replace(tensor, stored_as="MXFP4", read_blocks=blocks)


def _modelopt(parts: _Parts, settings: Settings) -> SourceTensor:
    """Reads modelopt: float8 or int8 with a scale by tensor or row, or NVFP4.

    TensorRT-Model-Optimizer, modelopt/torch/export/convert_hf_config.py (config), quantization/qtensor/nvfp4_tensor.py:345.
    """
    algorithm = settings.get("quant_algo")
    layers = (settings.get("quantized_layers") or {}).values() if algorithm == "MIXED_PRECISION" else ()
    known = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "W8A16", "W8A8_SQ_PER_CHANNEL")
    for name in [layer.get("quant_algo") for layer in layers] or [algorithm]:
        if name not in known:
            raise parts.invalid(f"has modelopt's quant_algo {name!r}; known are {', '.join(known)} and mixtures of them.")
    if parts.get(".pre_quant_scale"):
        raise parts.invalid(f"scales the inputs of {parts.prefix!r} (pre_quant_scale), which Lamina does not.")
    if parts[".weight"].dtype == "U8":
        return _e2m1(parts, ".weight", ".weight_scale_2", divide=False)
    return _scaled_bytes(parts, {})


def _int8_rows(parts: _Parts, _: Settings) -> SourceTensor:
    """Reads int8 with the largest magnitude of each row: weight = int8 * magnitude / 127.

    bitsandbytes, _ops.py:121, nn/modules.py:1108 (0.50.2).
    """
    if parts.get(".weight_format") and parts.array(".weight_format").any():
        raise parts.invalid(f"has {parts.prefix!r} in an order for one kind of GPU (weight_format).")
    weight = parts.matrix(".weight", "I8")
    largest = parts.vector(".SCB", weight.shape[0], "F32")

    def rows(first: int, last: int) -> Array:
        return read_array(weight, first, last) * read_array(largest, first, last)[:, None] * np.float32(1 / 127)

    def scales(first: int, last: int) -> Array:
        return (read_array(largest, first, last) * np.float32(1 / 127))[:, None]

    shape = weight.shape[0], weight.shape[1]
    one_group = np.zeros(shape[1], np.intp)
    return PackedMatrix(shape, partial(read_array, weight), scales, one_group, "INT8", offset=128).source(rows)


def _table_of_16(parts: _Parts, _: Settings) -> SourceTensor:
    """Reads indices of four bits (nf4, fp4) into a table of 16 values, two in a byte, the upper half first.

    Each block of weights has a scale, and may continue in the next row. Scales are floats, or indices of 8 bits into a second
    table that has scales and an offset of its own. bitsandbytes, functional.py:494 (state), :1052 (nested scales),
    backends/default/ops.py:263 (value), 0.50.2.
    """
    try:
        stored = next(filter(parts.get, _STATES))
        state = msgspec.json.decode(parts.array(stored).tobytes(), type=dict[str, Any])
        (outputs, inputs), block = state["shape"], int(state["blocksize"])
        nested = int(state["nested_blocksize"]) if parts.get(".nested_absmax") else 0
        offset = np.float32(state["nested_offset"] if nested else 0)
    except (StopIteration, KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
        raise parts.invalid(f"has no readable quant_state of {parts.prefix!r} ({error!r}).") from error
    weight, count = parts[""], outputs * inputs
    item, blocks = ITEM_BYTES[weight.dtype], -(-count // block)
    if inputs % 2 or math.prod(weight.shape) * item != count // 2:
        raise parts.invalid(
            f"has {math.prod(weight.shape) * item} bytes for {parts.prefix!r} [{outputs}, {inputs}] in four bits."
        )
    absmax = parts.vector(".absmax", blocks, *(("U8",) if nested else ("F32", "F16", "BF16")))
    table = read_array(parts.vector(".quant_map", 16, "F32"))
    if nested:
        nested_table = read_array(parts.vector(".nested_quant_map", 256, "F32"))
        nested_absmax = read_array(parts.vector(".nested_absmax", -(-blocks // nested), "F32"))

    def scales(first: int, last: int) -> Array:
        """The scales of blocks [first, last) of the matrix."""
        if not nested:
            return read_array(absmax, first, last)
        return nested_table[read_array(absmax, first, last)] * nested_absmax[np.arange(first, last) // nested] + offset

    def rows(first: int, last: int) -> Array:
        start, stop = first * inputs, last * inputs
        items = start // 2 // item, -(-stop // (2 * item))
        data = np.frombuffer(weight.read_rows(*items), np.uint8)[start // 2 - items[0] * item :][: (stop - start) // 2]
        values = values_of_halves(data, table, upper_first=True)
        first_block = start // block
        of_weight = scales(first_block, -(-stop // block)).repeat(block)[start - first_block * block :]
        values *= of_weight[: stop - start]
        return values.reshape(last - first, inputs)

    return float_source((outputs, inputs), rows, stored.rpartition("__")[2].upper())


def _mxfp4(parts: _Parts, settings: Settings) -> SourceTensor:
    """Reads the experts of gpt-oss, which are stored as bytes [experts, outputs, groups, 16].

    They become [experts, in, out], as transformers has them. transformers, integrations/mxfp4.py:229 (5.24.0).
    """
    blocks, scales = parts["_blocks"], parts["_scales"]
    if len(blocks.shape) != 4 or scales.shape != blocks.shape[:3] or {blocks.dtype, scales.dtype} != {"U8"}:
        raise parts.invalid(f"has {parts.prefix!r} as {list(blocks.shape)} with scales {list(scales.shape)}, which do not fit.")
    experts, outputs, groups, group_bytes = blocks.shape

    def rows(first: int, last: int) -> Array:
        values = values_of_halves(read_array(blocks, first, last).reshape(-1, group_bytes), E2M1)
        values *= powers_of_two(read_array(scales, first, last)).reshape(-1, 1)
        return values.reshape(last - first, outputs, -1).swapaxes(1, 2)

    def matrices(first: int, last: int) -> Blocks:
        codes = unpack(read_array(blocks, first, last).reshape(-1, groups * group_bytes), 4, groups * group_bytes * 2)
        return Blocks(codes, read_array(scales, first, last).reshape(-1, groups))

    tensor = float_source((experts, groups * group_bytes * 2, outputs), rows, "MXFP4")
    return replace(tensor, read_blocks=matrices) if group_bytes == 16 else tensor


def _torchao(parts: _Parts, settings: Settings) -> SourceTensor:
    """Reads torchao: float8, or integers of 1 to 8 bits in a byte each, with scales and zeros for blocks.

    torchao 0.18.0: prototype/safetensors/safetensors_support.py:28 (names), quantization/quant_primitives.py:815 and :2360.
    """
    name = f"{parts.prefix}.weight"
    try:
        described = msgspec.json.decode(parts.metadata[name])
        kind, block = described["_type"], described["_data"]["block_size"]
    except (KeyError, TypeError, msgspec.MsgspecError) as error:
        raise parts.invalid(f"does not describe {name!r} in the metadata of its file ({error!r}).") from error
    known = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
    if kind not in known:
        raise parts.invalid(f"has {name!r} as torchao's {kind}; known are {', '.join(known)}.")
    if parts.get("._weight_act_pre_scale"):
        raise parts.invalid(f"scales the inputs of {name!r} (act_pre_scale), which Lamina does not.")
    data = parts.matrix("._weight_qdata", "I8", "F8_E4M3", "F8_E5M2")
    shape = data.shape[0], data.shape[1]
    scales = parts.array("._weight_scale")
    zeros = parts.array("._weight_zero_point").astype(np.float32) if parts.get("._weight_zero_point") else None
    try:
        grid_shape = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        scales, zeros = scales.reshape(grid_shape), None if zeros is None else zeros.reshape(grid_shape)
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise parts.invalid(f"has scales {list(scales.shape)} for {name!r} {list(shape)} in blocks {block}.") from error
    four_bits = (described["_data"].get("target_dtype") or {}).get("_data") in ("int1", "int2", "int3", "int4")
    return _block_scaled(parts, data, scales, block, zeros, *(("INT4", 8) if four_bits else ()))


_SCALED: Final = (".weight", ".weight_scale", ".weight_scale_inv", ".weight_zero_point")
_PACKED: Final = (".weight_packed", ".weight_global_scale", ".weight_shape", ".weight_g_idx")
_TABLE: Final = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STATES: Final = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_METHODS: Final[Mapping[str, tuple[_Method, ...]]] = {
    "awq": (_Method(_awq, (".qweight",), (".qweight", ".qzeros", ".scales")),),
    "bitsandbytes": (
        _Method(_table_of_16, (".absmax",), (*_TABLE, *_STATES), target=""),
        _Method(_int8_rows, (".SCB",), (".weight", ".SCB", ".weight_format")),
    ),
    "compressed-tensors": (_Method(_compressed_tensors, (".weight_packed", ".weight_scale"), (*_SCALED, *_PACKED)),),
    "fbgemm_fp8": (_Method(_fp8, (".weight_scale",), _SCALED),),
    "fp8": (_Method(_fp8, (".weight_scale_inv", ".weight_scale"), _SCALED),),
    "gptq": (_Method(_gptq, (".qweight",), (".qweight", ".qzeros", ".scales", ".g_idx")),),
    "modelopt": (_Method(_modelopt, (".weight_scale",), (*_SCALED, ".weight_scale_2")),),
    "mxfp8": (_Method(_fp8, (".weight_scale_inv",), _SCALED),),
    "mxfp4": (_Method(_mxfp4, ("_blocks",), ("_blocks", "_scales"), target=""),),
    "torchao": (_Method(_torchao, ("._weight_qdata",), ("._weight_qdata", "._weight_scale", "._weight_zero_point")),),
}
_OF_ACTIVATIONS: Final = re.compile(
    r"\.(input_scale|input_scale_ub|input_zero_point|input_global_scale|activation_scale|output_scale|[qkv]_scale|kv_scale"
    r"|_weight_act_quant_scale|_weight_act_quant_zero_point)$"
)


def dequantized(
    folder: Path, settings: object, tensors: Mapping[str, SourceTensor], metadata: Mapping[str, str]
) -> tuple[dict[str, SourceTensor], str]:
    """Replaces the packed tensors of a quantized checkpoint by tensors of floats.

    Returns all tensors by name, and the name of the method for people. settings: the quantization_config of the checkpoint's
    config.json. metadata: that of its safetensors files. Matrices are dequantized as they are read, a few rows at a time; up to
    four packed tensors are in memory. Raises CheckpointInvalid for an unknown method or layout.
    """
    method = "an unnamed method"
    if isinstance(settings, dict):
        in_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
        method = str(settings.get("quant_method") or ("bitsandbytes" if in_bits else method))
    if not isinstance(settings, dict) or method not in _METHODS:
        raise CheckpointInvalid(
            f"{folder} is quantized with {method}; known are {', '.join(_METHODS)}. Publish the unquantized checkpoint instead"
        )
    whole = lru_cache(maxsize=4)(lambda name: read_array(tensors[name]))
    made: dict[str, SourceTensor] = {}
    used: set[str] = set()
    try:
        for name in tensors:
            for kind in _METHODS[method]:
                marker = next(filter(name.endswith, kind.markers), None)
                if marker is not None:
                    parts = _Parts(name.removesuffix(marker), tensors, whole, metadata)
                    made[parts.prefix + kind.target] = kind.read(parts, settings)
                    used |= {parts.prefix + end for end in kind.parts}
    except (AttributeError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise CheckpointInvalid(f"{folder} has a layout that {method} does not have ({error!r}); fetch it again") from error
    if not made:
        raise CheckpointInvalid(
            f"{folder} says that it is quantized with {method}, and no tensor is packed as that does; remove "
            "quantization_config from its config.json if the tensors are not quantized"
        )
    others = {name: tensor for name, tensor in tensors.items() if name not in used and not _OF_ACTIVATIONS.search(name)}
    packed = {end for kinds in _METHODS.values() for kind in kinds for end in kind.parts} - {"", ".weight"}
    if stray := next((name for name in others if name.endswith(tuple(packed))), None):
        raise CheckpointInvalid(
            f"{folder} has {stray!r}, which belongs to no matrix of {method}. Publish the unquantized checkpoint"
        )
    detail = settings.get("quant_algo") or settings.get("format") or settings.get("bnb_4bit_quant_type")
    return others | made, f"{method} ({detail})" if detail and method != detail else method
