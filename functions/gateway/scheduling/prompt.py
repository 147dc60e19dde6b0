"""What a door hands in: a prompt, and what is wanted behind it."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Final

from eventing.wire.events import Sampling
from functions.observing.tracing import TraceContext

_GREEDY: Final = Sampling()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Raises ValueError where it is empty, or wants nothing."""

    token_ids: Tokens[int]
    max_tokens: int
    """Of the answer. 0: the prompt is scored, and nothing drawn."""
    open_ended: bool = False
    """Nobody asked for so many tokens: memory for the answer is reserved as it grows."""
    sampling: Sampling = _GREEDY
    predicted_ids: Tokens[int] = ()
    """What the client expects the answer to have, for draft tokens."""
    eos_ids: frozenset[int] = frozenset()
    kept_end_ids: frozenset[int] = frozenset()
    """Those of them that are part of the answer which they end."""
    top_logprobs: int | None = None
    """So many at each place, beside the log-probabilities of the answer's tokens. None: neither."""
    scored: bool = False
    """The log-probabilities of the prompt's own tokens are wanted, too."""
    client_id: str = ""
    priority: int = 0
    """Of the client: whose is higher is taken first."""
    deadline_seconds: float = 600.0
    """From when the request came in."""
    arrived: float | None = None
    """When that was, in time.monotonic(). None: when it is handed in."""
    trace: TraceContext | None = None
    """Of the answer's span."""
    request_id: str = "?"
    """What the client knows it by; for logs."""

    def __post_init__(self) -> None:
        if not self.token_ids or self.max_tokens < (0 if self.scored else 1):
            raise ValueError(f"{len(self.token_ids)} prompt tokens and max_tokens {self.max_tokens}: both must be at least 1")
