"""Holds conversations with a gateway, as many at a time as a plan says, and records them second by second.

    python -m bench.load.conversations http://127.0.0.1:8080 --plan 1:30,16:60,64:90,4:60,0:120 \\
        --max-tokens 16 48 --metrics http://127.0.0.1:9000/metrics --output load.jsonl

A plan is `CONVERSATIONS:SECONDS,…`. A conversation asks one question after another, as HTTP CloudEvents with streamed answers.
When the plan ends it, it finishes its answer first. `--metrics` is any Prometheus page with Knative's `kn_revision_*` gauges,
such as the local platform's or a cluster's autoscaler's. The output is JSON lines, one record each (`bench.load.series`).
"""

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import click
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from bench.load.series import Answer, Failure, Phase, Replicas, Second, read_records
from bench.records import Recorder, of
from eventing.wire.generation import TokenEvent
from knative.commands.ask import AskFailed, Question, stream_answer

_WORDS: Final = ("river", "stone", "lamp", "seven", "north", "glass", "quiet", "engine", "paper", "winter", "copper", "field")
_PROMPT_WORDS: Final = (8, 64)  # the least and the most
_TIMEOUT_SECONDS: Final = 600.0
_PAUSE_AFTER_FAILURE_SECONDS: Final = 1.0
# A metric's name → its field of `Replicas`.
_GAUGES: Final = {
    "kn_revision_pods_count": "ready",
    "kn_revision_pods_desired": "desired",
    "kn_revision_pods_pending_count": "starting",
    "kn_revision_pods_not_ready_count": "not_ready",
    "kn_revision_pods_terminating_count": "leaving",
    "kn_revision_concurrency_stable": "concurrency",
    "kn_revision_panic_mode": "panicking",
}


@dataclass(frozen=True, slots=True)
class Load:
    """A plan and its target."""

    url: str
    plan: tuple[tuple[int, float], ...]  # (conversations, seconds) in order
    max_tokens: tuple[int, int]  # least and most tokens of an answer: with equal lengths conversations would go in step
    metrics_url: str  # a Prometheus page with the revisions' replicas


@dataclass
class LoadRecorder(Recorder):
    tokens: int = 0  # since the last `Second`
    in_flight: int = 0


async def run(load: Load, recorder: LoadRecorder) -> None:
    """Follows the whole plan; returns when the last answer has ended."""
    observers = [asyncio.create_task(each) for each in (_seconds(recorder), _scrape(load.metrics_url, recorder))]
    try:
        await _follow(load, recorder)
    finally:
        for observer in observers:
            observer.cancel()
        await asyncio.gather(*observers, return_exceptions=True)


async def _follow(load: Load, recorder: LoadRecorder) -> None:
    running: list[tuple[asyncio.Event, asyncio.Task[None]]] = []
    all_tasks: list[asyncio.Task[None]] = []
    for conversations, seconds in load.plan:
        recorder.write(Phase(t=recorder.now, conversations=conversations, seconds=seconds))
        while len(running) > conversations:
            running.pop()[0].set()
        while len(running) < conversations:
            over = asyncio.Event()
            task = asyncio.create_task(_converse(load, len(all_tasks), over, recorder))
            running.append((over, task))
            all_tasks.append(task)
        await asyncio.sleep(seconds)
    for over, _ in running:
        over.set()
    await asyncio.gather(*all_tasks)


async def _converse(load: Load, number: int, over: asyncio.Event, recorder: LoadRecorder) -> None:
    """Asks question after question until the plan ends this conversation."""
    words = random.Random(f"1 {number}")
    while not over.is_set():
        prompt = " ".join(words.choices(_WORDS, k=words.randint(*_PROMPT_WORDS)))
        max_tokens = words.randint(*load.max_tokens)
        question = Question(prompt, max_tokens, chat=False, timeout_seconds=_TIMEOUT_SECONDS)
        started = recorder.now
        recorder.in_flight += 1
        try:
            await _answer(load.url, question, number, started, recorder)
        except AskFailed as error:
            recorder.write(Failure(t=recorder.now, conversation=number, started=started, reason=str(error)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), _PAUSE_AFTER_FAILURE_SECONDS)
        finally:
            recorder.in_flight -= 1


async def _answer(url: str, question: Question, number: int, started: float, recorder: LoadRecorder) -> None:
    """Raises AskFailed."""
    first: float | None = None
    async for answer in stream_answer(url, question):
        if isinstance(answer, TokenEvent):
            recorder.tokens += 1
            first = recorder.now if first is None else first
            continue
        recorder.write(
            Answer(
                t=recorder.now,
                conversation=number,
                started=started,
                prompt=question.text,
                text=answer.text,
                tokens=answer.usage.completion_tokens,
                time_to_first_token_seconds=round((recorder.now if first is None else first) - started, 4),
                replays=answer.timings.replays,
            )
        )


async def _seconds(recorder: LoadRecorder) -> None:
    async for _ in _every_second(recorder):
        tokens, recorder.tokens = recorder.tokens, 0
        recorder.write(Second(t=recorder.now, in_flight=recorder.in_flight, tokens=tokens))


async def _scrape(url: str, recorder: LoadRecorder) -> None:
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async for _ in _every_second(recorder):
            try:
                async with session.get(url) as reply:
                    reply.raise_for_status()
                    page = await reply.text()
            except (aiohttp.ClientError, TimeoutError) as error:
                recorder.write(Failure(t=recorder.now, conversation=-1, started=recorder.now, reason=f"{url}: {error!r}"))
                continue
            for record in read_replicas(page, recorder.now):
                recorder.write(record)


async def _every_second(recorder: LoadRecorder) -> AsyncIterator[int]:
    second = 0
    while True:
        second += 1
        await asyncio.sleep(max(0.0, second - recorder.now))
        yield second


def read_replicas(page: str, t: float) -> list[Replicas]:
    """One record for each revision on a Prometheus page."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name in _GAUGES:
                key = sample.labels.get("kn_service_name", ""), sample.labels.get("kn_revision_name", "")
                found.setdefault(key, {})[_GAUGES[sample.name]] = sample.value
    return [Replicas(t=t, service=service, revision=revision, **values) for (service, revision), values in found.items()]


def parse_plan(text: str) -> tuple[tuple[int, float], ...]:
    """`1:30,16:60` → ((1, 30), (16, 60)). Raises click.BadParameter."""
    try:
        plan = tuple((int(count), float(seconds)) for count, seconds in (part.split(":") for part in text.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not CONVERSATIONS:SECONDS,…") from error
    if any(count < 0 or seconds < 0 for count, seconds in plan):
        raise click.BadParameter(f"{text!r} has a negative number")
    return plan


@click.command()
@click.argument("url")
@click.option("--plan", required=True, callback=lambda _c, _p, text: parse_plan(text))
@click.option("--metrics", "metrics_url", required=True, help="Prometheus page with the replicas; scraped each second.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON lines.")
@click.option("--max-tokens", type=(click.IntRange(min=1), click.IntRange(min=1)), required=True)
def main(output: Path, **load: object) -> None:
    """Load the gateway at URL as the plan says; status 1 if an answer failed."""
    output.unlink(missing_ok=True)
    with LoadRecorder(output) as recorder:
        asyncio.run(run(msgspec.convert(load, Load), recorder))
    answers, failed = (len(of(kind, read_records(output))) for kind in (Answer, Failure))
    click.echo(f"{answers} answers, {failed} failures")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
