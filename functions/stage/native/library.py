"""The compiled library: its functions with the types of `c/native.h`, and their errors as exceptions."""

import ctypes
import logging
from functools import cache
from typing import Any, Final

from functions.stage.native.compiler import CompilationFailed, NoCompiler, library_file
from functions.stage.native.records import RECORDS, Group, Matrix, Pass, Product

_log: Final = logging.getLogger(__name__)


class Refused(ValueError):
    """The library would not touch what it was given: a size, a dtype, a shape or an address is wrong."""


_FUNCTIONS: Final[dict[str, tuple[Any, list[Any]]]] = {
    "lamina_message": (ctypes.c_char_p, [ctypes.c_int]),
    "lamina_level_name": (ctypes.c_char_p, [ctypes.c_int64]),
    "lamina_best_level": (ctypes.c_int64, []),
    "lamina_use_level": (ctypes.c_int, [ctypes.c_int64]),
    "lamina_level": (ctypes.c_int64, []),
    "lamina_new_pool": (ctypes.c_void_p, []),
    "lamina_free_pool": (None, [ctypes.c_void_p]),
    "lamina_run_layers": (ctypes.c_int, [ctypes.c_void_p, ctypes.POINTER(Group), ctypes.POINTER(Pass)]),
    "lamina_multiply": (ctypes.c_int, [ctypes.c_void_p, ctypes.POINTER(Product)]),
    "lamina_pass_bytes": (ctypes.c_int64, [ctypes.POINTER(Group), *[ctypes.c_int64] * 3]),
    "lamina_product_bytes": (ctypes.c_int64, [ctypes.POINTER(Matrix), *[ctypes.c_int64] * 2]),
    "lamina_size_of": (ctypes.c_int64, [ctypes.c_int64]),
}


class Library:
    """Calls let other threads of Python run."""

    def __init__(self, path: str) -> None:
        """Raises OSError where it cannot be loaded, and ImportError where it is another library than this code is for."""
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
        """Names of all that this CPU has, the best last."""
        name = self.functions["lamina_level_name"]
        return [name(level).decode() for level in range(self.functions["lamina_best_level"]() + 1)]

    @property
    def level(self) -> str:
        """What passes run on."""
        number: int = self.functions["lamina_level"]()
        return self.levels[number]

    def use_level(self, name: str) -> None:
        """In place of the best, in the whole process. Raises ValueError for one that this CPU lacks."""
        self._checked(self.functions["lamina_use_level"](self.levels.index(name)))

    def new_pool(self) -> int:
        pool: int | None = self.functions["lamina_new_pool"]()
        if pool is None:
            raise MemoryError("no memory for a pool of threads")
        return pool

    def free_pool(self, pool: int) -> None:
        self.functions["lamina_free_pool"](pool)

    def run_layers(self, pool: int, group: Group, state: Pass) -> None:
        """Raises Refused."""
        self._checked(self.functions["lamina_run_layers"](pool, ctypes.byref(group), ctypes.byref(state)))

    def multiply(self, pool: int, product: Product) -> None:
        """Raises Refused."""
        self._checked(self.functions["lamina_multiply"](pool, ctypes.byref(product)))

    def pass_bytes(self, group: Group, rows: int, most_tokens: int, threads: int) -> int:
        """Raises Refused for sizes that no pass may have."""
        return self._checked_bytes(self.functions["lamina_pass_bytes"](ctypes.byref(group), rows, most_tokens, threads))

    def product_bytes(self, matrix: Matrix, rows: int, threads: int) -> int:
        """Raises Refused for sizes that no product may have."""
        return self._checked_bytes(self.functions["lamina_product_bytes"](ctypes.byref(matrix), rows, threads))

    def _checked(self, status: int) -> None:
        if status:
            raise Refused(self.functions["lamina_message"](status).decode())

    def _checked_bytes(self, found: int) -> int:
        self._checked(max(0, -found))
        return found


UNAVAILABLE: Final = (NoCompiler, CompilationFailed, OSError, ImportError)
"""What `library` raises where there is none: layers run by torch's operators then."""


@cache
def library() -> Library:
    """The one of this process. Raises one of UNAVAILABLE."""
    loaded = Library(str(library_file()))
    _log.info("layers run in C, for %s", loaded.level)
    return loaded
