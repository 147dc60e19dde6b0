"""Commands that read a cluster: list, logs, cost."""

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console

from knative.commands.console import show_table
from knative.commands.options import cluster_options, pipeline_options, say

if TYPE_CHECKING:
    from knative.cluster.client import Cluster
    from knative.cluster.cost import RevisionUsage

_RESOURCES: Final = (("memory", 2.0**30), ("cpu", 1.0), ("nvidia.com/gpu", 1.0))  # resource, one unit of its column
_UNIT_SECONDS: Final = {"m": 60, "h": 3600, "d": 86_400}


@click.command("list", short_help="List all pipelines of a cluster.")
@click.option("--namespace", "-n", help="Only this one. Default: all, or the context's own if you may not list all.")
@cluster_options
def list_(namespace: str | None, connect: "Callable[[], Cluster]") -> None:
    """List all pipelines of a cluster: whether they are ready, how many pods they have, their URLs."""
    cluster = connect()
    from knative.cluster.status import LIST_COLUMNS, pipelines

    rows = pipelines(cluster, namespace, say)
    if not rows:
        say(f"no pipeline is in {namespace or 'any namespace'} of {cluster.description}")
        return
    show_table(Console(), "", LIST_COLUMNS, rows)


@click.command(short_help="Print the last log lines of a pipeline's pods.")
@pipeline_options
@click.option("--stage", type=click.IntRange(min=0), help="Only this stage. Default: the gateway and all stages.")
@click.option("--lines", type=click.IntRange(min=1), default=20, show_default=True, help="Last lines of each pod.")
@click.option("--follow", "-f", is_flag=True, help="Keep printing new lines; follows one pod, so name a --stage.")
@cluster_options
def logs(
    name: str, stage: int | None, lines: int, follow: bool, namespace: str | None, connect: "Callable[[], Cluster]"
) -> None:
    """Print the last log lines of the pods of PIPELINE (its name, or the file of its spec), each led by its pod."""
    cluster = connect()
    from knative.cluster.objects import INSTANCE, SERVICE_LABEL, function_container

    where = namespace or cluster.default_namespace
    containers = {
        pod["metadata"]["name"]: function_container(pod)
        for pod in cluster.find("v1", "Pod", where, f"{INSTANCE}={name}")
        if stage is None or pod["metadata"]["labels"].get(SERVICE_LABEL, "").endswith(f"-s{stage}")
    }
    if not containers:
        say(f"no pod of {name} runs in namespace {where}; it may be scaled to zero")
        return
    if follow:
        pod = max(containers)
        for line in cluster.follow_log(where, pod, containers[pod], lines):
            click.echo(line)
        return
    for pod, container in sorted(containers.items()):
        found = cluster.log_tail(where, pod, container, lines)
        if not found:
            say(f"{pod}: its container {container} has no log yet, or no longer")
        for line in found:
            click.echo(f"{pod}: {line}")


@click.command(short_help="Add up the resources that a pipeline used.")
@pipeline_options
@click.option(
    "--prometheus", metavar="URL", help="A Prometheus that scrapes Knative's autoscaler. Default: count running pods."
)
@click.option("--since", default="1h", show_default=True, help="With --prometheus: how far back, such as 30m, 24h or 7d.")
@cluster_options
def cost(name: str, namespace: str | None, prometheus: str | None, since: str, connect: "Callable[[], Cluster]") -> None:
    """Add up what PIPELINE (its name, or the file of its spec) used: pods × seconds, and × what each pod requests.

    \b
    python -m knative cost chat
    python -m knative cost chat --prometheus http://127.0.0.1:9090 --since 24h
    """
    match = re.fullmatch(r"(\d+)([mhd])", since)
    if match is None or not int(match[1]):
        raise click.BadParameter(f"{since!r} is not a time such as 30m, 24h or 7d", param_hint="--since")
    cluster = connect()
    from knative.cluster.cost import usage_from_prometheus, usage_since_start

    where = namespace or cluster.default_namespace
    if prometheus is None:
        say("counts only pods that run now, each since its start; for the past, name a Prometheus with --prometheus")
        usage = usage_since_start(cluster, where, name)
    else:
        window_seconds = float(int(match[1]) * _UNIT_SECONDS[match[2]])
        usage = usage_from_prometheus(cluster, where, name, prometheus, window_seconds, time.time())
    if not usage:
        say(f"no pod of {name} runs in namespace {where}")
        return
    columns = ("service", "revision", "replica-seconds", "GiB-seconds", "core-seconds", "GPU-seconds")
    show_table(Console(), "", columns, [*map(_row, usage), _sum(usage)])


def _row(usage: "RevisionUsage") -> tuple[str, ...]:
    amounts = [(usage.seconds_of(resource), unit) for resource, unit in _RESOURCES]
    shown = ["-" if amount is None else f"{amount / unit:.0f}" for amount, unit in amounts]
    return (usage.service, usage.revision, f"{usage.replica_seconds:.0f}", *shown)


def _sum(usage: "list[RevisionUsage]") -> tuple[str, ...]:
    """The last row: totals. Deleted revisions, whose requests are unknown, add only to the replica-seconds."""
    shown = [f"{sum(each.seconds_of(resource) or 0.0 for each in usage) / unit:.0f}" for resource, unit in _RESOURCES]
    return ("all", "", f"{sum(each.replica_seconds for each in usage):.0f}", *shown)
