"""`python -m knative cost`: what a pipeline used, in replica-seconds and byte-seconds."""

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console

from knative.commands.sources.cluster_access import cluster_options, pipeline_options, say
from knative.commands.terminal.console import show_table

if TYPE_CHECKING:
    from knative.cluster.client import Cluster
    from knative.cluster.cost import Usage

_COLUMNS: Final = ("service", "revision", "replica-seconds", "GiB-seconds", "core-seconds", "GPU-seconds")
_RESOURCES: Final = (("memory", 2.0**30), ("cpu", 1.0), ("nvidia.com/gpu", 1.0))
_UNITS: Final = {"m": 60, "h": 3600, "d": 86_400}


@click.command()
@pipeline_options
@click.option("--prometheus", metavar="URL", help="One that scrapes Knative's autoscaler; else what runs now is counted.")
@click.option("--since", default="1h", show_default=True, help="How far back, such as 30m, 24h or 7d; with --prometheus.")
@cluster_options
def cost(name: str, namespace: str | None, prometheus: str | None, since: str, connect: "Callable[[], Cluster]") -> None:
    """Add up what PIPELINE (its name, or the file of its spec) used: pods × seconds, and × what each of them requests.

    \b
    python -m knative cost chat
    python -m knative cost chat --prometheus http://127.0.0.1:9090 --since 24h
    """
    window_seconds = _window(since)
    cluster = connect()
    from knative.cluster.cost import usage_from_prometheus, usage_since_start

    where = namespace or cluster.default_namespace
    if prometheus is None:
        say("of the pods that run now, each since its start; name a Prometheus with --prometheus for what was before")
        usage = usage_since_start(cluster, where, name)
    else:
        usage = usage_from_prometheus(cluster, where, name, prometheus, window_seconds, time.time())
    if not usage:
        say(f"no pod of {name} runs in namespace {where}")
        return
    show_table(Console(), "", _COLUMNS, [*map(_row, usage), _sum(usage)])


def _window(text: str) -> float:
    match = re.fullmatch(r"(\d+)([mhd])", text)
    if match is None or not int(match[1]):
        raise click.BadParameter(f"{text!r} is no time such as 30m, 24h or 7d", param_hint="--since")
    return float(int(match[1]) * _UNITS[match[2]])


def _row(usage: "Usage") -> tuple[str, ...]:
    amounts = [usage.seconds_of(resource) for resource, _ in _RESOURCES]
    told = ["-" if amount is None else f"{amount / unit:.0f}" for amount, (_, unit) in zip(amounts, _RESOURCES, strict=True)]
    return (usage.service, usage.revision, f"{usage.replica_seconds:.0f}", *told)


def _sum(usage: "list[Usage]") -> tuple[str, ...]:
    """Revisions that are gone, of which nobody knows what they requested, count with their replica-seconds alone."""
    told = [f"{sum(each.seconds_of(resource) or 0.0 for each in usage) / unit:.0f}" for resource, unit in _RESOURCES]
    return ("all", "", f"{sum(each.replica_seconds for each in usage):.0f}", *told)
