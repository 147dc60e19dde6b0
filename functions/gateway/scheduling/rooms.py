"""Who waits for memory is in flight at the stages that lack it: their autoscalers see it (docs/scheduling.md, "Memory").

A pod that is full of long answers may have a single event in flight, or less, and would never get a sibling while others wait
in the gateway. So releases without rows go to each instance of such a stage, whose replies are held there until it has room.
"""

from collections import Counter

from eventing.wire.control import ROOM_SECONDS
from functions.gateway.scheduling.actions import Release
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.capacity import IN_FLIGHT_PER_INSTANCE
from functions.gateway.stages.instances import Instance


class Rooms:
    def __init__(self, board: Board) -> None:
        self._board = board
        self._under_way: dict[Release, float] = {}
        """And since when."""
        self._not_before: dict[Instance, float] = {}
        """An instance that holds no reply, being older or having enough of them, is asked as seldom as one that does."""

    def next(self, now: float) -> list[Release]:
        """As many as wait for memory, and a few for each instance at most, at every stage that has no room for the first."""
        hungry = self._board.waiting.hungry.sequences
        if not hungry:
            return []
        self._not_before = {instance: until for instance, until in self._not_before.items() if until > now}
        tokens, placement = hungry[0].reserve_tokens, self._board.placement
        begun: list[Release] = []
        for stage in range(placement.num_stages):
            instances = [] if placement.has_room(stage, tokens) else placement.usable(stage)
            wanted = [*instances] * IN_FLIGHT_PER_INSTANCE
            lacking = Counter(wanted[: len(hungry)]) - Counter(release.instance for release in self._under_way)
            begun += [Release(one, (), tokens) for one in lacking.elements() if one not in self._not_before]
        self._under_way |= dict.fromkeys(begun, now)
        return begun

    def over(self, release: Release, now: float) -> bool:
        """It was answered, or failed. Whether it was one of these, so that somebody may go on."""
        since = self._under_way.pop(release, None)
        if since is None:
            return False
        free = release.instance.free_tokens
        if free is not None and free >= release.awaited_tokens:
            self._board.waiting.hungry.was_freed()
        else:
            self._not_before[release.instance] = since + ROOM_SECONDS
        return True
