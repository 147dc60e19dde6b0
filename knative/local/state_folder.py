"""`.lamina`: what a run on this machine leaves for `status`, for the next run, and for who wants to read the logs."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from knative.local.errors import StateError
from storage.errors import StorageError
from storage.store.settings import StoreSettings

DEFAULT_FOLDER: Final = Path(".lamina")
_FULL_BELOW_BYTES: Final = 2**20


class RunningPlatform(msgspec.Struct, frozen=True):
    """Where a running platform is."""

    pid: int
    admin_url: str
    gateway_url: str
    store: StoreSettings | None = None
    """Its embedded store, keys included: the file is for its owner's eyes only."""


class StateFolder:
    """Held by one run at a time. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self.recovered = False
        """An earlier run ended without cleaning up (killed, or the machine went down); what it left is gone now."""
        self._lock: int | None = None

    def __enter__(self) -> "StateFolder":
        """Raises StateError where another run has it, or it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._clean()
        except BlockingIOError as error:
            self._release()
            raise StateError(self._held_by()) from error
        except OSError as error:
            self._release()
            raise StateError(f"{self.path}: cannot be used: {error.strerror}; choose another folder with --state") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)
        self._release()

    def publish(self, running: RunningPlatform) -> None:
        """Makes the run known to `status` and the like, at once or not at all."""
        temporary = self._file.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_bytes(msgspec.json.encode(running))
        temporary.replace(self._file)

    @property
    def _file(self) -> Path:
        return self.path / "platform.json"

    def _clean(self) -> None:
        # Processes of a killed run die with it (processes.py), so files are all that can be left.
        self.recovered = self._file.exists()
        self._file.unlink(missing_ok=True)
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()

    def _held_by(self) -> str:
        running = find_running(self.path)
        where = f" (process {running.pid}, serving {running.gateway_url})" if running else ""
        return f"another run uses {self.path}{where}: end it with Ctrl-C, or give this one a folder of its own with --state"

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """A store that cannot write says no more than 500. Raises StateError instead where no room is left."""
    try:
        yield
    except StorageError as error:
        if (free := shutil.disk_usage(folder).free) >= _FULL_BELOW_BYTES:
            raise
        raise StateError(
            f"the disk of {folder} is full ({free // 1024} KiB left): free some, or choose --state; {error}"
        ) from error


def find_running(folder: Path) -> RunningPlatform | None:
    """The platform that runs with this state folder; None where there is none."""
    try:
        running = msgspec.json.decode((folder / "platform.json").read_bytes(), type=RunningPlatform)
    except (OSError, msgspec.MsgspecError):
        return None
    return running if _is_held(folder / "lock") else None


def _is_held(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
