"""The names that clients may give as `model`: the served model, and its adapters as the store lists them."""

import hashlib
import threading
import time
from typing import Final

from eventing.problems import ModelNotFound, NotReady
from storage.errors import AdapterNotPublished, StorageError
from storage.models.adapters import AdapterName, list_adapters, read_name
from storage.store.payload_store import PayloadStore

_FRESH_SECONDS: Final = 5.0  # what was read from the store is used for so long
_RETRY_SECONDS: Final = 1.0  # between two listings for names that are unknown
_MAX_LABELS: Final = 100  # adapters with a label of their own in metrics


def is_not_served(requested: str, served: str) -> str:
    """Returns the error message for a model that the gateway lacks. `served` lists the names of its models, as text."""
    return f"The model {requested!r} is not served here; this gateway serves {served!r}"


class ServedModels:
    """The served model and its adapters. Thread-safe. Methods raise ModelNotFound, or NotReady if the store cannot be asked.

    The store is asked when a client names an adapter. The versions of a name are read again after a few seconds. If that fails,
    the versions that are known stay in use.
    """

    def __init__(self, model: str, store: PayloadStore | None) -> None:
        """Reads nothing yet. If `store` is None, no adapters are served."""
        self.model = model
        self._store = store
        self._lock = threading.Lock()  # held while the store is asked: others wait for the same answer
        self._listed: frozenset[str] = frozenset()
        self._listed_at = -_FRESH_SECONDS
        self._read: dict[str, tuple[float, AdapterName]] = {}
        self._labels: set[str] = set()

    def names(self) -> list[str]:
        """Returns all names, the model's own first."""
        return [self.model, *(f"{self.model}:{name}" for name in sorted(self._list(_FRESH_SECONDS)))]

    def digests(self) -> dict[str, frozenset[bytes]]:
        """Returns all adapters by name, each with the digests of its versions.

        Digests are missing for an adapter that no request has named lately.
        """
        names = self._list(_FRESH_SECONDS)
        read = dict(self._read)
        return {
            name: frozenset(bytes.fromhex(each.version) for each in read[name][1].versions) if name in read else frozenset()
            for name in sorted(names)
        }

    def check(self, requested: str) -> None:
        """Raises ModelNotFound for a name that no adapter can have. Does not ask the store."""
        of_this_model = requested.startswith(f"{self.model}:")
        if requested != self.model and (self._store is None or not of_this_model):
            hint = "; it keeps no adapters: set `adapters` in the spec" if of_this_model else ""
            raise ModelNotFound(is_not_served(requested, self.model) + hint)

    def adapter(self, requested: str, request_id: str) -> bytes:
        """Returns the digest of the adapter version that a request gets. Empty for the model itself.

        `request_id` decides between versions that share a name, so that a repeated request gets the same version.
        """
        self.check(requested)
        if requested == self.model:
            return b""
        name, _, wanted = requested.removeprefix(f"{self.model}:").partition("@")
        named = self._versions(name)
        if not wanted:
            point = int.from_bytes(hashlib.sha256(f"{name} {request_id}".encode()).digest()[:6]) / 2**48
            return bytes.fromhex(named.version_at(point))
        chosen = [each.version for each in named.versions if each.version.startswith(wanted)]
        if len(chosen) != 1:
            raise ModelNotFound(
                f"{requested!r} names {len(chosen)} versions of the adapter {name!r}; it has {len(named.versions)}"
            )
        return bytes.fromhex(chosen[0])

    def label(self, requested: str) -> str:
        """Returns the metrics label of a served name.

        Adapters beyond a limit share one label, which bounds the number of series.
        """
        name = requested.partition("@")[0]
        if name == self.model or name in self._labels:
            return name
        with self._lock:
            if len(self._labels) < _MAX_LABELS:
                self._labels.add(name)
                return name
        return f"{self.model}:other"

    def _versions(self, name: str) -> AdapterName:
        now = time.monotonic()
        read_at, known = self._read.get(name, (-_FRESH_SECONDS, None))
        if known is not None and now - read_at < _FRESH_SECONDS:
            return known
        if name not in self._list(_FRESH_SECONDS) and name not in self._list(_RETRY_SECONDS):
            raise ModelNotFound(
                f"The model {self.model!r} has no adapter {name!r} here; GET /v1/models lists its adapters, "
                "and push-adapter publishes one"
            )
        with self._lock:
            assert self._store is not None
            try:
                known = read_name(self._store, self.model, name)
            except AdapterNotPublished as error:  # deleted just now
                raise ModelNotFound(str(error)) from error
            except StorageError as error:
                if known is None:
                    raise NotReady(f"the store of adapters failed: {error}") from error
            self._read[name] = (now, known)
        return known

    def _list(self, fresh_seconds: float) -> frozenset[str]:
        """Returns the names of all adapters, from a listing that is at most `fresh_seconds` old."""
        if self._store is None:
            return frozenset()
        with self._lock:
            now = time.monotonic()
            if now - self._listed_at >= fresh_seconds:
                try:
                    self._listed = frozenset(list_adapters(self._store, self.model))
                except StorageError as error:
                    if not self._listed:
                        raise NotReady(f"the store of adapters failed: {error}") from error
                self._listed_at = now
                for name in self._read.keys() - self._listed:
                    del self._read[name]
            return self._listed
