"""The adapters (LoRA) that a stage keeps in memory.

An adapter is loaded when a sequence first names it. A separate thread reads and converts it while the engine computes. As soon
as an adapter is claimed, it has a number in the layer group. If a new adapter finds no free number, the least recently claimed
adapter that no sequence uses is dropped.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from eventing.problems import NotReady
from eventing.wire.events import Status
from functions.stage.engine.sequences import Refusal
from functions.stage.models.adapters import WrongAdapter
from functions.stage.models.layer_group import LayerGroup, PreparedAdapter
from functions.threads.pool import ThreadPool
from storage.errors import StorageError
from storage.loading.weight_loader import RawTensor

_log: Final = logging.getLogger(__name__)

_AT_ONCE: Final = 4  # adapters that are loaded at a time
_FAILED_SECONDS: Final = 10.0  # after a failed load the same adapter is refused for so long

LoadAdapter = Callable[[bytes], Mapping[str, RawTensor]]
"""Reads the tensors of an adapter's version for the stage's layers. Raises a StorageError or WrongAdapter."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """The outcome of loading an adapter, successful or not. For metrics."""

    seconds: float
    bytes: int  # of memory; 0 if the load failed
    failed: bool


@dataclass(slots=True)
class _Slot:
    number: int  # in the layer group
    over: "Future[None]" = field(default_factory=Future)  # of its load
    bytes: int = 0
    ready: bool = False


class AdapterTable:
    """Keeps the adapters of a stage, each under the digest of its version.

    Only the thread that holds the engine's lock may call it, except for `is_ready`, `refusal`, `loaded` and `loaded_bytes`.
    """

    def __init__(
        self,
        group: LayerGroup,
        most: int,
        load: LoadAdapter | None,
        call: Callable[[Callable[[], None]], None],
        in_use: Callable[[], Collection[bytes]],
        on_load: Callable[[LoadedAdapter], None] = lambda loaded: None,
    ) -> None:
        """Creates an empty table. Nothing is loaded before the first `claim`.

        most: greatest number of adapters in memory. load: None if the stage keeps no adapters.

        call: runs a function on the engine's thread between two passes, and raises NotReady after the engine has stopped.
        in_use: returns the digests of the adapters that sequences use now. on_load: called after each load.
        """
        self._group = group
        self._load = load
        self._call = call
        self._in_use = in_use
        self._on_load = on_load
        self._slots: OrderedDict[bytes, _Slot] = OrderedDict()  # least recently claimed first
        self._free = list(range(most, 0, -1)) if load is not None else []
        self._most = len(self._free)
        self._failed: dict[bytes, tuple[float, str]] = {}  # until when, in time.monotonic(), and why
        self._threads = ThreadPool(_AT_ONCE, "adapter")

    @property
    def loaded(self) -> int:
        return sum(slot.ready for slot in list(self._slots.values()))

    @property
    def loaded_bytes(self) -> int:
        """Bytes of memory that loaded adapters take."""
        return sum(slot.bytes for slot in list(self._slots.values()))

    def is_ready(self, adapter: bytes) -> bool:
        slot = self._slots.get(adapter)
        return slot is not None and slot.ready

    def claim(self, adapter: bytes) -> "Future[None]":
        """Marks an adapter as the most recently used, and begins to load it if it is not in memory.

        Returns a future that completes when the load has ended, successfully or not. Raises Refusal with status FULL if
        sequences use all adapters that fit, and INVALID if the stage keeps no adapters or this one failed to load lately.
        """
        slot = self._slots.get(adapter)
        if slot is None:
            self._check(adapter)
            slot = self._slots[adapter] = _Slot(self._number())
            self._threads.submit(self._fetch, adapter, slot)
        self._slots.move_to_end(adapter)
        return slot.over

    def number(self, adapter: bytes) -> int:
        """Returns the number of an adapter in the layer group. Raises Refusal if the adapter is not loaded."""
        self._check(adapter)
        slot = self._slots.get(adapter)
        if slot is None or not slot.ready:
            raise Refusal(Status.MISS, held=0, reason="its adapter is not loaded")
        self._slots.move_to_end(adapter)
        return slot.number

    def refusal(self, adapter: bytes) -> str | None:
        """Returns why the adapter failed to load in the last seconds. None if no load of it failed lately."""
        until, reason = self._failed.get(adapter, (0.0, ""))
        return reason if time.monotonic() < until else None

    def _check(self, adapter: bytes) -> None:
        if self._load is None:
            raise Refusal(Status.INVALID, reason="this stage keeps no adapters: set `adapters` in the pipeline's spec")
        if (reason := self.refusal(adapter)) is not None:
            raise Refusal(Status.INVALID, reason=reason)

    def _number(self) -> int:
        """Returns a free number. Drops an unused adapter if none is free. Raises Refusal if all adapters are in use."""
        if not self._free:
            in_use = self._in_use()
            for adapter, slot in self._slots.items():
                if slot.ready and adapter not in in_use:
                    del self._slots[adapter]
                    self._group.place_adapter(slot.number, None)
                    return slot.number
            raise Refusal(Status.FULL, held=0, reason=f"all {self._most} adapters that this stage keeps are in use")
        return self._free.pop()

    def _fetch(self, adapter: bytes, slot: _Slot) -> None:
        """Loads an adapter. Runs in a thread of its own."""
        began = time.perf_counter()
        try:
            try:
                assert self._load is not None
                prepared = self._group.prepare_adapter(self._load(adapter))
            except (StorageError, WrongAdapter) as error:
                self._fail(adapter, f"adapter {adapter.hex()}: {error}")
            except Exception as error:  # noqa: BLE001 - the end of a thread; the adapter's sequences are told
                _log.exception("adapter %s", adapter.hex())
                self._fail(adapter, f"adapter {adapter.hex()}: {type(error).__name__}; the stage's log has the traceback")
            else:
                self._call(lambda: self._place(slot, prepared))
                _log.info(
                    "adapter %s is in, %d bytes, after %.2f s", adapter.hex(), prepared.bytes, time.perf_counter() - began
                )
            self._on_load(LoadedAdapter(time.perf_counter() - began, slot.bytes, not slot.ready))
        except NotReady:
            pass  # the stage stops
        finally:
            slot.over.set_result(None)

    def _place(self, slot: _Slot, prepared: PreparedAdapter) -> None:
        self._group.place_adapter(slot.number, prepared)
        slot.bytes, slot.ready = prepared.bytes, True

    def _fail(self, adapter: bytes, reason: str) -> None:
        _log.warning("%s", reason)

        def forget() -> None:
            self._free.append(self._slots.pop(adapter).number)
            now = time.monotonic()
            self._failed = {each: failed for each, failed in self._failed.items() if failed[0] > now}
            self._failed[adapter] = (now + _FAILED_SECONDS, reason)

        self._call(forget)
