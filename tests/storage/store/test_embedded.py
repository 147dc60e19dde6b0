"""The embedded store: comes up on a free port with keys of its own, and never outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from knative.local.kubelet.processes import free_port
from storage.errors import AccessDenied, StoreUnreachable
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.support.paths import ROOT

DEADLINE_SECONDS = 20.0

PARENT = """
import signal, sys, threading, time
from pathlib import Path
from storage.store.embedded import EmbeddedStore

def start():
    global store
    store = EmbeddedStore(Path(sys.argv[1]))

signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
# From a thread that ends: what ties the store's life to its parent must be the process.
thread = threading.Thread(target=start)
thread.start()
thread.join()
print(store.settings.endpoint_url, store.settings.access_key_id, store.settings.secret_access_key, flush=True)
time.sleep(600)
"""


def answers(endpoint_url: str) -> bool:
    from http.client import HTTPConnection

    connection = HTTPConnection(endpoint_url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status > 0
    except OSError:
        return False
    finally:
        connection.close()


def wait_until_gone(endpoint_url: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while answers(endpoint_url):
        assert time.monotonic() < deadline, "the store outlives its parent"
        time.sleep(0.05)


def command_lines() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


@pytest.mark.slow
def test_objects_survive_a_restart(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "data", bucket="models") as store:
        ObjectStore(store.settings).put("key", b"value")
        first = store.settings
    assert not answers(first.endpoint_url)
    with EmbeddedStore(tmp_path / "data", bucket="models") as store:
        assert ObjectStore(store.settings).get("key") == b"value"
        assert store.settings.secret_access_key != first.secret_access_key
        with pytest.raises(AccessDenied):
            ObjectStore(replace(first, endpoint_url=store.settings.endpoint_url)).get("key")
        assert store.settings.endpoint_url.startswith("http://127.0.0.1:")


@pytest.mark.slow
def test_a_store_that_comes_back_is_the_one_that_clients_know(tmp_path: Path) -> None:
    port = free_port()  # which no outgoing connection takes while the store is away
    with EmbeddedStore(tmp_path, port=port) as store:
        client = ObjectStore(store.settings)
        client.put("key", b"kept")
    known = store.settings
    with EmbeddedStore(tmp_path, port=port, keys=(known.access_key_id, known.secret_access_key)) as back:
        assert back.settings == known
        assert client.get("key") == b"kept"


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    store.close()
    store.close()
    assert not answers(store.settings.endpoint_url)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_the_store_ends_with_its_parent(tmp_path: Path, ending: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        endpoint_url, access_key_id, secret = parent.stdout.readline().split()
        assert answers(endpoint_url)
        assert access_key_id not in command_lines()
        assert secret not in command_lines()
        os.kill(parent.pid, ending)
    wait_until_gone(endpoint_url)


def test_an_interrupt_of_the_terminal_does_not_reach_the_store(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        endpoint_url = parent.stdout.readline().split()[0]
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stdout.readline() == "interrupted\n"
        assert answers(endpoint_url)
        parent.kill()
    wait_until_gone(endpoint_url)


def test_a_store_that_does_not_start_says_why(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "one") as store:
        port = int(store.settings.endpoint_url.rsplit(":", 1)[1])
        with pytest.raises(StoreUnreachable, match=f"did not start .*127.0.0.1:{port}.*address already in use"):
            EmbeddedStore(tmp_path / "two", port=port)
