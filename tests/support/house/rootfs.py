"""The image's file system as a folder: the Containerfile's own steps, run and entered through user namespaces.

`python -m tests.support.house.rootfs FOLDER [COMMAND…]` becomes the container's entrypoint in it, or another command, with this
process's environment.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.support.house.containerfile import Containerfile, read_containerfile
from tests.support.paths import ROOT

_ENTER: Final = Path(__file__).with_name("enter_rootfs.sh")
_BASE: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LD_LIBRARY_PATH": "/usr/local/lib", "LANG": "C.UTF-8"}
"""What a base image with Python in /usr/local sets."""
_UNSHARE: Final = ("unshare", "--user", "--map-root-user", "--mount")


def containerfile(**build_arguments: str) -> Containerfile:
    return read_containerfile(ROOT / "Containerfile", _BASE, **build_arguments)


def refusal() -> str | None:
    """Why the kernel of this machine does not let us; None where it does."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return "unshare or setpriv is not installed (package util-linux)"
    command = [*_UNSHARE, "sh", "-c", "mount --bind /usr /usr && unshare --user --map-user=65532 true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"no user namespaces for us here: {tried.stderr.strip()}"


def build(folder: Path) -> None:
    """Raises CalledProcessError where a step fails."""
    file = containerfile()
    for step in file.steps:
        if step.instruction == "COPY":
            *sources, target = step.value.split()
            _copy(sources, folder / file.workdir.lstrip("/"), target)
        else:
            environ = {**step.environment, **_pip_configuration()}
            subprocess.run(_entering("build", folder, file, ["sh", "-ec", step.value]), env=environ, check=True)


def _copy(sources: Sequence[str], workdir: Path, target: str) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    for source in sources:
        origin = ROOT / source
        if origin.is_dir():
            shutil.copytree(origin, workdir / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, workdir / target)


def _entering(mode: str, folder: Path, file: Containerfile, command: Sequence[str]) -> list[str]:
    arguments = [mode, str(folder), sys.base_prefix, file.workdir, file.user, *command]
    return [*_UNSHARE, "bash", str(_ENTER), *arguments]


def _pip_configuration() -> Mapping[str, str]:
    """Where this machine has its packages from; a file of a person's own would not be there."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = (line.partition("=") for line in listed.splitlines())
    return {f"PIP_{name.split('.')[-1].upper().replace('-', '_')}": value.strip("'\"") for name, _, value in settings}


def _become(folder: Path, command: Sequence[str]) -> None:
    file = containerfile()
    environ = {**os.environ, **file.environment}
    whole = _entering("run", folder, file, command or file.entrypoint)
    os.execvpe(whole[0], whole, environ)


if __name__ == "__main__":
    _become(Path(sys.argv[1]), sys.argv[2:])
