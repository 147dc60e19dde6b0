"""Programs and libraries of C that tests compile."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from functions.stage.native.compiler import FLAGS, SOURCE, CompilationFailed
from functions.stage.native.library import library

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Compiles C files with FLAGS and more options; raises CompilationFailed.

    Compiling takes up to a minute, so what an earlier run made of the same source with the same command is used again.
    """
    folder = Path(request.config.cache.mkdir("compiled"))

    def compile_(compiler: Sequence[str], files: Sequence[Path], options: Sequence[str]) -> Path:
        command = [*compiler, *FLAGS, "-I", str(SOURCE), *map(str, files), *options]
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        sources = [path.read_bytes() for path in sorted((*SOURCE.glob("*.[ch]"), *HERE.glob("*.c")))]
        label = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
        file = folder / f"{label}-{hashlib.sha256(b''.join([version, *sources])).hexdigest()[:16]}"
        if not file.exists():
            handle, made = tempfile.mkstemp(dir=folder)
            os.close(handle)
            done = subprocess.run([*command, "-o", made], capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompilationFailed(done.stdout + done.stderr)
            os.chmod(made, 0o755)
            for old in folder.glob(f"{label}-*"):
                old.unlink()
            os.replace(made, file)
        return file

    return compile_


@pytest.fixture(scope="session")
def own_sources() -> list[str | Path]:
    """C files of the library, and options to link them, without levels that this CPU does not have: no call reaches those."""
    files = sorted(SOURCE.glob("*.c"))
    absent = [path for path in files if path.match("level_*") and path.stem.removeprefix("level_") not in library().levels]
    return [
        *(path for path in files if path not in absent),
        *(f"-Wl,--defsym={path.stem.replace('level', 'lamina', 1)}=0" for path in absent),
    ]
