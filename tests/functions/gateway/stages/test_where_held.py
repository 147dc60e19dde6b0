"""The memory of prefix locations: found by a sequence's beginning, bounded, and weighed against load."""

from eventing.wire.prefix_chain import BLOCK_TOKENS, chain_key, extended
from functions.gateway.stages.routes import TOKENS_OF_A_ROUTE, Endpoint, Instance, Placement
from functions.gateway.stages.where_held import MAX_DIGESTS, NOTHING, Held, WhereHeld

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
