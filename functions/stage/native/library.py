"""Loads the compiled C library, declares its functions as `c/native.h` does, and turns their errors into exceptions."""

import ctypes
import logging
from functools import cache
from typing import Any, Final

from functions.stage.native.compiler import CompilationFailed, NoCompiler, library_file
from functions.stage.native.records import (
    RECORDS,
    DrawsRecord,
    GroupRecord,
    MatrixRecord,
    PassRecord,
    ProductRecord,
    SoftmaxRecord,
)

_log: Final = logging.getLogger(__name__)


class NativeError(ValueError):
    """The library refused the arguments of a call: a size, dtype, shape or address is wrong. No memory was changed."""


_FUNCTIONS: Final[dict[str, tuple[Any, list[Any]]]] = {
    "lamina_message": (ctypes.c_char_p, [ctypes.c_int]),
    "lamina_level_name": (ctypes.c_char_p, [ctypes.c_int64]),
    "lamina_best_level": (ctypes.c_int64, []),
    "lamina_use_level": (ctypes.c_int, [ctypes.c_int64]),
    "lamina_level": (ctypes.c_int64, []),
    "lamina_new_pool": (ctypes.c_void_p, []),
    "lamina_free_pool": (None, [ctypes.c_void_p]),
    "lamina_run_layers": (ctypes.c_int, [ctypes.c_void_p, ctypes.POINTER(GroupRecord), ctypes.POINTER(PassRecord)]),
    "lamina_multiply": (ctypes.c_int, [ctypes.c_void_p, ctypes.POINTER(ProductRecord)]),
    "lamina_draw": (ctypes.c_int, [ctypes.c_void_p, ctypes.POINTER(DrawsRecord)]),
    "lamina_softmax": (ctypes.c_int, [ctypes.POINTER(SoftmaxRecord)]),
    "lamina_pass_bytes": (ctypes.c_int64, [ctypes.POINTER(GroupRecord), *[ctypes.c_int64] * 3]),
    "lamina_product_bytes": (ctypes.c_int64, [ctypes.POINTER(MatrixRecord), *[ctypes.c_int64] * 2]),
    "lamina_draw_bytes": (ctypes.c_int64, [ctypes.c_int64] * 2),
    "lamina_size_of": (ctypes.c_int64, [ctypes.c_int64]),
}


class Library:
    """The functions of the C library. Calls release the GIL, so that other Python threads can run."""

    def __init__(self, path: str) -> None:
        """Loads the library. Raises OSError if the file cannot be loaded.

        Raises ImportError if the sizes of its structs differ from those in records.py.
        """
        loaded = ctypes.CDLL(path)
        self.functions: dict[str, Any] = {}
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
            self.functions[name] = function
        sizes = [self.functions["lamina_size_of"](number) for number in range(len(RECORDS) + 1)]
        if sizes != [*map(ctypes.sizeof, RECORDS), 0]:
            raise ImportError(f"{path} has records of {sizes} bytes, which are others than those of records.py")

    @property
    def levels(self) -> list[str]:
        """Names of the levels that this CPU supports, the best last. A level is the set of CPU instructions that C uses."""
        name = self.functions["lamina_level_name"]
        return [name(level).decode() for level in range(self.functions["lamina_best_level"]() + 1)]

    @property
    def level(self) -> str:
        """Name of the level in use."""
        number: int = self.functions["lamina_level"]()
        return self.levels[number]

    def use_level(self, name: str) -> None:
        """Selects a level for the whole process, in place of the best one. For tests.

        Raises ValueError if this CPU does not support the level.
        """
        self.call("lamina_use_level", self.levels.index(name))

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function of `c/native.h` that returns a status. Raises NativeError.

        Records are passed by reference. An argument that is a pool of threads may serve one call at a time. If it is None, only
        the calling thread computes.
        """
        if status := self.functions[name](*arguments):
            raise NativeError(self.functions["lamina_message"](status).decode())

    def bytes_for(self, name: str, *arguments: Any) -> int:
        """Calls a function of `c/native.h` that returns how many bytes of temporary memory another function needs.

        Raises NativeError for sizes that are not allowed.
        """
        needed: int = self.functions[name](*arguments)
        if needed < 0:
            raise NativeError(self.functions["lamina_message"](-needed).decode())
        return needed


UNAVAILABLE: Final = (NoCompiler, CompilationFailed, OSError, ImportError)
"""The errors that `library` raises if this machine cannot run layers in C. Use torch's operators then."""


@cache
def library() -> Library:
    """Returns the C library. The first call in a process loads it, and compiles it if necessary.

    Raises one of the errors in UNAVAILABLE.
    """
    loaded = Library(str(library_file()))
    _log.info("layers run in C, for %s", loaded.level)
    return loaded
