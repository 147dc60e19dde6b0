"""`python -m functions` as a process, with an environment: stages and gateways as they run everywhere."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from eventing.wire.events import Cut
from tests.support.paths import ROOT
from tests.support.storage.published import CUT, Published

TOKEN: Final = "pipeline-secret"
_LISTENING: Final = re.compile(r"listening on port (\d+)")
_METRICS: Final = re.compile(r"metrics on port (\d+)")
_SENT_KEY: Final = re.compile(r"[Bb]earer [\w-]{8}|lamina-[\w-]{43}\b")
"""As clients send keys, and as `python -m knative keys` makes them."""
_SECRET_SETTINGS: Final = (
    "LAMINA_PIPELINE_TOKEN",
    "LAMINA_SECOND_PIPELINE_TOKEN",
    "LAMINA_API_KEYS",
    "LAMINA_KV_KEY",
    "LAMINA_LIMITS_STORE",
    "AWS_SECRET_ACCESS_KEY",
)
_OF_MANAGEMENT: Final = ("/metrics", "/readyz")


def stage_environment(published: Published, group: int, cut: Cut = CUT, **more: str) -> dict[str, str]:
    """The environment of the stage that runs `cut[group]`."""
    first, last = cut[group]
    own = {
        "LAMINA_ROLE": "stage",
        "LAMINA_LAYERS": f"{first}:{last}",
        "LAMINA_THREADS": "1",
        "LAMINA_KV_CACHE_BYTES": "1000000",
    }
    return common_environment(published, cut) | own | more


def gateway_environment(published: Published, stage_urls: Sequence[str], cut: Cut = CUT, **more: str) -> dict[str, str]:
    stages = ",".join(f"{first}:{last}={url}" for (first, last), url in zip(cut, stage_urls, strict=True))
    return common_environment(published, cut) | {"LAMINA_ROLE": "gateway", "LAMINA_STAGES": stages} | more


def common_environment(published: Published, cut: Cut = CUT) -> dict[str, str]:
    return {
        "PORT": "0",
        "LAMINA_LISTEN": "127.0.0.1",
        "LAMINA_METRICS_PORT": "0",
        "PATH": os.environ["PATH"],
        "LAMINA_PIPELINE": published.fingerprint(cut),
        "LAMINA_PIPELINE_TOKEN": TOKEN,
        "LAMINA_MODEL": published.manifest.name,
        "LAMINA_DTYPE": published.manifest.dtype,
        "LAMINA_CUT": ",".join(f"{first}:{last}" for first, last in cut),
        "LAMINA_STORE_ENDPOINT": published.store.endpoint_url,
        "LAMINA_STORE_BUCKET": published.store.bucket,
        "AWS_ACCESS_KEY_ID": published.store.access_key_id or "",
        "AWS_SECRET_ACCESS_KEY": published.store.secret_access_key or "",
    }


def alive(pid: int) -> bool:
    """Returns whether a process with this pid runs. False for a zombie, which has ended and was not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


class FunctionProcess:
    """A running function. A context manager; at its end the process gets SIGTERM, and SIGKILL if that takes too long."""

    def __init__(self, environ: Mapping[str, str], command: Sequence[str] = ("-m", "functions")) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._secrets = _secrets_of(environ)
        self._lines: list[str] = []
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def log(self) -> str:
        """What it said so far; after its end, all of it."""
        return "".join(self._lines)

    @property
    def port(self) -> int:
        """Waits until it listens."""
        return self._said_port(_LISTENING)

    @property
    def metrics_port(self) -> int:
        return self._said_port(_METRICS)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self, timeout_seconds: float = 180.0) -> Self:
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                status, document = self.get("/readyz")
            except OSError as error:  # It has ended, or is about to; its log says why.
                status, document = 0, error
            if status == 200:
                return self
            assert self.process.poll() is None, f"ended while starting:\n{self.log}"
            assert time.monotonic() < deadline, f"not ready: {document}\n{self.log}"
            time.sleep(0.05)

    def get(self, path: str) -> tuple[int, Any]:
        """Status and body, parsed if it is JSON. Paths of management are requested at their own port."""
        url = f"http://127.0.0.1:{self.metrics_port}" if path in _OF_MANAGEMENT else self.url
        try:
            with urllib.request.urlopen(url + path, timeout=30) as response:
                return response.status, _parsed(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parsed(error.read())

    def wait_end(self, timeout_seconds: float = 60.0) -> int:
        """The exit status."""
        status = self.process.wait(timeout_seconds)
        self._reader.join(5)
        return status

    def stop(self) -> int:
        self.process.terminate()
        return self.wait_end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.wait_end()
        assert self.process.stderr is not None
        self.process.stderr.close()
        if kind is None:
            self._check_silence()

    def _check_silence(self) -> None:
        """In every test that runs a function: neither its own secrets nor any key that a client sent are in its log."""
        told = [line for line in self._lines if _SENT_KEY.search(line) or any(secret in line for secret in self._secrets)]
        assert not told, f"a secret is in the log: {told[:3]}"

    def _said_port(self, where: re.Pattern[str]) -> int:
        with self._said:
            self._said.wait_for(lambda: where.search(self.log) or not self._reader.is_alive(), 120)
        found = where.search(self.log)
        assert found, f"does not listen:\n{self.log}"
        return int(found[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._said:
                self._lines.append(line)
                self._said.notify_all()


def _secrets_of(environ: Mapping[str, str]) -> set[str]:
    """Secrets of eight characters and more; shorter ones may occur in any text."""
    values = [value for name in _SECRET_SETTINGS for value in environ.get(name, "").split(",")]
    return {value.strip() for value in values if len(value.strip()) >= 8}


@contextmanager
def running(environments: Iterable[Mapping[str, str]]) -> Iterator[list[FunctionProcess]]:
    """A ready function for each environment; they start together and end together."""
    with ExitStack() as stack:
        started = [stack.enter_context(FunctionProcess(environ)) for environ in environments]
        yield [function.wait_ready() for function in started]
        for function in started:
            function.process.terminate()


@contextmanager
def running_stages(published: Published, **more: str) -> Iterator[list[FunctionProcess]]:
    """The ready stages of a published model. more: of each stage's environment."""
    with running(stage_environment(published, group, CUT, **more) for group in range(len(CUT))) as stages:
        yield stages


@contextmanager
def running_gateway(published: Published, stages: Iterable[FunctionProcess], **more: str) -> Iterator[FunctionProcess]:
    """A ready gateway before the stages of a published model. more: of the gateway's environment."""
    with running([gateway_environment(published, [stage.url for stage in stages], CUT, **more)]) as (gateway,):
        yield gateway


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")
