"""GGUF files of the Llama-shaped architectures, seen as the Hugging Face checkpoint they were made from.

Tensors are dequantized to float32 as they are read, a few rows at a time; those in four bits can be read as they are, too
(`gguf_four_bits`). The metadata become config.json (`gguf_config`)
and the tokenizer's files (`gguf_tokenizer`). This is the only importer of gguf.
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

from storage.checkpoints.checkpoint import Checkpoint, SourceTensor
from storage.checkpoints.gguf_config import model_config
from storage.checkpoints.gguf_format import GgufTensor, read_header
from storage.checkpoints.gguf_four_bits import four_bits
from storage.checkpoints.gguf_tokenizer import tokenizer_files
from storage.checkpoints.safetensors_format import read_exactly
from storage.errors import ArchitectureUnsupported, CheckpointInvalid

_MODULES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FLOATS: Final = frozenset(
    {
        gguf.GGMLQuantizationType.F64,
        gguf.GGMLQuantizationType.F32,
        gguf.GGMLQuantizationType.F16,
        gguf.GGMLQuantizationType.BF16,
    }
)
_TENSOR_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<module>\w+)\.(?P<kind>weight|bias)")


def open_gguf(path: Path) -> Checkpoint:
    """Raises CheckpointInvalid for a file that is no whole GGUF, ArchitectureUnsupported for what is not Llama-shaped."""
    header = read_header(path)
    config = model_config(path, header)
    size = path.stat().st_size
    tensors = {_hugging_face_name(path, tensor.name): _source(path, tensor, config, size) for tensor in header.tensors}
    config_file = msgspec.json.format(msgspec.json.encode(config), indent=2)
    return Checkpoint(config, tokenizer_files(path, header.fields) | {"config.json": config_file}, tensors)


def _hugging_face_name(path: Path, name: str) -> str:
    found = _TENSOR_NAME.fullmatch(name)
    if not found or found["module"] not in _MODULES:
        raise ArchitectureUnsupported(
            f"{path} has a tensor {name!r} that no Llama-shaped model has; publish it from safetensors"
        )
    prefix = f"model.layers.{found['layer']}." if found["layer"] else ""
    return f"{prefix}{_MODULES[found['module']]}.{found['kind']}"


def _source(path: Path, tensor: GgufTensor, config: Mapping[str, Any], file_bytes: int) -> SourceTensor:
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    dequantize, row_bytes = _quantization(path, tensor, columns)
    if tensor.start + rows * row_bytes > file_bytes:
        raise CheckpointInvalid(
            f"{path} is no GGUF file, or only its beginning (tensor {tensor.name!r} ends at byte "
            f"{tensor.start + rows * row_bytes} of {file_bytes}); fetch it again"
        )
    read = partial(_read_rows, path, tensor.start, row_bytes, _row_order(path, tensor, rows, config))
    in_four_bits = four_bits(tensor.kind)
    return SourceTensor(
        "F32",
        tensor.shape,
        lambda first, last: _as_floats(dequantize(read(first, last))),
        tensor.kind not in _FLOATS,
        None if in_four_bits is None else lambda first, last: in_four_bits(read(first, last)),
    )


def _quantization(path: Path, tensor: GgufTensor, columns: int) -> tuple[Callable[[NDArray[np.uint8]], Any], int]:
    """What makes floats of bytes, and how many bytes a row has. One block is tried, before anything is written."""
    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
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


def _row_order(path: Path, tensor: GgufTensor, rows: int, config: Mapping[str, Any]) -> Callable[[int, int], NDArray[np.intp]]:
    """Where in the file the rows [first, last) lie. llama.cpp interleaves the two halves of every rotary head in files of
    `llama`, Hugging Face does not."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(tensor.name.split(".")[-2])
    if config["model_type"] != "llama" or heads is None:
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
    """[last - first, row_bytes]."""
    places = order(first, last)
    lowest, count = int(places.min()), int(places.max() - places.min()) + 1
    data = np.empty((count, row_bytes), np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        read_exactly(descriptor, start + lowest * row_bytes, data.reshape(-1).data)
    finally:
        os.close(descriptor)
    return data[places - lowest]


def _as_floats(rows: Any) -> memoryview:
    return np.ascontiguousarray(rows, dtype=np.float32).reshape(-1).view(np.uint8).data
