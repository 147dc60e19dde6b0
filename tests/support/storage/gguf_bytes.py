"""GGUF files byte by byte, right or wrong: what a writer that knows the format would refuse to write."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

U32: Final = 4
F32: Final = 6
STRING: Final = 8
ARRAY: Final = 9
FORMATS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

TOKENS: Final = ["a", "b", "ab", "<s>"]
LLAMA: Final[Mapping[str, tuple[int, Any]]] = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 1),
    "llama.context_length": (U32, 16),
    "llama.embedding_length": (U32, 8),
    "llama.feed_forward_length": (U32, 16),
    "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 1),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.freq_base": (F32, 10_000.0),
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.pre": (STRING, "smollm"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
    "tokenizer.ggml.token_type": (ARRAY, (5, [1, 1, 1, 3])),
    "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])),
    "tokenizer.ggml.bos_token_id": (U32, 3),
    "tokenizer.ggml.add_bos_token": (7, True),
    "tokenizer.chat_template": (STRING, "{{ messages }}"),
}
"""Key → type and value of a whole, tiny model's metadata; an array's value is its items' type and the items."""
TENSORS: Final = (("token_embd.weight", (8, 4), 0, 0), ("blk.0.attn_q.weight", (8, 8), 0, 128))
"""Name, shape in GGUF's order, type, offset."""


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        inner, items = content
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
    return struct.pack(f"<{FORMATS[kind]}", content)


def gguf_file(
    fields: Mapping[str, tuple[int, Any]] = LLAMA,
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]] = TENSORS,
    *,
    counts: tuple[int, int] | None = None,
    raw: bytes = b"",
) -> bytes:
    """counts: of tensors and of fields, as the file states them. raw: bytes in place of all that follows the counts."""
    stated = counts or (len(tensors), len(fields))
    data = b"GGUF" + struct.pack("<IQQ", 3, *stated)
    if raw:
        return data + raw
    for key, (kind, content) in fields.items():
        data += string(key) + struct.pack("<I", kind) + value(kind, content)
    for name, shape, kind, offset in tensors:
        data += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    data += b"\0" * (-len(data) % 32)
    return data + b"\0" * 512
