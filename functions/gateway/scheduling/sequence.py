"""A sequence at work: a prompt and what is generated behind it. The scheduler's alone, its lock is held around it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Final

from eventing.wire.generation import TokenLogprob
from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain, extended
from functions.gateway.scheduling.progress import Piece, Progress
from functions.gateway.scheduling.prompt import Prompt
from functions.gateway.scheduling.speculation import Drafter
from functions.gateway.scheduling.strikes import Strikes
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.routes import Route
from functions.observing.tracing import TraceContext

FIRST_RESERVED_TOKENS: Final = 256
"""For an answer without a length of its own; twice as many whenever it has come so far."""


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
    """Prompt and answer, as much of it as was asked for; of an open-ended one as much as it may have come to soon."""
    too_many_tokens: int = field(init=False)
    """So many it cannot have: beyond its answer, or more than a stage can hold."""
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
    drafter: Drafter | None = None
    """None: nothing is drafted."""
    chain_key: bytes | None = None
    """None: it finds nothing that others left, and leaves nothing."""
    chain: Chain = ()
    """Of the blocks that were counted so far, see `known`."""
    asked: Chain = ()
    """By which stages know it: that of its last reservation."""
    follows: "Followed | None" = None
    """It waits for another one that computes what both begin with."""
    goes_alone: bool = False
    """It has followed in vain."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.token_ids)
        most = len(self.tokens) + self.prompt.max_tokens
        self.too_many_tokens = most + 1
        self.reserve_tokens = min(most, len(self.tokens) + FIRST_RESERVED_TOKENS) if self.prompt.open_ended else most
        self.waiting_since = time.monotonic()
        arrived = self.waiting_since if self.prompt.arrived is None else self.prompt.arrived
        self.deadline = arrived + self.prompt.deadline_seconds

    @property
    def client_id(self) -> str:
        return self.prompt.client_id

    @property
    def priority(self) -> int:
        return self.prompt.priority

    @property
    def total_tokens(self) -> int:
        return len(self.tokens)

    @property
    def has_drawn(self) -> bool:
        """There are tokens behind its prompt."""
        return self.total_tokens > len(self.prompt.token_ids)

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
    def most_draft_tokens(self) -> int:
        """No more than can become tokens of the answer, with the one that is drawn anyway."""
        return self.reserve_tokens - self.total_tokens - 1

    def next_piece(self, most_tokens: int) -> Piece | None:
        """Of what it lacks anywhere. A prompt that is scored goes up to its last token first, which is only scored then; and
        on from there when all of it is back."""
        progress, last = self.progress, len(self.prompt.token_ids) - 1
        if self.prompt.scored and not self.has_drawn:
            piece = progress.next_piece(last, most_tokens)
            if piece is not None:
                return replace(piece, draft_tokens=(self.tokens[piece.end],), scores=True)
            if progress.in_flight:
                return None
        return progress.next_piece(self.total_tokens, most_tokens)

    def known(self) -> Chain:
        """The chain of its tokens but the newest, which is computed last of all."""
        if self.chain_key is not None and len(self.chain) < (len(self.tokens) - 1) // BLOCK_TOKENS:
            self.chain = extended(self.chain, self.tokens[:-1], self.chain_key)
        return self.chain

    def put(self, tokens: Iterable[int], logprobs: Iterable[TokenLogprob] | None = None) -> None:
        """The last stage drew `tokens`."""
        for token, logprob in zip(tokens, repeat(None) if logprobs is None else logprobs, strict=False):
            if self.over:
                return
            self.tokens.append(token)
            self.stream.put(token, logprob)

    @property
    def outgrown(self) -> bool:
        """It has come to the end of its memory, and not to its own."""
        return not self.over and self.total_tokens >= self.reserve_tokens

    def grow(self) -> bool:
        """Wants twice as much for its answer, or as much as it can have. False where it has that already."""
        prompt = len(self.prompt.token_ids)
        self.reserve_tokens = min(prompt + 2 * (self.reserve_tokens - prompt), self.too_many_tokens - 1)
        return self.reserve_tokens > self.total_tokens

    def shrink(self) -> bool:
        """What it wants is more than a stage can ever hold: wants less. False where no less lets it come any further."""
        self.too_many_tokens = self.reserve_tokens
        self.reserve_tokens = (self.total_tokens + self.reserve_tokens) // 2
        return self.prompt.open_ended and self.reserve_tokens > self.total_tokens

    def leave(self) -> None:
        """Back to where it holds nothing anywhere, ready to be queued."""
        self.route = None
        self.reserved = False
        self.must_restart = False
        self.follows = None
        self.goes_alone = False
        self.progress.restart()


@dataclass(frozen=True, slots=True)
class Followed:
    """Who computes `tokens` that others wait for."""

    sequence: Sequence
    tokens: int


def named(sequences: Iterable[Sequence]) -> str:
    """For a line of a log: the client's request and, in brackets, what the stages know it by."""
    return ", ".join(f"{sequence.prompt.request_id} ({sequence.id})" for sequence in sequences)


def traces_of(sequences: Iterable[Sequence]) -> list[TraceContext]:
    return [sequence.prompt.trace for sequence in sequences if sequence.prompt.trace is not None]
