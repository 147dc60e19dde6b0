"""`python -m knative logs`: what the functions of a pipeline wrote."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from knative.commands.sources.cluster_access import cluster_options, pipeline_options

if TYPE_CHECKING:
    from knative.cluster.client import Cluster


@click.command()
@pipeline_options
@click.option("--stage", type=click.IntRange(min=0), help="Only this stage; the gateway and all stages by default.")
@click.option("--lines", type=click.IntRange(min=1), default=20, show_default=True, help="Of each pod, counted from the end.")
@click.option("--follow", "-f", is_flag=True, help="Go on as more is written; needs one pod, so name a --stage.")
@cluster_options
def logs(
    name: str, stage: int | None, lines: int, follow: bool, namespace: str | None, connect: "Callable[[], Cluster]"
) -> None:
    """Print the last log lines of the pods of PIPELINE (its name, or the file of its spec), each led by its pod."""
    cluster = connect()
    from knative.cluster.diagnosis import function_container

    where = namespace or cluster.default_namespace
    containers = {
        pod["metadata"]["name"]: function_container(pod)
        for pod in cluster.find("v1", "Pod", where, f"app.kubernetes.io/instance={name}")
        if stage is None or pod["metadata"]["labels"].get("serving.knative.dev/service", "").endswith(f"-s{stage}")
    }
    pods = sorted(containers)
    if not pods:
        click.echo(f"no pod of {name} runs in namespace {where}; it may be at zero", err=True)
        return
    if follow:
        for line in cluster.follow_log(where, pods[-1], containers[pods[-1]], lines):
            click.echo(line)
        return
    for pod in pods:
        found = cluster.log_tail(where, pod, containers[pod], lines)
        if not found:
            click.echo(f"{pod}: no log of its container {containers[pod]} yet, or any more", err=True)
        for line in found:
            click.echo(f"{pod}: {line}")
