"""What a door hands in: a prompt, and what is wanted behind it."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Final

from eventing.wire.events import Sampling
from functions.observing.tracing import TraceContext

_GREEDY: Final = Sampling()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Raises ValueError where it is empty, or wants fewer than one token."""

    token_ids: Tokens[int]
    max_tokens: int
    """Of the answer."""
    sampling: Sampling = _GREEDY
    predicted_ids: Tokens[int] = ()
    """What the client expects the answer to have, for guesses."""
    eos_ids: frozenset[int] = frozenset()
    client_id: str = ""
    deadline_seconds: float = 600.0
    """From when the request came in."""
    arrived: float | None = None
    """When that was, in time.monotonic(). None: when it is handed in."""
    trace: TraceContext | None = None
    """Of the answer's span."""
    request_id: str = "?"
    """What the client knows it by; for logs."""

    def __post_init__(self) -> None:
        if not self.token_ids or self.max_tokens < 1:
            raise ValueError(f"{len(self.token_ids)} prompt tokens and max_tokens {self.max_tokens}: both must be at least 1")
