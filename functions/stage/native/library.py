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
    """The library refused its arguments: a size, dtype, shape or address is wrong. No memory was changed."""


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
    """The functions of the C library. Calls release Python's global lock, so that other Python threads run meanwhile."""

    def __init__(self, path: str) -> None:
        """Raises OSError if the file cannot be loaded, and ImportError if its structs differ in size from records.py."""
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
        """Uses another level than the best one, in the whole process. For tests. Raises ValueError if this CPU lacks it."""
        status = self.functions["lamina_use_level"](self.levels.index(name))
        if status:
            raise self._error(status)

    def new_pool(self) -> int:
        """Creates a pool of threads and returns its address, for `run_layers` and `multiply`. Raises MemoryError."""
        pool: int | None = self.functions["lamina_new_pool"]()
        if pool is None:
            raise MemoryError("no memory for a pool of threads")
        return pool

    def run_layers(self, pool: int, group: GroupRecord, forward_pass: PassRecord) -> None:
        """Runs one pass through the group's layers. pool: serves one call at a time. Raises NativeError."""
        status = self.functions["lamina_run_layers"](pool, ctypes.byref(group), ctypes.byref(forward_pass))
        if status:
            raise self._error(status)

    def multiply(self, pool: int, product: ProductRecord) -> None:
        """Multiplies by one matrix. pool: serves one call at a time. Raises NativeError."""
        status = self.functions["lamina_multiply"](pool, ctypes.byref(product))
        if status:
            raise self._error(status)

    def draw(self, pool: int | None, draws: DrawsRecord) -> None:
        """Draws tokens into their records. pool: serves one call at a time; None: for one thread. Raises NativeError."""
        status = self.functions["lamina_draw"](pool, ctypes.byref(draws))
        if status:
            raise self._error(status)

    def softmax(self, softmax: SoftmaxRecord) -> None:
        """Computes the results of a softmax into its record. Raises NativeError."""
        status = self.functions["lamina_softmax"](ctypes.byref(softmax))
        if status:
            raise self._error(status)

    def pass_bytes(self, group: GroupRecord, rows: int, most_tokens: int, threads: int) -> int:
        """Bytes of temporary memory that a pass needs. Raises NativeError for sizes that are not allowed.

        rows: tokens of the pass. most_tokens: length of its longest sequence after the pass.
        """
        needed: int = self.functions["lamina_pass_bytes"](ctypes.byref(group), rows, most_tokens, threads)
        if needed < 0:
            raise self._error(-needed)
        return needed

    def product_bytes(self, matrix: MatrixRecord, rows: int, threads: int) -> int:
        """Bytes of temporary memory to multiply `rows` rows by a matrix. Raises NativeError for sizes that are not allowed."""
        needed: int = self.functions["lamina_product_bytes"](ctypes.byref(matrix), rows, threads)
        if needed < 0:
            raise self._error(-needed)
        return needed

    def draw_bytes(self, vocabulary: int, threads: int) -> int:
        """Bytes of temporary memory to draw tokens. Raises NativeError for sizes that are not allowed."""
        needed: int = self.functions["lamina_draw_bytes"](vocabulary, threads)
        if needed < 0:
            raise self._error(-needed)
        return needed

    def _error(self, status: int) -> NativeError:
        return NativeError(self.functions["lamina_message"](status).decode())


UNAVAILABLE: Final = (NoCompiler, CompilationFailed, OSError, ImportError)
"""The errors that `library` raises on a machine that cannot run layers in C. Use torch's operators there."""


@cache
def library() -> Library:
    """The C library, loaded once per process and compiled first if necessary. Raises one of the errors in UNAVAILABLE."""
    loaded = Library(str(library_file()))
    _log.info("layers run in C, for %s", loaded.level)
    return loaded
