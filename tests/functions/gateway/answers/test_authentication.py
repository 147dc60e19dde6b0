"""API keys of the environment and of files that change, and how clients are identified."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from werkzeug.test import create_environ

from functions.configuration.api_keys import parse_keys
from functions.configuration.settings import ConfigError
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.app import gateway_admission
from functions.hosting.requests import CLIENT_ID
from tests.support.environments import gateway_config
from tests.support.functions.functions import wait_until
from tests.support.functions.scripted_gateway import Pipeline, ask, client_of


def soon(condition: Callable[[], bool]) -> None:
    wait_until(condition, 2.0)


def test_keys_come_from_the_environment_and_from_several_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("alice concurrent=1\n")
    two.write_text("bob\nalice concurrent=7\n")
    ring = KeyRing(parse_keys("env"), [str(one), str(two)])
    found = {key: ring.find(key) for key in ("env", "alice", "bob", "carol", "")}
    assert [key for key, each in found.items() if each] == ["env", "alice", "bob"]
    assert ring.quota(found["alice"].id).concurrent == 1, "the first file counts"
    assert ring.quota("nobody").concurrent is None
    assert not ring.is_open


@pytest.mark.slow
def test_a_removed_key_is_refused_within_seconds(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice\nbob\n")
    ring = KeyRing(files=[str(file)])
    assert ring.find("alice")
    file.write_text("bob\ncarol max_tokens=5\n")
    soon(lambda: ring.find("alice") is None)
    carol = ring.find("carol")
    assert ring.quota(carol.id).max_tokens == 5
    assert ring.find("bob")


@pytest.mark.slow
def test_a_mounted_secret_is_read_again_when_the_kubelet_updates_it(tmp_path: Path) -> None:
    """The kubelet has a folder per version and replaces a link (pkg/volume/util/atomic_writer.go)."""

    def publish(version: str, text: str) -> None:
        (tmp_path / version).mkdir()
        (tmp_path / version / "api-keys").write_text(text)
        (tmp_path / "..data_tmp").symlink_to(version)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("..1", "alice\n")
    (tmp_path / "api-keys").symlink_to("..data/api-keys")
    ring = KeyRing(files=[str(tmp_path / "api-keys")])
    assert ring.find("alice")
    publish("..2", "carol\n")  # has the same length
    soon(lambda: ring.find("alice") is None)
    assert ring.find("carol")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["emptied", "removed"])
def test_a_gateway_without_keys_left_refuses_everybody(how: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice\n")
    ring = KeyRing(files=[str(file)])
    if how == "emptied":
        file.write_text("")
    else:
        file.unlink()
    soon(lambda: ring.find("alice") is None)
    assert not ring.is_open
    file.write_text("alice\n")
    soon(lambda: ring.find("alice") is not None)


@pytest.mark.slow
def test_a_broken_file_keeps_its_keys_and_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("alice\n")
    ring = KeyRing(files=[str(file)])
    file.write_text("alice\nbob what s3cret\n")
    soon(lambda: ring.find("alice") is not None and "word 2 of key 2" in caplog.text)
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        assert ring.find("alice")
    assert caplog.text.count("its keys stay as they were") == 1
    assert "s3cret" not in caplog.text
    assert ring.find("bob") is None


def test_a_file_that_cannot_be_read_at_start_is_an_error(tmp_path: Path) -> None:
    broken, unreadable = tmp_path / "broken", tmp_path / "bytes"
    broken.write_text("a,,b")
    unreadable.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        KeyRing(files=[str(tmp_path / "not-there"), str(broken), str(unreadable), str(tmp_path)])
    assert [error.rpartition(": ")[2] for error in caught.value.errors][:1] == ["there is no such file of API keys"]
    assert len(caught.value.errors) == 4


def test_files_are_not_checked_for_each_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("alice\n")
    ring = KeyRing(files=[str(file)])
    looks: list[object] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *given, **named: (looks.append(given), real(*given, **named))[1])
    began = time.monotonic()
    for _ in range(2000):
        assert ring.find("alice")
    assert len(looks) <= 2 * (time.monotonic() - began) + 1


def test_a_keys_own_quota_applies(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice max_tokens=3 priority=7\nbob requests_per_minute=1\ncarol requests_per_minute=0\n")
    pipeline = Pipeline()
    client = client_of(pipeline, LAMINA_API_KEY_FILES=str(file), LAMINA_CLIENT_REQUESTS_PER_MINUTE="2")
    asked = [ask(client, {"prompt": "Hi"}, Authorization=f"Bearer {key}") for key in ("alice bob bob " + "carol " * 3).split()]
    assert [reply.status_code for reply in asked] == [200, 200, 429, 200, 200, 200]
    assert [(prompt.max_tokens, prompt.priority) for prompt in pipeline.prompts][:2] == [(3, 7), (61, 0)]


@pytest.fixture
def closed(pipeline: Pipeline) -> FlaskClient:
    return client_of(pipeline, LAMINA_API_KEYS="first-key, second-key")


@pytest.mark.parametrize("given", [None, "Bearer wrong-key", "first-key", "Basic first-key", "Bearer "])
def test_both_apis_require_a_key_if_keys_are_configured(closed: FlaskClient, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    asked = ask(closed, {"prompt": "Hi"}, **headers)
    assert (asked.status_code, asked.headers["WWW-Authenticate"]) == (401, 'Bearer realm="lamina"')
    for refused in (closed.get("/v1/models", headers=headers), closed.post("/v1/completions", headers=headers, data=b"{")):
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, 'Bearer realm="lamina"')
        assert refused.get_json()["error"]["type"] == "authentication_error"


def test_clients_are_identified_by_their_keys_without_keeping_them(closed: FlaskClient, pipeline: Pipeline) -> None:
    for key in ("first-key", "second-key", "first-key"):
        assert ask(closed, {"prompt": "Hi"}, Authorization=f"Bearer {key}").status_code == 200
    one, two, three = (prompt.client_id for prompt in pipeline.prompts)
    assert one == three != two
    assert "key" not in one


def test_a_key_may_be_configured_by_its_hash_which_is_no_key(pipeline: Pipeline) -> None:
    hashed = f"sha256:{hashlib.sha256(b'first-key').hexdigest()}"
    client = client_of(pipeline, LAMINA_API_KEYS=f"{hashed}, second-key")
    for key in ("first-key", "second-key"):
        assert ask(client, {"prompt": "Hi"}, Authorization=f"Bearer {key}").status_code == 200
    assert pipeline.prompts[0].client_id == hashed[7:19]
    for other in (hashed, hashed[7:], "sha256:"):
        assert ask(client, {"prompt": "Hi"}, Authorization=f"Bearer {other}").status_code == 401


@pytest.mark.parametrize(
    ("proxies", "forwarded", "expected"),
    [
        (None, "10.0.0.7, 10.1.0.1", "10.1.0.1"),
        (1, "forged, 10.1.0.1", "10.1.0.1"),
        (2, "forged, 10.0.0.7, 10.1.0.1", "10.0.0.7"),
        (2, "10.1.0.1", "127.0.0.1"),
        (1, " ", "127.0.0.1"),
        (0, "forged", "127.0.0.1"),
    ],
)
def test_clients_without_keys_are_identified_by_the_address_that_the_first_proxy_saw(
    pipeline: Pipeline, proxies: int | None, forwarded: str, expected: str
) -> None:
    """A client writes only entries before that one, so it cannot get a second queue."""
    client = client_of(pipeline, **({} if proxies is None else {"LAMINA_PROXIES": str(proxies)}))
    ask(client, {"prompt": "Hi"}, X_Forwarded_For=forwarded)
    ask(client, {"prompt": "Hi"}, X_Forwarded_For=f"another, {forwarded}" if proxies != 2 or "," in forwarded else forwarded)
    ask(client, {"prompt": "Hi"})
    assert [prompt.client_id for prompt in pipeline.prompts] == [expected, expected, "127.0.0.1"]


@pytest.mark.parametrize("prefer", [None, "reply"])
def test_a_client_gets_no_signed_event(client: FlaskClient, prefer: str | None) -> None:
    """A gateway for clients scores nothing, whatever headers they send."""
    headers = {} if prefer is None else {"Prefer": prefer}
    reply = ask(client, {"text": "Hello there"}, ce_type="dev.lamina.score.request", **headers)
    assert reply.status_code == 400
    assert "ce-signature" not in reply.headers
    assert b"Broker" in reply.data


@pytest.mark.parametrize(
    ("keys", "proxies", "expected"), [("alice", 1, "alice's id"), (None, 1, "10.0.0.7"), (None, 0, "127.0.0.1")]
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/completions"), ("GET", "/v1/models")])
def test_a_request_counts_for_its_client_before_its_body_is_read(
    keys: str | None, proxies: int, expected: str, method: str, path: str
) -> None:
    ring = KeyRing(None if keys is None else parse_keys(keys))
    config = gateway_config(LAMINA_PROXIES=str(proxies))
    headers = {"Authorization": "Bearer alice", "X-Forwarded-For": "10.0.0.7", "Content-Type": "application/json"}
    environ = create_environ(path, method=method, headers=headers, environ_base={"REMOTE_ADDR": "127.0.0.1"})
    admitted_bytes = gateway_admission(config, ring, client_of(Pipeline()).application)(environ)
    assert bool(admitted_bytes) == (method == "POST")
    assert environ[CLIENT_ID] == (ring.find("alice").id if keys else expected)
