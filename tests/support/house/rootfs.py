"""The image's file system as a folder: the Containerfile's own steps, run and entered through user namespaces.

`python -m tests.support.house.rootfs FOLDER [COMMAND…]` becomes the container's entrypoint in it, or another command, with this
process's environment.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.support.house.containerfile import Stage, Step, read_containerfile
from tests.support.paths import ROOT

_ENTER: Final = Path(__file__).with_name("enter_rootfs.sh")
_BASE: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LD_LIBRARY_PATH": "/usr/local/lib", "LANG": "C.UTF-8"}
"""What a base image with Python in /usr/local sets."""
_UNSHARE: Final = ("unshare", "--user", "--map-root-user", "--mount")


def stages(**build_arguments: str) -> dict[str, Stage]:
    return read_containerfile(ROOT / "Containerfile", _BASE, **build_arguments)


def refusal() -> str | None:
    """Why the kernel of this machine refuses user namespaces, or None."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return "unshare or setpriv is not installed (package util-linux)"
    command = [*_UNSHARE, "sh", "-c", "mount --bind /usr /usr && unshare --user --map-user=65532 true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"no user namespaces for us here: {tried.stderr.strip()}"


def build(folder: Path, target: str) -> None:
    """Builds each stage in its own folder; the target's is `folder`. Raises CalledProcessError if a step fails."""
    with ExitStack() as others:
        _Build(others).build(folder, target)


def size_bytes(folder: Path) -> int:
    """Size of everything that the Containerfile adds to its base image."""
    files = (path for top in ("lamina", "venv") for path in (folder / top).rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())


class _Build:
    """Stages that others take something from are built once."""

    def __init__(self, folders: ExitStack) -> None:
        self._folders = folders
        self._stages = stages()
        self._built: dict[str, Path] = {}

    def build(self, folder: Path, target: str) -> None:
        stage = self._stages[target]
        if stage.base in self._stages:
            _copy_tree(self._other(stage.base), folder)
        for step in stage.steps:
            self._run(step, folder, stage)

    def _other(self, name: str) -> Path:
        if name not in self._built:
            self._built[name] = Path(self._folders.enter_context(tempfile.TemporaryDirectory(prefix=f"lamina-{name}-")))
            self.build(self._built[name], name)
        return self._built[name]

    def _run(self, step: Step, folder: Path, stage: Stage) -> None:
        words = step.value.split()
        if step.instruction == "RUN":
            environ = {**step.environment, **_pip_configuration()}
            subprocess.run(_entering("build", folder, stage, ["sh", "-ec", step.value]), env=environ, check=True)
        elif words[0].startswith("--from="):
            source, target = (place.lstrip("/") for place in words[1:])
            _copy_tree(self._other(words[0].removeprefix("--from=")) / source, folder / target)
        else:
            *sources, target = words
            _copy([ROOT / source for source in sources], folder / stage.workdir.lstrip("/"), target)


def _copy(sources: Sequence[Path], workdir: Path, target: str) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    for origin in sources:
        if origin.is_dir():
            shutil.copytree(origin, workdir / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, workdir / target)


def _copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)


def _entering(mode: str, folder: Path, stage: Stage, command: Sequence[str]) -> list[str]:
    arguments = [mode, str(folder), sys.base_prefix, stage.workdir, stage.user, *command]
    return [*_UNSHARE, "bash", str(_ENTER), *arguments]


def _pip_configuration() -> Mapping[str, str]:
    """This machine's package indexes as environment variables, since the user's pip.conf is not in the folder."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = (line.partition("=") for line in listed.splitlines())
    return {f"PIP_{name.split('.')[-1].upper().replace('-', '_')}": value.strip("'\"") for name, _, value in settings}


def _become(folder: Path, command: Sequence[str]) -> None:
    stage = stages()["lean"]  # `full` is run alike, which a test holds
    environ = {**os.environ, **stage.environment}
    whole = _entering("run", folder, stage, command or stage.entrypoint)
    os.execvpe(whole[0], whole, environ)


if __name__ == "__main__":
    _become(Path(sys.argv[1]), sys.argv[2:])
