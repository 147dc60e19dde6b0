"""Which keys are good now: those of files are read again when they change, and what is wrong with a file lets nobody in."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from functions.configuration.api_keys import parse_keys
from functions.configuration.settings import ConfigError
from functions.gateway.answers.authentication import KeyRing
from tests.support.functions.functions import wait_until
from tests.support.functions.scripted_gateway import Pipeline, ask, client_of

WITHIN_SECONDS = 2.0


def soon(condition: Callable[[], bool]) -> None:
    wait_until(condition, WITHIN_SECONDS)


def test_keys_of_the_environment_and_of_several_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("alice concurrent=1\n")
    two.write_text("bob\nalice concurrent=7\n")
    ring = KeyRing(parse_keys("env"), [str(one), str(two)])
    found = {key: ring.find(key) for key in ("env", "alice", "bob", "carol", "")}
    assert [key for key, each in found.items() if each] == ["env", "alice", "bob"]
    assert found["alice"] is not None
    assert ring.quota(found["alice"].id).concurrent == 1, "the first file counts"
    assert ring.quota("nobody").concurrent is None
    assert not ring.is_open


def test_a_key_that_is_taken_out_is_refused_within_seconds(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice\nbob\n")
    ring = KeyRing(files=[str(file)])
    assert ring.find("alice")
    file.write_text("bob\ncarol max_tokens=5\n")
    soon(lambda: ring.find("alice") is None)
    carol = ring.find("carol")
    assert carol is not None
    assert ring.quota(carol.id).max_tokens == 5
    assert ring.find("bob")


def test_a_secret_as_the_kubelet_puts_it_in_place(tmp_path: Path) -> None:
    """A folder for each version, and a link that is put in the place of another (pkg/volume/util/atomic_writer.go)."""

    def publish(version: str, text: str) -> None:
        (tmp_path / version).mkdir()
        (tmp_path / version / "api-keys").write_text(text)
        (tmp_path / "..data_tmp").symlink_to(version)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("..1", "alice\n")
    (tmp_path / "api-keys").symlink_to("..data/api-keys")
    ring = KeyRing(files=[str(tmp_path / "api-keys")])
    assert ring.find("alice")
    publish("..2", "carol\n")  # as long as the other
    soon(lambda: ring.find("alice") is None)
    assert ring.find("carol")


@pytest.mark.parametrize("how", ["emptied", "removed"])
def test_where_no_key_is_left_nobody_may_ask(how: str, tmp_path: Path) -> None:
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


def test_a_file_that_is_broken_keeps_its_keys_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_gateway_does_not_start_with_a_file_that_it_cannot_use(tmp_path: Path) -> None:
    broken, unreadable = tmp_path / "broken", tmp_path / "bytes"
    broken.write_text("a,,b")
    unreadable.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        KeyRing(files=[str(tmp_path / "not-there"), str(broken), str(unreadable), str(tmp_path)])
    assert [error.rpartition(": ")[2] for error in caught.value.errors][:1] == ["there is no such file of API keys"]
    assert len(caught.value.errors) == 4


def test_files_are_looked_at_now_and_then_and_not_for_each_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_limits_of_a_key_at_the_doors(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice max_tokens=3 priority=7\nbob requests_per_minute=1\ncarol requests_per_minute=0\n")
    pipeline = Pipeline()
    client = client_of(pipeline, LAMINA_API_KEY_FILES=str(file), LAMINA_CLIENT_REQUESTS_PER_MINUTE="2")
    asked = [ask(client, {"prompt": "Hi"}, Authorization=f"Bearer {key}") for key in ("alice bob bob " + "carol " * 3).split()]
    assert [reply.status_code for reply in asked] == [200, 200, 429, 200, 200, 200]
    assert [(prompt.max_tokens, prompt.priority) for prompt in pipeline.prompts][:2] == [(3, 7), (61, 0)]
