"""`python -m knative ask`: asks a gateway one question, as an HTTP CloudEvent, and prints the answer as it streams."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import click
import msgspec
from rich.console import Console

from eventing.http.binding import from_http, to_binary_http
from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE, ServerSentEvent, SSEDecoder
from eventing.problems import MalformedEvent, problem_from_document
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType
from eventing.wire.generation import ErrorEvent, GenerateRequest, GenerateResponse, Message, ProgressEvent, TokenEvent
from knative.spec.fleet_spec import is_fleet, load_fleet

_LIST_SECONDS: Final = 10
_SENTENCE_ENDS: Final = ("?", ".", "!", "…", "？", "。", "！", "؟", "।")
_TYPES: Final[dict[str, type[TokenEvent | ProgressEvent | GenerateResponse | ErrorEvent]]] = {
    "dev.lamina.generate.token": TokenEvent,
    "dev.lamina.generate.progress": ProgressEvent,
    "dev.lamina.generate.response": GenerateResponse,
    "dev.lamina.generate.error": ErrorEvent,
}

Answer = TokenEvent | GenerateResponse
OnProgress = Callable[[ProgressEvent], object]

chat_option = click.option(
    "--chat/--raw",
    default=None,
    help="Apply the model's chat template, or continue the prompt as it is. Default: chat for a prompt that ends like a "
    "sentence, raw for an open one, such as 'The capital of France is'.",
)


class AskFailed(Exception):
    """The gateway did not answer, or rejected the request. The message says why."""


class HostNotRouted(AskFailed):
    """An ingress answered instead of a gateway, because no Service has the host of the request."""


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    max_tokens: int
    temperature: float = 0.0
    chat: bool = True  # apply the model's chat template; False: continue the text
    api_key: str | None = None
    timeout_seconds: float = 900.0  # for the whole answer
    host: str | None = None  # the gateway's host, if the URL is an ingress's address
    model: str | None = None  # a fleet's member; None: the gateway serves one model


@click.command(short_help="Ask a gateway, and print the answer as it streams.")
@click.argument("url")
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True, help="0 is greedy.")
@chat_option
@click.option("--api-key", envvar="LAMINA_API_KEY", show_envvar=True, help="If the gateway requires one.")
@click.option("--host", help="If URL is an ingress's address: the host of the gateway's URL, which does not resolve here.")
@click.option("--model", help="If the gateway is a fleet's: the model to ask.")
@click.option(
    "--spec",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The spec behind the gateway: without --model, the first member of a Fleet is asked.",
)
@click.option("--timeout", type=click.FloatRange(min=1), default=900.0, show_default=True, help="Seconds for the whole answer.")
def ask(
    url: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    chat: bool | None,
    api_key: str | None,
    host: str | None,
    model: str | None,
    spec: Path | None,
    timeout: float,
) -> None:
    """Ask the gateway at URL, and print the answer while it streams.

    \b
    python -m knative ask http://127.0.0.1:8080 "What is the capital of France?"
    python -m knative ask http://127.0.0.1:8080 "The capital of France is" --max-tokens 8
    python -m knative ask http://203.0.113.7 --host chat.default.example.com "What is the capital of France?"
    """
    if model is None and spec is not None and is_fleet(spec):
        model = load_fleet(spec)[1][0].model.name
    as_chat = is_question(prompt) if chat is None else chat
    question = Question(prompt, max_tokens, temperature, as_chat, api_key, timeout, host, model)
    console = Console()
    status = console.status("")  # shown on terminals only

    def waits(progress: ProgressEvent) -> None:
        status.update(f"waiting: {progress.text}")
        status.start()

    try:
        asyncio.run(show_answer(console, url, question, before_text=status.stop, on_progress=waits))
    except HostNotRouted as error:
        raise AskFailed(f"{error}; {_known_hosts()}") from error
    finally:
        status.stop()


def _known_hosts() -> str:
    """Says which gateways the cluster of the kubeconfig has. If it does not answer in ten seconds, says how to list them."""
    said: list[str] = []

    def look() -> None:
        from knative.cluster.client import Cluster
        from knative.cluster.errors import ClusterError
        from knative.cluster.status import LIST_COLUMNS, pipelines

        with contextlib.suppress(ClusterError):
            cluster = Cluster.connect()
            urls = [row[LIST_COLUMNS.index("url")] for row in pipelines(cluster, None, lambda _: None)]
            hosts = ", ".join(urlsplit(url).netloc for url in urls if url)
            said.append(f"{cluster.description} has {hosts}" if hosts else f"{cluster.description} has no pipeline with a URL")

    thread = threading.Thread(target=look, name="known-hosts", daemon=True)  # the client of Kubernetes may wait for minutes
    thread.start()
    thread.join(_LIST_SECONDS)
    return said[0] if said else "python -m knative list shows the hosts of a cluster"


def is_question(text: str) -> bool:
    """Whether the text ends like a sentence, and so asks for an answer rather than a continuation."""
    return text.rstrip().rstrip("\"')").endswith(_SENTENCE_ENDS)


async def show_answer(
    console: Console,
    url: str,
    question: Question,
    before_text: Callable[[], object] = lambda: None,
    on_progress: OnProgress | None = None,
) -> GenerateResponse:
    """Prints the answer's text while it streams, then one line of timings. Returns the response. Raises AskFailed.

    before_text: called before each piece of text. on_progress: as in `stream_answer`. Times are measured here, because the
    gateway's own clock starts after a cold start and stops before the network.
    """
    asked_at = time.monotonic()
    first_at: float | None = None
    async for answer in stream_answer(url, question, on_progress):
        now = time.monotonic()
        first_at = now if first_at is None else first_at
        if isinstance(answer, GenerateResponse):
            usage, seconds = answer.usage, now - first_at
            rate = (usage.completion_tokens - 1) / seconds if usage.completion_tokens > 1 and seconds > 0 else 0.0
            console.out()
            console.out(
                f"({usage.prompt_tokens} + {usage.completion_tokens} tokens, first after {first_at - asked_at:.2f} s, "
                f"then {rate:.1f} tokens/s, {answer.finish_reason})",
                highlight=False,
                style="dim",
            )
            return answer
        before_text()
        console.out(answer.text, end="", highlight=False)
        console.file.flush()
    raise AskFailed(f"{url}: the answer had no end")


async def stream_answer(url: str, question: Question, on_progress: OnProgress | None = None) -> AsyncIterator[Answer]:
    """Asks the gateway at `url`; yields token events as they arrive, then the complete response. Raises AskFailed.

    on_progress: called while no tokens come, with what the answer waits for. If it is None, the gateway sends no progress.
    """
    headers, body = _request(question, include_progress=on_progress is not None)
    timeout = aiohttp.ClientTimeout(total=question.timeout_seconds, sock_connect=10)
    asked_of = None if question.model is None else {"model": question.model}
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, data=body, headers=headers, params=asked_of) as reply,
        ):
            if reply.status != 200:
                body = await reply.read()
                problem = problem_from_document(body)
                if reply.status == 404 and problem is None:
                    asked = question.host or urlsplit(url).netloc
                    raise HostNotRouted(f"{url} answered 404: the ingress there knows no host {asked}")
                reason = str(problem or body[:300].decode(errors="replace").strip() or "nothing")
                raise AskFailed(f"{url} answered {reply.status}: {reason}")
            decoder = SSEDecoder()
            async for chunk in reply.content.iter_any():
                for event in decoder.feed(chunk):
                    answer = _read(event)
                    if isinstance(answer, ErrorEvent):
                        raise AskFailed(f"the answer broke off: {answer.title}: {answer.detail}")
                    if isinstance(answer, ProgressEvent):
                        if on_progress is not None:
                            on_progress(answer)
                        continue
                    yield answer
                    if isinstance(answer, GenerateResponse):
                        return
            raise AskFailed("the answer broke off: the stream ended before its last event")
    except aiohttp.ClientConnectorError as error:
        raise AskFailed(f"{url}: no connection ({error.strerror or error}); is the pipeline running?") from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise AskFailed(f"{url}: {error or f'no answer in {question.timeout_seconds:g} seconds'}") from error


def _request(question: Question, *, include_progress: bool) -> tuple[dict[str, str], bytes]:
    sampling: dict[str, Any] = {
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
        "include_progress": include_progress,
    }
    if question.chat:
        data = GenerateRequest(messages=(Message(role="user", content=question.text),), **sampling)
    else:
        data = GenerateRequest(prompt=question.text, **sampling)
    headers, pieces = to_binary_http(json_event(EventType.GENERATE_REQUEST, "lamina/cli", data))
    headers["accept"] = EVENT_STREAM_CONTENT_TYPE
    if question.api_key is not None:
        headers["authorization"] = f"Bearer {question.api_key}"
    if question.host is not None:
        headers["host"] = question.host
    return headers, b"".join(pieces)


def _read(event: ServerSentEvent) -> TokenEvent | ProgressEvent | GenerateResponse | ErrorEvent:
    """Decodes a message of the stream, which is a CloudEvent in structured mode."""
    try:
        cloud_event = from_http({"content-type": "application/cloudevents+json"}, event.data.encode())
        return msgspec.json.decode(cloud_event.get_data() or b"", type=_TYPES[cloud_event.get_type()])  # type: ignore[arg-type]
    except (MalformedEvent, KeyError, msgspec.MsgspecError) as error:
        raise AskFailed(f"the stream holds something other than events of an answer: {event.data[:200]!r}") from error
