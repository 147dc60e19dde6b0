"""`kernels` as machine code: compiled once (some 10 s), kept beside the source, loaded from then on.

The target must be selected before numba compiles anything, or code would be made for the CPU at hand and looked up as that of
a level. So nothing here or in `layers` imports functions for numba: importing one has numba choose its target.

What is kept belongs to one state of the source and one level of CPUs. Where the folder cannot be written, as in a container,
what the image brought is used; what it did not bring is compiled at every start.
"""

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from numba import cfunc, types
from numba.core import config

from functions.stage.native import target

_log: Final = logging.getLogger(__name__)
_FOLDER: Final = Path(__file__).parent
_SIGNATURE: Final = types.void(types.CPointer(types.int64))
_alive: Final[list[Any]] = []
"""What has been compiled goes with the last reference to it."""


@dataclass(frozen=True, slots=True)
class MachineCode:
    """Addresses of C functions `void (int64 *)`, of `kernels`."""

    run_layers: int
    run_product: int
    compiled: bool
    """Whether this process had to compile them."""


@cache
def for_this_machine() -> MachineCode:
    target.select(target.of_this_machine())
    return for_selected_target()


def for_selected_target() -> MachineCode:
    """From what is kept or, where nothing is, compiled and then kept."""
    from functions.stage.native import kernels

    begun = time.perf_counter()
    with _cache_folder() as folder:
        config.CACHE_DIR = str(folder)
        layers, product = (cfunc(_SIGNATURE, cache=True)(function) for function in (kernels.run_layers, kernels.run_product))
    _alive.extend((layers, product))
    code = MachineCode(layers.address, product.address, compiled=not (layers.cache_hits and product.cache_hits))
    if code.compiled:
        _log.info("compiled the layers for %s in %.1f s", config.CPU_NAME or "this CPU", time.perf_counter() - begun)
    return code


@contextmanager
def _cache_folder() -> Iterator[Path]:
    kept = _FOLDER / "__pycache__" / f"machine-code-{_digest()}"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=kept).close()
    except OSError:
        with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
            if kept.is_dir():
                shutil.copytree(kept, folder, dirs_exist_ok=True)
            yield Path(folder)
        return
    yield kept


def _digest() -> str:
    """Of all source here: numba itself looks at one file only."""
    digest = hashlib.sha256()
    for path in sorted(_FOLDER.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
