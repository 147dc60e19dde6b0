"""No log has a key, a prompt or an answer, whether a request is answered, refused or fails."""

import json
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any

from tests.support.functions.functions import TOKEN, FunctionProcess, gateway_environment, running_stages
from tests.support.storage.published import Published

KEY = "key-of-a-client-that-nobody-else-may-know"
WORD = "unmistakable"  # in every prompt


def ask(
    gateway: FunctionProcess, path: str, body: dict[str, Any] | bytes, key: str = KEY, seconds: float = 60, **headers: str
) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) else json.dumps({"model": "tiny", "max_tokens": 12} | body).encode()
    told = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"} | headers
    try:
        with urllib.request.urlopen(urllib.request.Request(gateway.url + path, data, told), timeout=seconds) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_no_log_has_keys_prompts_or_answers(published: Published) -> None:
    with running_stages(published, LAMINA_LOG_LEVEL="debug") as stages:
        urls = [stage.url for stage in stages]
        environ = gateway_environment(published, urls, LAMINA_API_KEYS=KEY, LAMINA_LOG_LEVEL="debug")
        with FunctionProcess(environ) as gateway:
            gateway.wait_ready()
            message = [{"role": "user", "content": WORD}]
            status, answered = ask(gateway, "/v1/chat/completions", {"messages": message, "ignore_eos": True, "seed": 1})
            assert status == 200
            statuses = [
                ask(gateway, "/v1/completions", {"prompt": WORD, "stream": True})[0],
                ask(gateway, "/v1/chat/completions", {"messages": message}, key=f"{KEY}-not")[0],
                ask(gateway, "/v1/completions", {"prompt": WORD * 1000})[0],
                ask(gateway, "/v1/completions", {"prompt": WORD, "temperature": WORD})[0],
                ask(gateway, "/v1/completions", f'{{"prompt": "{WORD}'.encode())[0],
                ask(gateway, "/", {"prompt": WORD, "unheard-of": WORD}, **{"ce-id": "1", "ce-source": "/x"})[0],
            ]
            assert statuses == [200, 401, 400, 400, 400, 400]
            tool = {"type": "function", "function": {"name": WORD, "parameters": {"type": "object", "title": WORD}}}
            others = {
                "/v1/responses": {"input": WORD},
                "/tokenize": {"prompt": WORD},
                "/v1/chat/completions": {"messages": message, "tools": [tool], "tool_choice": "none"},
                "/v1/completions": {"prompt": [WORD, WORD], "stop": WORD, "structured_outputs": {"choice": [WORD]}},
            }
            for path, body in others.items():
                assert ask(gateway, path, body)[0] in (200, 400), path
            stages[1].process.kill()
            stages[1].wait_end()
            with suppress(OSError):
                ask(gateway, "/v1/completions", {"prompt": WORD}, seconds=3)
            status = gateway.stop()
        text = json.loads(answered)["choices"][0]["message"]["content"]
        assert len(text) > 5, "too short to search for in logs"
    logs = {"gateway": gateway.log, **{f"stage {number}": stage.log for number, stage in enumerate(stages)}}
    assert gateway.log.count('"path":"/v1/completions"') >= 4, "the access log is on"
    for name, log in logs.items():
        for secret in (KEY, TOKEN, WORD, text):
            assert secret not in log, f"the log of {name} has {secret!r}"
    assert status == 0
