"""Keeps a gateway from scaling to zero while batches are open: a request to the gateway's own Service stays in flight.

Knative counts requests and knows nothing of batches. The request goes to the Service's URL, so queue-proxy counts it and the
autoscaler keeps at least one gateway. It carries no secret and has no effect.
"""

import logging
import threading
from collections.abc import Callable
from typing import Final

from eventing.http.delivery import BadReply, DeliveryError, Sender
from eventing.problems import Problem

_log: Final = logging.getLogger(__name__)

HOLD_PATH: Final = "/v1/batches/hold"
HOLD_SECONDS: Final = 30.0  # that a request is held; then the next one is sent
_MOST_HELD: Final = 4  # requests at one gateway; more are answered at once
_LOOK_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 5.0  # after a failed one, or one that was not held


class Hold:
    """Keeps one request to the gateway's own Service in flight, and holds such requests that arrive here. Thread-safe."""

    def __init__(self, sender: Sender, url: str | None) -> None:
        """`url` is the URL of the gateway's own Service. If it is None, no requests are sent."""
        self._sender = sender
        self._url = url
        self._held = threading.BoundedSemaphore(_MOST_HELD)
        self.over = threading.Event()  # if set, nothing is held any more

    def keep(self, is_open: Callable[[], bool]) -> None:
        """Sends one request after another while `is_open` returns True, until `over` is set. Runs in a thread of its own."""
        while self._url is not None and not self.over.wait(_LOOK_SECONDS):
            if not is_open():
                continue
            try:
                held = self._sender.get(self._url + HOLD_PATH, {}, 2 * HOLD_SECONDS).body.tobytes() == b"held"
            except (DeliveryError, BadReply, Problem) as error:
                held = False
                _log.warning("nothing keeps this gateway from scaling to zero while batches are open: %s", error)
            if not held:
                self.over.wait(_PAUSE_SECONDS)

    def hold(self) -> bool:
        """Waits for HOLD_SECONDS, or until `over` is set. Returns False at once if too many requests wait already."""
        if not self._held.acquire(blocking=False):
            return False
        try:
            self.over.wait(HOLD_SECONDS)
        finally:
            self._held.release()
        return True
