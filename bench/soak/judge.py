"""What must show in a soak, judged from its records."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bench.soak.growth import QUANTITIES, Growth, growths
from bench.soak.records import (
    FREE,
    GATEWAY,
    STORE,
    Answer,
    Attempt,
    Began,
    Ended,
    Fault,
    Health,
    Lost,
    Record,
    Reference,
    Refused,
    Rest,
    of,
)

HEALTHY_SECONDS: Final = 1.0
_NAMES: Final = {
    "threads": "threads",
    "descriptors": "descriptors",
    "own_bytes": "resident memory, without what is reserved for keys and values,",
}
RECOVERY_SECONDS: Final = 20.0
"""After a fault of a service, or of the store that it starts from: so long its own health is not asked for."""


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    seen: str
    holds: bool


def judge(records: Sequence[Record], refused_kinds: frozenset[str]) -> list[Verdict]:
    """refused_kinds: names of those hostile clients that nothing good or broken may be answered to."""
    return [
        _right(records),
        _none_lost(records),
        _told_when(records),
        _nobody_left(records),
        _memory_free(records),
        *(_flat(records, quantity) for quantity in QUANTITIES),
        _healthy(records),
        _ended_by_faults_only(records),
        _refused(records, refused_kinds),
        _disturbed(records),
    ]


def wrong(records: Sequence[Record]) -> list[Answer]:
    """Answers that are not, token for token, what the question was answered while nothing disturbed."""
    references = {reference.question: reference for reference in of(Reference, records)}
    return [answer for answer in of(Answer, records) if not _as_before(answer, references.get(answer.question))]


def _as_before(answer: Answer, before: Reference | None) -> bool:
    if before is None or (answer.text, answer.completion_tokens) != (before.text, before.completion_tokens):
        return False
    return answer.token_ids is None or answer.token_ids == before.token_ids


def _right(records: Sequence[Record]) -> Verdict:
    answers, found = of(Answer, records), wrong(records)
    first = f"; first: {found[0].question!r} by {found[0].door}: {found[0].text!r}" if found else ""
    return Verdict(
        "every honest answer is, token for token, the undisturbed one",
        f"{len(found)} of {len(answers)} wrong{first}",
        bool(answers) and not found,
    )


def _none_lost(records: Sequence[Record]) -> Verdict:
    lost = of(Lost, records)
    first = f"; first, at {lost[0].t:.0f} s by {lost[0].door}: {lost[0].reason}" if lost else ""
    return Verdict("no honest question is lost", f"{len(lost)} lost{first}", not lost)


def _told_when(records: Sequence[Record]) -> Verdict:
    refusals = of(Refused, records)
    silent = [refusal for refusal in refusals if refusal.retry_after is None]
    return Verdict(
        "refusals of honest clients say when to retry (Retry-After)",
        f"{len(silent)} of {len(refusals)} refusals without",
        not silent,
    )


def _rest(records: Sequence[Record], moment: str) -> dict[str, dict[str, float]]:
    return {rest.service: rest.gauges for rest in of(Rest, records) if rest.moment == moment}


def _nobody_left(records: Sequence[Record]) -> Verdict:
    after = _rest(records, "after")
    left = {
        f"{service} {name.removeprefix('lamina_')}": value
        for service, gauges in after.items()
        for name, value in gauges.items()
        if name != FREE and value
    }
    seen = ", ".join(f"{name} {value:g}" for name, value in left.items()) or "0 everywhere"
    complete = bool(after) and all(after.values())
    return Verdict(
        "afterwards nothing runs, waits or holds memory", seen if complete else "not all answered", complete and not left
    )


def _memory_free(records: Sequence[Record]) -> Verdict:
    before, after = (
        {service: gauges.get(FREE) for service, gauges in _rest(records, moment).items() if service != GATEWAY}
        for moment in ("before", "after")
    )
    pairs = [f"{service} {after.get(service)} of {free}" for service, free in before.items() if after.get(service) != free]
    holds = bool(before) and not pairs and None not in before.values()
    return Verdict("keys and values are free everywhere as at the start", ", ".join(pairs) or "as at the start", holds)


def _flat(records: Sequence[Record], quantity: str) -> Verdict:
    services = of(Began, records)[0].services if of(Began, records) else ()
    seen = [growth for growth in growths(records) if growth.quantity == quantity]
    unseen = [service for service in services if service not in {growth.service for growth in seen}]
    told = [_grown(growth) for growth in seen if not growth.flat] or [_grown(each) for each in _most_grown(seen)]
    told += [f"{service}: no process lived long enough" for service in unseen]
    return Verdict(
        f"{_NAMES[quantity]} of every process flat over the last two thirds",
        "; ".join(told) or "nothing seen",
        bool(seen) and not unseen and all(growth.flat for growth in seen),
    )


def _most_grown(seen: Sequence[Growth]) -> list[Growth]:
    return [max(seen, key=lambda growth: growth.grown / growth.allowed)] if seen else []


def _grown(growth: Growth) -> str:
    factor, unit = (2**-20, " MiB") if growth.quantity == "own_bytes" else (1, "")
    return f"{growth.service} {growth.grown * factor:+.1f}{unit} at {growth.level * factor:.0f}{unit} ({growth.lulls} lulls)"


def late(records: Sequence[Record]) -> list[Health]:
    """Answers of `/healthz` that were none or late, where no fault of the service's own or the store's excuses them."""
    faults = of(Fault, records)
    found = [health for health in of(Health, records) if health.status != 200 or health.seconds > HEALTHY_SECONDS]
    return [health for health in found if not any(_excuses(fault, health) for fault in faults)]


def _excuses(fault: Fault, health: Health) -> bool:
    if fault.service != health.service and (fault.service != STORE or health.service == GATEWAY):
        return False
    return fault.t <= health.t + health.seconds + HEALTHY_SECONDS and health.t <= fault.until + RECOVERY_SECONDS


def _healthy(records: Sequence[Record]) -> Verdict:
    asked, found = of(Health, records), late(records)
    seen = f"{len(found)} of {len(asked)} not" + (f": {', '.join(_worst(found))}" if found else "")
    gateway_asked = any(health.service == GATEWAY for health in asked)
    return Verdict(
        f"/healthz is answered within {HEALTHY_SECONDS:g} s throughout, where the process itself is not broken",
        seen,
        gateway_asked and not found,
    )


def _worst(found: Sequence[Health]) -> Iterator[str]:
    for service, count in Counter(health.service for health in found).items():
        worst = max((health for health in found if health.service == service), key=lambda health: health.seconds)
        how = f"after {worst.seconds:.1f} s" if worst.status else f"nothing for {worst.seconds:.1f} s"
        yield f"{service} {count}, worst {how} at {worst.t:.0f} s"


def unexplained(records: Sequence[Record]) -> list[Ended]:
    """Ends of processes that nobody made: all of the gateway's; a stage's that no kill and no store's absence goes before."""
    faults = [fault for fault in of(Fault, records) if fault.fault != "hang"]
    return [
        ended
        for ended in of(Ended, records)
        if not any(
            fault.service in (ended.service, STORE) and fault.t <= ended.t <= fault.until + RECOVERY_SECONDS
            for fault in faults
            if ended.service != GATEWAY
        )
    ]


def _ended_by_faults_only(records: Sequence[Record]) -> Verdict:
    found = unexplained(records)
    seen = "; ".join(f"{ended.service} at {ended.t:.0f} s: {ended.cause[:160]}" for ended in found[:3])
    return Verdict("no process ends that was not killed", f"{len(found)} did" + (f": {seen}" if seen else ""), not found)


def _refused(records: Sequence[Record], kinds: frozenset[str]) -> Verdict:
    bad = Counter(
        f"{attempt.name}: {outcome}"
        for attempt in of(Attempt, records)
        for outcome in attempt.outcomes
        if attempt.name in kinds and (outcome.startswith("2") or outcome == "500")
    )
    seen = "; ".join(f"{what} ({count} ×)" for what, count in bad.most_common(3))
    return Verdict("what is no request is neither served nor breaks anything (2xx, 500)", seen or "none was", not bad)


def _disturbed(records: Sequence[Record]) -> Verdict:
    """A soak in which nothing happened shows nothing."""
    began = of(Began, records)
    if not began:
        return Verdict("everything was disturbed as planned", "the run never began", False)
    kinds = set(began[0].hostile) - {attempt.name for attempt in of(Attempt, records) if attempt.outcomes}
    faults: Counter[str] = Counter(fault.fault for fault in of(Fault, records))
    # Half of the kills may find the stage away already.
    wanted = {"kill": began[0].seconds / began[0].kill_seconds / 4, "hang": len(began[0].services) - 1, "away": 1}
    missed = [f"{faults[name]} of {count:.0f} {name}s" for name, count in wanted.items() if faults[name] < count]
    seen = f"{faults['kill']} kills, {faults['hang']} hangs, {faults['away']} times without a store"
    return Verdict("everything was disturbed as planned", "; ".join([seen, *missed, *sorted(kinds)]), not missed and not kinds)
