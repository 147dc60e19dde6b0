"""Instances that are ready before Kubernetes says so: asked as the activator asks them, through their queue-proxy.

queue-proxy answers a request with `K-Network-Probe: queue` itself: 200 and `queue` once the function is ready, whom it asks
every 50 ms for up to ten seconds, and counts no such request (knative/serving pkg/queue/health, pkg/queue/readiness). The
kubelet asks the same when a container starts, gives up after a second and comes again ten seconds later: an EndpointSlice
alone is that late.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import urllib3

from functions.gateway.stages.instances import Endpoint

_log = logging.getLogger(__name__)

_PROBE: Final = {"K-Network-Probe": "queue", "User-Agent": "lamina-gateway"}
_PASSED: Final = b"queue"
_CONNECT_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 12.0
"""Longer than queue-proxy holds the question."""
_PAUSE_SECONDS: Final = 0.2
"""The activator's, after an answer that was no."""

OnChange = Callable[[int, Sequence[Endpoint] | None], None]
"""Stage and all its endpoints, whenever they changed; None when they cannot be known."""


class EarlyReadiness:
    """Stands between the watch and `on_change`, which it tells of instances as ready that have said so themselves."""

    def __init__(self, on_change: OnChange) -> None:
        self._on_change = on_change
        self._lock = threading.Lock()
        """Held while `on_change` is told, so that what is newer is told later."""
        self._known: dict[int, Sequence[Endpoint]] = {}
        self._ready: set[str] = set()
        """URLs that have said so, until Kubernetes says it too, or calls them gone."""
        self._asked: set[str] = set()
        """URLs for which a thread is asking."""
        self._stopped = threading.Event()
        self._pool = urllib3.PoolManager(num_pools=64, retries=False)

    def endpoints_changed(self, stage: int, endpoints: Sequence[Endpoint] | None) -> None:
        with self._lock:
            if endpoints is None:
                self._known.pop(stage, None)
                self._on_change(stage, None)
                return
            self._known[stage] = endpoints
            self._ready &= set(self._starting())
            self._tell(stage)
            asked = [each.url for each in endpoints if _starts(each) and each.url not in self._ready | self._asked]
            self._asked.update(asked)
        for url in asked:
            threading.Thread(target=self._ask, args=(stage, url), name="readiness", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        self._pool.clear()

    def _starting(self) -> list[str]:
        return [each.url for endpoints in self._known.values() for each in endpoints if _starts(each)]

    def _tell(self, stage: int) -> None:
        told = [replace(each, ready=True) if each.url in self._ready else each for each in self._known.get(stage, ())]
        self._on_change(stage, told)

    def _ask(self, stage: int, url: str) -> None:
        """Until it is ready, or Kubernetes knows better."""
        try:
            while not self._passes(url):
                self._stopped.wait(_PAUSE_SECONDS)
                with self._lock:
                    if self._stopped.is_set() or url not in self._starting():
                        return
            with self._lock:
                if url in self._starting():
                    self._ready.add(url)
                    self._tell(stage)
        except Exception:  # noqa: BLE001 - the end of a thread; Kubernetes will say it, some seconds later
            _log.exception("asking %s whether it is ready failed", url)
        finally:
            with self._lock:
                self._asked.discard(url)

    def _passes(self, url: str) -> bool:
        timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=_ANSWER_SECONDS)
        try:
            answer = self._pool.request("GET", f"{url}/healthz", headers=_PROBE, timeout=timeout, redirect=False)
        except urllib3.exceptions.HTTPError:
            return False
        return answer.status == 200 and answer.data == _PASSED


def _starts(endpoint: Endpoint) -> bool:
    return not endpoint.ready and not endpoint.terminating
