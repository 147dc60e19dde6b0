"""Identifies clients: by API key if the gateway has keys, else by the address that the platform's first proxy saw.

Keys come from the environment and from files. A changed file is read again within a second. From then on a key that was removed
is refused; answers that have begun are finished. Kubernetes updates mounted Secrets late (docs/operating.md).
"""

import hmac
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from flask import Request

from eventing.problems import Unauthorized
from functions.configuration.api_keys import ApiKey, Quota, parse_keys, sha256_of
from functions.configuration.settings import ConfigError

_log: Final = logging.getLogger(__name__)

_CHECK_SECONDS: Final = 0.5  # least time between two checks whether the files have changed
_MAX_ADDRESS_CHARACTERS: Final = 64


class KeyRing:
    """The API keys that are valid now. Thread-safe."""

    def __init__(self, keys: Sequence[ApiKey] | None = None, files: Sequence[str] = (), *, takes_budgets: bool = True) -> None:
        """Reads the files. If `keys` is None and there are no files, the gateway is open to all.

        If `takes_budgets`, a store counts budgets. Otherwise a key with a budget is an error. Raises ConfigError for such a
        key, and for a file that cannot be read or parsed.
        """
        self._fixed = tuple(keys or ())
        self._files = [_KeyFile(Path(path), takes_budgets=takes_budgets) for path in files]
        self.is_open = keys is None and not self._files
        self._lock = threading.Lock()
        errors = [error for file in self._files if (error := file.read()) is not None]
        if not takes_budgets and (uncounted := _uncounted_budget(self._fixed)):
            errors.append(f"LAMINA_API_KEYS: {uncounted}")
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
        """Returns the quota of this client's key. It has no limits if the key is unknown or has no quota."""
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
        """Builds the look-up tables from all lists of keys. If a key is listed twice, its first entry counts."""
        keys = [*self._fixed, *(key for file in self._files for key in file.keys)]
        self._by_hash = {key.hashed: key for key in reversed(keys)}
        self._by_id = {key.id: key for key in reversed(keys)}
        self._check_at = time.monotonic() + _CHECK_SECONDS


def _uncounted_budget(keys: Sequence[ApiKey]) -> str | None:
    """Returns a sentence that names the first key with a budget, which nothing would count. None if no key has one."""
    found = next((key for key in keys if key.quota.has_budget), None)
    if found is None:
        return None
    return f"key {found.id} has a budget, which takes a store: set gateway.limits_secret in the spec (LAMINA_LIMITS_STORE)"


class _KeyFile:
    def __init__(self, path: Path, *, takes_budgets: bool) -> None:
        self._path = path
        self._takes_budgets = takes_budgets
        self.seen: tuple[int, ...] = ()  # `state` at the last read; empty before the first
        self.keys: tuple[ApiKey, ...] = ()

    def read(self) -> str | None:
        """Reads the file into `keys`. Returns a sentence that says what is wrong with the file, or None.

        A file that is empty, or was removed after an earlier read, has no keys. After any other error `keys` stay as they were.
        """
        existed, self.seen = bool(self.seen), self.state()
        try:
            keys = parse_keys(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.keys = ()
            return None if existed else f"{self._path}: there is no such file of API keys"
        except (OSError, UnicodeDecodeError) as error:
            return f"{self._path}: cannot be read ({type(error).__name__})"
        except ValueError as error:
            return f"{self._path}: {error}"
        if not self._takes_budgets and (uncounted := _uncounted_budget(keys)):
            return f"{self._path}: {uncounted}"
        self.keys = keys
        return None

    def state(self) -> tuple[int, ...]:
        """Returns a value that changes when the file is written to or replaced. Kubernetes replaces it."""
        try:
            found = os.stat(self._path)
        except OSError:
            return (0,)
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Clients:
    """Identifies the client of a request: by its API key, or by its address if the gateway has no keys.

    `find` returns the valid API key with a given text. If `find` is None, the gateway has no keys. `wanted` names, for errors,
    the keys that are taken.

    `proxies` is the number of proxies that every request passes. If it is 0, X-Forwarded-For is ignored. Each proxy appends the
    address of its peer to that header. Earlier entries are not used: a client writes them, and could pass for another client
    each time.
    """

    def __init__(
        self, find: Callable[[str], ApiKey | None] | None, proxies: int = 0, wanted: str = "one of the gateway's API keys"
    ) -> None:
        self._find = find
        self._proxies = proxies
        self._wanted = wanted
        self.are_known = find is not None  # by their API keys

    def identify(self, request: Request) -> str:
        """Returns the client's id, by which the pipeline is shared fairly. The id is no secret.

        Raises Unauthorized if the gateway has keys and the request has no valid one.
        """
        if self._find is None:
            entries = request.headers.get("X-Forwarded-For", "").split(",")
            forwarded = entries[-self._proxies].strip() if 0 < self._proxies <= len(entries) else ""
            return forwarded[:_MAX_ADDRESS_CHARACTERS] or request.remote_addr or "unknown"
        header = request.headers.get("Authorization", "")
        key = self._find(bearer_token(header))
        if key is None:
            seen = "another key" if header else "no Authorization header"
            raise Unauthorized(f"{seen}; send Authorization: Bearer with {self._wanted}")
        return key.id


def bearer_token(header: str) -> str:
    """Returns the API key in an Authorization header. Empty if there is none."""
    scheme, _, secret = header.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""
