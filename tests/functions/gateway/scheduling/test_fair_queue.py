"""Who is next."""

from dataclasses import dataclass

import pytest

from functions.gateway.scheduling.fair_queue import FairQueue


@dataclass(frozen=True)
class Waiting:
    client_id: str
    number: int


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
