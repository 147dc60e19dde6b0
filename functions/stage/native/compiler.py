"""Compiles the C library in `c/`, with the compiler that the variable CC names or else with the package `ziglang`.

The compiled library is kept in `__pycache__`, or in the user's cache folder if `__pycache__` cannot be written to. The name of
the file has a digest of source, flags and compiler. A container image has a compiled library in `__pycache__`.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_log: Final = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).parent / "c"
_CACHE: Final = Path(__file__).parent / "__pycache__"

FLAGS: Final = (
    "-std=gnu11",
    "-O3",
    "-Wall",
    "-Wextra",
    # Products and sums are fused only if the source says so: the same bits from every compiler. No flag may change results.
    "-ffp-contract=off",
    "-fno-math-errno",  # a square root is an instruction, not a call
    "-fno-strict-aliasing",  # packed numbers are read as other types than they were written as
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
)
_OLDEST_GLIBC: Final = "2.28"  # with which a library that zig compiled can be loaded


class NoCompiler(Exception):
    """There is no compiled library, no package ziglang and no CC. Install ziglang, or set CC."""

    def __init__(self) -> None:
        super().__init__("no compiled library and no compiler: pip install ziglang, or name a C compiler with CC")


class CompilationFailed(Exception):
    """The compiler failed, or could not be run. The message has its output."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C compiler: the first words of its command line, and its version."""

    command: tuple[str, ...]
    version: str

    @classmethod
    def found(cls) -> "Compiler | None":
        """Returns the compiler that the variable CC names, or else the one in the package ziglang. None if there is neither."""
        if named := os.environ.get("CC"):
            command = tuple(shlex.split(named))
            return cls(command, _output((*command, "--version")))
        if importlib.util.find_spec("ziglang") is None:
            return None
        target = (f"{platform.machine()}-linux-gnu.{_OLDEST_GLIBC}",) if sys.platform == "linux" else ()
        # Turns off zig's defaults: checks of undefined behaviour, and debug information, which is most of a file's size.
        added = ("-g0", "-fno-sanitize=undefined", *(("-target", *target) if target else ()))
        return cls((sys.executable, "-m", "ziglang", "cc", *added), importlib.metadata.version("ziglang"))

    def compile(self, into: Path, flags: tuple[str, ...] = FLAGS) -> None:
        """Compiles all C files to the shared library `into`. Raises CompilationFailed."""
        _output((*self.command, *flags, "-shared", *map(str, sorted(SOURCE.glob("*.c"))), "-o", str(into)))


def library_file() -> Path:
    """Returns the path of the compiled library. Compiles it first if there is none for this source.

    Raises NoCompiler or CompilationFailed.
    """
    compiler = Compiler.found()
    name = _library_name(compiler)
    for folder in (_CACHE, _user_cache()):
        for file in sorted(folder.glob(name)):
            return file
    if compiler is None:
        raise NoCompiler
    begun = time.perf_counter()
    file = _writable_folder() / name
    # Other processes may be compiling the same: the last one wins, and none finds half a file.
    handle, made = tempfile.mkstemp(dir=file.parent, suffix=".so")
    os.close(handle)
    try:
        compiler.compile(Path(made))
        os.chmod(made, 0o755)
        os.replace(made, file)
    finally:
        Path(made).unlink(missing_ok=True)
    _log.info("compiled the layers in %.1f s", time.perf_counter() - begun)
    return file


def _library_name(compiler: Compiler | None) -> str:
    """Returns the file name of the library that `compiler` makes from this source.

    If `compiler` is None, returns a glob pattern that matches the libraries of all compilers.
    """
    files = sorted(SOURCE.glob("*.[ch]"))
    source = _digest(*FLAGS, *(part for file in files for part in (file.name, file.read_text())))
    by = "*" if compiler is None else _digest(*compiler.command[1:], compiler.version)
    return f"layers-{source}-{by}.so"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamina"


def _writable_folder() -> Path:
    """Returns the folder for a new library. Raises CompilationFailed if no folder can be written to."""
    for folder in (_CACHE, _user_cache()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    raise CompilationFailed(f"neither {_CACHE} nor {_user_cache()} can be written")


def _output(command: tuple[str, ...]) -> str:
    """Runs a command and returns its standard output. Raises CompilationFailed if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilationFailed(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise CompilationFailed(f"{shlex.join(command)}:\n{done.stderr}")
    return done.stdout
