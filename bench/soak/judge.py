"""Judges a soak from its records. `VERDICTS` is the table of what a soak must hold."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from re import fullmatch
from statistics import fmean
from typing import Final

from bench.records import Record, of
from bench.report import Verdict
from bench.soak.attacks import KINDS
from bench.soak.records import (
    FREE,
    GREEDY,
    STORE,
    Answer,
    Attempt,
    Began,
    Broken,
    Ended,
    Fault,
    Health,
    Lost,
    Reference,
    Refused,
    Resources,
    Rest,
    Usage,
    is_gateway,
)

HEALTHY_SECONDS: Final = 1.0
RECOVERY_SECONDS: Final = 20.0  # after a fault of a service, or of the store, the service's health is not judged
NOTICED_SECONDS: Final = 5.0  # within which a client sees that its gateway was killed
LEAST_SHARE: Final = 0.5  # of an equal part, for every honest client
LEAST_ADVANTAGE: Final = 1.5  # of honest clients before connections of the greedy one, on average
GATEWAY_PEAK_BYTES: Final = 400 * 2**20  # its pod may have 512 MiB
_GROWTH_SHARE: Final = 1.05
_SPARE_THREADS: Final = 2  # threads that are ending, and connections that are closing, when a process is looked at
_SPARE_DESCRIPTORS: Final = 4
_MIB: Final = 2**20


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    return [judge(records) for judge in VERDICTS]


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
    again = sum(answer.broken > 0 for answer in answers)
    first = f"; first: {found[0].question!r} by {found[0].api}: {found[0].text!r}" if found else ""
    what = "every answer equals the undisturbed one, token for token, also when it is asked for again"
    seen = f"{len(found)} of {len(answers)} wrong, {again} asked for again{first}"
    return Verdict(what, seen, bool(answers) and not found, "0 wrong")


def unexcused(records: Sequence[Record]) -> list[Broken]:
    """Broken attempts whose own gateway was not killed meanwhile."""
    kills = [fault for fault in of(Fault, records) if fault.fault == "kill" and is_gateway(fault.service)]

    def excused(broken: Broken) -> bool:
        return any(
            kill.service.startswith(broken.gateway) and kill.t <= broken.t and broken.asked <= kill.until + NOTICED_SECONDS
            for kill in kills
        )

    return [broken for broken in of(Broken, records) if not excused(broken)]


def _broken_by_kills_only(records: Sequence[Record]) -> Verdict:
    broken, found = of(Broken, records), unexcused(records)
    first = f"; first, at {found[0].t:.0f} s at {found[0].gateway} by {found[0].api}: {found[0].reason}" if found else ""
    seen = f"{len(found)} of {len(broken)} broken answers otherwise{first}"
    return Verdict("an answer breaks only if its own gateway is killed", seen, not found, "0 otherwise")


def _none_lost(records: Sequence[Record]) -> Verdict:
    lost = [each for each in of(Lost, records) if each.client != GREEDY]
    first = f"; first, at {lost[0].t:.0f} s by {lost[0].api}: {lost[0].reason}" if lost else ""
    return Verdict("who asks again gets the answer: no honest question is lost", f"{len(lost)} lost{first}", not lost, "0")


def _shares(records: Sequence[Record]) -> tuple[Began | None, Counter[str]]:
    """How many answers each client got while the disturbance lasted: neither in the warm-up nor after it, to its last one."""
    began = next(iter(of(Began, records)), None)
    if began is None:
        return None, Counter()
    within = (each for each in of(Answer, records) if each.started >= began.t and each.t <= began.t + began.seconds)
    return began, Counter(answer.client for answer in within)


def _equal_shares(records: Sequence[Record]) -> Verdict:
    began, answers = _shares(records)
    counts = [answers[client] for client in began.honest] if began else [0]
    part = fmean(counts)
    seen = f"{min(counts)} of {part:.1f} answers"
    what = "every honest client gets its share: an equal part of all honest clients' answers"
    # One answer is what a client may miss by chance, which counts in a short run.
    return Verdict(
        what, seen, part > 0 and min(counts) >= LEAST_SHARE * part - 1, f"≥ {LEAST_SHARE:.0%} of it, less one answer"
    )


def _before_greedy(records: Sequence[Record]) -> Verdict:
    """If clients did not share the queue, each connection would get the same."""
    began, answers = _shares(records)
    honest = fmean(answers[client] for client in began.honest) if began else 0.0
    greedy = answers[GREEDY] / began.greedy if began else 0.0
    seen = f"{honest:.1f}, and {greedy:.1f} for each connection of the greedy key"
    what = "honest clients, with a connection each, get more answers than a connection of the greedy key"
    return Verdict(what, seen, greedy > 0 and honest >= LEAST_ADVANTAGE * greedy, f"≥ {LEAST_ADVANTAGE:g} ×")


def _refusals_name_a_time(records: Sequence[Record]) -> Verdict:
    refusals = of(Refused, records)
    silent = sum(refusal.retry_after is None for refusal in refusals)
    seen = f"{silent} of {len(refusals)} refusals without"
    return Verdict("refusals of valid questions say when to retry (Retry-After)", seen, not silent, "0 without")


def _rest(records: Sequence[Record], moment: str) -> dict[str, Rest]:
    return {rest.service: rest for rest in of(Rest, records) if rest.moment == moment}


def _nothing_held(records: Sequence[Record]) -> Verdict:
    before, after = _rest(records, "before"), _rest(records, "after")
    held = [
        f"{rest.service} {name.removeprefix('lamina_')} {value:g}"
        for rest in after.values()
        for name, value in rest.gauges.items()
        if value != (before[rest.service].gauges.get(FREE) if name == FREE and rest.service in before else 0)
    ]
    complete = bool(after) and after.keys() == before.keys() and all(rest.gauges for rest in after.values())
    seen = (", ".join(held) or "nothing anywhere") if complete else "not all answered"
    return Verdict("afterwards nothing runs, waits or holds keys and values", seen, complete and not held, "nothing")


def has_returned(before: Resources | None, after: Resources | None) -> bool:
    """A process, or the one that replaced it, uses no more than before."""
    return (
        before is not None
        and after is not None
        and after.own_bytes <= _GROWTH_SHARE * before.own_bytes
        and after.threads <= before.threads + _SPARE_THREADS
        and after.descriptors <= before.descriptors + _SPARE_DESCRIPTORS
    )


def _back(
    what: str, wanted: str, used: Callable[[Resources], float], allowed: Callable[[float], float], records: Sequence[Record]
) -> Verdict:
    moments = [{name: rest.uses for name, rest in _rest(records, moment).items()} for moment in ("before", "after")]
    services = of(Began, records)[0].services if of(Began, records) else ()
    told, met = [], bool(services)
    for service in services:
        before, after = (uses.get(service) for uses in moments)
        if before is None or after is None:
            told.append(f"{service} unknown")
            met = False
        else:
            told.append(f"{service} {used(before):.0f} → {used(after):.0f}")
            met = met and used(after) <= allowed(used(before))
    unit = " (MiB)" if what == "memory" else ""
    return Verdict(f"{what} of every process afterwards as before{unit}", ", ".join(told), met, wanted)


def _peak(records: Sequence[Record]) -> Verdict:
    peaks = [usage.uses.peak_bytes for usage in of(Usage, records) if is_gateway(usage.service)]
    seen = f"{max(peaks) / _MIB:.0f} MiB" if peaks else "nothing seen"
    wanted = f"≤ {GATEWAY_PEAK_BYTES // _MIB} MiB"
    return Verdict("a gateway's peak memory", seen, bool(peaks) and max(peaks) <= GATEWAY_PEAK_BYTES, wanted)


def late(records: Sequence[Record]) -> list[Health]:
    """Missing or late answers of `/healthz` that no fault of the service or of the store excuses."""
    faults = of(Fault, records)
    found = [health for health in of(Health, records) if health.status != 200 or health.seconds > HEALTHY_SECONDS]
    return [health for health in found if not any(_excuses(fault, health) for fault in faults)]


def _excuses(fault: Fault, health: Health) -> bool:
    if fault.service != health.service and (fault.service != STORE or is_gateway(health.service)):
        return False
    return fault.t <= health.t + health.seconds + HEALTHY_SECONDS and health.t <= fault.until + RECOVERY_SECONDS


def _healthy(records: Sequence[Record]) -> Verdict:
    asked, found = of(Health, records), late(records)
    told = []
    for service, count in Counter(health.service for health in found).items():
        worst = max((health for health in found if health.service == service), key=lambda health: health.seconds)
        how = f"after {worst.seconds:.1f} s" if worst.status else f"nothing for {worst.seconds:.1f} s"
        told.append(f"{service} {count}, worst {how} at {worst.t:.0f} s")
    what = "/healthz is answered throughout, unless the process itself is broken"
    seen = f"{len(found)} of {len(asked)} not" + (f": {', '.join(told)}" if told else "")
    met = any(is_gateway(health.service) for health in asked) and not found
    return Verdict(what, seen, met, f"≤ {HEALTHY_SECONDS:g} s")


def unexplained(records: Sequence[Record]) -> list[Ended]:
    """Ends of processes that were not killed, and of stages also without a store outage."""
    faults = [fault for fault in of(Fault, records) if fault.fault != "hang"]

    def explained(ended: Ended) -> bool:
        causes = (ended.service,) if is_gateway(ended.service) else (ended.service, STORE)
        return any(fault.service in causes and fault.t <= ended.t <= fault.until + RECOVERY_SECONDS for fault in faults)

    return [ended for ended in of(Ended, records) if not explained(ended)]


def _ended_by_faults_only(records: Sequence[Record]) -> Verdict:
    found = unexplained(records)
    seen = "; ".join(f"{ended.service} at {ended.t:.0f} s: {ended.cause[:160]}" for ended in found[:3])
    return Verdict("no process ends that was not killed", f"{len(found)} did" + (f": {seen}" if seen else ""), not found, "0")


def _attacks_fail(records: Sequence[Record]) -> Verdict:
    never = {kind.name: kind.never for kind in KINDS}
    bad = Counter(
        f"{attempt.name}: {outcome}"
        for attempt in of(Attempt, records)
        for outcome in attempt.outcomes
        if attempt.name in never and fullmatch(never[attempt.name], outcome)
    )
    seen = "; ".join(f"{what} ({count} ×)" for what, count in bad.most_common(3))
    what = "invalid requests are not served (2xx), messages open no turn, nothing is an internal error (500)"
    return Verdict(what, seen or "none", not bad, "none")


def _disturbed(records: Sequence[Record]) -> Verdict:
    """Holds only if the planned attacks and faults happened."""
    what = "everything was disturbed as planned"
    if not (all_began := of(Began, records)):
        return Verdict(what, "the run never began", False)
    began = all_began[0]
    kinds = set(began.hostile) - {attempt.name for attempt in of(Attempt, records) if attempt.outcomes}
    gateways = Counter(map(is_gateway, began.services))
    faults = Counter(
        "gateway kill" if fault.fault == "kill" and is_gateway(fault.service) else fault.fault for fault in of(Fault, records)
    )
    wanted = {  # half of the kills may find the process away already
        "kill": began.seconds / began.kill_seconds / 4,
        "gateway kill": (began.seconds / began.gateway_kill_seconds - 1) / 2,
        "hang": gateways[False] - 1,
        "away": 1,
    }
    missed = [f"{faults[name]} of {count:.0f} {name}s" for name, count in wanted.items() if faults[name] < count]
    seen = (
        f"{faults['kill']} kills of stages, {faults['gateway kill']} of gateways, {faults['hang']} hangs, "
        f"{faults['away']} times without a store, {len(began.hostile) - len(kinds)} kinds of hostile clients"
    )
    return Verdict(what, "; ".join([seen, *missed, *sorted(kinds)]), not missed and not kinds)


VERDICTS: Final[tuple[Callable[[Sequence[Record]], Verdict], ...]] = (
    _answers_equal,
    _broken_by_kills_only,
    _none_lost,
    _equal_shares,
    _before_greedy,
    _refusals_name_a_time,
    _peak,
    # Without keys and values: a stage reserves their memory at its start, but the kernel provides it page by page.
    partial(_back, "memory", "≤ +5 %", lambda uses: uses.own_bytes / _MIB, lambda before: _GROWTH_SHARE * before),
    partial(_back, "threads", f"≤ +{_SPARE_THREADS}", lambda uses: uses.threads, lambda before: before + _SPARE_THREADS),
    partial(
        _back,
        "descriptors",
        f"≤ +{_SPARE_DESCRIPTORS}",
        lambda uses: uses.descriptors,
        lambda before: before + _SPARE_DESCRIPTORS,
    ),
    _nothing_held,
    _healthy,
    _ended_by_faults_only,
    _attacks_fail,
    _disturbed,
)
