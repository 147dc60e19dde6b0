"""Routes: placed on the instances that a watch knows, left, rebalanced, and avoided; load and held prefixes of instances."""

import time

import pytest

from eventing.wire.prefix_chain import BLOCK_TOKENS, chain_key, extended
from functions.gateway.stages import routes
from functions.gateway.stages.routes import TOKENS_OF_A_ROUTE, Endpoint, FifoLock, InFlight, Instance, Placement
from functions.gateway.stages.where_held import MAX_DIGESTS, NOTHING, Held, WhereHeld

SERVICES = ["http://stage-0", "http://stage-1"]


def placement(*urls: str) -> Placement:
    """Two stages. The first has one instance, the second one for each of `urls`."""
    placed = Placement(SERVICES, watched=True)
    placed.update(0, [Endpoint("a")])
    placed.update(1, [Endpoint(url) for url in urls])
    return placed


def test_a_new_route_takes_the_instances_with_the_fewest_routes() -> None:
    placed = placement("x", "y", "z")
    routes = [placed.place(10) for _ in range(6)]
    seconds = [route.instances[1].url for route in routes]
    assert sorted(seconds[:3]) == sorted(seconds[3:]) == ["x", "y", "z"]
    routes[1].close()
    assert placed.least_used(1).url == seconds[1]


def test_full_instances_come_last() -> None:
    placed = placement("x", "y")
    full = placed.least_used(1)
    full.replied("boot", 50)
    assert placed.least_used(1, 50).url == full.url
    assert placed.least_used(1, 51).url != full.url


def test_new_routes_use_the_current_revision_and_old_ones_stay() -> None:
    placed = Placement(SERVICES[:1], watched=True)
    placed.update(0, [Endpoint("old", "stage-0-00009")])
    route = placed.place(1)
    placed.update(0, [Endpoint("old", "stage-0-00009"), Endpoint("new", "stage-0-00010", ready=False)])
    assert placed.least_used(0).url == "old"
    placed.update(0, [Endpoint("old", "stage-0-00009"), Endpoint("new", "stage-0-00010")])
    assert placed.least_used(0).url == "new"
    assert placed.must_leave(route) is None
    assert placed.ready_counts() == [1]


def test_a_route_leaves_an_instance_that_terminates_once_there_is_another() -> None:
    placed = placement("x")
    route = placed.place(1)
    placed.update(1, [Endpoint("x", ready=False, terminating=True)])
    assert placed.must_leave(route) is None
    assert placed.strands(route)
    assert placed.cold() == [1]
    placed.update(1, [Endpoint("x", ready=False, terminating=True), Endpoint("y")])
    target = placed.must_leave(route)
    assert target.url == "y"
    assert route.replace(target).routes == 0
    assert target.routes == 1
    placed.update(1, [])
    assert placed.strands(route)


def test_an_address_that_comes_back_is_a_new_instance() -> None:
    placed = placement("x")
    before = placed.least_used(1)
    placed.update(1, [])
    placed.update(1, [Endpoint("x")])
    assert placed.least_used(1) is not before


def test_two_routes_more_than_another_instance_are_unbalanced() -> None:
    placed = placement("x")
    for _ in range(2):
        placed.place(1)
    placed.update(1, [Endpoint("x"), Endpoint("y")])
    uneven = placed.unbalanced(1)
    assert (uneven[0].url, uneven[1].url) == ("x", "y")
    placed.place(1)
    assert placed.unbalanced(1) is None


def paced(instance: Instance, times_as_slow: float, passes: int, now: float) -> None:
    for _ in range(passes):
        instance.passed(times_as_slow * 0.02, 0.02, now)


def test_an_instance_at_a_third_of_its_peers_speed_gets_a_quarter_of_the_routes() -> None:
    placed = placement("slow", "quick")
    slow, quick = placed.stages[1].values()
    routes = [placed.place(1) for _ in range(4)]
    assert (slow.routes, quick.routes) == (2, 2)
    now = time.monotonic()
    paced(quick, 1.0, 20, now)
    for _ in range(20):  # pauses of the process
        paced(slow, 50.0, 1, now)
        paced(slow, 1.0, 4, now)
        assert placed.unbalanced(1) is None
    paced(slow, 3.0, 30, now)
    assert placed.unbalanced(1) == (slow, quick)
    next(route for route in routes if slow in route.instances).replace(quick)
    assert placed.unbalanced(1) is None
    assert placed.least_used(1) is quick, "1 route beside 3"
    assert [placed.slowness(route) > 2 for route in routes if slow in route.instances] == [True]
    paced(slow, 1.0, 40, now)
    assert placed.unbalanced(1) == (quick, slow)


def test_a_slow_instance_without_routes_gets_a_try_after_a_while() -> None:
    placed = placement("slow", "quick")
    slow, quick = placed.stages[1].values()
    long_ago = time.monotonic() - 60
    paced(slow, 3.0, 30, long_ago)
    paced(quick, 1.0, 1, time.monotonic())
    assert placed.least_used(1) is slow
    paced(slow, 3.0, 1, time.monotonic())
    assert not slow.slow, "what it was is forgotten"


def test_stages_that_are_slow_as_a_whole_have_no_slow_instance() -> None:
    placed = placement("x", "y")
    for instance in placed.stages[1].values():
        paced(instance, 3.0, 30, time.monotonic())
    assert placed.slowness(placed.place(1)) == 1.0


def test_each_suspension_of_a_broken_instance_is_longer() -> None:
    placed = placement("x", "y")
    broken = placed.least_used(1)
    moment, pauses = time.monotonic(), []
    for _ in range(4):
        broken.suspend(moment)
        pauses.append(broken.suspended_until - moment)
        moment = broken.suspended_until
    assert pauses == sorted(pauses)
    assert placed.least_used(1).url != broken.url
    assert placed.next_resumption(time.monotonic()) == broken.suspended_until
    broken.replied("boot", None)
    broken.suspend(moment)
    assert broken.suspended_until - moment < pauses[1]


def test_many_events_that_fail_together_count_as_one_failure() -> None:
    placed = placement("x")
    instance = placed.least_used(1)
    placed.avoid(instance)
    resumption = instance.suspended_until
    for _ in range(15):
        placed.avoid(instance)
    assert (instance.failures, instance.suspended_until) == (1, resumption)


def test_without_a_watch_the_service_url_is_the_instance_once_it_is_awake() -> None:
    placed = Placement(SERVICES, watched=False)
    assert placed.cold() == [0, 1]
    assert placed.place(1) is None
    for stage in (0, 1):
        placed.woken(stage)
    route = placed.place(1)
    assert [instance.url for instance in route.instances] == SERVICES
    assert placed.ready_counts() == [0, 0], "unknown"
    placed.avoid(route.instances[1])
    assert placed.cold() == [1]


def test_with_tls_no_service_url_stands_for_instances() -> None:
    """The way to a Service is not encrypted: requests wait until the watch reports pods."""
    placed = Placement(SERVICES, watched=True, pods_only=True)
    pod = Endpoint("https://10.1.0.5:8112")
    placed.update(0, [pod])
    placed.update(1, [Endpoint("https://10.1.0.6:8112")])
    placed.unwatched(0)  # the gateway may not watch any more
    placed.woken(0)
    assert (placed.cold(), placed.place(1)) == ([0], None)
    placed.update(0, [pod])
    assert [instance.url for instance in placed.place(1).instances] == [pod.url, "https://10.1.0.6:8112"]


def test_revisions_are_compared_only_when_endpoints_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decision of the scheduler asks for the current instances, under its lock."""
    placed = placement("x", "y")
    monkeypatch.setattr(routes, "_revision_order", lambda _: pytest.fail("compared again"))
    route = placed.place(10)
    assert placed.ready_counts() == [1, 2]
    assert (placed.cold(), placed.strands(route), placed.outdated(route), placed.unbalanced(1)) == ([], False, False, None)
    monkeypatch.undo()
    placed.update(1, [Endpoint("x")])
    assert placed.ready_counts() == [1, 1]


def test_a_fifo_lock_keeps_order() -> None:
    lock = FifoLock()
    first, second, third = (lock.queue() for _ in range(3))
    assert [turn.is_set() for turn in (first, second, third)] == [True, False, False]
    lock.leave()
    assert [turn.is_set() for turn in (second, third)] == [True, False]
    lock.leave()
    lock.leave()
    assert lock.idle


def test_event_seconds_add_up_over_events_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(routes.time, "monotonic", lambda: now)
    instance = InFlight()
    now = 101.0
    with instance:
        now = 102.0
        with instance:
            now = 104.0
            assert instance.event_seconds() == pytest.approx(1 + 2 * 2)
        now = 105.0
    now = 200.0
    assert instance.event_seconds() == pytest.approx(1 + 2 * 2 + 1)


KEY = chain_key("0" * 32, "")


def instances(name: str) -> tuple[Instance, ...]:
    made = tuple(Instance(stage, f"{name}-{stage}") for stage in range(2))
    for instance in made:
        instance.replied("boot", None)
    return made


def test_the_longest_prefix_and_its_last_instances_are_found() -> None:
    where, one, other = WhereHeld(), instances("one"), instances("other")
    first, second = list(range(100)), [*range(60), *range(500, 600)]
    where.put(extended((), first, KEY), one)
    where.put(extended((), second, KEY), other)
    assert where.find(extended((), first, KEY)) == Held(96, one)
    assert where.find(extended((), first[:70], KEY)) == Held(64, one)
    assert where.find(extended((), first[:50], KEY)) == Held(48, other)
    assert where.find(extended((), [7, *first], KEY)) is NOTHING


def test_an_instance_that_booted_again_or_leaves_holds_nothing() -> None:
    where, one = WhereHeld(), instances("one")
    chain = extended((), list(range(40)), KEY)
    where.put(chain, one)
    one[0].replied("next boot", None)
    assert where.find(chain) == Held(32, one)
    one[1].terminating = True
    assert where.find(chain) is NOTHING


def test_ten_thousand_conversations_leave_it_as_large_as_a_thousand() -> None:
    where, one = WhereHeld(), instances("one")
    for number in range(10_000):
        where.put(extended((), [number] * 10 * BLOCK_TOKENS, KEY), one)
    assert len(where._places) == MAX_DIGESTS
    assert where.find(extended((), [9_999] * 10 * BLOCK_TOKENS, KEY)).tokens == 10 * BLOCK_TOKENS
    assert where.find(extended((), [0] * 10 * BLOCK_TOKENS, KEY)) is NOTHING


def test_a_route_goes_to_its_cached_prefix_unless_others_have_much_less_load() -> None:
    placed = Placement(["http://stage-0"], watched=True)
    placed.update(0, [Endpoint("x"), Endpoint("y")])
    holder = placed.least_used(0)
    held = Held(TOKENS_OF_A_ROUTE, (holder,))
    routes = [placed.place(1, held) for _ in range(3)]
    seen = [route.instances[0] is holder for route in routes if route is not None]
    assert seen == [True, True, False]
    assert placed.unbalanced(0) is None, "two more would be moved away"
    assert Held(TOKENS_OF_A_ROUTE, (holder,)).at(holder) == TOKENS_OF_A_ROUTE


def test_what_an_instance_that_leaves_holds_is_known_for_its_peers() -> None:
    where, one, other = WhereHeld(), instances("one"), instances("other")
    chain = extended((), list(range(40)), KEY)
    where.put(chain, one)
    where.put(chain[:1], other)
    one[0].terminating, one[0].ready = True, False
    assert where.holder(chain, 0) == (32, one[0])
    one[0].replied("next boot", None)
    assert where.holder(chain, 0) == (16, other[0])
    assert where.holder(extended((), [7] * 40, KEY), 0) == (0, None)
