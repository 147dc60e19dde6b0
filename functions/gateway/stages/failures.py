"""What it means that an event got no usable reply: whether the event may be the cause, and whether asking again can help."""

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
    """An event got no usable reply from an instance of `stage`, or from its Service URL."""

    def __init__(
        self, stage: int, cause: str, detail: str, *, blames: bool = False, final: bool = False, expired: bool = False
    ) -> None:
        super().__init__(f"stage {stage}: {detail}")
        self.stage = stage
        self.cause = cause
        """One word for metrics: refused, broken, timeout, deadline, infrastructure, not-ready, malformed, a problem's name."""
        self.blames = blames
        """The event may have done it: it was at the stage when the stage failed."""
        self.final = final
        """The stage refuses this gateway, not this event: asking again does not help."""
        self.expired = expired
        """Nobody awaits the reply any more, because a client wanted its answer sooner: nobody has failed."""


_REFUSES_GATEWAY: Final = (WrongPipeline, WrongLayer, Unauthorized, UnknownEventType, UnsupportedMediaType)

_REFUSED: Final = "connect: connection refused"
"""In the text of a queue-proxy's 502: Go's words where nobody listens behind it, the function being dead or not there yet, so
that the event reached nobody. One that broke with the event in hand says EOF, or that the connection was reset."""


def stage_failed(stage: int, error: DeliveryError | Problem, awaited_until: float | None = None) -> StageFailed:
    """What `error` means for the sequences that were in the event.

    awaited_until: in time.monotonic(), where the client's deadline came before the time that the stage may take.
    """
    if awaited_until is not None and _is_expiry(error, awaited_until):
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
        # 503 comes from an activator or a queue-proxy that is full or has nobody behind it: the event reached no function.
        return StageFailed(stage, "infrastructure", str(error), blames=error.status != 503)
    cause = "timeout" if isinstance(error, DeliveryTimeout) else "broken"
    return StageFailed(stage, cause, str(error), blames=True)


def _is_expiry(error: DeliveryError | Problem, awaited_until: float) -> bool:
    late = isinstance(error, DeliveryTimeout | Unreachable) and time.monotonic() >= awaited_until
    return late or isinstance(error, EventExpired)
