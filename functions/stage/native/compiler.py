"""The library of `c/`, compiled: by the compiler that the package `ziglang` is, or by the one that CC names.

What is compiled is kept beside the source, by a digest of source, flags and compiler. Where that folder cannot be written, as
in a container, what the image brought is used, else a folder of the user's.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_log: Final = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).parent / "c"
_BESIDE: Final = Path(__file__).parent / "__pycache__"

FLAGS: Final = (
    "-std=gnu11",
    "-O3",
    "-Wall",
    "-Wextra",
    # Products and sums are joined where the source says so and nowhere else: the same bits from every compiler. No other
    # flag may change what numbers come out, either.
    "-ffp-contract=off",
    "-fno-math-errno",  # a square root is an instruction, and no call
    # Packed numbers are read as other types than they were written as.
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
)
_OLDEST_GLIBC: Final = "2.28"


class NoCompiler(Exception):
    """Neither the package ziglang nor CC is there, and nothing compiled. Install ziglang, or set CC."""

    def __init__(self) -> None:
        super().__init__("no compiled library and no compiler: pip install ziglang, or name a C compiler with CC")


class CompilationFailed(Exception):
    """The compiler refused, or could not be run. The message has what it said."""


@dataclass(frozen=True, slots=True)
class Compiler:
    command: tuple[str, ...]
    version: str

    @classmethod
    def found(cls) -> "Compiler | None":
        """CC of the environment, else the package ziglang."""
        if named := os.environ.get("CC"):
            command = tuple(shlex.split(named))
            return cls(command, _output((*command, "--version")))
        if importlib.util.find_spec("ziglang") is None:
            return None
        target = (f"{platform.machine()}-linux-gnu.{_OLDEST_GLIBC}",) if sys.platform == "linux" else ()
        # Zig's own additions: no checks of undefined behaviour, and no debug information, which is most of a file's size.
        added = ("-g0", "-fno-sanitize=undefined", *(("-target", *target) if target else ()))
        return cls((sys.executable, "-m", "ziglang", "cc", *added), importlib.metadata.version("ziglang"))

    def compile(self, into: Path, flags: tuple[str, ...] = FLAGS) -> None:
        """Raises CompilationFailed."""
        _output((*self.command, *flags, "-shared", *map(str, sorted(SOURCE.glob("*.c"))), "-o", str(into)))


def library_file() -> Path:
    """The compiled library; compiled first where it is not there yet. Raises NoCompiler, CompilationFailed."""
    compiler = Compiler.found()
    for folder in _folders():
        if kept := _kept(folder, compiler):
            return kept
    if compiler is None:
        raise NoCompiler
    return _compiled(compiler)


def _compiled(compiler: Compiler) -> Path:
    begun = time.perf_counter()
    file = _writable_folder() / _name(compiler)
    # Others may be compiling the same: whoever is last wins, and nobody finds half a file.
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


def _kept(folder: Path, compiler: Compiler | None) -> Path | None:
    """What that compiler has made of this source; without one, what any has."""
    found = folder.glob(_name(compiler)) if folder.is_dir() else iter(())
    return next(iter(sorted(found)), None)


def _name(compiler: Compiler | None) -> str:
    by = "*" if compiler is None else _digest(*compiler.command[1:], compiler.version)
    return f"layers-{_source_digest()}-{by}.so"


def _source_digest() -> str:
    files = sorted(SOURCE.glob("*.[ch]"))
    return _digest(*FLAGS, *(part for file in files for part in (file.name, file.read_text())))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _folders() -> Iterator[Path]:
    yield _BESIDE
    yield _of_user()


def _of_user() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamina"


def _writable_folder() -> Path:
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    raise CompilationFailed(f"neither {_BESIDE} nor {_of_user()} can be written")


def _output(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilationFailed(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise CompilationFailed(f"{shlex.join(command)}:\n{done.stderr}")
    return done.stdout
