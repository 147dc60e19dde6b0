"""`.lamina`, the state folder: files of a run on this machine, for `status`, the next run and readers of the logs."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from knative.local.errors import LocalError
from storage.errors import StorageError
from storage.store.settings import StoreSettings

DEFAULT_FOLDER: Final = Path(".lamina")
_FULL_BELOW_BYTES: Final = 2**20


class StateError(LocalError):
    """The state folder cannot be used now. The message says what to do."""


class RunningPlatform(msgspec.Struct, frozen=True):
    """Process, addresses and store of a platform that runs on this machine."""

    pid: int
    admin_url: str
    gateway_url: str
    store: StoreSettings | None = None  # the embedded store, keys included: only the file's owner may read it


class StateFolder:
    """The state folder of a run. As a context manager it is locked, so that only one run at a time uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self.recovered = False  # whether an earlier run was killed, so that its leftovers had to be removed
        self._lock: int | None = None
        self._file = path / "platform.json"

    def __enter__(self) -> "StateFolder":
        """Locks the folder, and removes what an earlier run has left.

        Raises StateError if another run holds the lock, or if the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The processes of a killed run died with it (processes.py), so only files can be left.
            self.recovered = self._file.exists()
            self._file.unlink(missing_ok=True)
            shutil.rmtree(self.logs, ignore_errors=True)
            self.logs.mkdir()
        except BlockingIOError as error:
            self._release()
            running = find_running(self.path)
            where = f" (process {running.pid}, serving {running.gateway_url})" if running else ""
            raise StateError(
                f"another run uses {self.path}{where}: end it with Ctrl-C, or give this one a folder of its own with --state"
            ) from error
        except OSError as error:
            self._release()
            raise StateError(f"{self.path}: cannot be used: {error.strerror}; choose another folder with --state") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)
        self._release()

    def publish(self, running: RunningPlatform) -> None:
        """Writes the platform's addresses to the file that `find_running` reads."""
        replace_file(self._file, msgspec.json.encode(running))

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file that is always whole for readers, even if this process is killed. A new one is only its owner's."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with open(handle, "wb") as file:
        file.write(data)
    if path.exists():
        os.chmod(temporary, path.stat().st_mode)
    os.replace(temporary, path)


@contextlib.contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Context manager that raises StateError in place of a StorageError if the disk of the folder is full.

    A store only answers 500 then, which does not tell the user what to do.
    """
    try:
        yield
    except StorageError as error:
        if (free := shutil.disk_usage(folder).free) >= _FULL_BELOW_BYTES:
            raise
        raise StateError(
            f"the disk of {folder} is full ({free // 1024} KiB left): free some, or choose --state; {error}"
        ) from error


def find_running(folder: Path) -> RunningPlatform | None:
    """The platform that runs with this state folder; None if none does."""
    try:
        running = msgspec.json.decode((folder / "platform.json").read_bytes(), type=RunningPlatform)
    except (OSError, msgspec.MsgspecError):
        return None
    try:
        with (folder / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return running  # the run still holds its lock
    except OSError:
        pass
    return None
