"""Who is next."""

from types import SimpleNamespace
from typing import Any

from functions.gateway.scheduling.waiting import FairQueue


def drain(queue: FairQueue) -> list[int]:
    """Numbers of all sequences in the order in which they are taken."""
    numbers = []
    while (sequence := queue.peek()) is not None:
        queue.take(sequence)
        numbers.append(sequence.number)
    return numbers


def waiting(client_id: str, number: int, priority: int = 0) -> Any:
    return SimpleNamespace(number=number, prompt=SimpleNamespace(client_id=client_id, priority=priority))


def test_the_queue_goes_round_the_clients() -> None:
    queue = FairQueue()
    for number, client in enumerate("aaaabbc"):
        queue.push(waiting(client, number))
    returned = waiting("a", 9)
    assert queue.remove(waiting("a", 1))
    assert not queue.remove(waiting("a", 1))
    queue.push_returned(returned)
    assert len(queue) == len(list(queue)) == 7
    assert queue.peek() == returned
    other = queue.peek(excluded={"a"})
    assert other is not None
    assert other.number == 4
    assert queue.peek(excluded={"a", "b", "c"}) is None
    assert drain(queue) == [9, 0, 4, 6, 2, 5, 3]
    assert len(queue) == 0


def test_who_has_priority_goes_first_and_equals_take_turns() -> None:
    queue = FairQueue()
    for number, (client, priority) in enumerate([("low", -1), ("a", 0), ("a", 0), ("b", 0), ("high", 5), ("high", 5)]):
        queue.push(waiting(client, number, priority))
    queue.push_returned(waiting("low", 9, -1))
    assert drain(queue) == [9, 4, 5, 1, 3, 2, 0]
