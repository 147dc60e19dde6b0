"""The policy by which members share devices: who gives way, in which order, and that each is next at some time."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from functions.gateway.fleet.grants import QUANTUM_SECONDS, GrantDecision, MemberLoad, decide

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
    gone = holds("gone", pods=0, used_at=NOW - 1, return_seconds=60.0)
    assert decide([quick, gone, waits("new")], 4, NOW).revoke == ("gone",), "it gives nothing up"


def test_devices_count_until_their_pods_are_gone() -> None:
    leaving = MemberLoad("leaving", 2, pods=2)
    busy = holds("busy", in_flight=1)
    assert decide([busy, leaving, waits("new")], 4, NOW) == GrantDecision(), "what leaves is enough, so nobody else gives way"
    assert decide([busy, replace(leaving, pods=0), waits("new")], 4, NOW) == GrantDecision(("new",))
    back = waits("back", pods=2)
    assert decide([busy, back], 4, NOW) == GrantDecision(("back",)), "its own pods are still there"
    young = replace(busy, granted_at=NOW)
    assert decide([young, replace(back, leaving=1)], 4, NOW) == GrantDecision(), "one of them goes, and another must come"


def test_a_busy_member_gives_way_after_its_quantum_and_finishes_what_is_in_flight() -> None:
    busy = holds("busy", in_flight=3, granted_at=NOW - QUANTUM_SECONDS + 1)
    assert decide([busy, waits("new")], 2, NOW) == GrantDecision()
    assert decide([busy, waits("new")], 2, NOW + 1) == GrantDecision(close=frozenset({"busy"}))
    done = replace(busy, in_flight=0, waiting_since=NOW)  # its own next request waits
    assert decide([done, waits("new")], 2, NOW + 1) == GrantDecision(revoke=("busy",))


LOADS = st.lists(
    st.builds(
        MemberLoad,
        name=st.uuids().map(str),
        devices=st.integers(1, 4),
        pods=st.integers(0, 4),
        granted_at=st.none() | st.floats(0, NOW),
        in_flight=st.integers(0, 3),
        waiting_since=st.none() | st.floats(0, NOW),
        used_at=st.floats(0, NOW),
    ),
    max_size=8,
    unique_by=lambda load: load.name,
)


@given(LOADS, st.integers(4, 12))
def test_grants_never_add_up_to_more_than_the_devices(loads: list[MemberLoad], max_devices: int) -> None:
    decision = decide(loads, max_devices, NOW)
    by_name = {load.name: load for load in loads}
    taken = sum(
        max(load.devices, load.pods) if load.granted_at is not None or load.name in decision.grant else load.pods
        for load in loads
    )
    assert not decision.grant or taken <= max_devices or any(load.pods > load.devices for load in loads)
    assert all(by_name[name].granted_at is not None and not by_name[name].in_flight for name in decision.revoke)


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
