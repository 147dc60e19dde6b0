"""One greedy client and five modest ones, each with a key, at a real gateway: every modest request is answered."""

import json
import threading
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tests.support.functions.functions import FunctionProcess, running_gateway, wait_until
from tests.support.storage.published import Published

QUEUE_LIMIT = 8
GREEDY_AT_ONCE = 48
MODEST_REQUESTS = 6
TOKENS = 24


def ask(gateway: FunctionProcess, model: str, key: str) -> int:
    """The status of one request."""
    body = json.dumps({"model": model, "prompt": key, "max_tokens": TOKENS, "ignore_eos": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{gateway.url}/v1/completions", body, headers), timeout=60
        ) as reply:
            return len(json.load(reply)["choices"]) and reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_modest_clients_are_answered_beside_a_greedy_one(published: Published) -> None:
    modest, enough, greedy_statuses = [f"modest-{number}" for number in range(5)], threading.Event(), Counter[int]()
    keys = ",".join(["greedy", *modest])
    limits = {"LAMINA_QUEUE_LIMIT": str(QUEUE_LIMIT), "LAMINA_MICRO_BATCH_SEQUENCES": "1", "LAMINA_API_KEYS": keys}

    with running_gateway(published, **limits) as gateway, ThreadPoolExecutor(GREEDY_AT_ONCE + len(modest)) as threads:
        model = published.manifest.name

        def be_greedy() -> None:
            while not enough.is_set():
                greedy_statuses[ask(gateway, model, "greedy")] += 1
                enough.wait(0.01)

        def be_modest(key: str) -> list[int]:
            return [ask(gateway, model, key) for _ in range(MODEST_REQUESTS)]

        try:
            greedy = [threads.submit(be_greedy) for _ in range(GREEDY_AT_ONCE)]
            wait_until(lambda: greedy_statuses[429] > GREEDY_AT_ONCE)
            statuses = list(threads.map(be_modest, modest))
        finally:
            enough.set()
        for each in greedy:
            each.result()
    assert statuses == [[200] * MODEST_REQUESTS] * len(modest)
    assert greedy_statuses[200] > 0, "it goes on beside them"
    assert set(greedy_statuses) == {200, 429}
