"""The parts of a token's time in a stream of one conversation, as gateway, stages and client count it.

Answers of two lengths are subtracted, so that only decode steps remain; counters are read while nothing runs. In each round
the gateway counts the time of its own work (`lamina_gateway_step_seconds_total`), and the stages count computing, decoding and
waiting. HTTP is the rest of an exchange.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from bench.pipeline import RunningPipeline, gateway_beside, read_metrics, read_page
from bench.report import Verdict, judged, milliseconds, table
from bench.serving.client import Client
from bench.serving.requests import Requests
from knative.local.kubelet.processes import free_port

_SHORT_TOKENS: Final = 8
_TOKENS: Final = 96  # of the long answer beyond the short one
_TURNS: Final = 5
_LEAST_COMPUTE: Final = {"bfloat16": 0.8, "int8": 0.7}  # share of the client's time that should be compute, by dtype
_MOST_UNACCOUNTED: Final = 0.05  # share of the client's time that the table may miss


@dataclass(frozen=True, slots=True)
class TokenTime:
    """Seconds of one token."""

    compute: float  # in the stages' forward passes, sampling included
    queue: float  # waiting in a stage for its pass
    codec: float  # at the stages: events decoded and encoded
    http: float  # both HTTP stacks, a proxy if there is one, the loopback, waking threads
    events: float  # at the gateway: events encoded and decoded
    deciding: float  # at the gateway: scheduling and waiting for its lock
    rows: float  # at the gateway: the rest of a step, building batches and applying replies
    seen: float  # by the client, from one token to the next

    @property
    def accounted(self) -> float:
        parts: list[float] = [getattr(self, field.name) for field in fields(self)]
        return sum(parts) - self.seen

    @property
    def missing_share(self) -> float:
        return 1 - self.accounted / self.seen

    @property
    def compute_share(self) -> float:
        return self.compute / self.seen


def token_times(pipeline: RunningPipeline, requests: Requests, logs: Path) -> Iterator[tuple[str, TokenTime]]:
    """Medians of the turns, without queue-proxies and through them."""
    for name, proxies in ((pipeline.dtype, False), (f"{pipeline.dtype}, through queue-proxies", True)):
        urls = [stage.proxy if proxies else stage.function for stage in pipeline.stages]
        metrics_port = free_port()
        environ = {"LAMINA_METRICS_PORT": str(metrics_port), "LAMINA_DRAFT_TOKENS": "0"}
        with gateway_beside(pipeline.local, urls, logs / "token-time.log", environ) as (url, _):
            client = Client(url, pipeline.model, {})
            pages = [stage.metrics for stage in pipeline.stages]
            _decode_seconds(client, requests, _TOKENS)
            found = [_turn(client, requests, f"http://127.0.0.1:{metrics_port}", pages) for _ in range(_TURNS)]
        yield name, TokenTime(*(median(getattr(each, field.name) for each in found) for field in fields(TokenTime)))


def _turn(client: Client, requests: Requests, gateway: str, stages: Sequence[str]) -> TokenTime:
    counters = [_counters(gateway, stages)]
    spans = []
    for length in (_SHORT_TOKENS, _SHORT_TOKENS + _TOKENS):
        spans.append(_decode_seconds(client, requests, length))
        counters.append(_counters(gateway, stages))
    before, between, after = counters
    of = {name: (after[name] - 2 * between[name] + before[name]) / _TOKENS for name in after}
    http = of["exchange"] - of["compute"] - of["queue"] - of["codec"]
    seen = (spans[1] - spans[0]) / _TOKENS
    return TokenTime(of["compute"], of["queue"], of["codec"], http, of["events"], of["deciding"], of["rows"], seen)


def _decode_seconds(client: Client, requests: Requests, tokens: int) -> float:
    """From an answer's first token to its last."""
    found = asyncio.run(client.measure([requests.cut(0, 128, tokens)]))
    if found.tokens != tokens:
        raise RuntimeError(f"an answer of {found.tokens} tokens instead of {tokens}: choose another prompt")
    return sum(found.gap_seconds)


def _counters(gateway: str, stages: Sequence[str]) -> dict[str, float]:
    found = dict.fromkeys(("compute", "queue", "codec"), 0.0)
    for page in map(read_metrics, stages):
        for name in found:
            found[name] += page[f"lamina_stage_{name}_seconds_sum"]
    for family in text_string_to_metric_families(read_page(gateway)):
        if family.name == "lamina_gateway_step_seconds":
            found |= {sample.labels["part"]: sample.value for sample in family.samples if sample.name.endswith("_total")}
    return found


def token_time_verdicts(name: str, found: TokenTime) -> list[Verdict]:
    missing = f"part of the client's time that the table misses, {name}"
    told = [judged(missing, abs(found.missing_share), _MOST_UNACCOUNTED, at_most=True, number="{:.1%}")]
    if name in _LEAST_COMPUTE:
        compute = f"compute, of the time that a client of one stream sees, {name}"
        told.append(judged(compute, found.compute_share, _LEAST_COMPUTE[name], number="{:.1%}"))
    return told


def token_time_table(found: Mapping[str, TokenTime]) -> str:
    names = [field.name for field in fields(TokenTime)]
    rows = [
        [
            name,
            *(milliseconds(getattr(each, part), 2) for part in names),
            f"{each.accounted / each.seen:.1%}",
            f"{each.compute_share:.1%}",
        ]
        for name, each in found.items()
    ]
    return (
        "\n### Parts of a token's time: single stream, milliseconds\n\n"
        "Counted by gateway and stages themselves; *seen*: by a client that streams. Detokenizing and writing to the client "
        "run beside the next round.\n\n" + table(["", *names, "accounted for", "compute"], rows)
    )
