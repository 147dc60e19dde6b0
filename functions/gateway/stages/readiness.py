"""Finds instances that are ready before Kubernetes reports them, by probing their queue-proxy as Knative's activator does.

The kubelet gives up its first probe after a second and repeats it ten seconds later, so an EndpointSlice alone can be ten
seconds late.

queue-proxy recognizes a probe by its User-Agent (HealthCheckUAPrefixes in knative/serving pkg/queue/sharedmain/handlers.go). It
passes other requests to the function. It replies to a probe with 200 and `queue` once the function is ready, and with 400
unless the header `K-Network-Probe` is `queue` (pkg/queue/health). For each probe, queue-proxy itself probes the function every
50 ms for up to ten seconds. It does not count probes as requests.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from eventing.http.delivery import DeliveryError, RequestTarget, Sender, request_head
from eventing.http.pod_tls import PodTLS
from eventing.problems import Problem
from functions.gateway.stages.routes import Endpoint

_log = logging.getLogger(__name__)

_PROBE: Final = {"K-Network-Probe": "queue", "User-Agent": "Knative-Activator-Probe"}
_PASSED: Final = b"queue"
_CONNECT_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 12.0  # longer than queue-proxy holds a probe
_PAUSE_SECONDS: Final = 0.2  # the activator's, after a negative answer

OnChange = Callable[[int, Sequence[Endpoint] | None], None]  # a stage and all its endpoints after a change; None: unknown


class EarlyReadiness:
    """Passes endpoints from the watch on to `on_change`, and marks as ready those that answered a probe."""

    def __init__(self, on_change: OnChange, tls: PodTLS | None = None) -> None:
        """Starts no probes yet. `tls` must be given if instances are reached by https."""
        self._on_change = on_change
        self._lock = threading.Lock()  # held during `on_change`, so that changes are passed on in their order
        self._known: dict[int, Sequence[Endpoint]] = {}
        self._ready: set[str] = set()  # URLs that answered a probe, until Kubernetes reports them ready or gone
        self._asked: set[str] = set()  # URLs that a thread is probing
        self._stopped = threading.Event()
        self._sender = Sender(connect_timeout_seconds=_CONNECT_SECONDS, tls=tls)

    def endpoints_changed(self, stage: int, endpoints: Sequence[Endpoint] | None) -> None:
        with self._lock:
            if endpoints is None:
                self._known.pop(stage, None)
                self._on_change(stage, None)
                return
            self._known[stage] = endpoints
            starting = set(self._starting())
            self._ready &= starting
            self._tell(stage)
            new = starting - self._ready - self._asked
            asked = [each.url for each in endpoints if each.url in new]
            self._asked.update(asked)
        for url in asked:
            threading.Thread(target=self._ask, args=(stage, url), name="readiness", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        self._sender.close()

    def _starting(self) -> list[str]:
        known = (each for endpoints in self._known.values() for each in endpoints)
        return [each.url for each in known if not each.ready and not each.terminating]

    def _tell(self, stage: int) -> None:
        told = [replace(each, ready=True) if each.url in self._ready else each for each in self._known.get(stage, ())]
        self._on_change(stage, told)

    def _ask(self, stage: int, url: str) -> None:
        """Probes one instance until it is ready, or Kubernetes reports it as ready or no longer lists it.

        Runs in a thread of its own.
        """
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
        except Exception:  # noqa: BLE001 - ends this thread alone; Kubernetes reports the instance some seconds later
            _log.exception("probing %s failed", url)
        finally:
            with self._lock:
                self._asked.discard(url)

    def _passes(self, url: str) -> bool:
        target = RequestTarget.of(f"{url}/healthz")
        head = request_head(target, _PROBE, "GET")
        try:
            reply = self._sender.deliver(target, head, (), time.monotonic() + _ANSWER_SECONDS)
        except (DeliveryError, Problem):
            return False
        return reply.status == 200 and bytes(reply.body) == _PASSED
