"""A batch while gateways are killed, one after the other: every line is answered once, and rightly."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import openai
import pytest

from functions.gateway.jobs.files import EVERYBODY
from storage.store.payload_store import PayloadStore
from tests.support.functions.functions import FunctionProcess, gateway_environment, running_stages, wait_until
from tests.support.storage.published import CUT, Published

TOKENS: Final = 4
KILL_SECONDS: Final = 3.0
WAIT_SECONDS: Final = 900.0
SAMPLE: Final = 60  # lines that are compared with transformers


class Gateways:
    """Two gateways, one of which is killed and replaced at a time."""

    def __init__(self, stack: ExitStack, environment: dict[str, str]) -> None:
        self._stack = stack
        self._environment = environment
        self.alive = [self._start().wait_ready(), self._start().wait_ready()]
        self.kills = 0

    def _start(self) -> FunctionProcess:
        return self._stack.enter_context(FunctionProcess(self._environment))

    def kill(self) -> None:
        killed = self.alive.pop(0)
        killed.process.kill()
        killed.wait_end()
        self.kills += 1
        self.alive.append(self._start())
        self.alive[0].wait_ready()

    @contextmanager
    def client(self) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{self.alive[0].url}/v1", api_key="none") as client:
            yield client

    def status(self, batch_id: str) -> openai.types.Batch:
        with self.client() as client:
            return client.batches.retrieve(batch_id)


@pytest.mark.timeout(1500)
def test_every_line_is_answered_once_while_gateways_are_killed(published: Published, wide: bool) -> None:
    number_of_lines, most_kills = (3000, 1000) if wide else (800, 4)
    texts = [f"line {number} of {number_of_lines}" for number in range(number_of_lines)]
    sampled = [number for number in range(0, number_of_lines, number_of_lines // SAMPLE) if number % 3 != 2]
    expected = {number: continued(published, texts[number]) for number in sampled}
    with running_stages(published) as stages, ExitStack() as stack, PayloadStore(published.store) as store:
        environment = gateway_environment(published, [stage.url for stage in stages], CUT, LAMINA_JOBS_STORE="lamina/jobs")
        gateways = Gateways(stack, environment)
        with gateways.client() as client:
            content = "\n".join(json.dumps(request(number, text)) for number, text in enumerate(texts))
            file = client.files.create(file=("input.jsonl", content.encode()), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        killed_at, deadline = time.monotonic(), time.monotonic() + WAIT_SECONDS
        while gateways.status(batch.id).status != "completed":
            assert time.monotonic() < deadline, gateways.status(batch.id)
            if gateways.kills < most_kills and time.monotonic() - killed_at > KILL_SECONDS:
                gateways.kill()
                killed_at = time.monotonic()
            time.sleep(0.2)
        assert gateways.kills >= 3, "the batch was over before it was disturbed"
        ended, output = read(gateways, batch.id)
        lines = [json.loads(each) for each in output.splitlines()]
        assert [each["custom_id"] for each in lines] == [str(number) for number in range(number_of_lines)]
        assert (ended.request_counts.completed, ended.request_counts.failed) == (number_of_lines, 0)
        found = {number: lines[number]["response"]["body"]["choices"][0]["text"] for number in sampled}
        assert found == expected

        for _ in range(2):
            gateways.kill()  # new ones do not know that the batch has ended
        # Without the results of some parts, and its end, the batch is open again. The same bytes come, also of drawn answers.
        wait_until(lambda: not list(store.list("jobs/tiny/open/")))
        run = f"jobs/tiny/{EVERYBODY}/runs/{batch.id}/results/"
        for found_object in list(store.list(run))[::20]:
            store.delete(found_object.key)
        end = f"jobs/tiny/{EVERYBODY}/ends/{batch.id}.json"
        store.delete(end)
        store.put(f"jobs/tiny/open/{EVERYBODY}/{batch.id}", b"{}")
        wait_until(lambda: bool(list(store.list(end))), WAIT_SECONDS)
        assert read(gateways, batch.id)[1] == output


def request(number: int, text: str) -> dict[str, Any]:
    """Every third line is drawn, with the seed that the line has."""
    temperature = 1.0 if number % 3 == 2 else 0.0
    body = {"model": "tiny", "prompt": text, "max_tokens": TOKENS, "temperature": temperature}
    return {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}


def read(gateways: Gateways, batch_id: str) -> tuple[openai.types.Batch, bytes]:
    with gateways.client() as client:
        batch = client.batches.retrieve(batch_id)
        assert batch.error_file_id is None
        return batch, client.files.content(str(batch.output_file_id)).content


def continued(published: Published, text: str) -> str:
    """The whole model's continuation."""
    ids = published.tokenizer.encode(text).ids
    whole: str = published.tokenizer.decode([*ids, *published.expected(ids, TOKENS)])
    return whole.removeprefix(published.tokenizer.decode(ids))
