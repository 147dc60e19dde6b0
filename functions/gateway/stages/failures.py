"""Classifies failed events: whether the event may be the cause, and whether a retry can help."""

import time
from typing import Final

from eventing.http.delivery import DeliveryError, DeliveryTimeout, InfrastructureError, Unreachable
from eventing.problems import (
    EventExpired,
    NotReady,
    Problem,
    Unauthorized,
    UnknownEventType,
    UnsupportedMediaType,
    WrongLayer,
    WrongPipeline,
)


class StageFailed(Exception):
    """An event got no usable reply from an instance of `stage`, or from its Service URL.

    The event may be retried on another instance, unless the failure is final or expired.
    """

    def __init__(
        self, stage: int, cause: str, detail: str, *, blames: bool = False, final: bool = False, expired: bool = False
    ) -> None:
        super().__init__(f"stage {stage}: {detail}")
        self.stage = stage
        # For metrics: refused, broken, timeout, deadline, infrastructure, not-ready, malformed, or a problem's name.
        self.cause = cause
        self.blames = blames  # the event was at the stage when the stage failed, and may have broken it
        self.final = final  # the stage refuses this gateway: a retry does not help
        self.expired = expired  # the client's deadline has passed: the stage did not fail


_REFUSES_GATEWAY: Final = (WrongPipeline, WrongLayer, Unauthorized, UnknownEventType, UnsupportedMediaType)

# In the text of a queue-proxy's 502, in Go's words: the function is dead or not started, so the event did not reach it. If the
# function broke with the event in hand, the text says EOF or that the connection was reset.
_REFUSED: Final = "connect: connection refused"


def stage_failed(stage: int, error: DeliveryError | Problem, client_deadline: float | None = None) -> StageFailed:
    """Makes a StageFailed of `error`, with which an event to `stage` failed.

    `client_deadline` is in time.monotonic(). It is None unless it came before the stage's own timeout.
    """
    if client_deadline is not None:
        late = isinstance(error, DeliveryTimeout | Unreachable) and time.monotonic() >= client_deadline
        if late or isinstance(error, EventExpired):
            return StageFailed(stage, "deadline", str(error), expired=True)
    if isinstance(error, Problem):
        final = isinstance(error, _REFUSES_GATEWAY)
        blames = not final and not isinstance(error, NotReady)
        return StageFailed(stage, error.name, f"{error.name}: {error}", blames=blames, final=final)
    if isinstance(error, Unreachable):
        return StageFailed(stage, "refused", str(error))
    if isinstance(error, InfrastructureError):
        if error.status == 502 and _REFUSED in error.excerpt:
            return StageFailed(stage, "refused", str(error))
        # 503: an activator or a queue-proxy is full or has no instance, so the event did not reach a function.
        return StageFailed(stage, "infrastructure", str(error), blames=error.status != 503)
    cause = "timeout" if isinstance(error, DeliveryTimeout) else "broken"
    return StageFailed(stage, cause, str(error), blames=True)
