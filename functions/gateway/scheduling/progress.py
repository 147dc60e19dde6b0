"""What each stage holds of one sequence, and what must be sent next.

One rule covers prompts, decode steps, misses, migrations and replays: the next chunk begins at the position of the stage that
holds least, and goes as far as the last stage that lacks it. A new sequence starts at 0 everywhere. A migration puts one stage
back to 0. A miss or a reservation puts a stage to the number of tokens that it says it holds. A broken route begins a new
attempt, again at 0 everywhere.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that one step computes at stages 0 to `depth`: a part of a prompt, or the newest token."""

    position: int
    length: int
    depth: int
    draft_tokens: tuple[int, ...] = ()  # sent after the chunk's own tokens; held once accepted, see Progress.accepted
    scores: bool = False  # the log-probabilities of tokens 2 … length + 1 are wanted; the last of them is sent as a draft token

    @property
    def end(self) -> int:
        return self.position + self.length


class Progress:
    """Tokens that each stage holds of the current attempt. Not thread-safe: the scheduler's lock guards it."""

    def __init__(self, num_stages: int) -> None:
        self.attempt = 0
        self.in_flight = 0  # chunks sent whose replies have not all come
        self.failing = False  # a chunk in flight was lost: nothing is sent until the others are back
        self.grammar_known = False  # the last stage has drawn a token in this attempt, so it knows the sequence's grammar
        self._held = [0] * num_stages
        self._sent = [0] * num_stages

    @property
    def held_everywhere(self) -> int:
        """Tokens that every stage holds."""
        return min(self._held)

    def next_chunk(self, total_tokens: int, max_tokens: int) -> Chunk | None:
        """The next chunk of a sequence of `total_tokens`. None: all is sent, or a failure must settle first."""
        position = min(self._sent)
        if self.failing or position >= total_tokens:
            return None
        end = min([position + max_tokens, total_tokens, *(sent for sent in self._sent if sent > position)])
        depth = max(stage for stage, sent in enumerate(self._sent) if sent == position)
        return Chunk(position, end - position, depth)

    def decodes(self, total_tokens: int) -> bool:
        """Every stage lacks exactly the newest token: the next chunk is a decode step."""
        return not self.failing and self._sent.count(total_tokens - 1) == len(self._sent)

    def found(self, stage: int, held: int) -> None:
        """A reservation's reply says that `stage` holds `held` tokens. Only while nothing is in flight."""
        self._held[stage] = self._sent[stage] = max(self._held[stage], held)

    def send(self, chunk: Chunk) -> None:
        self.in_flight += 1
        self._sent[: chunk.depth + 1] = [chunk.position + chunk.length] * (chunk.depth + 1)

    def computed(self, stage: int, chunk: Chunk) -> None:
        """`stage` computed the chunk."""
        self._held[stage] = chunk.position + chunk.length

    def accepted(self, draft_tokens: int) -> None:
        """The first `draft_tokens` of the only chunk in flight became tokens of the sequence. Every stage holds them."""
        if draft_tokens:
            self._held = [held + draft_tokens for held in self._held]
            self._sent = [sent + draft_tokens for sent in self._sent]

    def missed(self, stage: int, held: int) -> None:
        """`stage` holds only `held` tokens, or another instance takes its place and holds none: the rest is sent again."""
        self._held[stage] = min(self._held[stage], held)
        self.grammar_known = False
        self.failing = True
        self._settle()

    def returned(self) -> None:
        """A chunk is no longer in flight, computed or not."""
        self.in_flight -= 1
        if self.failing:
            self._settle()

    def restart(self) -> None:
        """Begins a new attempt. Only while nothing is in flight."""
        self.attempt += 1
        self.grammar_known = False
        self._held = [0] * len(self._held)
        self._sent = list(self._held)
        self.failing = False

    def _settle(self) -> None:
        if self.in_flight == 0:
            self._sent = list(self._held)
            self.failing = False
