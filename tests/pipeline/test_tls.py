"""Pods that reach each other by TLS only: with Knative's certificate at queue-proxy, and with their own. Real processes."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import aiohttp
import msgspec
import pytest

from knative.local.kubelet.pods import LocalPod
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import services
from knative.spec.pipeline_spec import NetworkSpec, TLSSpec
from tests.support.certificates import CertificateAuthority, write
from tests.support.functions.served import answer_to, serving, stage_revisions, tiny_pipeline
from tests.support.knative.platform import fetch, until
from tests.support.storage.published import Published

PROMPT = "the river " * 5
NEW_TOKENS = 24
MIDDLE = 1
SECRETS = {"serving-certs": TLSSpec(), "tiny-tls": TLSSpec(secret="tiny-tls")}
NAMES = {"serving-certs": ("kn-user-default", "data-plane.knative.dev"), "tiny-tls": ("tiny.default",)}


def remote_ports(pid: int) -> set[int]:
    """Ports of this machine to which the process has connections."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:  # closed since
            continue
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(fields[2].partition(":")[2], 16) for fields in lines if fields[9] in sockets}


def with_tls(published: Published, tls: TLSSpec) -> ResolvedPipeline:
    """The middle stage has two pods, and conversations share KV."""
    pipeline = tiny_pipeline(published)
    gateway = msgspec.structs.replace(pipeline.spec.gateway, prefix_sharing="pipeline")
    override = {"stage": MIDDLE, "autoscaling": {"min_scale": 2}}
    changes = {"network": NetworkSpec(tls=tls), "stage_overrides": [override], "gateway": gateway}
    spec = msgspec.structs.replace(pipeline.spec, **changes)
    return replace(pipeline, spec=spec)


async def measured(pod: LocalPod, name: str) -> float:
    """A metric of a pod, its labels included in the name."""
    async with aiohttp.ClientSession() as session:
        _, page = await fetch(session, f"http://127.0.0.1:{pod.metrics_port}/metrics")
    return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} "))


@pytest.mark.parametrize("secret", SECRETS)
def test_all_between_pods_is_encrypted_and_answers_are_the_models(published: Published, tmp_path: Path, secret: str) -> None:
    pipeline = with_tls(published, SECRETS[secret])
    wanted = published.expected(PROMPT, NEW_TOKENS)
    follow_up = PROMPT + published.tokenizer.decode(wanted) + " and the sea"
    follow_up_wanted = published.expected(follow_up, NEW_TOKENS)
    folder = write(CertificateAuthority().secret(*NAMES[secret]), tmp_path / secret)

    async def scenario() -> None:
        async with (
            asyncio.timeout(180),
            serving(tmp_path, published, services(pipeline), secret_folders={secret: folder}) as platform,
        ):
            url = platform.url("tiny")
            middle = platform.services["default", pipeline.stage_name(MIDDLE)].revisions[-1]
            await until(lambda: len(middle.ready_pods) == 2)
            answer = await answer_to(url, PROMPT, NEW_TOKENS)
            assert list(answer.token_ids) == wanted
            (gateway,) = platform.services["default", "tiny"].revisions[-1].ready_pods
            assert gateway.pid is not None
            connected = remote_ports(gateway.pid)
            stages = [pods for (revision,) in stage_revisions(platform, pipeline) if (pods := revision.ready_pods)]
            assert len(stages) == 3
            assert all({pod.tls_port for pod in pods} & connected for pods in stages)
            assert not {pod.proxy.port for pods in stages for pod in pods} & connected

            # The conversation's KV moves to the other pod.
            held = [await measured(pod, "lamina_stage_kv_remembered_tokens") for pod in middle.ready_pods]
            leaving, staying = sorted(middle.ready_pods, key=lambda pod: -held[middle.ready_pods.index(pod)])
            gone = asyncio.create_task(leaving.leave())
            answer = await answer_to(url, follow_up, NEW_TOKENS)
            assert list(answer.token_ids) == follow_up_wanted
            assert await measured(staying, 'lamina_stage_kv_restored_bytes_total{tier="peer"}') > 0
            await gone

    asyncio.run(scenario())
