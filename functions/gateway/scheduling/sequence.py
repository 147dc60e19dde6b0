"""A sequence at work: a prompt and what is generated behind it. The scheduler's alone, its lock is held around it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from functions.gateway.scheduling.guessing import Guesser
from functions.gateway.scheduling.progress import Progress
from functions.gateway.scheduling.prompt import Prompt
from functions.gateway.scheduling.strikes import Strikes
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.routes import Route
from functions.observing.tracing import TraceContext


@dataclass(eq=False, slots=True)
class Sequence:
    """Waits for its turn (no route), is given memory (not yet reserved), then computes."""

    id: str
    """What stages know it by: unique over all gateways and their restarts."""
    number: int
    """Who came first."""
    prompt: Prompt
    stream: TokenStream
    """To the door, with a lock of its own."""
    progress: Progress
    tokens: list[int] = field(init=False)
    """Prompt and all that was generated, an end-of-text token included. Grows only."""
    reserve_tokens: int = field(init=False)
    deadline: float = field(init=False)
    """In time.monotonic()."""
    waiting_since: float = field(init=False)
    strikes: Strikes = field(default_factory=Strikes)
    route: Route | None = None
    """That of the micro-batch that it is in."""
    reserved: bool = False
    one_by_one: bool = False
    """Its reservation did not fit once: from then on it asks one stage after the other, in order."""
    overtaken_tokens: int = 0
    """Given to others while a stage was too full for it."""
    must_restart: bool = False
    """Its route is broken; it leaves when all its pieces are back."""
    served: int = 0
    """When its last prompt chunk was sent, counted in trips: who waits longest is next."""
    guesser: Guesser | None = None
    """None: nothing is guessed."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.token_ids)
        self.reserve_tokens = len(self.tokens) + self.prompt.max_tokens
        self.waiting_since = time.monotonic()
        arrived = self.waiting_since if self.prompt.arrived is None else self.prompt.arrived
        self.deadline = arrived + self.prompt.deadline_seconds

    @property
    def client_id(self) -> str:
        return self.prompt.client_id

    @property
    def total_tokens(self) -> int:
        return len(self.tokens)

    @property
    def over(self) -> bool:
        """No further token is wanted, or will come."""
        return self.stream.over

    @property
    def at_rest(self) -> bool:
        """Nothing of it is on its way, neither tokens nor a reservation that has begun."""
        return self.progress.in_flight == 0 and self.reserved

    @property
    def decodes(self) -> bool:
        return self.at_rest and not self.must_restart and self.progress.decodes(self.total_tokens)

    @property
    def most_guesses(self) -> int:
        """No more than can become tokens of the answer, with the one that is drawn anyway."""
        return self.reserve_tokens - self.total_tokens - 1

    def put(self, tokens: Iterable[int]) -> None:
        """The last stage drew `tokens`."""
        for token in tokens:
            if self.over:
                return
            self.tokens.append(token)
            self.stream.put(token)

    def leave(self) -> None:
        """Back to where it holds nothing anywhere, ready to be queued."""
        self.route = None
        self.reserved = False
        self.must_restart = False
        self.progress.restart()


def named(sequences: Iterable[Sequence]) -> str:
    """For a line of a log: the client's request and, in brackets, what the stages know it by."""
    return ", ".join(f"{sequence.prompt.request_id} ({sequence.id})" for sequence in sequences)


def traces_of(sequences: Iterable[Sequence]) -> list[TraceContext]:
    return [sequence.prompt.trace for sequence in sequences if sequence.prompt.trace is not None]
