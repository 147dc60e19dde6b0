"""`python -m knative status`: what runs on this machine or on a cluster, and why."""

import json
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console, Group
from rich.live import Live

from functions.configuration.config import PERCENT
from knative.commands.console import rich_table, show_table, size
from knative.commands.fleet import FLEET_COLUMNS, fleet_lines, fleet_rows, fleet_status, one_screen
from knative.commands.local_pods import objective_line, samples_by_model, tokens_per_second
from knative.commands.options import cluster_options, named_pipeline, state_option
from knative.commands.state_folder import StateError, find_running
from knative.spec.fleet_spec import is_fleet

if TYPE_CHECKING:
    from knative.cluster.client import Cluster

_LOCAL_COLUMNS: Final = (
    "service", "ready", "starting", "leaving", "desired", "stable", "panic", "panicking", "tokens/s", "waiting", "restarts",
    "memory",
)  # fmt: skip
_FLEET_COLUMNS: Final = (
    "member", "model", "stages", "ready", "other pods", "tokens/s", "waiting", "for a device", "pod-seconds", "memory",
)  # fmt: skip
_REFRESH_SECONDS: Final = 1.0
_FIRST_RATE_SECONDS: Final = 0.5

_Lines = tuple[list[tuple[str, ...]], list[str]]  # rows of the table, and lines below it


@dataclass(frozen=True, slots=True)
class _Source:
    """A source of status: this machine or a cluster. Both functions raise if there is no status.

    document: reads the whole status, for --json. lines: reads rows of a table with `columns`, and lines to print below it.
    has_rates: the rows have rates since the reading before, so the first reading is not shown.
    """

    columns: Sequence[str]
    document: Callable[[], dict[str, Any]]
    lines: Callable[[], _Lines]
    has_rates: bool = False


@click.command(short_help="Show what runs here or on a cluster, and why.")
@click.argument("pipeline", required=False)
@click.option("--watch", is_flag=True, help="Repeat every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")
@click.option("--namespace", "-n", help="On a cluster: namespace of the pipeline. Default: the context's own.")
@cluster_options
@state_option
def status(
    pipeline: str | None, watch: bool, as_json: bool, namespace: str | None, connect: "Callable[[], Cluster]", state: Path
) -> None:
    """Show the pipeline that `run` serves on this machine: replicas, concurrency, and the scale that the autoscaler wants.

    For a fleet: the members that have pods or requests, and how many are at zero.

    With a PIPELINE (its name, or the file of its spec): its Services on a cluster, each revision that gets requests, the
    versions that were deployed, and why something is not ready.

    \b
    python -m knative status
    python -m knative status --watch
    python -m knative status chat --context production
    """
    if pipeline is None:
        source = _fleet_on_this_machine(state) if _local_status(state)["members"] else _on_this_machine(state)
    else:
        name, where = named_pipeline(pipeline, namespace)
        cluster = connect()
        look = _fleet_on_a_cluster if pipeline.endswith((".yaml", ".yml")) and is_fleet(Path(pipeline)) else _on_a_cluster
        source = look(cluster, where or cluster.default_namespace, name)
    if as_json:
        click.echo(json.dumps(source.document(), indent=2))
        return
    if source.has_rates:
        source.lines()
        time.sleep(_FIRST_RATE_SECONDS)
    console = Console()
    if watch and console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                rows, lines = source.lines()
                live.update(Group(rich_table("", source.columns, rows), *lines), refresh=True)
                time.sleep(_REFRESH_SECONDS)
    while True:
        rows, lines = source.lines()
        show_table(console, "", source.columns, rows)
        for text in lines:
            console.out(text, highlight=False)
        if not watch:
            return
        time.sleep(_REFRESH_SECONDS)


def _on_a_cluster(cluster: "Cluster", namespace: str, name: str) -> _Source:
    from knative.cluster.status import COLUMNS, cluster_status, status_lines, status_rows

    def document() -> dict[str, Any]:
        found = cluster_status(cluster, namespace, name)
        if not found["services"]:
            raise click.ClickException(f"no pipeline {name} is in namespace {namespace} of {cluster.description}")
        return found

    def lines() -> _Lines:
        found = document()
        return status_rows(found), status_lines(found)

    return _Source(COLUMNS, document, lines)


def _fleet_on_a_cluster(cluster: "Cluster", namespace: str, name: str) -> _Source:
    def lines() -> _Lines:
        found = fleet_status(cluster, namespace, name)
        rows, left = fleet_rows(found)
        return rows, [*left, *fleet_lines(found)]

    return _Source(FLEET_COLUMNS, lambda: fleet_status(cluster, namespace, name), lines)


def _fleet_on_this_machine(state: Path) -> _Source:
    seen: tuple[float, dict[str, float]] | None = None

    def lines() -> _Lines:
        nonlocal seen
        answer, now = _local_status(state), time.monotonic()
        services = {each["name"]: each for each in answer["services"]}
        of_members = {name for member in answer["members"] for name in member["services"]}
        read = samples_by_model([pod for name in services.keys() - of_members for pod in _pods(services[name])])
        samples: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float)) if read is None else read
        tokens, waiting = samples["lamina_gateway_drawn_tokens_total"], samples["lamina_gateway_waiting_sequences"]
        cost, wait = samples["lamina_fleet_pod_seconds_total"], samples["lamina_fleet_device_wait_seconds"]
        before, seen = seen, seen if read is None else (now, tokens)
        rows: list[tuple[float, tuple[str, ...]]] = []
        for member in answer["members"]:
            pods = [pod for name in member["services"] if name in services for pod in _pods(services[name])]
            percent = member["annotations"].get(PERCENT)
            model = "" if percent else member["model"]  # metrics are by model: a canary's are in its member's row
            drawn = 0.0
            if before is not None:
                drawn = max(0.0, tokens.get(model, 0.0) - before[1].get(model, 0.0)) / (now - before[0])
            if pods or waiting[model] or wait[model]:
                ready = sum(pod["phase"] == "ready" for pod in pods)
                memory = size(sum(pod["memory_bytes"] for pod in pods))
                counts = str(len(member["services"])), str(ready), str(len(pods) - ready)
                waits = f"{waiting[model]:.0f}", f"{wait[model]:.0f} s" if wait[model] else ""
                figures = ["-"] * 4 if read is None else [f"{drawn:.1f}", *waits, f"{cost[model]:.0f}"]
                name = f"{member['name']}, {percent} %" if percent else member["name"]
                row = (name, member["model"], *counts, *figures, memory)
                rows.append((wait[model] + drawn + waiting[model] + len(pods), row))
        shown, left = one_screen(rows)
        asleep = len(answer["members"]) - len(rows)
        at_zero = f"{len(answer['members'])} members, {asleep} of them at zero"
        return shown, [*left, at_zero, *_event_lines(answer.get("eventing") or {}), *_trouble_lines(answer)]

    return _Source(_FLEET_COLUMNS, lambda: _local_status(state), lines, has_rates=True)


def _pods(service: dict[str, Any]) -> list[dict[str, Any]]:
    return [pod for revision in service["revisions"] for pod in revision["pods"]]


def _on_this_machine(state: Path) -> _Source:
    seen: dict[str, tuple[float, float]] = {}

    def lines() -> _Lines:
        answer, now = _local_status(state), time.monotonic()
        rows: list[tuple[str, ...]] = []
        for service in answer["services"]:
            for revision in service["revisions"]:
                single = len(service["revisions"]) == 1
                label = str(service["name"]) if single else f"{revision['name']} {revision['percent']} %"
                rows.append(_row(label, revision, *tokens_per_second(revision, now, seen)))
        objective = objective_line([pod for service in answer["services"] for pod in _pods(service)])
        below = [] if objective is None else [objective]
        return rows, [*below, *_event_lines(answer.get("eventing") or {}), *_trouble_lines(answer)]

    return _Source(_LOCAL_COLUMNS, lambda: _local_status(state), lines, has_rates=True)


def _local_status(state: Path) -> dict[str, Any]:
    running = find_running(state)
    if running is None:
        raise StateError(f"nothing runs here with the state folder {state}; start it with: python -m knative run")
    try:
        with urllib.request.urlopen(f"{running.admin_url}/status", timeout=5) as reply:
            answer: dict[str, Any] = json.load(reply)
    except (OSError, HTTPException) as error:
        raise StateError(f"process {running.pid} runs, but does not answer at {running.admin_url}: {error}") from error
    return answer


def _row(name: str, revision: dict[str, Any], rate: float | None, queued: int | None) -> tuple[str, ...]:
    phases = [pod["phase"] for pod in revision["pods"]]
    return (
        name,
        str(phases.count("ready")),
        str(sum(phase in ("starting", "not ready", "back-off") for phase in phases)),
        str(phases.count("leaving")),
        str(revision["desired_scale"]),
        f"{revision['stable']:.2f}",
        f"{revision['panic']:.2f}",
        "yes" if revision["panicking"] else "no",
        "-" if rate is None else f"{rate:.1f}",
        "-" if queued is None else str(revision["waiting"] + queued),
        str(sum(pod["restarts"] for pod in revision["pods"])),
        size(sum(pod["memory_bytes"] for pod in revision["pods"])),
    )


def _event_lines(eventing: dict[str, Any]) -> list[str]:
    """Lines about Brokers, with the number of accepted events, and about Triggers and steps of Sequences.

    Those say how many events were delivered, sent again or lost. eventing: from the platform's status.
    """
    brokers = eventing.get("brokers", [])
    names = [(each["name"], each) for broker in brokers for each in broker["triggers"]]
    names += [(f"step {each['url'].rpartition('/sequences/')[2]}", each) for each in eventing.get("steps", [])]
    return [f"broker {broker['url']}: {broker['accepted']} events accepted" for broker in brokers] + [
        f"{name} → {each['subscriber']}: {each['delivered']} delivered, {each['retries']} retries, "
        f"{each['dead_letters']} dead letters, {each['lost']} lost"
        for name, each in names
    ]


def _trouble_lines(answer: dict[str, Any]) -> list[str]:
    revisions = [revision for service in answer["services"] for revision in service["revisions"]]
    failures = [f"{revision['name']}: {revision['failure']}" for revision in revisions if revision["failure"]]
    return failures + [
        f"{pod['name']}: {pod['trouble']}; log: {pod['log']}"
        for revision in revisions
        for pod in revision["pods"]
        if pod["phase"] == "back-off"
    ]
