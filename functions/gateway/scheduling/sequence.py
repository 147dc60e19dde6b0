"""A sequence: a prompt, its answer so far, the number of its tokens that each stage holds, and its retry budget.

Not thread-safe: the scheduler's lock guards it.
"""

import random
import secrets
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Final

from eventing.wire.events import Pooling, Sampling
from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain, extended
from functions.gateway.scheduling.speculation import Drafter
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.routes import Instance, Route
from functions.observing.tracing import TraceContext

FIRST_RESERVED_TOKENS: Final = 256  # for an open-ended answer; doubled whenever the answer has filled it
MAX_FAILURES_AT_ONE_PLACE: Final = 3  # after so many the sequence ends with an error: it seems to be what breaks stages
MAX_FAILURES: Final = 9  # anywhere; higher, because stages that are killed every few seconds fail in different places
TRIAL_AFTER_FAILURES: Final = 2  # from then on the sequence runs only while nothing else is in flight
_FIRST_BACK_OFF_SECONDS: Final = 0.1
_LONGEST_BACK_OFF_SECONDS: Final = 5.0
_GREEDY: Final = Sampling()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that one step computes at stages 0 to `depth`: a part of a prompt, or the newest token.

    The newest token may be followed by draft tokens.
    """

    position: int  # of its first token in the sequence
    length: int  # without draft tokens
    depth: int  # index of the last stage
    draft_tokens: tuple[int, ...] = ()  # sent after the chunk's own tokens; see Progress.accepted
    scores: bool = False  # the log-probabilities of tokens 2 … length + 1 are wanted; the last of them is sent as a draft token

    @property
    def end(self) -> int:
        return self.position + self.length


class Progress:
    """Counts which tokens of a sequence's current attempt each stage holds, and derives the next chunk to send.

    One rule covers prompts, decode steps, misses, migrations and replays. The next chunk begins at the position of the stage
    that holds least. It goes as far as the last stage that lacks it.

    A new sequence starts at 0 at all stages. A migration sets one stage to 0. After a miss or a reservation, a stage has the
    number of tokens that its reply states. A broken route begins a new attempt, again at 0 at all stages.
    """

    def __init__(self, num_stages: int) -> None:
        self.attempt = 0
        self.in_flight = 0  # chunks sent whose replies have not all come
        self.failing = False  # a chunk in flight was lost: nothing is sent until the others are back
        self.grammar_known = False  # the last stage has drawn a token in this attempt, so it knows the sequence's grammar
        self.held = [0] * num_stages  # tokens that each stage holds
        self.sent = [0] * num_stages  # and those that it holds or gets by chunks in flight

    def next_chunk(self, total_tokens: int, max_tokens: int) -> Chunk | None:
        """Returns the next chunk, at most `max_tokens` long, of a sequence of `total_tokens` tokens.

        Returns None if all is sent, or if chunks in flight must return first after a failure.
        """
        position = min(self.sent)
        if self.failing or position >= total_tokens:
            return None
        end = min([position + max_tokens, total_tokens, *(sent for sent in self.sent if sent > position)])
        depth = max(stage for stage, sent in enumerate(self.sent) if sent == position)
        return Chunk(position, end - position, depth)

    def decodes(self, total_tokens: int) -> bool:
        """Whether every stage lacks only the newest of `total_tokens` tokens, so that the next chunk is a decode step."""
        return not self.failing and self.sent.count(total_tokens - 1) == len(self.sent)

    def found(self, stage: int, held: int) -> None:
        """Records that `stage` holds `held` tokens, as its reply to a reservation states.

        Call it only while nothing is in flight.
        """
        self.held[stage] = self.sent[stage] = max(self.held[stage], held)

    def send(self, chunk: Chunk) -> None:
        """Records that `chunk` is sent to the stages 0 to `chunk.depth`."""
        self.in_flight += 1
        self.sent[: chunk.depth + 1] = [chunk.position + chunk.length] * (chunk.depth + 1)

    def accepted(self, draft_tokens: int) -> None:
        """Records that the first `draft_tokens` draft tokens of the only chunk in flight were accepted.

        Every stage holds these tokens now.
        """
        self.held = [held + draft_tokens for held in self.held]
        self.sent = [sent + draft_tokens for sent in self.sent]

    def missed(self, stage: int, held: int) -> None:
        """Records that `stage` holds only `held` tokens. Use 0 if another instance takes the stage's place.

        The other tokens are sent again, after chunks in flight have returned.
        """
        self.held[stage] = min(self.held[stage], held)
        self.grammar_known = False
        self.failing = True
        self._settle()

    def returned(self) -> None:
        """Records that one chunk is no longer in flight, whether it was computed or not."""
        self.in_flight -= 1
        if self.failing:
            self._settle()

    def restart(self) -> None:
        """Begins a new attempt, in which all tokens are computed again at all stages.

        Call it only while no chunk of the sequence is in flight.
        """
        self.attempt += 1
        self.grammar_known = False
        self.held = [0] * len(self.held)
        self.sent = list(self.held)
        self.failing = False

    def _settle(self) -> None:
        if self.in_flight == 0:
            self.sent = list(self.held)
            self.failing = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt with the settings of its answer, as an API hands it to `Scheduler.submit`.

    Raises ValueError if there are no prompt tokens, or if neither an answer nor scores nor a vector are wanted.
    """

    token_ids: Items[int]
    max_tokens: int  # of the answer; 0: the prompt is only scored, or becomes a vector
    open_ended: bool = False  # the client set no max_tokens: memory for the answer is reserved as it grows
    sampling: Sampling = _GREEDY
    predicted_ids: Items[int] = ()  # tokens that the client expects the answer to have, for drafts
    eos_ids: frozenset[int] = frozenset()
    kept_end_ids: frozenset[int] = frozenset()  # those of eos_ids that become part of the answer which they end
    top_logprobs: int | None = None  # alternatives beside each drawn token's log-probability; None: no log-probabilities
    scored: bool = False  # the log-probabilities of the prompt's own tokens are wanted, too
    pooling: Pooling | None = None  # the prompt becomes a vector, and there is no answer; None: it does not
    in_one_chunk: bool = False  # the prompt is computed in one chunk, because its tokens attend to later ones
    adapter: bytes = b""  # digest of its adapter's version; empty: the model's own layers
    client_id: str = ""
    cache_salt: str = ""  # the client's own secret; see PrefixSharing
    request_secret: str = field(default_factory=lambda: secrets.token_hex(16))  # the same for all answers to one request
    is_only_answer: bool = True  # to its request
    priority: int = 0  # clients of a higher priority are admitted first
    deadline_seconds: float = 600.0  # counted from `arrived`
    arrived: float | None = None  # when the request came in, in time.monotonic(); None: when it is submitted
    trace: TraceContext | None = None  # of the answer's span
    request_id: str = "?"  # what the client knows the request by; for logs

    def __post_init__(self) -> None:
        if not self.token_ids or self.max_tokens < (0 if self.scored or self.pooling else 1):
            raise ValueError(f"{len(self.token_ids)} prompt tokens and max_tokens {self.max_tokens}: both must be at least 1")

    @property
    def turn(self) -> tuple[str, int]:
        """Key by which sequences take turns. Sequences with equal keys are served in the order in which they came."""
        return self.client_id, self.priority


@dataclass(slots=True)
class RetryBudget:
    """Counts how often stages failed while they computed this sequence, and sets the back-off before it is tried again."""

    failures_here: int = 0  # in a row at the same stage and tokens, as far as the gateway can tell
    failures: int = 0  # at any place
    last_failure: tuple[int, Chunk] | None = None  # the stage, and the chunk that it was computing
    lost_at: set[int] = field(default_factory=set)  # stages that lost the sequence; only the second loss counts as a failure
    retry_at: float = 0.0  # earliest start of the next attempt, in time.monotonic()

    @property
    def exhausted(self) -> bool:
        """Whether the sequence has failed so often that it must end with an error."""
        return self.failures_here >= MAX_FAILURES_AT_ONE_PLACE or self.failures >= MAX_FAILURES

    def reset(self) -> None:
        """Clears the counts. Call it after a new token, which shows that earlier failures were not the sequence's fault."""
        self.failures_here = self.failures = 0
        self.lost_at.clear()

    def failed_at(self, stage: int, chunk: Chunk) -> None:
        """Counts a failure of `stage` while it computed `chunk`.

        Tokens that break a stage break it each time, but accidents happen anywhere. So `failures_here` begins again at 1 if the
        last failure was at another stage or at other tokens.
        """
        last_stage, last = self.last_failure or (-1, chunk)
        if last_stage != stage or chunk.position >= last.end or last.position >= chunk.end:
            self.failures_here = 0
        self.last_failure = (stage, chunk)
        self.failed()

    def failed(self) -> None:
        """Counts a failure at the same place as the last one, and sets a longer back-off before the next attempt."""
        self.failures_here += 1
        self.failures += 1
        pause = min(_LONGEST_BACK_OFF_SECONDS, _FIRST_BACK_OFF_SECONDS * 4 ** (self.failures_here - 1))
        self.retry_at = time.monotonic() + pause * random.uniform(0.75, 1.25)


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and the answer that grows from it.

    A sequence first waits (`route` is None). Then it joins a micro-batch and asks for memory (`reserved` is False). Then its
    tokens are computed.
    """

    id: str  # what the stages know it by: unique among all gateways and their restarts
    number: int  # order of arrival
    prompt: Prompt
    stream: TokenStream  # to the API; has a lock of its own
    progress: Progress
    retry_budget: RetryBudget = field(default_factory=RetryBudget)
    drafter: Drafter | None = None  # None: speculation is off
    chain_key: bytes | None = None  # of its prefix chain; None: it neither finds nor leaves anything in prefix caches
    chain: Chain = ()  # hashes of the blocks so far, see prefix_chain
    leaves_kv: bool = True  # its KV stays in prefix caches when it ends

    tokens: list[int] = field(init=False)  # prompt and answer, an end-of-text token included; only grows
    reserve_tokens: int = field(init=False)  # memory that it needs: prompt and answer, or as far as an open-ended one has come
    impossible_tokens: int = field(init=False)  # smallest reservation known to be impossible
    deadline: float = field(init=False)  # in time.monotonic()
    waiting_since: float = field(init=False)  # in time.monotonic()

    route: Route | None = None  # its micro-batch's
    reserved: bool = False  # every stage has granted its memory
    restoring: bool = False  # every stage has granted its memory, and some still restore its KV: its reservation asks again
    handing_over: Instance | None = None  # the instance that it migrated from, while KV of it is fetched from there
    reserves_in_order: bool = False  # a stage was full once: from then on stages are asked one after the other
    reserved_chain: Chain = ()  # the chain that its last reservation named
    overtaken_tokens: int = 0  # memory given to others while it was in the memory backlog
    overtook: "tuple[Sequence, ...]" = ()  # sequences whose overtaken_tokens include what it asked for, until it is refused
    must_restart: bool = False  # its route broke: it leaves the micro-batch once none of its chunks is in flight
    broken_by: str | None = None  # the failure for which it must restart, a key of `Stats.replays`; None: none
    last_chunk_step: int = 0  # number of the step that sent its last prompt chunk; the lowest is next
    leader: "Sequence | None" = None  # computes a prefix that this sequence shares and waits for
    leader_tokens: int = 0  # length of that prefix
    follow_failed: bool = False  # its leader was done and the prefix was not found: it computes everything itself

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.token_ids)
        most = len(self.tokens) + self.prompt.max_tokens
        self.impossible_tokens = most + 1
        self.reserve_tokens = min(most, len(self.tokens) + FIRST_RESERVED_TOKENS) if self.prompt.open_ended else most
        self.waiting_since = time.monotonic()
        arrived = self.waiting_since if self.prompt.arrived is None else self.prompt.arrived
        self.deadline = arrived + self.prompt.deadline_seconds

    @property
    def has_drawn(self) -> bool:
        return len(self.tokens) > len(self.prompt.token_ids)

    @property
    def has_memory(self) -> bool:
        """Whether every stage has granted the sequence's memory. True also while its reservation is asked for again."""
        return self.reserved or self.restoring

    @property
    def at_rest(self) -> bool:
        """Whether the sequence's memory is reserved and none of its chunks is in flight."""
        return self.progress.in_flight == 0 and self.reserved

    @property
    def decodes(self) -> bool:
        """Whether the sequence's next chunk is a decode step and may be sent. False for a prompt that becomes a vector."""
        progress = self.progress
        if self.prompt.pooling is not None:
            return False
        return progress.in_flight == 0 and self.reserved and not self.must_restart and progress.decodes(len(self.tokens))

    def next_chunk(self, max_tokens: int) -> Chunk | None:
        """Returns the next chunk that some stage lacks, at most `max_tokens` long. None if nothing can be sent now.

        A prompt that must be computed in one chunk may be longer. A scored prompt is first sent without its last token, because
        only the log-probability of that token is wanted. The last token follows when all scores are there.
        """
        progress, last = self.progress, len(self.prompt.token_ids) - 1
        if self.prompt.in_one_chunk:
            return progress.next_chunk(len(self.tokens), len(self.tokens))
        if self.prompt.scored and not self.has_drawn:
            chunk = progress.next_chunk(last, max_tokens)
            if chunk is not None:
                return replace(chunk, draft_tokens=(self.tokens[chunk.end],), scores=True)
            if progress.in_flight:
                return None
        return progress.next_chunk(len(self.tokens), max_tokens)

    def prefix_chain(self) -> Chain:
        """Returns the prefix chain of all tokens but the newest, which the next step has to compute in any case.

        Empty without prefix caching.
        """
        if self.chain_key is not None and len(self.chain) < (len(self.tokens) - 1) // BLOCK_TOKENS:
            self.chain = extended(self.chain, self.tokens[:-1], self.chain_key)
        return self.chain

    def grow(self) -> bool:
        """Doubles the reservation for the sequence's answer, up to its limits. Returns False if no further token would fit."""
        prompt = len(self.prompt.token_ids)
        self.reserve_tokens = min(prompt + 2 * (self.reserve_tokens - prompt), self.impossible_tokens - 1)
        return self.reserve_tokens > len(self.tokens)

    def shrink(self) -> bool:
        """Reduces the reservation after a stage said that it can never hold `reserve_tokens`.

        Returns False if a smaller reservation is of no use: the answer is not open-ended, or no further token would fit.
        """
        self.impossible_tokens = self.reserve_tokens
        self.reserve_tokens = (len(self.tokens) + self.reserve_tokens) // 2
        return self.prompt.open_ended and self.reserve_tokens > len(self.tokens)

    def leave(self) -> None:
        """Resets the sequence after it left its micro-batch: no route, no memory, a new attempt."""
        self.route = None
        self.reserved = False
        self.restoring = False
        self.handing_over = None
        self.must_restart, self.broken_by = False, None
        self.leader = None
        self.follow_failed = False
        self.progress.restart()


def names_of(sequences: Iterable[Sequence]) -> str:
    """Formats sequences for a log line: each request's id, and in brackets the id that stages know."""
    return ", ".join(f"{sequence.prompt.request_id} ({sequence.id})" for sequence in sequences)
