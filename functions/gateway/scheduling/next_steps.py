"""Which steps begin now: of each micro-batch that is at a step boundary, and of prompts where a first stage takes a chunk."""

from collections.abc import Iterator
from collections.abc import Sequence as Items

from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.failures import Failures
from functions.gateway.scheduling.micro_batch import MicroBatch, level, prompt_pieces
from functions.gateway.scheduling.progress import Piece
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.speculation import how_many, step_seconds
from functions.gateway.scheduling.step import Step, make_step
from functions.gateway.stages.instances import Instance


class NextSteps:
    def __init__(self, board: Board, failures: Failures) -> None:
        self._board = board
        self._failures = failures

    def begin(self, now: float) -> list[Step]:
        """All that can begin has begun; their trips have to be walked."""
        return [*self._decode_steps(), *self._prompt_steps(now)]

    def _decode_steps(self) -> Iterator[Step]:
        board = self._board
        wanted = board.micro_batches_wanted(board.running)
        depth = board.placement.num_stages - 1
        for batch in list(board.micro_batches):
            if batch.decoding or batch.target is not None:
                continue
            level(batch, board.micro_batches, len(board.micro_batches) > wanted, board.limits.micro_batch_sequences)
            going = [one for one in batch.sequences if not one.strikes.count and one.decodes and self._failures.may_send(one)]
            if going:
                draft_tokens = self._draft_tokens(going)
                pieces = [
                    (sequence, Piece(sequence.total_tokens - 1, 1, depth, drafted))
                    for sequence, drafted in zip(going, draft_tokens, strict=True)
                ]
                yield self._begin(pieces, batch.route.instances, batch)

    def _draft_tokens(self, sequences: Items[Sequence]) -> list[tuple[int, ...]]:
        """For each, as many as pay for what they cost in its step."""
        most = self._board.limits.draft_tokens
        draft_tokens = [() if one.drafter is None else one.drafter.draft(min(most, one.most_draft_tokens)) for one in sequences]
        if not any(draft_tokens):
            return draft_tokens
        chances = [0.0 if one.drafter is None else one.drafter.chance for one in sequences]
        stages = self._board.stats.stages
        micro_batches = sum(1 for batch in self._board.micro_batches if batch.sequences)
        network_seconds = sum(stage.network_seconds for stage in stages)
        seconds = step_seconds([stage.costs for stage in stages], micro_batches, network_seconds)
        counts = how_many([(len(own), chance) for own, chance in zip(draft_tokens, chances, strict=True)], seconds)
        return [own[:count] for own, count in zip(draft_tokens, counts, strict=True)]

    def _prompt_steps(self, now: float) -> Iterator[Step]:
        """At each first stage where no chunk is: one event, begun by whoever waits longest, filled up with others' chunks.

        Nothing to an instance that has just broken: suspects, who travel one by one, would each get another strike there.
        """
        by_route: dict[tuple[Instance, ...], list[Sequence]] = {}
        for batch in self._board.micro_batches:
            if batch.target is None and not batch.route.suspended(now) and batch.route.instances[0].prompts.idle:
                prompts = [sequence for sequence in batch.sequences if self._has_prompt(sequence)]
                by_route.setdefault(batch.route.instances, []).extend(prompts)
        candidates = [(min(one.served for one in prompts), route) for route, prompts in by_route.items() if prompts]
        for _, route in sorted(candidates, key=lambda candidate: candidate[0]):
            if not route[0].prompts.idle:
                continue
            prompts = sorted(by_route[route], key=lambda sequence: sequence.served)
            pieces = prompt_pieces(prompts, self._board.limits.chunk_tokens)
            if pieces:
                yield self._begin(pieces, route, None)

    def _has_prompt(self, sequence: Sequence) -> bool:
        """At most as many chunks of it are on their way as there are stages."""
        if (
            not sequence.reserved
            or sequence.follows
            or sequence.must_restart
            or sequence.over
            or not self._failures.may_send(sequence)
        ):
            return False
        in_flight = sequence.progress.in_flight
        return in_flight < self._board.placement.num_stages and (sequence.strikes.count > 0 or not sequence.decodes)

    def _begin(self, pieces: Items[tuple[Sequence, Piece]], instances: tuple[Instance, ...], batch: MicroBatch | None) -> Step:
        board = self._board
        step = make_step(pieces, instances, batch)
        if batch is None:
            instances[0].prompts.queue()
        board.step_begins(step)
        for sequence, piece in pieces:
            sequence.progress.send(piece)
            if sequence.stream.started(piece.position):
                board.stats.cached_tokens += piece.position
            if batch is None:
                sequence.served = board.steps_begun
            board.stats.prompt_tokens += max(0, min(piece.end, len(sequence.prompt.token_ids)) - piece.position)
        return step
