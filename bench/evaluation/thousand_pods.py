"""A thousand pods, twenty gateways, ten models, a day: what bears least, computed from costs that were measured.

    python -m bench.evaluation.thousand_pods

How much one pod of each stage bears is simulated, a relayed byte is measured here, and all else is what docs/benchmarks.md or
Knative's own settings say. It writes the section `at-scale` of docs/benchmarks.md.
"""

import socket
import threading
import time
from contextlib import suppress
from typing import Final

import click
import numpy as np

from bench.evaluation.experiments import setting_13b
from bench.evaluation.setting import STATIC
from bench.evaluation.simulator import Simulation, World
from bench.evaluation.trace import Sizes, drawn, rates
from bench.report import ROOT, help_text, machine, table, write_section
from functions.gateway.scheduling.batching import SchedulerLimits

PODS: Final = 1000
GATEWAYS: Final = 20
MODELS: Final = 10
_OBJECTIVE_SHARE: Final = 0.98  # of answers within it
_GATEWAY_TOKENS: Final = 4744  # a second, one process: docs/benchmarks.md, "Many at once"
_LINK_BYTES: Final = 3.125e9  # a second of a pod's link: 25 Gbit/s
_STORE_BYTES: Final = 12.5e9  # a second of all of a store's: 100 Gbit/s
_STARTS_A_POD: Final = 3  # of a day's peak: simulated days have 11 starts for 4 pods that come and go
_CHANGES_A_START: Final = 4  # of an EndpointSlice: a pod comes, is ready, leaves, is gone
_ENDPOINT_BYTES: Final = 400  # of one address in an EndpointSlice, as JSON
_SCRAPED_PODS: Final = 16  # of a revision, at most: Knative samples (pkg/autoscaler/metrics/stats_scraper.go)
_SECONDS: Final = 90
_ANSWER: Final = 288  # tokens at most, as in the other experiments
_DAY: Final = 86_400


def requests_a_second() -> float:
    """The most requests a second with which one pod of each stage keeps the objective; simulated."""
    most, rate = 0.0, 2.5
    while True:
        load = drawn("steady", np.full(_SECONDS, rate), 1.0, 0, Sizes()).with_answers_within(_ANSWER)
        setting = setting_13b()
        outcome, _ = Simulation(setting, STATIC, load, World(tail_seconds=40.0), pods=(1,) * setting.stages).run()
        if outcome.attainment < _OBJECTIVE_SHARE:
            return most
        most, rate = rate, rate + 0.5


def real_time_factor(copies: int, rate: float, seconds: int) -> float:
    """How much faster than real time a model with so many pods of each stage, two gateways and `rate` a copy is simulated."""
    load = drawn("steady", np.full(seconds, copies * rate), 1.0, 0, Sizes()).with_answers_within(_ANSWER)
    setting = setting_13b(devices=4 * copies)
    simulation = Simulation(setting, STATIC, load, World(gateways=2, tail_seconds=1.0))
    began = time.process_time()
    outcome, _ = simulation.run()
    return outcome.seconds / (time.process_time() - began)


def relayed_bytes_a_second(size: int, seconds: float = 1.0) -> float:
    """Bytes that a thread takes from a socket and puts into another one, in bodies of `size`, in a second of its processor."""
    (source, taken), (given, sink) = socket.socketpair(), socket.socketpair()
    body, buffer = bytes(size), bytearray(size)

    def send() -> None:
        with suppress(OSError):  # the other end is closed
            while True:
                source.sendall(body)

    def drop() -> None:
        while sink.recv(2**20):
            pass

    threads = [threading.Thread(target=each, name=each.__name__) for each in (send, drop)]
    for thread in threads:
        thread.start()
    moved, began = 0, time.thread_time()
    while time.thread_time() - began < seconds:
        view = memoryview(buffer)
        while view:
            view = view[taken.recv_into(view) :]
        given.sendall(buffer)
        moved += size
    used = time.thread_time() - began
    taken.close()
    given.close()
    for thread in threads:
        thread.join()
    source.close()
    sink.close()
    return moved / used


@click.command(help=help_text(__doc__))
def main() -> None:
    setting, rate = setting_13b(), requests_a_second()
    copies = PODS // setting.stages
    sizes = drawn("sizes", np.full(2000, 1.0), 1.0, 0, Sizes()).within(setting.context_tokens).with_answers_within(_ANSWER)
    prompt, answer = float(sizes.prompt_tokens.mean()), float(sizes.answer_tokens.mean())
    requests = rate * copies
    token_bytes = max(plan.hop_bytes_per_token for plan in setting.plans(STATIC))
    relayed = requests * (prompt + answer) * token_bytes * (setting.stages - 1)  # into the gateways, and out again
    relay = relayed_bytes_a_second(SchedulerLimits().chunk_tokens * token_bytes)
    shape = setting.shape
    pod_bytes = (shape.embedding_bytes + sum(shape.layer_bytes) + shape.head_bytes) / setting.stages
    start, together = pod_bytes / _LINK_BYTES, PODS / 2 * pod_bytes / _STORE_BYTES
    starts = _STARTS_A_POD * PODS
    pods_of_stage = PODS / (MODELS * setting.stages)
    changes = PODS / 2 * _CHANGES_A_START / together * GATEWAYS / MODELS
    scrapes = MODELS * setting.stages * min(_SCRAPED_PODS, pods_of_stage)

    def gateways(what: str, needed: float, one: float, unit: str, of: str) -> list[object]:
        wanted = needed / one
        return [
            what,
            f"{needed:,.0f} {unit}",
            f"{one:,.1f} {unit}, {of}",
            f"{wanted:.1f} gateways",
            f"{PODS * GATEWAYS / wanted:,.0f} pods",
        ]

    rows: list[list[object]] = [
        gateways("gateways: tokens", requests * answer, _GATEWAY_TOKENS, "tokens/s", "a core"),
        gateways("gateways: copying hidden states", relayed / 1e9, relay / 1e9, "GB/s", "a core, measured here"),
        gateways("gateways: network, each way", relayed / 1e9, _LINK_BYTES / 1e9, "GB/s", "a link of 25 Gbit/s"),
        [
            "store: half of all pods start at once",
            f"{PODS / 2 * pod_bytes / 1e12:.1f} TB",
            f"{_STORE_BYTES / 1e9:.1f} GB/s, assumed",
            f"{together:.0f} s, alone {start:.1f} s",
            f"{_STORE_BYTES / _LINK_BYTES:.0f} pods at once",
        ],
        [
            "API server: watches of EndpointSlices meanwhile",
            f"{changes:.0f} events/s",
            "not measured",
            f"{changes * _ENDPOINT_BYTES * pods_of_stage / 1e6:.1f} MB/s",
            "–",
        ],
        ["autoscaler: scrapes", f"{scrapes:.0f} a second", "not measured", "one autoscaler", "–"],
        ["activator", "wake-ups alone", "not measured", "none while pods are ready", "–"],
    ]
    tenth = copies // MODELS
    factor = real_time_factor(tenth, rate, 8)
    mean = rates("day", _DAY, 1.0).mean()
    steps = round(requests * answer / setting.micro_batch_sequences * setting.stages, -3)
    pods_of_gateway = PODS * _GATEWAY_TOKENS / (requests * answer)
    columns = ["part", "at the peak", "one bears", "wanted", f"{GATEWAYS} gateways, or one store, are full at"]
    text = (
        f"## A thousand pods on paper\n\n`python -m bench.evaluation.thousand_pods` on {machine()}. {MODELS} models like "
        f"{setting.model} on {PODS} {setting.device_name}, {setting.stages} stages each, {GATEWAYS} gateways, and a day whose "
        f"mean is {mean:.0%} of its peak. Simulated, one pod of each stage keeps the objective in {_OBJECTIVE_SHARE:.0%} of "
        f"answers at {rate:g} requests/s of {prompt:.0f} tokens of prompt and {answer:.0f} of answer on average, so all pods "
        f"take {requests:,.0f} requests/s at the peak. The store reads {starts * pod_bytes / 1e12:.0f} TB a day for "
        f"{starts:,} starts.\n\n{table(columns, rows)}\n\nTo simulate a second of one of the models, {tenth} pods of each "
        f"stage and two gateways, takes {1 / factor:.1f} s of a core, so all ten take {MODELS / factor:.0f} s: "
        f"{factor / MODELS:.2f} × real time. The gateways' own Python decides each of some {steps:,.0f} steps of micro-batches "
        f"at stages a second.\n\nWhat to do from which size on: tokens fill a gateway's core first, at {pods_of_gateway:.0f} "
        "pods. Gateways share nothing, so more of them are enough. Pods that start together wait for the store: "
        "`min_scale` for what a day always needs, and a store as wide as growth shall be quick."
    )
    write_section(ROOT / "docs" / "benchmarks.md", "at-scale", text)
    click.echo(text)


if __name__ == "__main__":
    main()
