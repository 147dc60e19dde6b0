"""What a network between the pods costs a pipeline: tokens a second and bytes, by the same sums that the gateway goes by."""

from collections.abc import Sequence
from dataclasses import dataclass

from functions.gateway.scheduling.capacity import micro_batches_allowed, micro_batches_wanted
from knative.spec.stage_plan import StagePlan


@dataclass(frozen=True, slots=True)
class Link:
    """Between the gateway's pod and a stage's."""

    delay_seconds: float
    """Each way."""
    bytes_per_second: float | None
    """Each way; None: no bound."""


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """Of decode steps; prompts cost bytes alone."""

    micro_batches: int
    round_seconds: float
    tokens_per_second: float
    bytes_per_token: int
    """Hidden states on all links, of a token of prompt or answer."""


def network_plan(
    plans: Sequence[StagePlan], step_seconds: Sequence[float], sequences: int, micro_batch: int, link: Link
) -> NetworkPlan:
    """One replica of each stage. step_seconds: per stage, of a step of one micro-batch with nobody else, whatever its size.

    A stage is called with its predecessor's hidden states and answers with its own, both through the gateway. A round is what
    passes and links take, or what the slowest stage needs for all micro-batches.
    """
    allowed = micro_batches_allowed([1] * len(plans), _service_seconds(plans, step_seconds, 1, link))
    count = micro_batches_wanted(sequences, len(plans), micro_batch, allowed)
    service = _service_seconds(plans, step_seconds, sequences / count, link)
    seconds = max(sum(service), count * max(step_seconds))
    carried = sum(2 * plan.hop_bytes_per_token for plan in plans)
    return NetworkPlan(count, seconds, sequences / seconds, carried)


def _service_seconds(plans: Sequence[StagePlan], step_seconds: Sequence[float], rows: float, link: Link) -> list[float]:
    sent = [0, *(plan.hop_bytes_per_token for plan in plans[:-1])]
    carried = [(one + plan.hop_bytes_per_token) * rows for one, plan in zip(sent, plans, strict=True)]
    rate = link.bytes_per_second
    return [
        step + 2 * link.delay_seconds + (size / rate if rate else 0.0) for step, size in zip(step_seconds, carried, strict=True)
    ]
