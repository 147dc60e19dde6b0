"""The API keys that are good now: those of the environment, and those of files, which are read again when they change.

A key that is taken out of its file is refused from the next look on, less than a second later; an answer that has begun comes
to its end. Kubernetes writes a mounted Secret anew some time after it was changed (docs/operating.md).
"""

import hmac
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from functions.configuration.api_keys import Allowance, ApiKey, parse_keys, sha256_of
from functions.configuration.settings import ConfigError

_log: Final = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 0.5


class KeyRing:
    """Thread-safe."""

    def __init__(self, keys: Sequence[ApiKey] | None = None, files: Sequence[str] = ()) -> None:
        """keys: None and no files: open to all. Raises ConfigError for a file that cannot be read or understood."""
        self._fixed = tuple(keys or ())
        self._files = [_File(Path(path)) for path in files]
        self.is_open = keys is None and not self._files
        self._lock = threading.Lock()
        errors = [error for file in self._files if (error := file.read()) is not None]
        if errors:
            raise ConfigError(errors)
        self._gather()

    def find(self, secret: str) -> ApiKey | None:
        self._look()
        hashed = sha256_of(secret)
        found = self._by_hash.get(hashed)
        # Looking up hashes says how much of a hash was right, which is of no use to whoever has to find a key for it.
        return found if found is not None and hmac.compare_digest(found.hashed, hashed) else None

    def allowance(self, client_id: str) -> Allowance:
        """What its key says; nothing where there is no such key."""
        found = self._by_id.get(client_id)
        return Allowance() if found is None else found.allowance

    def _look(self) -> None:
        if not self._files or time.monotonic() < self._look_at or not self._lock.acquire(blocking=False):
            return
        try:
            changed = [file for file in self._files if file.has_changed()]
            for file in changed:
                if (error := file.read()) is not None:
                    _log.error("%s; its keys stay as they were", error)
            self._gather()
            if changed:
                _log.info("%d API keys are good now", len(self._by_hash))
        finally:
            self._lock.release()

    def _gather(self) -> None:
        """Where a key is written twice, the first one counts."""
        keys = [*self._fixed, *(key for file in self._files for key in file.keys)]
        self._by_hash = {key.hashed: key for key in reversed(keys)}
        self._by_id = {key.id: key for key in reversed(keys)}
        self._look_at = time.monotonic() + _LOOK_SECONDS


class _File:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self.keys: tuple[ApiKey, ...] = ()

    def has_changed(self) -> bool:
        return self._stat() != self._seen

    def read(self) -> str | None:
        """What is wrong with it. One that is empty, or has gone, has no keys; one that is broken has those it had."""
        there, self._seen = bool(self._seen), self._stat()
        try:
            self.keys = parse_keys(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.keys = ()
            return None if there else f"{self._path}: there is no such file of API keys"
        except (OSError, UnicodeDecodeError) as error:
            return f"{self._path}: cannot be read ({type(error).__name__})"
        except ValueError as error:
            return f"{self._path}: {error}"
        return None

    def _stat(self) -> tuple[int, ...]:
        """Kubernetes puts another file in its place, people write into it."""
        try:
            found = os.stat(self._path)
        except OSError:
            return (0,)
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
