"""The policy by which members share devices: who gives way, in which order, and that each is next at some time."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from functions.gateway.fleet.grants import QUANTUM_SECONDS, GrantDecision, MemberLoad, decide
from tests.support.functions.simulated_fleet import simulate

NOW = 1000.0


def holds(name: str, devices: int = 2, **changes: object) -> MemberLoad:
    """A member with a grant and its pods, idle for 10 s."""
    return replace(MemberLoad(name, devices, devices, granted_at=NOW - 60, used_at=NOW - 10), **changes)


def waits(name: str, seconds: float = 1.0, devices: int = 2, pods: int = 0) -> MemberLoad:
    return MemberLoad(name, devices, pods, waiting_since=NOW - seconds)


def test_free_devices_are_granted_in_the_order_of_the_requests() -> None:
    assert decide([waits("late", 1), waits("early", 5)], 4, NOW) == GrantDecision(("early", "late"))
    assert decide([waits("late", 1), waits("early", 5)], 2, NOW) == GrantDecision(("early",))


def test_nobody_overtakes_a_member_that_does_not_fit_yet() -> None:
    busy = holds("busy", in_flight=1, granted_at=NOW - 1)
    assert decide([busy, waits("large", 5, devices=3), waits("small", 1, devices=1)], 4, NOW) == GrantDecision()


def test_idle_members_give_way_least_recently_used_first() -> None:
    recent, old = holds("recent", used_at=NOW - 1), holds("old", used_at=NOW - 50)
    assert decide([recent, old, waits("new")], 4, NOW) == GrantDecision(revoke=("old",))


def test_room_is_made_for_all_that_wait_at_once() -> None:
    """One after the other, each would wait for the windows of all before it."""
    idle = [holds(f"idle-{number}", used_at=NOW - number) for number in range(3)]
    assert decide([*idle, waits("a", 2), waits("b", 1)], 6, NOW) == GrantDecision(revoke=("idle-2", "idle-1"))


def test_the_time_of_a_return_weighs() -> None:
    quick, slow = holds("quick", used_at=NOW - 10, return_seconds=2.0), holds("slow", used_at=NOW - 50, return_seconds=60.0)
    assert decide([quick, slow, waits("new")], 4, NOW).revoke == ("quick",)


def test_devices_count_until_their_pods_are_gone() -> None:
    leaving = MemberLoad("leaving", 2, pods=2)
    busy = holds("busy", in_flight=1)
    assert decide([busy, leaving, waits("new")], 4, NOW) == GrantDecision(), "what leaves is enough, so nobody else gives way"
    assert decide([busy, replace(leaving, pods=0), waits("new")], 4, NOW) == GrantDecision(("new",))
    back = waits("back", pods=2)
    assert decide([busy, back], 4, NOW) == GrantDecision(("back",)), "its own pods are still there"
    young = replace(busy, granted_at=NOW)
    assert decide([young, replace(back, leaving=1)], 4, NOW) == GrantDecision(), "one of them goes, and another must come"
    returned = holds("returned", pods=4, leaving=2, in_flight=1)
    assert decide([returned, waits("new", devices=1)], 4, NOW) == GrantDecision(), "its old pods count beside its new ones"


def test_a_member_whose_pods_are_on_their_way_keeps_its_devices() -> None:
    """Its client went away. Nothing stops the pods that Knative starts for it."""
    starts = holds("starts", pods=0, starting=True, granted_at=NOW - 60)
    assert decide([starts, waits("new")], 2, NOW) == GrantDecision()
    assert decide([replace(starts, pods=2, starting=False), waits("new")], 2, NOW).revoke == ("starts",)


def test_a_busy_member_gives_way_after_its_quantum_and_finishes_what_is_in_flight() -> None:
    busy = holds("busy", in_flight=3, granted_at=NOW - QUANTUM_SECONDS + 1)
    assert decide([busy, waits("new")], 2, NOW) == GrantDecision()
    assert decide([busy, waits("new")], 2, NOW + 1) == GrantDecision(close=frozenset({"busy"}))
    done = replace(busy, in_flight=0, waiting_since=NOW)  # its own next request waits
    assert decide([done, waits("new")], 2, NOW + 1) == GrantDecision(revoke=("busy",))


def test_lines_of_batches_wait_for_live_requests_of_other_members() -> None:
    """They take what is free, have nobody with live requests give way, and give way at once, after the lines in flight."""
    batch = replace(waits("batch", 50), live=False)
    assert decide([batch, waits("new")], 2, NOW) == GrantDecision(("new",))
    assert decide([batch, waits("new")], 4, NOW) == GrantDecision(("new", "batch"))
    assert decide([batch, holds("idle"), holds("busy", in_flight=1)], 4, NOW) == GrantDecision(), "idle pods end by themselves"
    lines = holds("lines", in_flight=1, live=False, granted_at=NOW - 1)
    assert decide([lines, waits("new")], 2, NOW) == GrantDecision(close=frozenset({"lines"}))
    assert decide([lines, holds("idle"), waits("new")], 4, NOW) == GrantDecision(revoke=("idle",))
    assert decide([holds("busy", in_flight=1), lines, waits("new")], 4, NOW).close == {"lines"}, "whoever holds it longer"


def test_batches_take_turns_with_each_other() -> None:
    lines = holds("lines", in_flight=1, live=False, granted_at=NOW - QUANTUM_SECONDS + 1)
    batch = replace(waits("batch"), live=False)
    assert decide([lines, batch], 2, NOW) == GrantDecision()
    assert decide([lines, batch], 2, NOW + 1) == GrantDecision(close=frozenset({"lines"}))


@st.composite
def loads_of(draw: st.DrawFn) -> list[MemberLoad]:
    def load(number: int) -> MemberLoad:
        pods = draw(st.integers(0, 4))
        granted_at = draw(st.none() | st.floats(0, NOW))
        return MemberLoad(
            str(number),
            draw(st.integers(1, 4)),
            pods,
            draw(st.integers(0, pods)),
            granted_at,
            granted_at is not None and draw(st.booleans()),
            0 if granted_at is None else draw(st.integers(0, 3)),
            draw(st.none() | st.floats(0, NOW)),
            draw(st.booleans()),
            draw(st.floats(0, NOW)),
        )

    return [load(number) for number in range(draw(st.integers(0, 8)))]


@given(loads_of(), st.integers(4, 12))
def test_grants_never_take_more_than_the_devices(loads: list[MemberLoad], max_devices: int) -> None:
    decision = decide(loads, max_devices, NOW)
    by_name = {load.name: load for load in loads}
    after = [replace(load, granted_at=NOW) if load.name in decision.grant else load for load in loads]
    assert not decision.grant or sum(load.taken for load in after) <= max_devices
    for name in decision.revoke:
        load = by_name[name]
        assert load.granted_at is not None
        assert not load.in_flight
        assert not load.starting


def test_the_bound_holds_while_pods_come_and_go() -> None:
    """Ten simulated minutes of requests to twelve members, with Knative's window, ticks and drain."""
    waits, peak = simulate(12, 600.0, devices=6, timeout_seconds=20.0)
    assert peak == 6
    assert len(waits) > 200
    assert max(waits) < 120, "each is next at some time"


def test_everybody_is_served_in_the_end() -> None:
    """Six members that always have requests share devices for two: each is granted again and again."""
    names = [f"m{number}" for number in range(6)]
    loads = {name: MemberLoad(name, 1, waiting_since=float(number)) for number, name in enumerate(names)}
    served = dict.fromkeys(names, 0)
    for second in range(600):
        now = 10.0 + second
        decision = decide(list(loads.values()), 2, now)
        for name in decision.revoke:
            loads[name] = replace(loads[name], granted_at=None, in_flight=0, waiting_since=now)
        for name, load in loads.items():
            if name in decision.grant:
                served[name] += 1
                loads[name] = replace(load, granted_at=now, in_flight=1, waiting_since=None, pods=1)
            elif name in decision.close:
                loads[name] = replace(load, in_flight=0, waiting_since=now)
            elif load.granted_at is None:
                loads[name] = replace(loads[name], pods=0)
    assert min(served.values()) >= 4, served
