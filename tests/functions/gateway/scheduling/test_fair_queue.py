"""Who is next."""

from dataclasses import dataclass

import pytest

from functions.gateway.scheduling.fair_queue import FairQueue


@dataclass(frozen=True)
class Waiting:
    client_id: str
    number: int
    priority: int = 0


def test_the_queue_goes_round_the_clients() -> None:
    queue: FairQueue[Waiting] = FairQueue()
    for number, client in enumerate("aaaabbc"):
        queue.push(Waiting(client, number))
    returned = Waiting("a", 9)
    assert queue.remove(Waiting("a", 1))
    assert not queue.remove(Waiting("a", 1))
    queue.push_returned(returned)
    assert len(queue) == len(list(queue)) == 7
    assert queue.peek() == returned
    other = queue.peek(but={"a"})
    assert other is not None
    assert other.number == 4
    assert queue.peek(but={"a", "b", "c"}) is None
    assert [queue.pop().number for _ in range(7)] == [9, 0, 4, 6, 2, 5, 3]
    assert queue.peek() is None
    with pytest.raises(IndexError, match="nobody waits"):
        queue.pop()


def test_who_has_priority_goes_first_and_equals_take_turns() -> None:
    queue: FairQueue[Waiting] = FairQueue()
    for number, (client, priority) in enumerate([("low", -1), ("a", 0), ("a", 0), ("b", 0), ("high", 5), ("high", 5)]):
        queue.push(Waiting(client, number, priority))
    queue.push_returned(Waiting("low", 9, -1))
    assert [queue.pop().number for _ in range(7)] == [9, 4, 5, 1, 3, 2, 0]
