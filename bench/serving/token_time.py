"""Where a token's time goes in a stream of one conversation, from inside all who take part; and what the client sees.

A long answer less a short one: what is left is decode steps only, and counters are read while nothing runs. Of each round the
gateway counts what it decides, makes and sends (`lamina_gateway_step_seconds_total`), the stages what they compute, decode and
let wait; HTTP is what an exchange took beside that.

    python -m bench.serving.token_time --dtype bfloat16 --dtype int8        some two minutes on two cores
"""

import asyncio
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from os import getloadavg
from pathlib import Path
from statistics import median
from typing import Final

import click
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from bench.serving.client import Client
from bench.serving.pipeline import ROOT, RunningPipeline, gateway_beside, read_metrics, read_page, running_pipeline
from bench.serving.requests import Requests
from storage.models.model_repository import read_file
from storage.store.object_store import ObjectStore

_SHORT_TOKENS: Final = 8
_WANTED: Final = {"bfloat16": 0.8, "int8": 0.7}
"""Share of what a client sees that is to be compute, by dtype."""
_MISSING: Final = 0.05
"""Share of what a client sees that the table may be off by."""


@dataclass(frozen=True, slots=True)
class TokenTime:
    """Seconds of one token."""

    compute: float
    """In the stages' passes: layers, and in the last one the draw."""
    queue: float
    """Waiting in a stage for its pass."""
    codec: float
    """At the stages: events read and made."""
    http: float
    """Both HTTP stacks, a proxy if there is one, the loopback, threads that are woken."""
    events: float
    """At the gateway: events made and read."""
    deciding: float
    """At the gateway: what is next, waiting for the lock."""
    rows: float
    """At the gateway: the rest of a step, batches put together and replies' rows taken."""
    seen: float
    """By the client, from one token to the next."""

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


def measure_token_time(
    pipeline: RunningPipeline, requests: Requests, tokens: int, turns: int, log: Path, *, proxies: bool
) -> TokenTime:
    """tokens: of a long answer beyond a short one. The medians of the turns."""
    metrics_port = _free_port()
    urls = [stage.proxy if proxies else stage.function for stage in pipeline.stages]
    environ = {"LAMINA_METRICS_PORT": str(metrics_port), "LAMINA_DRAFT_TOKENS": "0"}
    with gateway_beside(pipeline.local, urls, log, environ) as (url, _):
        client = Client(url, pipeline.model, {})
        gateway = f"http://127.0.0.1:{metrics_port}"
        pages = [stage.metrics for stage in pipeline.stages]
        _answer(client, requests, tokens)
        found = [_turn(client, requests, tokens, gateway, pages) for _ in range(turns)]
    return TokenTime(*(median(getattr(one, field.name) for one in found) for field in fields(TokenTime)))


def token_times(
    pipeline: RunningPipeline, requests: Requests, logs: Path, tokens: int = 96, turns: int = 5
) -> Iterator[tuple[str, TokenTime]]:
    """Without queue-proxies, and with them."""
    for name, proxies in ((pipeline.dtype, False), (f"{pipeline.dtype}, through queue-proxies", True)):
        yield name, measure_token_time(pipeline, requests, tokens, turns, logs / "token-time.log", proxies=proxies)


def _turn(client: Client, requests: Requests, tokens: int, gateway: str, stages: Sequence[str]) -> TokenTime:
    counters = [_counters(gateway, stages)]
    spans = []
    for length in (_SHORT_TOKENS, _SHORT_TOKENS + tokens):
        spans.append(_answer(client, requests, length))
        counters.append(_counters(gateway, stages))
    before, between, after = counters
    of = {name: (after[name] - 2 * between[name] + before[name]) / tokens for name in after}
    http = of["exchange"] - of["compute"] - of["queue"] - of["codec"]
    seen = (spans[1] - spans[0]) / tokens
    return TokenTime(of["compute"], of["queue"], of["codec"], http, of["events"], of["deciding"], of["rows"], seen)


def _answer(client: Client, requests: Requests, tokens: int) -> float:
    """Seconds from its first token to its last."""
    found = asyncio.run(client.measure([requests.single(tokens)]))
    if found.tokens != tokens:
        raise RuntimeError(f"an answer of {found.tokens} tokens where {tokens} were asked for: choose another prompt")
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


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def verdicts(dtype: str, found: TokenTime) -> list[tuple[str, float, float, bool]]:
    """What was to be reached: in words, wanted, seen, and whether at most that."""
    wanted = [(f"what the table of a token misses of what the client sees, {dtype}", _MISSING, abs(found.missing_share), True)]
    if dtype in _WANTED:
        wanted.append((f"compute, of what a client of one stream sees, {dtype}", _WANTED[dtype], found.compute_share, False))
    return wanted


def table(found: Mapping[str, TokenTime]) -> list[str]:
    """found: by what was measured."""
    names = [field.name for field in fields(TokenTime)]
    return [
        "\n### Where a token's time goes: single stream, milliseconds\n",
        "Counted by gateway and stages themselves; *seen*: by a client that streams. Detokenizing and writing to the client "
        "run beside the next round.\n",
        f"| | {' | '.join(names)} | accounted for | compute |",
        f"|---|{'---:|' * (len(names) + 2)}",
        *(
            f"| {name} | {' | '.join(f'{getattr(one, part) * 1000:.2f}' for part in names)} "
            f"| {one.accounted / one.seen:.1%} | {one.compute_share:.1%} |"
            for name, one in found.items()
        ),
    ]


@click.command(help=__doc__)
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "int8"), show_default=True)
@click.option("--tokens", type=click.IntRange(min=8), default=96, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True)
def main(dtypes: Sequence[str], tokens: int, turns: int) -> None:
    state = ROOT / ".lamina" / "bench"
    for dtype in dtypes:
        with running_pipeline(dtype, state / dtype) as pipeline:
            text = read_file(ObjectStore(pipeline.store), pipeline.local.manifest, "tokenizer.json").decode()
            found = dict(token_times(pipeline, Requests(Tokenizer.from_str(text)), state, tokens, turns))
        click.echo("\n".join(table(found)))
        click.echo(f"load average {getloadavg()[0]:.1f}")
        for name, one in found.items():
            for what, wanted, seen, at_most in verdicts(name, one):
                met = seen <= wanted if at_most else seen >= wanted
                click.echo(f"{'met' if met else 'missed'}: {what}: {seen:.3f}, wanted {wanted:g}")


if __name__ == "__main__":
    main()
