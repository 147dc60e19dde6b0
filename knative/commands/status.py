"""`python -m knative status`: what runs on this machine or on a cluster, and why."""

import json
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import click
from rich.console import Console, Group
from rich.live import Live

from knative.commands.sources.cluster_access import cluster_options
from knative.commands.sources.pipeline_name import named_pipeline
from knative.commands.sources.state_folder import StateError, find_running
from knative.commands.sources.store_access import state_option
from knative.commands.terminal.console import rich_table, show_table, size
from knative.commands.terminal.pod_metrics import RevisionRates

if TYPE_CHECKING:
    from knative.cluster.client import Cluster

_COLUMNS: Final = (
    "service", "ready", "starting", "leaving", "desired", "stable", "panic", "panicking", "tokens/s", "waiting", "restarts",
    "memory",
)  # fmt: skip
_REFRESH_SECONDS: Final = 1.0
_FIRST_RATE_SECONDS: Final = 0.5


@click.command()
@click.argument("pipeline", required=False)
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="All that is known, as JSON.")
@click.option("--namespace", "-n", help="On a cluster: of the pipeline; the context's own by default.")
@cluster_options
@state_option
def status(
    pipeline: str | None, watch: bool, as_json: bool, namespace: str | None, connect: "Callable[[], Cluster]", state: Path
) -> None:
    """Show the pipeline that `run` serves on this machine: replicas, concurrency, and what the autoscaler wants.

    With a PIPELINE, its name or the file of its spec: its Services on a cluster, each revision that gets requests, what was
    deployed, and why something is not ready.

    \b
    python -m knative status
    python -m knative status --watch
    python -m knative status chat --context production
    """
    view: _View
    if pipeline is None:
        view = _LocalView(state)
    else:
        name, where = named_pipeline(pipeline, namespace)
        view = _ClusterView(connect(), where, name)
    if as_json:
        click.echo(json.dumps(view.document(), indent=2))
        return
    console = Console()
    if watch and console.is_terminal:
        _live(console, view)
    while True:
        _show(console, view)
        if not watch:
            return
        time.sleep(_REFRESH_SECONDS)


class _View(Protocol):
    """One status after the other."""

    @property
    def columns(self) -> Sequence[str]: ...

    def document(self) -> dict[str, Any]: ...

    def rows(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """The table, and lines beside it."""


class _ClusterView:
    def __init__(self, cluster: "Cluster", namespace: str | None, name: str) -> None:
        from knative.cluster.status import COLUMNS

        self.columns: Sequence[str] = COLUMNS
        self._cluster = cluster
        self._namespace = namespace or cluster.default_namespace
        self._name = name

    def document(self) -> dict[str, Any]:
        from knative.cluster.status import cluster_status

        found = cluster_status(self._cluster, self._namespace, self._name)
        if not found["services"]:
            raise click.ClickException(
                f"no pipeline {self._name} is in namespace {self._namespace} of {self._cluster.description}"
            )
        return found

    def rows(self) -> tuple[list[tuple[str, ...]], list[str]]:
        from knative.cluster.status import status_lines, status_rows

        found = self.document()
        return status_rows(found), status_lines(found)


class _LocalView:
    """Rates need two."""

    columns: Sequence[str] = _COLUMNS

    def __init__(self, state: Path) -> None:
        self._state = state
        self._rates: RevisionRates | None = None

    def document(self) -> dict[str, Any]:
        return _ask(self._state)

    def rows(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """The table, and lines about events and what is wrong."""
        if self._rates is None:
            self._rates = RevisionRates()
            self._rows(self._rates)
            time.sleep(_FIRST_RATE_SECONDS)
        return self._rows(self._rates)

    def _rows(self, rates: RevisionRates) -> tuple[list[tuple[str, ...]], list[str]]:
        answer, now = _ask(self._state), time.monotonic()
        rows = [
            _row(_label(service, revision), revision, *rates.tokens_per_second(revision, now))
            for service in answer["services"]
            for revision in service["revisions"]
        ]
        return rows, [*_events(answer.get("eventing") or {}), *_troubles(answer)]


def _ask(state: Path) -> dict[str, Any]:
    running = find_running(state)
    if running is None:
        raise StateError(f"nothing runs here with the state folder {state}; start it with: python -m knative run")
    try:
        with urllib.request.urlopen(f"{running.admin_url}/status", timeout=5) as reply:
            answer: dict[str, Any] = json.load(reply)
    except OSError as error:
        raise StateError(f"process {running.pid} runs, but does not answer at {running.admin_url}: {error}") from error
    return answer


def _show(console: Console, view: _View) -> None:
    rows, troubles = view.rows()
    show_table(console, "", view.columns, rows)
    for text in troubles:
        console.out(text, highlight=False)


def _live(console: Console, view: _View) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            rows, troubles = view.rows()
            live.update(Group(rich_table("", view.columns, rows), *troubles), refresh=True)
            time.sleep(_REFRESH_SECONDS)


def _label(service: dict[str, Any], revision: dict[str, Any]) -> str:
    single = len(service["revisions"]) == 1
    return str(service["name"]) if single else f"{revision['name']} {revision['percent']} %"


def _row(name: str, revision: dict[str, Any], rate: float | None, queued: int) -> tuple[str, ...]:
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
        str(revision["waiting"] + queued),
        str(sum(pod["restarts"] for pod in revision["pods"])),
        size(sum(pod["memory_bytes"] for pod in revision["pods"])),
    )


def _events(eventing: dict[str, Any]) -> list[str]:
    """A line for each Broker, and for each Trigger and step of a Sequence."""
    brokers = eventing.get("brokers", [])
    names = [(each["name"], each) for broker in brokers for each in broker["triggers"]]
    names += [(f"step {each['url'].rpartition('/sequences/')[2]}", each) for each in eventing.get("steps", [])]
    return [f"broker {broker['url']}: {broker['accepted']} events accepted" for broker in brokers] + [
        f"{name} → {each['subscriber']}: {each['delivered']} delivered, {each['retries']} retries, "
        f"{each['dead_letters']} dead letters, {each['lost']} lost"
        for name, each in names
    ]


def _troubles(answer: dict[str, Any]) -> list[str]:
    revisions = [revision for service in answer["services"] for revision in service["revisions"]]
    failures = [f"{revision['name']}: {revision['failure']}" for revision in revisions if revision["failure"]]
    return failures + [
        f"{pod['name']}: {pod['trouble']}; log: {pod['log']}"
        for revision in revisions
        for pod in revision["pods"]
        if pod["phase"] == "back-off"
    ]
