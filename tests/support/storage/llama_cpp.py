"""llama.cpp as an oracle: its sources from a package's sdist, and tokenizer and quantization from a package with its library.

Neither is needed for development: tests that use them are skipped where they are absent (`make llama-cpp-test`).
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.storage.llama_cpp_library import library
from tests.support.storage.llama_cpp_library import logits as library_logits

SOURCES: Final = Path(__file__).parents[3] / ".llama.cpp"
_PRE: Final = b"tokenizer.ggml.pre"
_VOCAB_ONLY: Final = 64  # offset of this flag in struct llama_model_params


def sources() -> Path:
    """The folder of llama.cpp's sources. Skips the test if it is absent."""
    if not SOURCES.is_dir():
        pytest.skip("llama.cpp's sources are not here: make llama-cpp-test")
    return SOURCES


def program(name: str) -> Path:
    """A program of llama.cpp. Skips the test if it is not built."""
    path = sources() / "build" / "bin" / name
    if not path.is_file():
        pytest.skip(f"{name} is not built: make llama-cpp")
    return path


def golden(name: str) -> tuple[Path, list[tuple[str, list[int]]]]:
    """A vocabulary of llama.cpp's own tests, and texts with the ids that the model's first tokenizer gave them."""
    path = sources() / "models" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = Path(f"{path}.out").read_text().split("\n")
    return path, [(text, list(map(int, line.split()))) for text, line in zip(texts, ids, strict=False)]


def relabel(source: Path, target: Path, rule: str) -> Path:
    """Writes a copy of a GGUF file that has no tensors, with another rule in tokenizer.ggml.pre."""
    data = source.read_bytes()
    at = data.index(struct.pack("<Q", len(_PRE)) + _PRE) + 8 + len(_PRE)
    _, length = struct.unpack_from("<IQ", data, at)
    target.write_bytes(data[:at] + struct.pack("<IQ", 8, len(rule)) + rule.encode() + data[at + 12 + length :])
    return target


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def _library() -> Any:
    try:
        return library()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def quantized(weights: NDArray[np.float32], kind: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Rows of weights in a block format, as llama-quantize writes them, and the weights that llama.cpp makes of them.

    kind: a GGMLQuantizationType.
    """
    _library()
    library = ctypes.CDLL("libggml-base.so.0", mode=ctypes.RTLD_GLOBAL)
    library.ggml_row_size.restype = library.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows, width = weights.shape
    made = np.empty((rows, library.ggml_row_size(kind, ctypes.c_int64(width))), np.uint8)
    first, sizes = ctypes.c_int64(0), (ctypes.c_int64(rows), ctypes.c_int64(width))
    source, target = (ctypes.c_void_p(array.ctypes.data) for array in (weights, made))
    assert library.ggml_quantize_chunk(kind, source, target, first, *sizes, None) == made.nbytes
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    found = np.empty_like(weights)
    to_float = library.ggml_get_type_traits(kind).contents.to_float
    to_float(target, ctypes.c_void_p(found.ctypes.data), ctypes.c_int64(weights.size))
    return made, found


@contextmanager
def vocabulary(path: Path) -> Iterator[Any]:
    """Opens the vocabulary of a GGUF file in llama.cpp. Yields a function from text to ids, special tokens included."""
    library = _library()
    params = library.llama_model_default_params()
    params.bytes[_VOCAB_ONLY] = 1
    model = library.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        pytest.skip("this version of llama.cpp does not know the vocabulary's rule")

    def encode(text: str) -> list[int]:
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 16))()
        vocab = ctypes.c_void_p(library.llama_model_get_vocab(model))
        count = library.llama_tokenize(vocab, raw, len(raw), ids, len(ids), True, True)
        return list(ids[:count])

    try:
        yield encode
    finally:
        library.llama_model_free(model)


def logits(path: Path, tokens: Sequence[int]) -> NDArray[np.float32]:
    """What llama.cpp computes of a GGUF file: logits [len(tokens), vocabulary]. Skips the test without its library."""
    _library()
    return library_logits(path, [tokens])[0]
