"""What is asked of stages for sequences of one micro-batch: memory, and whether what they hold is there already."""

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Items

from eventing.wire.control import ReserveRow
from eventing.wire.prefix_chain import BLOCK_TOKENS, packed
from functions.gateway.scheduling.actions import Reserve
from functions.gateway.scheduling.sequence import Sequence, traces_of
from functions.gateway.stages.instances import Instance


def reserve(
    instances: tuple[Instance, ...],
    sequences: Items[Sequence],
    *,
    one_by_one: bool = False,
    peers: Mapping[Instance, tuple[str, ...]] | None = None,
    moved_from: Instance | None = None,
) -> Reserve:
    """instances: one for each stage from the first that is asked on."""
    return Reserve(
        sequences,
        instances,
        [_row(one) for one in sequences],
        traces_of(sequences),
        max(one.deadline for one in sequences),
        one_by_one,
        peers or {},
        moved_from,
    )


def _row(sequence: Sequence) -> ReserveRow:
    every_token = sequence.prompt.scored and not sequence.has_drawn
    chain = sequence.asked = () if every_token else sequence.known()
    looks_back = sequence.prompt.sampling.looks_back
    token_ids = array("i", sequence.tokens[: BLOCK_TOKENS * len(chain)]).tobytes() if looks_back else b""
    return ReserveRow(sequence.id, sequence.progress.attempt, sequence.reserve_tokens, packed(chain), token_ids)
