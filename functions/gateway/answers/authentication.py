"""Identifies clients: by API key if the gateway has keys, else by the address that the platform's first proxy saw.

Keys come from the environment and from files. A changed file is read again within a second: a key that was removed is refused
from then on, and answers that have begun are finished. Kubernetes updates a mounted Secret some time after it was changed
(docs/operating.md).
"""

import hmac
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from flask import Request

from eventing.problems import Unauthorized
from functions.configuration.api_keys import ApiKey, Quota, parse_keys, sha256_of
from functions.configuration.settings import ConfigError

_log: Final = logging.getLogger(__name__)

_CHECK_SECONDS: Final = 0.5  # between looks at the files
_MAX_ADDRESS_CHARACTERS: Final = 64


class KeyRing:
    """The API keys that are valid now. Thread-safe."""

    def __init__(self, keys: Sequence[ApiKey] | None = None, files: Sequence[str] = ()) -> None:
        """Without keys and files the gateway is open to all. Raises ConfigError for a file that cannot be read or parsed."""
        self._fixed = tuple(keys or ())
        self._files = [_KeyFile(Path(path)) for path in files]
        self.is_open = keys is None and not self._files
        self._lock = threading.Lock()
        errors = [error for file in self._files if (error := file.read()) is not None]
        if errors:
            raise ConfigError(errors)
        self._collect()

    def find(self, secret: str) -> ApiKey | None:
        self._read_changed_files()
        hashed = sha256_of(secret)
        found = self._by_hash.get(hashed)
        # The time of the look-up may reveal how much of a hash matched, which is of no use without a key for that hash.
        return found if found is not None and hmac.compare_digest(found.hashed, hashed) else None

    def quota(self, client_id: str) -> Quota:
        """The quota that is written beside the client's key; an empty one if there is none."""
        found = self._by_id.get(client_id)
        return Quota() if found is None else found.quota

    def _read_changed_files(self) -> None:
        if not self._files or time.monotonic() < self._check_at or not self._lock.acquire(blocking=False):
            return
        try:
            changed = [file for file in self._files if file.state() != file.seen]
            for file in changed:
                if (error := file.read()) is not None:
                    _log.error("%s; its keys stay as they were", error)
            self._collect()
            if changed:
                _log.info("%d API keys are valid now", len(self._by_hash))
        finally:
            self._lock.release()

    def _collect(self) -> None:
        """The first entry counts if a key is listed twice."""
        keys = [*self._fixed, *(key for file in self._files for key in file.keys)]
        self._by_hash = {key.hashed: key for key in reversed(keys)}
        self._by_id = {key.id: key for key in reversed(keys)}
        self._check_at = time.monotonic() + _CHECK_SECONDS


class _KeyFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.seen: tuple[int, ...] = ()  # the state that was read
        self.keys: tuple[ApiKey, ...] = ()

    def read(self) -> str | None:
        """Returns an error, or None. An empty or removed file has no keys; one with an error keeps the keys that it had."""
        existed, self.seen = bool(self.seen), self.state()
        try:
            self.keys = parse_keys(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.keys = ()
            return None if existed else f"{self._path}: there is no such file of API keys"
        except (OSError, UnicodeDecodeError) as error:
            return f"{self._path}: cannot be read ({type(error).__name__})"
        except ValueError as error:
            return f"{self._path}: {error}"
        return None

    def state(self) -> tuple[int, ...]:
        """Changes when the file is replaced, as Kubernetes does, and when it is written to."""
        try:
            found = os.stat(self._path)
        except OSError:
            return (0,)
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Clients:
    """proxies: how many proxies every request passes.

    Each proxy appends the address of its peer to X-Forwarded-For. A client writes the entries before those itself, and could
    write others for each request, to get a queue of its own each time.
    """

    def __init__(self, keys: KeyRing, proxies: int = 0) -> None:
        self._keys = keys
        self._proxies = proxies

    def identify(self, request: Request) -> str:
        """The client's id, by which the pipeline is shared fairly; it is no secret. Raises Unauthorized."""
        if self._keys.is_open:
            entries = request.headers.get("X-Forwarded-For", "").split(",")
            forwarded = entries[-self._proxies].strip() if 0 < self._proxies <= len(entries) else ""
            return forwarded[:_MAX_ADDRESS_CHARACTERS] or request.remote_addr or "unknown"
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        key = self._keys.find(secret.strip())
        if scheme.lower() != "bearer" or key is None:
            seen = "another key" if secret else "no Authorization header"
            raise Unauthorized(f"{seen}; send Authorization: Bearer with one of the gateway's API keys")
        return key.id
