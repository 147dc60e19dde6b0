"""How far each stage of its route is with one sequence, and what has to be sent next.

One rule covers first prompts, decode steps, misses, moves and replays: what is sent next begins at the position of the stage
that holds least, and goes as deep as the deepest stage that lacks it. A fresh sequence is held nowhere; a move puts one stage
at 0; a miss puts one stage at what it says it holds, and so does a reservation; a broken route begins a new attempt, held
nowhere.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` tokens of a sequence from `position`, for stages 0 to `depth`."""

    position: int
    length: int
    depth: int
    draft_tokens: tuple[int, ...] = ()
    """Tokens that may come behind them. They count as held once they have come true, see `Progress.came_true`."""
    scores: bool = False
    """The log-probabilities of its tokens but the first are wanted; the one behind them goes with it as its draft token."""

    @property
    def end(self) -> int:
        return self.position + self.length

    def overlaps(self, other: "Piece") -> bool:
        return self.position < other.end and other.position < self.end


class Progress:
    """Tokens held per stage of one attempt. Not thread-safe: the scheduler's lock is held around it."""

    def __init__(self, num_stages: int) -> None:
        self.attempt = 0
        self.in_flight = 0
        """Pieces on their way."""
        self._num_stages = num_stages
        self._held = [0] * num_stages
        self._sent = [0] * num_stages
        self._failed = False
        self.introduced = False
        """The last stage has answered a row that wanted a token: it knows what does not change from row to row."""

    @property
    def failing(self) -> bool:
        """Something on its way got lost, and the rest is not settled yet."""
        return self._failed

    def next_piece(self, total_tokens: int, most_tokens: int) -> Piece | None:
        """What to send next of a sequence of `total_tokens`; None where everything is sent or a failure must settle first."""
        position = min(self._sent)
        if self._failed or position >= total_tokens:
            return None
        end = min([position + most_tokens, total_tokens, *(sent for sent in self._sent if sent > position)])
        depth = max(stage for stage, sent in enumerate(self._sent) if sent == position)
        return Piece(position, end - position, depth)

    @property
    def held_everywhere(self) -> int:
        """Tokens that every stage holds."""
        return min(self._held)

    def found(self, stage: int, held: int) -> None:
        """`stage` says, at a reservation, that it holds so many. Only between pieces."""
        self._held[stage] = self._sent[stage] = max(self._held[stage], held)

    def decodes(self, total_tokens: int) -> bool:
        """Nothing is lacking but the newest token, at every stage: the next piece is a decode step."""
        return not self._failed and all(sent == total_tokens - 1 for sent in self._sent)

    def send(self, piece: Piece) -> None:
        """`piece` is on its way."""
        self.in_flight += 1
        for stage in range(piece.depth + 1):
            self._sent[stage] = piece.end

    def computed(self, stage: int, piece: Piece) -> None:
        """`stage` answered ok for `piece`."""
        self._held[stage] = piece.end

    def came_true(self, draft_tokens: int) -> None:
        """So many draft tokens of the one piece that was on its way have become tokens of the sequence, held everywhere."""
        self._held = [held + draft_tokens for held in self._held]
        self._sent = [sent + draft_tokens for sent in self._sent]

    def missed(self, stage: int, held: int) -> None:
        """`stage` holds only `held` tokens, or goes on at another instance that holds none: what is beyond is sent again."""
        self._held[stage] = min(self._held[stage], held)
        self.introduced = False
        self._failed = True
        self._settle_if_quiet()

    def failed(self) -> None:
        """A piece on its way got lost: nothing more is sent before all others are settled."""
        self._failed = True

    def settle(self) -> None:
        """One piece is no longer on its way, whatever became of it."""
        self.in_flight -= 1
        self._settle_if_quiet()

    def _settle_if_quiet(self) -> None:
        if self.in_flight == 0:
            self._sent = list(self._held)
            self._failed = False

    def restart(self) -> None:
        """A new attempt, held nowhere. Only between pieces."""
        self.attempt += 1
        self.introduced = False
        self._held = [0] * self._num_stages
        self._sent = list(self._held)
        self._failed = False
