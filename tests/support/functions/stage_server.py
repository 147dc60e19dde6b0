"""Stages for the gateway's tests: real applications and engines behind real HTTP, in this process.

Most tests have stages that count (see `counting_group`): the next token is the sum of all tokens so far, so an answer shows
every token lost, repeated or out of place. What goes wrong at a stage is a test's to say, event by event.
"""

import itertools
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, cast

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from eventing.wire.batch_codec import decode_batch
from eventing.wire.control import LEASE_SECONDS
from eventing.wire.events import Batch, Cut, EventType, Row
from functions.configuration.config import StageConfig, read_config
from functions.hosting.startup import StartUp
from functions.stage.engine.engine import Engine
from functions.stage.engine.event_queue import ForwardEvent
from functions.stage.engine.kv_tiers import Tier
from functions.stage.models.layer_group import LayerGroup
from functions.stage.serving.app import StageApp, StageMetrics
from functions.stage.serving.handlers import EventHandlers, StageIdentity
from knative.local.kubelet.processes import free_port
from tests.support.functions.counting_group import CountingGroup

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

FINGERPRINT: Final = "0123456789abcdef0123456789abcdef"
TOKEN: Final = "pipeline-secret"


class Fault(StrEnum):
    """What becomes of one event."""

    REFUSED = "the connection is reset before anything is computed"
    REPLY_LOST = "the connection is reset when everything is computed"
    TWICE = "it is delivered twice, and the second reply is the answer"
    UNAVAILABLE = "503 from something in between"
    KILLED = "the stage dies with it in hand"
    KILLED_RESTARTED = "the same, and it starts again at once"


@dataclass(slots=True)
class Seen:
    """An event at a stage."""

    type: str
    rows: tuple[Row, ...]
    token_ids: tuple[int, ...]
    body: bytes
    arrived: float
    left: float = 0.0
    reply: bytes = b""

    @property
    def ids(self) -> set[str]:
        return {row.id for row in self.rows}


Inspect = Callable[[Seen], Fault | None]


def inspecting(when: Callable[[Seen], bool], then: Fault | Callable[[], object], times: float = math.inf) -> Inspect:
    """For the first `times` events that `when` accepts: the fault, or the call, which the event waits for."""
    happened = 0

    def inspect(seen: Seen) -> Fault | None:
        nonlocal happened
        if happened >= times or not when(seen):
            return None
        happened += 1
        if isinstance(then, Fault):
            return then
        then()
        return None

    return inspect


def is_type(type_: EventType) -> Callable[[Seen], bool]:
    return lambda seen: seen.type == type_


def on_forwards(then: Fault | Callable[[], object], *numbers: int) -> Inspect:
    """For the forward events with these numbers, counted from 1: the fault, or the call, which the event waits for."""
    forwards = itertools.count(1)
    return inspecting(lambda seen: seen.type == EventType.FORWARD and next(forwards) in numbers, then)


def on_forward_from(position: int, then: Callable[[], object]) -> Inspect:
    """For the first forward event whose first row begins at this position: the call, which the event waits for."""
    return inspecting(lambda seen: seen.type == EventType.FORWARD and seen.rows[0].position == position, then, times=1)


def hold(stage: "StageServer", positions: Container[int]) -> threading.Event:
    """Makes forward events with a row at one of `positions` wait at the stage until the returned event is set.

    What a test does in the middle of an answer then comes before its end, however late the test's thread is.
    """
    go_on = threading.Event()
    stage.inspect = inspecting(lambda seen: any(row.position in positions for row in seen.rows), go_on.wait)
    return go_on


class _StartNow(StartUp):
    """Start-up of a pod that begins when it is asked. The real one would count from the start of the test's process."""

    def phases(self) -> dict[str, float]:
        return {}


class _Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def setup(self) -> None:
        super().setup()
        self.server.sockets.add(self.connection)
        if self.server.killed:  # before this thread began: the connection must not reach the next boot
            _reset(self.connection)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def finish(self) -> None:
        self.server.sockets.discard(self.connection)
        super().finish()

    def log(self, *_: object) -> None:
        """Tests are silent."""

    def connection_dropped(self, error: BaseException, environ: Any = None) -> None:
        self.close_connection = True


class _Server(ThreadedWSGIServer):
    daemon_threads = True
    block_on_close = False
    sockets: set[socket.socket]
    killed = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that the test has broken."""


class StageServer:
    """One stage. It can be killed and started again at its address, and slowed down."""

    def __init__(
        self,
        index: int,
        cut: Cut,
        build: Callable[[], LayerGroup],
        *,
        max_merge: int = 8,
        idle_seconds: float = 600.0,
        lease_seconds: float = LEASE_SECONDS,
        tiers: Callable[[LayerGroup], Sequence[Tier]] = lambda _: (),
    ) -> None:
        """build: makes the group of `cut[index]`, anew for each boot. tiers: behind its memory."""
        self.index = index
        self._cut = cut
        self._build = build
        self._tiers = tiers
        self._settings: dict[str, Any] = {
            "max_merge": max_merge,
            "idle_sequence_seconds": idle_seconds,
            "lease_seconds": lease_seconds,
        }
        self._boots = 0
        self._server: _Server | None = None
        self._lock = threading.Lock()  # of `start` and `kill`
        self._port = free_port()  # of a kind that no outgoing connection takes while the stage is down
        self.seconds = 0.0
        """What each pass takes at least."""
        self.clock: Callable[[], float] = time.time
        """The engine's clock, by which it finds idle sequences."""
        self.inspect: Inspect = lambda _: None
        self.seen: list[Seen] = []
        self.passes: list[set[tuple[int, int]]] = []
        """Position and length of each segment of each pass."""
        self.queued: list[tuple[int, tuple[Row, ...]]] = []
        """Rows of each event, with the number of passes that were over when it was put into the engine's queue."""
        self.passes_over = 0
        self.start()

    @property
    def first_layer(self) -> int:
        return self._cut[self.index][0]

    @property
    def is_down(self) -> bool:
        return self._server is None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def forwards(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.type == EventType.FORWARD]

    @property
    def prompts_begun(self) -> list[int]:
        """The first token of each prompt, in the order in which they arrived."""
        begun = []
        for seen in self.forwards:
            starts = itertools.accumulate((row.length for row in seen.rows), initial=0)
            begun += [seen.token_ids[start] for start, row in zip(starts, seen.rows, strict=False) if row.position == 0]
        return begun

    def start(self) -> None:
        """A new boot, with nothing held. Does nothing while it runs."""
        with self._lock:
            if self._server is not None:
                return
            self._boots += 1
            self.group = self._build()
            self.engine = _NotingEngine(
                self,
                _Slow(self.group, self),
                num_stages=len(self._cut),
                tiers=self._tiers(self.group),
                clock=self._now,
                **self._settings,
            )
            self.engine.start()
            self._server = server = _Server("127.0.0.1", self._port, self._app(), _Handler)
            server.sockets = set()
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def _now(self) -> float:
        return self.clock()

    def kill(self) -> None:
        """Acts like SIGKILL: every connection is reset, the port is closed, the KV is lost."""
        with self._lock:
            server, self._server = self._server, None
            if server is None:
                return
            server.shutdown()
            server.killed = True
            server.server_close()
            for connection in list(server.sockets):
                _reset(connection)
            self.engine.stop(drain=False)

    def _app(self) -> Callable[["WSGIEnvironment", "StartResponse"], Iterable[bytes]]:
        config = _config(self._cut, self.index)
        identity = StageIdentity.of(config, f"stage-{self.index}-boot-{self._boots}")
        handlers = EventHandlers(identity, lambda _: self.engine, cast("Any", None), _StartNow())  # no Sequence asks it
        app = StageApp(handlers, StageMetrics(), TOKEN)

        def with_faults(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            seen = _seen(environ, body)
            self.seen.append(seen)
            fault = self.inspect(seen)
            if fault in (Fault.KILLED, Fault.KILLED_RESTARTED):
                self.kill()
                if fault is Fault.KILLED_RESTARTED:
                    self.start()
            if fault in (Fault.KILLED, Fault.KILLED_RESTARTED, Fault.REFUSED):
                raise _broken(environ)
            if fault is Fault.UNAVAILABLE:
                start_response("503 Service Unavailable", [("Content-Length", "0")])
                return [b""]
            if fault is Fault.TWICE:
                list(app({**environ, "wsgi.input": BytesIO(body)}, lambda *_: lambda _: None))
            answer = list(app({**environ, "wsgi.input": BytesIO(body)}, start_response))
            seen.left, seen.reply = time.monotonic(), b"".join(answer)
            if fault is Fault.REPLY_LOST:
                raise _broken(environ)
            return answer

        return with_faults


def _config(cut: Cut, index: int) -> StageConfig:
    groups = [f"{first}:{last}" for first, last in cut]
    environ = {
        "LAMINA_ROLE": "stage",
        "LAMINA_PIPELINE": FINGERPRINT,
        "LAMINA_PIPELINE_TOKEN": TOKEN,
        "LAMINA_MODEL": "tiny",
        "LAMINA_DTYPE": "float32",
        "LAMINA_CUT": ",".join(groups),
        "LAMINA_LAYERS": groups[index],
        "LAMINA_STORE_ENDPOINT": "http://127.0.0.1:9",
        "LAMINA_STORE_BUCKET": "none",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
    }
    return cast("StageConfig", read_config(environ))


class _NotingEngine(Engine):
    def __init__(self, stage: StageServer, group: Any, **settings: Any) -> None:
        super().__init__(group, **settings)
        self._stage = stage

    def compute(self, batch: Batch, **named: Any) -> ForwardEvent:
        event = super().compute(batch, **named)
        # Afterwards: passes that are over before the event is in the queue are none that it waits for.
        self._stage.queued.append((self._stage.passes_over, batch.rows))
        return event


class _Slow:
    """A group whose passes take as long as its stage says."""

    def __init__(self, group: LayerGroup, stage: StageServer) -> None:
        self._group = group
        self._stage = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def forward(self, inputs: Any, segments: Any) -> Any:
        self._stage.passes.append({(segment.position, segment.length) for segment in segments})
        if self._stage.seconds:
            time.sleep(self._stage.seconds)
        try:
            return self._group.forward(inputs, segments)
        finally:
            self._stage.passes_over += 1


def _seen(environ: "WSGIEnvironment", body: bytes) -> Seen:
    type_ = environ.get("HTTP_CE_TYPE", "")
    batch = decode_batch(body) if type_ == EventType.FORWARD else None
    rows, token_ids = (batch.rows, tuple(batch.token_ids)) if batch is not None else ((), ())
    return Seen(type_, rows, token_ids, body, time.monotonic())


def _broken(environ: "WSGIEnvironment") -> ConnectionResetError:
    _reset(environ["werkzeug.socket"])
    return ConnectionResetError("as the test wants it")


def _reset(connection: socket.socket) -> None:
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def counting_stage(index: int, num_stages: int = 3, capacity_tokens: int = 100_000, **settings: Any) -> StageServer:
    def build() -> LayerGroup:
        return CountingGroup(index, index + 1, num_stages, capacity_tokens=capacity_tokens, max_positions=2**20)

    return StageServer(index, [(stage, stage + 1) for stage in range(num_stages)], build, **settings)


@contextmanager
def counting_stages(num_stages: int = 3, **settings: Any) -> Iterator[list[StageServer]]:
    with running(lambda index: counting_stage(index, num_stages, **settings), num_stages) as stages:
        yield stages


@contextmanager
def running(make: Callable[[int], StageServer], num_stages: int) -> Iterator[list[StageServer]]:
    """Stages that `make` starts, killed at the end."""
    with ExitStack() as stack:
        stages = []
        for index in range(num_stages):
            stages.append(make(index))
            stack.callback(stages[-1].kill)
        yield stages
