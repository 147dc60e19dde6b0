"""Files by the official client: a real gateway, a real store. No stage runs."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx
import openai
import pytest

from functions.gateway.jobs.files import MAX_LINE_BYTES, PART_LINES
from knative.local.kubelet.processes import memory_bytes
from storage.store.payload_store import PayloadStore
from tests.support.functions.functions import FunctionProcess, gateway_environment, running
from tests.support.storage.published import CUT, Published

KEYS = ("a-first-client-key", "a-second-client-key")
FORM = "multipart/form-data; boundary=b"
LINE = b'{"custom_id": "%08d", "padding": "%b"}\n'


@pytest.fixture(scope="module")
def gateway(published: Published) -> Iterator[FunctionProcess]:
    nowhere = ["http://127.0.0.1:1"] * len(CUT)
    more = {"LAMINA_JOBS_STORE": "lamina/jobs", "LAMINA_API_KEYS": ",".join(KEYS)}
    with running([gateway_environment(published, nowhere, CUT, **more)]) as (gateway,):
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
