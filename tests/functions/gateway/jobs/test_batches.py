"""Files and batches by the official client: a real pipeline, a real store. The oracle is the same pipeline, asked live."""

import hashlib
import itertools
import json
import signal
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry

from functions.gateway.jobs import worker
from functions.gateway.jobs.batches import Batches, BatchJob
from functions.gateway.jobs.files import MAX_LINE_BYTES, PART_LINES, Files, JobObjects, part_name
from functions.gateway.jobs.hold import Hold
from functions.gateway.jobs.lines import LineAnswerer
from functions.gateway.jobs.results import ResultsHead
from functions.gateway.jobs.run import BatchRun
from functions.gateway.jobs.worker import BatchMetrics, BatchWorker
from knative.local.kubelet.processes import memory_bytes
from storage.errors import ObjectAltered, ObjectNotFound
from storage.store.payload_store import PayloadStore
from tests.support.functions.functions import FunctionProcess, running_gateway, wait_until
from tests.support.storage.published import Published

KEYS = ("a-first-client-key", "a-second-client-key")
CHAT = {"model": "tiny", "temperature": 0, "max_tokens": 4}
WAIT_SECONDS = 120.0
FORM = "multipart/form-data; boundary=b"
LINE = b'{"custom_id": "%08d", "padding": "%b"}\n'


@pytest.fixture(scope="module")
def gateway(published: Published, stages: list[FunctionProcess]) -> Iterator[FunctionProcess]:
    with running_gateway(published, stages, LAMINA_JOBS_STORE="lamina/jobs", LAMINA_API_KEYS=",".join(KEYS)) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: FunctionProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        yield client


def requests(lines: int, padding: int = 10) -> bytes:
    return b"".join(LINE % (number, b"x" * padding) for number in range(lines))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"one",
        b"one\n",
        b"\n\none\r\n\n",
        requests(PART_LINES),
        requests(PART_LINES + 1)[:-1],
        requests(3, MAX_LINE_BYTES - 100),
    ],
    ids=["empty", "no end", "one", "blank lines", "a part", "more", "long lines"],
)
def test_a_file_is_read_as_it_was_sent(client: openai.OpenAI, content: bytes) -> None:
    sent = client.files.create(file=("input.jsonl", content), purpose="batch")
    assert (sent.bytes, sent.filename, sent.purpose) == (len(content), "input.jsonl", "batch")
    assert client.files.retrieve(sent.id) == sent
    assert client.files.content(sent.id).content == content
    assert client.files.delete(sent.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(sent.id)


def test_a_large_file_takes_little_memory(client: openai.OpenAI, gateway: FunctionProcess, tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    content = requests(2**17, 2**10)  # 137 MB
    large.write_bytes(content)
    client.files.create(file=("small.jsonl", b"{}\n"), purpose="batch")
    before = memory_bytes(gateway.process.pid)
    sent = client.files.create(file=large, purpose="batch")
    digest = hashlib.sha256()
    with client.files.with_streaming_response.content(sent.id) as reply:
        for piece in reply.iter_bytes():
            digest.update(piece)
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()
    assert memory_bytes(gateway.process.pid) < before + len(content) / 8
    client.files.delete(sent.id)


def test_files_are_listed_page_by_page_and_belong_to_their_key(client: openai.OpenAI) -> None:
    for old in client.files.list():
        client.files.delete(old.id)
    sent = [client.files.create(file=(f"{number}.jsonl", b"{}\n"), purpose="batch").id for number in range(5)]
    assert [file.id for file in islice(client.files.list(limit=2), 10)] == sent[::-1]
    assert [file.id for file in client.files.list(purpose="batch_output")] == []
    other = client.with_options(api_key=KEYS[1])
    assert list(other.files.list()) == []
    for refused in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            refused(sent[0])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").files.create(file=("x", b"{}"), purpose="batch")


@pytest.mark.parametrize(
    ("file", "purpose", "status"),
    [(b"{}\n", "fine-tune", 400), (b"x" * (MAX_LINE_BYTES + 1), "batch", 413)],
    ids=["purpose", "line"],
)
def test_what_is_refused_leaves_nothing(
    client: openai.OpenAI, published: Published, file: bytes, purpose: str, status: int
) -> None:
    with PayloadStore(published.store) as store:
        before = [found.key for found in store.list("jobs/tiny/")]
        with pytest.raises(openai.APIStatusError) as raised:
            client.files.create(file=("x.jsonl", file), purpose=purpose)  # type: ignore[arg-type]
        assert raised.value.status_code == status
        assert [found.key for found in store.list("jobs/tiny/")] == before


@pytest.mark.parametrize(
    ("content_type", "body", "said"),
    [
        ("application/json", b"{}", "multipart/form-data"),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n', "no file"),
        (FORM, b"no form", "no form of at most"),
    ],
)
def test_what_is_no_form_is_named(gateway: FunctionProcess, content_type: str, body: bytes, said: str) -> None:
    headers = {"Content-Type": content_type, "Authorization": f"Bearer {KEYS[0]}"}
    reply = httpx.post(f"{gateway.url}/v1/files", content=body, headers=headers)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


@pytest.mark.parametrize("id_", ["file-1", "..%2F..%2Fmodels", "batch_" + "0" * 27])
def test_an_id_names_no_other_object(gateway: FunctionProcess, id_: str) -> None:
    reply = httpx.get(f"{gateway.url}/v1/files/{id_}", headers={"Authorization": f"Bearer {KEYS[0]}"})
    assert reply.status_code == 404


def line(number: int, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    said = {"messages": [{"role": "user", "content": f"Say {number}"}]} if "messages" not in body else {}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": CHAT | said | body}


def begun(
    client: openai.OpenAI, lines: Iterable[object], endpoint: Any = "/v1/chat/completions", **more: Any
) -> openai.types.Batch:
    content = b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)
    file = client.files.create(file=("input.jsonl", content), purpose="batch")
    return client.batches.create(
        **({"input_file_id": file.id, "endpoint": endpoint, "completion_window": "24h"} | more)  # type: ignore[arg-type]
    )


def ended(client: openai.OpenAI, batch: openai.types.Batch) -> openai.types.Batch:
    def over() -> bool:
        return client.batches.retrieve(batch.id).status in ("completed", "failed", "expired", "cancelled")

    wait_until(over, WAIT_SECONDS)
    return client.batches.retrieve(batch.id)


def read(client: openai.OpenAI, file_id: str | None) -> list[Any]:
    return [] if file_id is None else [json.loads(each) for each in client.files.content(file_id).text.splitlines()]


def results(client: openai.OpenAI, batch: openai.types.Batch) -> list[Any]:
    return read(client, batch.output_file_id) + read(client, batch.error_file_id)


def test_the_whole_life_of_a_batch(client: openai.OpenAI) -> None:
    count = 2 * PART_LINES + 3
    batch = begun(client, map(line, range(count)), metadata={"of": "a test"})
    assert (batch.status, batch.request_counts.total, batch.metadata) == ("in_progress", count, {"of": "a test"})
    batch = ended(client, batch)
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed, batch.error_file_id) == (count, 0, None)
    output = read(client, batch.output_file_id)
    assert [each["custom_id"] for each in output] == [f"line-{number}" for number in range(count)]
    assert client.files.retrieve(batch.output_file_id).bytes == len(client.files.content(batch.output_file_id).content)
    for each in output[:: PART_LINES // 2]:
        live = client.chat.completions.create(**line(int(each["custom_id"].removeprefix("line-")))["body"])
        body = openai.types.chat.ChatCompletion.model_validate(each["response"]["body"])
        assert body.choices == live.choices
        assert body.usage.total_tokens == live.usage.total_tokens
    assert batch.usage.output_tokens == sum(each["response"]["body"]["usage"]["completion_tokens"] for each in output)
    assert batch in client.batches.list()
    assert client.files.delete(batch.output_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.output_file_id)


@pytest.mark.parametrize(
    ("endpoint", "body", "text"),
    [
        ("/v1/completions", {"prompt": "hello", "max_tokens": 4}, lambda body: body["choices"][0]["text"]),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 4}, lambda body: body["output"][0]["content"][0]["text"]),
    ],
)
def test_every_endpoint_is_served(client: openai.OpenAI, endpoint: str, body: dict[str, Any], text: Any) -> None:
    body = {"model": "tiny", "temperature": 0} | body
    batch = ended(client, begun(client, [{"custom_id": "1", "method": "POST", "url": endpoint, "body": body}], endpoint))
    (result,) = read(client, batch.output_file_id)
    live: Any = client.post(endpoint.removeprefix("/v1"), body=body, cast_to=object)
    assert text(result["response"]["body"]) == text(live)


def test_what_cannot_be_served_is_in_the_error_file(client: openai.OpenAI) -> None:
    wrong: dict[str, Any] = {
        "model": line(0, model="other"),
        "option": line(1, no_option=1),
        "stream": line(2, stream=True),
        "url": line(3, "/v1/completions"),
        "context": line(4, max_tokens=None, messages=[{"role": "user", "content": "x" * 10_000}]),
        "no id": {"body": {}},
        "no JSON": b"no JSON",
    }
    batch = ended(client, begun(client, [line(10), *wrong.values(), b"", line(11)]))
    assert batch.status == "completed"
    assert [each["custom_id"] for each in read(client, batch.output_file_id)] == ["line-10", "line-11"]
    errors = read(client, batch.error_file_id)
    assert [each["custom_id"] for each in errors] == [*(f"line-{number}" for number in range(5)), None, None]
    statuses = [each["response"]["status_code"] for each in errors]
    assert statuses == [404, 400, 400, 400, 400, 400, 400]
    assert errors[4]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 7)


def long_lines(count: int) -> list[dict[str, Any]]:
    return [line(number, max_tokens=200, ignore_eos=True) for number in range(count)]


def check_stopped(client: openai.OpenAI, batch: openai.types.Batch, count: int, code: str) -> None:
    """Every line is there once, and those without an answer say why."""
    found = results(client, batch)
    assert sorted(each["custom_id"] for each in found) == sorted(f"line-{number}" for number in range(count))
    errors = read(client, batch.error_file_id)
    assert errors
    assert {each["error"]["code"] for each in errors} == {code}
    assert batch.request_counts.completed + batch.request_counts.failed == count


def test_a_cancelled_batch_keeps_its_answers(client: openai.OpenAI) -> None:
    count = 40 * PART_LINES
    batch = begun(client, [*map(line, range(PART_LINES)), *long_lines(count)[PART_LINES:]])
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0, WAIT_SECONDS)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    assert batch.request_counts.completed > 0
    check_stopped(client, batch, count, "batch_cancelled")


def test_a_batch_ends_with_its_window(client: openai.OpenAI) -> None:
    count = 40 * PART_LINES
    batch = ended(client, begun(client, long_lines(count), completion_window="3s"))
    assert batch.status == "expired"
    check_stopped(client, batch, count, "batch_expired")


def test_a_part_that_the_store_does_not_show_is_not_passed_over(published: Published) -> None:
    with PayloadStore(published.store) as store:
        objects = JobObjects(store, "unseen")
        files = Files(objects)
        file = files.add("me", files.write("me", "input.jsonl", [LINE % (number, b"") for number in range(3 * PART_LINES)]))
        batches = Batches(objects, files)
        job = batches.create("me", "me", file, "/v1/chat/completions", ("1s", 1), created_at=int(time.time()) - 60)
        key = f"me/parts/{file.id}/{part_name(1)}"
        part = objects.get(key)
        objects.delete(key)
        run = BatchRun(batches, job)
        with pytest.raises(ObjectNotFound):
            run.end(lambda: False)
        objects.put(key, part)
        assert run.end(lambda: False)
        (errors,) = batches.results_files(job)
        assert b"".join(files.read("me", errors)).count(b"\n") == errors.lines == 3 * PART_LINES
        objects.delete(f"me/runs/{job.id}/results/{part_name(2)}")
        with pytest.raises(ObjectAltered, match=r"of the [0-9]+ bytes"):
            list(files.read("me", errors))


def test_a_part_is_counted_once_while_the_batch_is_ended(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker looks at its batches once a second, and ending a long one takes longer."""
    monkeypatch.setattr(worker, "LOOK_SECONDS", 0.01)
    looks, heads, count = itertools.count(1), list[str](), 4 * PART_LINES
    looked = 0
    open_batches, head = Batches.open, Batches.head

    def noted(batches: Batches) -> Iterator[tuple[tuple[str, str], datetime]]:
        nonlocal looked
        looked = next(looks)
        return open_batches(batches)

    def slow(batches: Batches, job: BatchJob, name: str, folder: str = "results") -> ResultsHead | None:
        found, before = head(batches, job, name, folder), looked
        heads.append(name)
        if heads.count(part_name(1)) == 2 and name == part_name(1):  # it has just been written, and is counted now
            wait_until(lambda: looked > before + 2)
        return found

    monkeypatch.setattr(Batches, "open", noted)
    monkeypatch.setattr(Batches, "head", slow)
    with PayloadStore(published.store) as store:
        objects = JobObjects(store, "counted")
        files = Files(objects)
        file = files.add("me", files.write("me", "input.jsonl", [LINE % (number, b"") for number in range(count)]))
        batches = Batches(objects, files)
        job = batches.create("me", "me", file, "/v1/chat/completions", ("1s", 1), created_at=int(time.time()) - 60)
        answerer = LineAnswerer(cast(Any, None), cast(Any, None))  # all lines are given up
        metrics = BatchMetrics(CollectorRegistry())
        running = BatchWorker(batches, answerer, lambda: 0, lambda _: True, Hold(cast(Any, None), None), metrics)
        running.start()
        wait_until(lambda: not running.runs and looked > 0 and batches.end_of(job) is not None)
        running.stop()
        (errors,) = batches.results_files(job)
        assert errors.lines == count
        assert b"".join(files.read("me", errors)).count(b"\n") == count


def test_a_batch_belongs_to_its_key(client: openai.OpenAI) -> None:
    batch = begun(client, [line(0)])
    other = client.with_options(api_key=KEYS[1])
    assert list(other.batches.list()) == []
    for refused in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            refused(batch.id)
    with pytest.raises(openai.NotFoundError):
        other.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h")
    ended(client, batch)
    newest = [begun(client, [line(0)]).id for _ in range(3)][::-1]
    assert [each.id for each in islice(client.batches.list(limit=2), 3)] == newest


@pytest.mark.parametrize(
    "more",
    [{"endpoint": "/v1/images/generations"}, {"completion_window": "8d"}, {"completion_window": "soon"}],
    ids=lambda more: " ".join(more.values()),
)
def test_what_no_batch_may_ask_is_refused(client: openai.OpenAI, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        begun(client, [line(0)], **more)
    with pytest.raises(openai.BadRequestError, match="no requests"):
        begun(client, [])


def test_an_input_stays_as_long_as_it_is_read(client: openai.OpenAI, published: Published) -> None:
    batch = begun(client, long_lines(10 * PART_LINES))
    with pytest.raises(openai.BadRequestError, match="has not ended"):
        client.files.delete(batch.input_file_id)
    client.batches.cancel(batch.id)
    ended(client, batch)
    with PayloadStore(published.store) as store:
        until_closed(store, batch.id)
    assert client.files.delete(batch.input_file_id).deleted


def until_closed(store: PayloadStore, batch_id: str) -> None:
    """Waits until a gateway has removed the mark of an open batch, some time after clients see the batch's end."""
    wait_until(lambda: not [found for found in store.list("jobs/tiny/open/") if found.key.endswith(batch_id)])


def test_nothing_of_ended_batches_is_left_but_files(client: openai.OpenAI, published: Published) -> None:
    batch = ended(client, begun(client, [line(0)]))
    with PayloadStore(published.store) as store:
        until_closed(store, batch.id)
        assert [
            found.key.rpartition(f"{batch.id}/")[2] for found in store.list("jobs/tiny/") if f"/runs/{batch.id}/" in found.key
        ] == ["results/00000000"]
    for file_id in (batch.output_file_id, batch.input_file_id):
        client.files.delete(file_id)
    with PayloadStore(published.store) as store:
        assert not [
            found.key for found in store.list("jobs/tiny/") if "/parts/" in found.key and batch.input_file_id in found.key
        ]
        assert not [found.key for found in store.list("jobs/tiny/") if f"/runs/{batch.id}/" in found.key]


def test_a_repeated_request_finds_its_batch(client: openai.OpenAI) -> None:
    file = client.files.create(file=("input.jsonl", json.dumps(line(1)).encode()), purpose="batch")

    def create(key: str, window: str = "24h") -> str:
        return client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window=window,  # type: ignore[arg-type]
            extra_headers={"Idempotency-Key": key},
        ).id

    first = create("a key")
    assert create("a key") == first
    assert len({first, create("another key"), create("a key", "23h")}) == 3
    assert ended(client, client.batches.retrieve(first)).status == "completed"
    assert create("a key") == first


def test_files_say_when_they_are_deleted(client: openai.OpenAI) -> None:
    content = json.dumps(line(1)).encode()
    kept = client.files.create(file=("input.jsonl", content), purpose="batch")
    assert kept.expires_at == kept.created_at + 30 * 86_400
    short = client.files.create(
        file=("input.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert short.expires_at == short.created_at + 3600
    batch = client.batches.create(
        input_file_id=short.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    output = client.files.retrieve(ended(client, batch).output_file_id or "")
    assert output.expires_at == output.created_at + 7200
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        client.files.create(
            file=("input.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 0}
        )


def test_files_and_batches_are_deleted_when_their_time_is_over(
    client: openai.OpenAI, gateway: FunctionProcess, published: Published
) -> None:
    """A file that an open batch reads stays. The gateway is stopped meanwhile, or it could end that batch."""
    batch = ended(client, begun(client, [line(1)], output_expires_after={"anchor": "created_at", "seconds": 10**6}))
    with PayloadStore(published.store) as store:
        objects = JobObjects(store, "jobs/tiny")
        batches = Batches(objects, Files(objects))
        owner = next(each.split("/")[0] for each in objects.names("") if each.endswith(f"batches/{batch.id}.json"))
        until_closed(store, batch.id)
        input_deleted_at = time.time() + 31 * 86_400
        gateway.process.send_signal(signal.SIGSTOP)
        try:
            file = batches.files.get(owner, batch.input_file_id)
            waiting = batches.create(owner, owner, file, batch.endpoint, ("24h", 86_400))
            batches.expire(input_deleted_at)
            assert batches.files.get(owner, batch.input_file_id)
        finally:
            gateway.process.send_signal(signal.SIGCONT)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(batch.output_file_id or "")
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve(batch.id)
        ended(client, client.batches.retrieve(waiting.id))
        until_closed(store, waiting.id)
        batches.expire(input_deleted_at)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(batch.input_file_id)
        assert not [name for name in objects.names(f"{owner}/") if batch.id in name or batch.input_file_id in name]


def test_a_batch_makes_vectors(client: openai.OpenAI) -> None:
    texts = [["one", "two"], "three", [1, 2, 3]]
    lines = [
        {"custom_id": str(number), "url": "/v1/embeddings", "body": {"model": "tiny", "input": text}}
        for number, text in enumerate(texts)
    ]
    lines.append({"custom_id": "wrong", "url": "/v1/embeddings", "body": {"model": "tiny", "input": "a", "dimensions": 3}})
    batch = ended(client, begun(client, lines, "/v1/embeddings"))
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 1)
    for found, text in zip(read(client, batch.output_file_id), texts, strict=True):
        live = client.embeddings.create(model="tiny", input=text, encoding_format="float")  # type: ignore[arg-type]
        body = found["response"]["body"]
        assert [each["embedding"] for each in body["data"]] == [each.embedding for each in live.data]
        assert body["usage"]["prompt_tokens"] == live.usage.prompt_tokens
    assert read(client, batch.error_file_id)[0]["response"]["status_code"] == 400
