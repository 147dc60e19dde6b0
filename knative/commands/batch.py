"""`python -m knative batch`: has the requests of a file answered as a batch, shows how far it is, and writes the results."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from knative.commands.ask import AskFailed

T = TypeVar("T")

_POLL_SECONDS: Final = 1.0
_PATIENCE_SECONDS: Final = 120.0  # without an answer: a gateway that died is replaced, or starts from zero
_READ_BYTES: Final = 2**18
_OVER: Final = ("completed", "failed", "expired", "cancelled")


class _Unreachable(Exception):
    """No gateway answers now. A later try may succeed."""


@click.command(short_help="Have a file of requests answered as a batch.")
@click.argument("target", metavar="FILE|ID")
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="Of the gateway.")
@click.option("--endpoint", help="Path that the requests ask. Default: the `url` of the first line.")
@click.option(
    "--window", default="24h", show_default=True, help="Time within which the lines are answered, such as 30m, 24h or 7d."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the answers, with the errors beside it. Default: FILE with .output.jsonl at its end.",
)
@click.option("--cancel", is_flag=True, help="Cancel the batch ID, and write what is answered.")
@click.option("--api-key", envvar="LAMINA_API_KEY", show_envvar=True, help="If the gateway requires one.")
@click.option("--host", help="If URL is an ingress's address: the host of the gateway's URL, which does not resolve here.")
def batch(
    target: str,
    url: str,
    endpoint: str | None,
    window: str,
    output: Path | None,
    cancel: bool,
    api_key: str | None,
    host: str | None,
) -> None:
    """Send FILE, with one request a line as in the OpenAI API, and wait for the answers; or go on with the batch ID.

    The answers are written to FILE.output.jsonl, lines without an answer to FILE.errors.jsonl. An interrupted command leaves
    the batch running. The gateway must serve files and batches (gateway.jobs in the spec).

    \b
    python -m knative batch requests.jsonl
    python -m knative batch batch_0f3c... --output requests.output.jsonl
    python -m knative batch batch_0f3c... --cancel
    """
    console = Console(stderr=True)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    headers |= {"Host": host} if host else {}

    async def run() -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
        async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
            await _Batch(url.rstrip("/"), session, console).run(target, endpoint, window, output, cancel=cancel)

    asyncio.run(run())


class _Batch:
    """The command's requests to one gateway. Methods raise AskFailed."""

    def __init__(self, url: str, session: aiohttp.ClientSession, console: Console) -> None:
        self._url = url
        self._session = session
        self._console = console

    async def run(self, target: str, endpoint: str | None, window: str, output: Path | None, *, cancel: bool) -> None:
        file = Path(target)
        is_id = target.startswith("batch_") and not file.exists()
        id_ = target if is_id else await self._begin(file, endpoint, window)
        if cancel:
            await self._ask("POST", f"/v1/batches/{id_}/cancel")
        ended = await self._follow(id_)
        answers = output or file.with_name(f"{file.stem}.output.jsonl")
        await self._write(ended["output_file_id"], answers)
        await self._write(ended["error_file_id"], answers.with_name(f"{answers.stem.removesuffix('.output')}.errors.jsonl"))
        if ended["status"] != "completed":
            raise AskFailed(f"{id_} is {ended['status']}: {_counts(ended)}")

    async def _begin(self, file: Path, endpoint: str | None, window: str) -> str:
        """Sends the file and creates the batch. Returns its id."""
        endpoint = endpoint or _endpoint(file)
        with self._console.status(f"sending {file.name}"), file.open("rb") as content:
            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", content, filename=file.name)
            try:
                sent = await self._send("POST", "/v1/files", data=form)
            except _Unreachable as error:
                raise AskFailed(f"{error}; is the pipeline running?") from error
        created = await self._ask(
            "POST", "/v1/batches", json={"input_file_id": sent["id"], "endpoint": endpoint, "completion_window": window}
        )
        self._console.print(f"{created['id']} has {created['request_counts']['total']} lines", highlight=False)
        return str(created["id"])

    async def _follow(self, id_: str) -> dict[str, Any]:
        """Shows the batch's progress until it has ended. Returns what it is then."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        batch = await self._ask("GET", f"/v1/batches/{id_}")
        began, tokens = time.monotonic(), batch["usage"]["output_tokens"]
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(batch["status"], total=batch["request_counts"]["total"], rate="")
            try:
                while True:
                    counts, seconds = batch["request_counts"], time.monotonic() - began
                    rate = (batch["usage"]["output_tokens"] - tokens) / seconds if seconds > 0 else 0.0
                    done = counts["completed"] + counts["failed"]
                    progress.update(task, completed=done, description=batch["status"], rate=f"{rate:.0f} tokens/s")
                    if batch["status"] in _OVER:
                        return batch
                    await asyncio.sleep(_POLL_SECONDS)
                    batch = await self._ask("GET", f"/v1/batches/{id_}")
            except asyncio.CancelledError:
                progress.stop()
                self._console.print(f"The batch goes on. See it again: python -m knative batch {id_} --url {self._url}")
                raise

    async def _write(self, file_id: str | None, target: Path) -> None:
        """Writes a file of results to `target`, which appears when it is complete."""
        if file_id is None:
            return
        partial = target.with_name(f".{target.name}.partial")

        async def fetch() -> None:
            async with self._session.get(f"{self._url}/v1/files/{file_id}/content") as reply:
                await _check(reply)
                with partial.open("wb") as content:
                    async for piece in reply.content.iter_chunked(_READ_BYTES):
                        content.write(piece)

        await self._patiently(fetch)
        partial.replace(target)
        self._console.print(f"wrote {target}", highlight=False)

    async def _ask(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The gateway's reply. While no gateway answers, asks again."""
        return await self._patiently(lambda: self._send(method, path, **body))

    async def _send(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        try:
            async with self._session.request(method, self._url + path, **body) as reply:
                await _check(reply)
                document: dict[str, Any] = await reply.json()
                return document
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _Unreachable(f"{self._url}: {error or type(error).__name__}") from error

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return await attempt()
            except (_Unreachable, aiohttp.ClientError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise AskFailed(f"{error}; the batch goes on as soon as a gateway runs") from error
            await asyncio.sleep(_POLL_SECONDS)


async def _check(reply: aiohttp.ClientResponse) -> None:
    """Raises AskFailed for a refusal, and _Unreachable for one that may not last."""
    if reply.status == 200:
        return
    body = await reply.read()
    try:
        reason = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        reason = body[:300].decode(errors="replace")
    said = f"{reply.url} answered {reply.status}: {reason}"
    if reply.status in (429, 502, 503, 504):
        raise _Unreachable(said)
    raise AskFailed(said)


def _endpoint(file: Path) -> str:
    """Path of the API, such as /v1/chat/completions, to which the first request in the file goes. Raises AskFailed."""
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        return str(msgspec.json.decode(first)["url"])
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise AskFailed(f"{file}: the first line is no request with a `url`, such as /v1/chat/completions") from error


def _counts(batch: dict[str, Any]) -> str:
    counts = batch["request_counts"]
    return f"{counts['completed']} of {counts['total']} lines are answered, {counts['failed']} are in the error file"
