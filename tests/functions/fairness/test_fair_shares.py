"""The policy by itself: who is refused and who gives way when a resource is full."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.fairness.fair_shares import FairShares

GREEDY, MODEST = "greedy", [f"modest-{number}" for number in range(5)]


def asked(shares: FairShares[str], client: str, count: int, capacity: int, amount: int = 1) -> list[str]:
    """The client asks `count` times. Returns the clients that gave way, and the client itself for each refusal."""
    gave_way = []
    for number in range(count):
        yielding = shares.make_room(client, amount, capacity)
        if yielding is None:
            gave_way.append(client)
            continue
        gave_way += [item.partition("/")[0] for item in yielding]
        shares.add(client, f"{client}/{len(shares)}-{number}-{shares.total}", amount)
    return gave_way


def test_a_client_alone_has_everything_and_gives_way_to_equal_parts() -> None:
    shares: FairShares[str] = FairShares()
    assert asked(shares, GREEDY, 70, 60) == [GREEDY] * 10
    for client in MODEST:
        asked(shares, client, 30, 60)
    assert {client: shares.held[client] for client in (GREEDY, *MODEST)} == dict.fromkeys((GREEDY, *MODEST), 10)
    assert shares.total == 60


def test_what_modest_clients_want_they_get() -> None:
    shares: FairShares[str] = FairShares()
    asked(shares, GREEDY, 60, 60)
    for client in MODEST:
        assert asked(shares, client, 4, 60) == [GREEDY] * 4
    assert asked(shares, GREEDY, 5, 60) == [GREEDY] * 5


def test_the_newest_item_gives_way_and_never_a_fixed_or_only_one() -> None:
    shares: FairShares[str] = FairShares()
    for item in ("first", "second", "third"):
        shares.add(GREEDY, item, 10)
    shares.fix("third")
    assert shares.make_room("other", 5, 30) == ["second"]
    assert shares.make_room("other", 10, 30) == []
    assert shares.make_room("other", 11, 30) == ["first"]
    assert shares.make_room("other", 21, 30) is None, "the third is fixed, and the only one"
    shares.remove("third")
    shares.remove("third")
    assert (len(shares), shares.total, list(shares)) == (0, 0, [])


def test_among_clients_with_one_item_each_the_new_one_is_refused() -> None:
    shares: FairShares[str] = FairShares()
    for client in MODEST:
        shares.add(client, client, 8)
    assert shares.make_room("newcomer", 1, 40) is None


@pytest.mark.parametrize(("clients", "first"), [("aabbb", 2), ("aaabb", 0), ("abcde", 0), ("bcacd", 1)])
def test_the_oldest_item_of_the_greediest_client_gives_way_if_nobody_is_refused(clients: str, first: int) -> None:
    shares: FairShares[int] = FairShares(oldest_first=True)
    for item, client in enumerate(clients):
        shares.add(client, item)
    assert shares.make_room("new", 1, 5) == [first]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 5)), max_size=60), st.integers(1, 20))
def test_a_share_is_lost_only_to_clients_that_hold_less(requests: list[tuple[str, int]], capacity: int) -> None:
    shares: FairShares[int] = FairShares()
    amounts: dict[int, tuple[str, int]] = {}
    for item, (client, amount) in enumerate(requests):
        yielding = shares.make_room(client, amount, capacity)
        if yielding is not None:
            for lost in yielding:
                owner, _ = amounts.pop(lost)
                assert owner != client
                assert owner in {left for left, _ in amounts.values()}, "its only item"
            shares.add(client, item, amount)
            amounts[item] = (client, amount)
        expected = Counter[str]()
        for owner, held in amounts.values():
            expected[owner] += held
        assert shares.total == sum(expected.values()) <= capacity
        assert all(shares.held[owner] == expected[owner] for owner in "abcdef")
