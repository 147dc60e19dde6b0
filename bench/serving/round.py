"""The parts of a decode step: sends micro-batches round the running stages and splits the time of each hop.

The hops are the gateway's own (`functions.gateway.stages.client` over `eventing.http.delivery`), with a thread for each
micro-batch. The reply's Server-Timing states a hop's time at the stage; the stages' metrics say how much of it was waiting.
"""

import gc
import re
import threading
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Final

from bench.pipeline import TOKEN, RunningPipeline, read_metrics
from bench.serving.requests import Request
from eventing.http.delivery import HttpReply, RequestTarget, Sender
from eventing.wire.batch_codec import encode_batch
from eventing.wire.control import ReleaseRow
from eventing.wire.events import Batch, Row, Want
from eventing.wire.framing import Buffer
from functions.gateway.stages.client import PipelineIdentity, StageClient
from functions.gateway.stages.routes import Instance

_TIMING: Final = re.compile(r"(engine|codec);dur=([0-9.]+)")
_TIMEOUT_SECONDS: Final = 60.0


@dataclass(slots=True)
class RoundTime:
    """Seconds of one round of one micro-batch through all stages."""

    compute: float = 0.0
    queue: float = 0.0  # waiting in a stage for the pass before
    codec: float = 0.0  # events made and read, at the stages and at the gateway's end
    http: float = 0.0  # the rest of each hop: both HTTP stacks, proxies, the loopback
    gateway: float = 0.0  # rows put together, tokens taken out

    @property
    def total(self) -> float:
        return self.compute + self.queue + self.codec + self.http + self.gateway

    @property
    def transport_share(self) -> float:
        """Codec and HTTP together, of the whole round."""
        return (self.codec + self.http) / self.total


class _Timed(Sender):
    """A sender that keeps the times of each thread's last request: total, engine and codec."""

    def __init__(self) -> None:
        super().__init__()
        self.of_thread = threading.local()

    def deliver(self, target: RequestTarget, head: bytes, buffers: Sequence[Buffer], deadline: float) -> HttpReply:
        began = time.perf_counter()
        reply = super().deliver(target, head, buffers, deadline)
        timing = {name: float(value) / 1000 for name, value in _TIMING.findall(reply.headers.get("server-timing", ""))}
        self.of_thread.sent = (time.perf_counter() - began, timing.get("engine", 0.0), timing.get("codec", 0.0))
        return reply


def measure_rounds(
    pipeline: RunningPipeline, batches: Sequence[Sequence[Request]], rounds: int, *, through_proxies: bool
) -> RoundTime:
    """The mean over all rounds of all micro-batches, which are under way at the same time."""
    urls = [stage.proxy if through_proxies else stage.function for stage in pipeline.stages]
    identity = PipelineIdentity(
        pipeline.local.pipeline.fingerprint, TOKEN, "/gateways/bench", tuple(first for first, _ in pipeline.cut)
    )
    sender = _Timed()
    with closing(sender), ThreadPoolExecutor(len(batches)) as threads:
        client = StageClient(sender, identity, _TIMEOUT_SECONDS)
        instances = [Instance(stage, url) for stage, url in enumerate(urls)]
        walkers = [_Walker(f"round-{number}", batch, client, instances, sender) for number, batch in enumerate(batches)]
        for walker in walkers:
            walker.prompt()
        list(threads.map(_Walker.decode, walkers, [3] * len(walkers)))
        # As a gateway does after its start: collecting this benchmark's own objects is no part of a hop.
        gc.collect()
        gc.freeze()
        before = _waited(pipeline)
        times = [time for found in threads.map(_Walker.decode, walkers, [rounds] * len(walkers)) for time in found]
        waited = _waited(pipeline) - before
        for walker in walkers:
            walker.release()
    mean = RoundTime(*(sum(getattr(time, field.name) for time in times) / len(times) for field in fields(RoundTime)))
    mean.queue = waited / len(times)
    mean.compute -= mean.queue
    return mean


class _Walker:
    """Sends one micro-batch round the stages."""

    def __init__(
        self, name: str, requests: Sequence[Request], client: StageClient, instances: Sequence[Instance], sender: _Timed
    ) -> None:
        self._ids = [f"{name}-{index}-{time.time_ns()}" for index in range(len(requests))]
        self._requests = requests
        self._client = client
        self._instances = instances
        self._sender = sender
        self._lengths = [0] * len(requests)
        self._tokens = [array("i", request.token_ids) for request in requests]

    def prompt(self) -> None:
        """Sends prompts one by one, so that no event is larger than a chunk."""
        for index in range(len(self._ids)):
            self._round([index])

    def decode(self, rounds: int) -> list[RoundTime]:
        return [self._round(range(len(self._ids))) for _ in range(rounds)]

    def release(self) -> None:
        for instance in self._instances:
            self._client.release(instance, [ReleaseRow(id_, 0) for id_ in self._ids])

    def _round(self, indices: Sequence[int]) -> RoundTime:
        """Sends the new tokens of these sequences; each gets one token back."""
        began = time.perf_counter()
        rows = tuple(self._row(index) for index in indices)
        token_ids = memoryview(array("i", [token for index in indices for token in self._tokens[index]]))
        body: Sequence[Buffer] = encode_batch(Batch(rows, token_ids))
        spent = RoundTime()
        for instance in self._instances:
            sent = time.perf_counter()
            reply = self._client.forward(
                instance, body, [self._ids[index] for index in indices], time.monotonic() + _TIMEOUT_SECONDS
            )
            hop = time.perf_counter() - sent
            in_flight, engine, codec = self._sender.of_thread.sent
            spent.compute += engine
            spent.codec += codec + hop - in_flight
            spent.http += in_flight - engine - codec
            body = [reply.body]
        for index, row in zip(indices, reply.batch.rows, strict=True):
            if row.result is None or not row.result.tokens:
                raise RuntimeError(f"no token: {row}")
            self._lengths[index] += len(self._tokens[index])
            self._tokens[index] = array("i", [*row.result.tokens])
        spent.gateway = time.perf_counter() - began - spent.total
        return spent

    def _row(self, index: int) -> Row:
        request, position = self._requests[index], self._lengths[index]
        reserve = len(request.token_ids) + request.max_tokens if position == 0 else None
        return Row(self._ids[index], 0, position, len(self._tokens[index]), Want.TOKEN, reserve_tokens=reserve)


def _waited(pipeline: RunningPipeline) -> float:
    """Seconds that events have waited at all stages since their start."""
    return sum(read_metrics(stage.metrics)["lamina_stage_queue_seconds_sum"] for stage in pipeline.stages)
