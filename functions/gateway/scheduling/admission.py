"""Who waits comes into a micro-batch, as many as capacity and memory allow, and is given memory at all its stages."""

from collections.abc import Sequence as Items
from collections.abc import Set

from eventing.problems import InvalidRequest
from eventing.wire.control import MOST_PEERS, ReleaseRow
from eventing.wire.events import Status
from functions.gateway.scheduling.actions import Reserve
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.capacity import sequences_beyond
from functions.gateway.scheduling.failures import Failures
from functions.gateway.scheduling.following import asks_again, follow
from functions.gateway.scheduling.micro_batch import MicroBatch
from functions.gateway.scheduling.replies import Replies
from functions.gateway.scheduling.reservation import Reservation
from functions.gateway.scheduling.reserve import reserve
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.stages.instances import Instance


class Admission:
    def __init__(self, board: Board, replies: Replies, failures: Failures) -> None:
        self._board = board
        self._replies = replies
        self._failures = failures

    def room(self) -> int:
        """Sequences that could be taken into micro-batches now, beyond those that are."""
        board = self._board
        return sequences_beyond(board.running, board.micro_batches_allowed(), board.limits.micro_batch_sequences)

    def take_in(self, now: float) -> list[Reserve]:
        """Those whose turn it is join micro-batches; what has to be asked for them."""
        board = self._board
        if any(one.one_by_one for batch in board.micro_batches for one in batch.sequences if not one.reserved):
            return []  # Whoever comes behind it would take what it is asking for.
        hungry = board.waiting.hungry
        if hungry.sequences and (tried := self._take_in_hungry(now)):
            return tried
        # One reservation at a time for each micro-batch: those who come meanwhile share the next one. A burst of requests
        # would otherwise be as many events at every stage, which its autoscaler takes for load.
        reserving = {batch for batch in board.micro_batches if not all(one.reserved for one in batch.sequences)}
        groups: dict[MicroBatch, list[Sequence]] = {}
        behind = hungry.clients
        while (sequence := board.waiting.queue.peek(behind)) is not None:
            if hungry.sequences and not (hungry.may_be_overtaken(sequence) and self._fits(sequence)):
                behind.add(sequence.client_id)
                continue
            home = self._home(sequence, now, reserving)
            if home is None:
                break
            self._join(home, board.waiting.queue.pop(behind))
            hungry.overtaken(sequence)
            groups.setdefault(home, []).append(sequence)
        return [self._reserve(home, sequences, one_by_one=False) for home, sequences in groups.items()]

    def reserved(self, wanted: Reserve, reservation: Reservation) -> None:
        """What became of the memory for its sequences, which are in one micro-batch."""
        for origin in reservation.origins:
            self._replies.heard(origin)
        if wanted.moved_from is not None:
            self._board.release_rows(wanted.moved_from, [ReleaseRow(row.id, row.attempt, row.chain) for row in wanted.rows])
        here = []
        for sequence, row, status, held in zip(
            wanted.sequences, wanted.rows, reservation.statuses, reservation.held, strict=True
        ):
            if sequence.id in self._board.sequences:
                here.append((sequence, status, held))
            else:
                self._board.release_row(wanted.instances, ReleaseRow(row.id, row.attempt))
        if reservation.failure is not None:
            self._failures.reservation_failed([sequence for sequence, _, _ in here], reservation.failure)
            return
        self._board.no_route_since = None
        if Status.FULL in reservation.statuses:
            self._board.waiting.hungry.still_full()
        for sequence, status, held in here:
            self._reserved(sequence, status, held, wanted.instances[0].stage)
            if not sequence.reserved or sequence.route is None or not reservation.remembers:
                continue
            self._board.where_held.put(sequence.asked, sequence.route.instances)
            if wanted.moved_from is None:
                follow(sequence, self._board)

    def ask_again(self) -> list[Reserve]:
        """Reservations that are there already, for those who may find more held by now."""
        asking = []
        for batch in self._board.micro_batches:
            if batch.target is None and (sequences := [one for one in batch.sequences if asks_again(one, self._board)]):
                for sequence in sequences:
                    sequence.reserved = False
                asking.append(self._reserve(batch, sequences, one_by_one=False))
        return asking

    def _reserved(self, sequence: Sequence, status: Status, held: Items[int], first_stage: int) -> None:
        board = self._board
        if status is Status.OK:
            sequence.reserved = True
            _found(sequence, held, first_stage)
            board.waiting.hungry.was_given()
            self._failures.settle(sequence)
        elif sequence.over:
            board.dismiss(sequence)
        elif status is Status.FULL:
            board.take_out(sequence, frees=False)
            sequence.one_by_one = True
            board.waiting.hungry.add(sequence)
        elif status is Status.STALE:
            self._failures.start_again(sequence)
        elif sequence.shrink():
            board.put_back(sequence)
        elif sequence.has_drawn:
            sequence.stream.finish("length")
            board.dismiss(sequence)
        else:
            wanted = f"prompt and answer of {sequence.too_many_tokens} tokens"
            board.dismiss(sequence, InvalidRequest(f"{wanted} are more than a stage can ever hold; ask for fewer"))

    def _take_in_hungry(self, now: float) -> list[Reserve]:
        """The first of those that a stage was too full for; while it has to wait, one that may overtake it and seems to fit."""
        hungry = self._board.waiting.hungry
        if now >= hungry.retry_at:
            sequence = hungry.sequences[0]
        else:
            others = (one for one in hungry.sequences[1:] if hungry.may_be_overtaken(one) and self._fits(one))
            if (found := next(others, None)) is None:
                return []
            sequence = found
        home = self._home(sequence, now, set())
        if home is None:
            return []
        overtakes = sequence is not hungry.sequences[0]
        hungry.sequences.remove(sequence)
        if overtakes:
            hungry.overtaken(sequence)
        self._join(home, sequence)
        return [self._reserve(home, [sequence], one_by_one=True)]

    def _reserve(self, home: MicroBatch, sequences: Items[Sequence], *, one_by_one: bool) -> Reserve:
        peers = {instance: urls for instance in home.route.instances if (urls := self._peers(instance, sequences))}
        return reserve(home.route.instances, sequences, one_by_one=one_by_one, peers=peers)

    def _peers(self, instance: Instance, sequences: Items[Sequence]) -> tuple[str, ...]:
        """Who may hold it: instances that leave, with conversations that nobody has in hand, and where much of it went last."""
        board = self._board
        places = [board.where_held.find(sequence.known()) for sequence in sequences]
        others = [held.instances[instance.stage] for held in places if held.tokens >= board.limits.chunk_tokens]
        urls = [other.url for other in others if other is not instance and other.ready and not other.is_service]
        return tuple(dict.fromkeys([*board.placement.leaving(instance), *urls]))[:MOST_PEERS]

    def _fits(self, sequence: Sequence) -> bool:
        """As far as the stages' last replies say, an instance of each has room for it."""
        placement = self._board.placement
        return all(placement.has_room(stage, sequence.reserve_tokens) for stage in range(placement.num_stages))

    def _room_elsewhere(self, current: Items[MicroBatch], sequence: Sequence) -> bool:
        """Only at instances that no micro-batch goes to: what fills the memory of a pod may be few for a micro-batch."""
        lacking = all(batch.route.lacks(sequence.reserve_tokens) for batch in current)
        return lacking and self._fits(sequence) and len(current) < self._board.micro_batches_allowed()

    def _join(self, home: MicroBatch, sequence: Sequence) -> None:
        home.join(sequence)
        sequence.served = self._board.steps_begun

    def _home(self, sequence: Sequence, now: float, closed: Set[MicroBatch]) -> MicroBatch | None:
        """The micro-batch for `sequence`, none of `closed`, new where there may be one more; None where it has to wait."""
        board = self._board
        # On an older revision sequences end where they began, and none begins: or it would never fall to zero.
        current = [batch for batch in board.micro_batches if not board.placement.outdated(batch.route)]
        coming = len(board.waiting.queue) + len(board.waiting.hungry.sequences)
        held = board.where_held.find(sequence.known())
        if len(current) < board.micro_batches_wanted(board.running + coming) or self._room_elsewhere(current, sequence):
            route = board.placement.place(sequence.reserve_tokens, held)
            if route is None:
                board.no_route_since = board.no_route_since or now
                return None
            board.micro_batches.append(MicroBatch(route))
            return board.micro_batches[-1]
        with_room = [
            batch
            for batch in current
            if len(batch.sequences) < board.limits.micro_batch_sequences
            and batch not in closed
            and batch.target is None
            and all(instance.usable(now) for instance in batch.route.instances)
        ]
        reserve = sequence.reserve_tokens
        chunk = board.limits.chunk_tokens

        def load(batch: MicroBatch) -> tuple[bool, float]:
            """A chunk of a prompt takes the others about as long as one sequence more."""
            return batch.route.lacks(reserve), len(batch.sequences) - held.on(batch.route.instances) / chunk

        return min(with_room, key=load, default=None)


def _found(sequence: Sequence, held: Items[int], first_stage: int) -> None:
    before = sequence.progress.held_everywhere
    for stage, tokens in enumerate(held, first_stage):
        sequence.progress.found(stage, min(tokens, sequence.total_tokens - 1))
    if (followed := sequence.follows) is not None:
        sequence.follows = None
        found_nothing = sequence.progress.held_everywhere <= before
        sequence.goes_alone = found_nothing and followed.sequence.progress.held_everywhere >= followed.tokens
