"""Judges a soak from its records."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Final

from bench.records import Record, of
from bench.report import Verdict
from bench.soak.attacks import KINDS
from bench.soak.records import (
    FREE,
    GATEWAY,
    ROUND_LULLS,
    STORE,
    Answer,
    Attempt,
    Began,
    Ended,
    Fault,
    Health,
    Lost,
    Lull,
    Reference,
    Refused,
    Rest,
    Usage,
)

HEALTHY_SECONDS: Final = 1.0
RECOVERY_SECONDS: Final = 20.0  # after a fault of a service, or of the store, the service's health is not judged
_FEWEST_LULLS: Final = 2
_GROWTH_SHARE: Final = 0.05
# Growth that honest clients, who are there in lulls too, and the allocator cause; or 5 % of the level, if that is more.
_ALLOWED_GROWTH: Final = {"threads": 6.0, "descriptors": 12.0, "own_bytes": 16.0 * 2**20}
_NAMES: Final = {
    "threads": "threads",
    "descriptors": "descriptors",
    "own_bytes": "resident memory, without what is reserved for keys and values,",
}


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    return [
        _answers_equal(records),
        _none_lost(records),
        _refusals_name_a_time(records),
        _nothing_held(records),
        _memory_free(records),
        *(_flat(records, quantity) for quantity in _ALLOWED_GROWTH),
        _healthy(records),
        _ended_by_faults_only(records),
        _invalid_requests_refused(records),
        _disturbed(records),
    ]


def wrong(records: Sequence[Record]) -> list[Answer]:
    """Answers that differ, in any token, from the undisturbed answer to the same question."""
    references = {reference.question: reference for reference in of(Reference, records)}

    def as_before(answer: Answer) -> bool:
        before = references.get(answer.question)
        if before is None or (answer.text, answer.completion_tokens) != (before.text, before.completion_tokens):
            return False
        return answer.token_ids is None or answer.token_ids == before.token_ids

    return [answer for answer in of(Answer, records) if not as_before(answer)]


def _answers_equal(records: Sequence[Record]) -> Verdict:
    answers, found = of(Answer, records), wrong(records)
    first = f"; first: {found[0].question!r} by {found[0].api}: {found[0].text!r}" if found else ""
    what = "every honest answer equals the undisturbed one, token for token"
    return Verdict(what, f"{len(found)} of {len(answers)} wrong{first}", bool(answers) and not found)


def _none_lost(records: Sequence[Record]) -> Verdict:
    lost = of(Lost, records)
    first = f"; first, at {lost[0].t:.0f} s by {lost[0].api}: {lost[0].reason}" if lost else ""
    return Verdict("no honest question is lost", f"{len(lost)} lost{first}", not lost)


def _refusals_name_a_time(records: Sequence[Record]) -> Verdict:
    refusals = of(Refused, records)
    silent = sum(refusal.retry_after is None for refusal in refusals)
    seen = f"{silent} of {len(refusals)} refusals without"
    return Verdict("refusals of honest clients say when to retry (Retry-After)", seen, not silent)


def _rest(records: Sequence[Record], moment: str) -> dict[str, dict[str, float]]:
    return {rest.service: rest.gauges for rest in of(Rest, records) if rest.moment == moment}


def _nothing_held(records: Sequence[Record]) -> Verdict:
    after = _rest(records, "after")
    held = [
        f"{service} {name.removeprefix('lamina_')} {value:g}"
        for service, gauges in after.items()
        for name, value in gauges.items()
        if name != FREE and value
    ]
    complete = bool(after) and all(after.values())
    seen = (", ".join(held) or "0 everywhere") if complete else "not all answered"
    return Verdict("afterwards nothing runs, waits or holds memory", seen, complete and not held)


def _memory_free(records: Sequence[Record]) -> Verdict:
    before, after = (
        {service: gauges.get(FREE) for service, gauges in _rest(records, moment).items() if service != GATEWAY}
        for moment in ("before", "after")
    )
    pairs = [f"{service} {after.get(service)} of {free}" for service, free in before.items() if after.get(service) != free]
    met = bool(before) and not pairs and None not in before.values()
    return Verdict("keys and values are free everywhere as at the start", ", ".join(pairs) or "as at the start", met)


@dataclass(frozen=True, slots=True)
class Growth:
    """One quantity of one process, compared with itself at the lulls of the last two thirds of a soak.

    Memory for keys and values is left out: a stage reserves all of it at its start, so that it cannot leak, but the kernel
    provides it page by page when sequences first use it. Another verdict says that sequences release it.
    """

    service: str
    pid: int
    quantity: str
    lulls: int
    level: float
    grown: float  # along the fitted line, from the first of these lulls to the last

    @property
    def allowed(self) -> float:
        return max(_ALLOWED_GROWTH[self.quantity], _GROWTH_SHARE * self.level)

    def __str__(self) -> str:
        factor, unit = (2**-20, " MiB") if self.quantity == "own_bytes" else (1, "")
        return f"{self.service} {self.grown * factor:+.1f}{unit} at {self.level * factor:.0f}{unit} ({self.lulls} lulls)"


def growths(records: Sequence[Record]) -> list[Growth]:
    """One for every process that lived through at least two lulls of the last two thirds."""
    found = []
    for (service, pid), points in _at_lulls(records).items():
        if len(points) < _FEWEST_LULLS:
            continue
        times = [point.t for point in points]
        for quantity in _ALLOWED_GROWTH:
            values = [float(getattr(point, quantity)) for point in points]
            grown = linear_regression(times, values).slope * (times[-1] - times[0])
            found.append(Growth(service, pid, quantity, len(points), fmean(values), grown))
    return found


def _at_lulls(records: Sequence[Record]) -> dict[tuple[str, int], list[Usage]]:
    """(service, pid) → its last usage in each lull, without its first round, in which it loads and its pools fill."""
    found: dict[tuple[str, int], list[Usage]] = {}
    born = {(usage.service, usage.pid): usage.t for usage in reversed(of(Usage, records))}
    for lull in late_lulls(records):
        second_half = (usage for usage in of(Usage, records) if (lull.t + lull.until) / 2 <= usage.t < lull.until)
        for key, usage in {(usage.service, usage.pid): usage for usage in second_half}.items():
            if lull.t - born[key] >= ROUND_LULLS * (lull.until - lull.t):
                found.setdefault(key, []).append(usage)
    return found


def late_lulls(records: Sequence[Record]) -> Iterator[Lull]:
    """The lulls of the last two thirds."""
    for began in of(Began, records)[:1]:
        yield from (lull for lull in of(Lull, records) if lull.t >= began.t + began.seconds / 3)


def _flat(records: Sequence[Record], quantity: str) -> Verdict:
    services = of(Began, records)[0].services if of(Began, records) else ()
    seen = [growth for growth in growths(records) if growth.quantity == quantity]
    unseen = [service for service in services if service not in {growth.service for growth in seen}]
    grown = [growth for growth in seen if growth.grown > growth.allowed]
    worst = [max(seen, key=lambda growth: growth.grown / growth.allowed)] if seen else []
    told = [*map(str, grown or worst), *(f"{service}: no process lived long enough" for service in unseen)]
    what = f"{_NAMES[quantity]} of every process flat over the last two thirds"
    return Verdict(what, "; ".join(told) or "nothing seen", bool(seen) and not unseen and not grown)


def late(records: Sequence[Record]) -> list[Health]:
    """Missing or late answers of `/healthz` that no fault of the service or of the store excuses."""
    faults = of(Fault, records)
    found = [health for health in of(Health, records) if health.status != 200 or health.seconds > HEALTHY_SECONDS]
    return [health for health in found if not any(_excuses(fault, health) for fault in faults)]


def _excuses(fault: Fault, health: Health) -> bool:
    if fault.service != health.service and (fault.service != STORE or health.service == GATEWAY):
        return False
    return fault.t <= health.t + health.seconds + HEALTHY_SECONDS and health.t <= fault.until + RECOVERY_SECONDS


def _healthy(records: Sequence[Record]) -> Verdict:
    asked, found = of(Health, records), late(records)
    told = []
    for service, count in Counter(health.service for health in found).items():
        worst = max((health for health in found if health.service == service), key=lambda health: health.seconds)
        how = f"after {worst.seconds:.1f} s" if worst.status else f"nothing for {worst.seconds:.1f} s"
        told.append(f"{service} {count}, worst {how} at {worst.t:.0f} s")
    what = f"/healthz is answered within {HEALTHY_SECONDS:g} s throughout, unless the process itself is broken"
    seen = f"{len(found)} of {len(asked)} not" + (f": {', '.join(told)}" if told else "")
    return Verdict(what, seen, any(health.service == GATEWAY for health in asked) and not found)


def unexplained(records: Sequence[Record]) -> list[Ended]:
    """Ends of processes without a cause: all of the gateway's, and those of a stage after neither a kill nor a store outage."""
    faults = [fault for fault in of(Fault, records) if fault.fault != "hang"]

    def explained(ended: Ended) -> bool:
        return ended.service != GATEWAY and any(
            fault.service in (ended.service, STORE) and fault.t <= ended.t <= fault.until + RECOVERY_SECONDS for fault in faults
        )

    return [ended for ended in of(Ended, records) if not explained(ended)]


def _ended_by_faults_only(records: Sequence[Record]) -> Verdict:
    found = unexplained(records)
    seen = "; ".join(f"{ended.service} at {ended.t:.0f} s: {ended.cause[:160]}" for ended in found[:3])
    return Verdict("no process ends that was not killed", f"{len(found)} did" + (f": {seen}" if seen else ""), not found)


def _invalid_requests_refused(records: Sequence[Record]) -> Verdict:
    refused = {kind.name for kind in KINDS if kind.refused}
    bad = Counter(
        f"{attempt.name}: {outcome}"
        for attempt in of(Attempt, records)
        for outcome in attempt.outcomes
        if attempt.name in refused and (outcome.startswith("2") or outcome == "500")
    )
    seen = "; ".join(f"{what} ({count} ×)" for what, count in bad.most_common(3))
    return Verdict("invalid requests are neither served nor break anything (2xx, 500)", seen or "none was", not bad)


def _disturbed(records: Sequence[Record]) -> Verdict:
    """Holds only if the planned attacks and faults happened."""
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
