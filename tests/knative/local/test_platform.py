"""The local platform with real processes: from zero, holding, streaming, crashes, drain, revisions."""

import asyncio
import io
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from knative.local.errors import ManifestRefused, PortInUse, UnknownRevision, UnsupportedManifest
from knative.local.kubelet.pods import Phase
from knative.local.platform import Platform
from tests.support.knative.platform import client, echo_service, fetch, revision, running_platform, until

FULL_DUPLEX = {"features.knative.dev/http-full-duplex": "Enabled"}


async def test_the_first_request_starts_a_pod_and_waits_for_it(tmp_path: Path) -> None:
    async with running_platform(tmp_path, echo_service()) as platform, client() as session:
        assert revision(platform).pods == []
        answers = await asyncio.gather(*(fetch(session, platform.url("echo") + "/pid") for _ in range(20)))
        assert {status for status, _ in answers} == {200}
        assert {int(pid) for _, pid in answers} <= {pod.pid for pod in revision(platform).pods}, "more may have been started"


@pytest.mark.slow
async def test_one_held_request_starts_one_pod(tmp_path: Path) -> None:
    """The request that wakes a revision is not counted a second time when the second is over."""
    release = tmp_path / "release"
    manifest = echo_service(annotations={"target": "2", "window": "10s"})
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        held = asyncio.create_task(fetch(session, f"{platform.url('echo')}/hold?until={release}"))
        await until(lambda: revision(platform).autoscaler.desired_scale == 1)
        decisions = []
        for _ in range(3):
            seen = revision(platform).autoscaler.last_decision
            await until(lambda seen=seen: revision(platform).autoscaler.last_decision is not seen)
            decisions.append(revision(platform).autoscaler.desired_scale)
        release.touch()
        await held
        assert decisions == [1, 1, 1]


@pytest.mark.slow
async def test_an_idle_revision_falls_to_zero_and_comes_back(tmp_path: Path) -> None:
    quick = echo_service(annotations={"window": "6s"})
    async with running_platform(tmp_path, quick) as platform, client() as session:
        _, first = await fetch(session, platform.url("echo") + "/pid")
        await until(lambda: not revision(platform).pods)
        with pytest.raises(ProcessLookupError):
            os.kill(int(first), 0)
        status, second = await fetch(session, platform.url("echo") + "/pid")
        assert status == 200
        assert second != first


@pytest.mark.slow
async def test_a_backlog_adds_pods_and_all_requests_are_answered(tmp_path: Path) -> None:
    manifest = echo_service(concurrency=1, annotations={"window": "6s", "target": "1", "max-scale": "4"})
    release = tmp_path / "release"
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        held = [asyncio.create_task(fetch(session, f"{platform.url('echo')}/hold?until={release}")) for _ in range(8)]
        await until(lambda: len(revision(platform).ready_pods) == 4)
        release.touch()
        answers = await asyncio.gather(*held)
        assert {status for status, _ in answers} == {200}
        assert len({pid for _, pid in answers}) == 4


@pytest.mark.parametrize("through", ["ingress", "queue-proxy"])
async def test_bodies_stream_both_ways(tmp_path: Path, through: str) -> None:
    """The app answers a chunk before it reads the next, so that a buffer anywhere would stop the conversation."""

    async def converse(session: aiohttp.ClientSession, url: str) -> None:
        to_send: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def chunks() -> Any:
            while (chunk := await to_send.get()) is not None:
                yield chunk

        to_send.put_nowait(b"first")
        async with session.post(url, data=chunks()) as reply:
            for text in (b"first", b"second", b"third" * 100_000):
                assert await reply.content.readexactly(len(text)) == text
                to_send.put_nowait({b"first": b"second", b"second": b"third" * 100_000}.get(text))
            assert await reply.content.read() == b""

    async with running_platform(tmp_path, echo_service(full_annotations=FULL_DUPLEX)) as platform, client() as session:
        await fetch(session, platform.url("echo") + "/pid")
        url = platform.url("echo") if through == "ingress" else _pod_url(platform)
        await converse(session, url)


async def test_a_large_body_to_a_slow_reader_arrives_whole(tmp_path: Path) -> None:
    body = os.urandom(2**20) * 24
    async with running_platform(tmp_path, echo_service(full_annotations=FULL_DUPLEX)) as platform, client() as session:
        async with session.post(platform.url("echo"), data=io.BytesIO(body)) as reply:
            seen = b""
            async for chunk in reply.content.iter_chunked(2**18):
                seen += chunk
                await asyncio.sleep(0)
        assert seen == body


async def test_container_concurrency_holds_for_direct_requests_too(tmp_path: Path) -> None:
    release = tmp_path / "release"
    manifest = echo_service(concurrency=1, annotations={"max-scale": "1"})
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        await fetch(session, platform.url("echo") + "/pid")
        pod = revision(platform).pods[0]
        url = f"{_pod_url(platform)}/hold?until={release}"
        held = [asyncio.create_task(fetch(session, url)) for _ in range(11)]
        await until(lambda: pod.proxy.all.in_flight == 11)
        assert await fetch(session, url) == (503, "pending request queue full\n")
        release.touch()
        assert {status for status, _ in await asyncio.gather(*held)} == {200}


@pytest.mark.slow
async def test_a_request_that_finds_no_pod_in_time_gets_504(tmp_path: Path) -> None:
    manifest = echo_service(timeout=1, environment={"NEVER_READY": "1"})
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        assert await fetch(session, platform.url("echo") + "/pid") == (504, "activator request timeout\n")


@pytest.mark.slow
async def test_an_answer_that_does_not_begin_in_time_is_504(tmp_path: Path) -> None:
    manifest = echo_service(timeout=1)
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        await fetch(session, platform.url("echo") + "/pid")
        status, _ = await fetch(session, f"{platform.url('echo')}/hold?until={tmp_path / 'never'}")
        assert status == 504


async def test_more_than_the_activator_may_hold_gets_503(tmp_path: Path) -> None:
    manifest = echo_service(environment={"NEVER_READY": "1"})
    async with running_platform(tmp_path, manifest, activator_queue_depth=2) as platform, client() as session:
        held = [asyncio.create_task(fetch(session, platform.url("echo"))) for _ in range(2)]
        await until(lambda: len(revision(platform).activator.waiting) == 2)
        assert await fetch(session, platform.url("echo")) == (503, "2 requests wait for a pod already\n")
        for task in held:
            task.cancel()
        await until(lambda: len(revision(platform).activator.waiting) == 0)


async def test_a_crash_breaks_the_request_and_the_container_comes_back(tmp_path: Path) -> None:
    async with running_platform(tmp_path, echo_service()) as platform, client() as session:
        _, before = await fetch(session, platform.url("echo") + "/pid")
        pod = revision(platform).pods[0]
        status, _ = await fetch(session, platform.url("echo") + "/crash")
        assert status == 502
        await until(lambda: pod.ready and pod.pid != int(before))
        assert pod.restarts == 1
        assert (await fetch(session, platform.url("echo") + "/pid"))[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "cause"), [("CRASH", "exit status 1: told to crash"), ("NEVER_READY", "readiness probe: ")]
)
async def test_a_revision_without_a_ready_pod_fails_at_its_deadline_with_the_cause(
    tmp_path: Path, environment: str, cause: str
) -> None:
    deadline = {"serving.knative.dev/progress-deadline": "3s"}
    manifest = echo_service(environment={environment: "1"}, full_annotations=deadline)
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        status, text = await fetch(session, platform.url("echo"))
        assert status == 503
        assert "ProgressDeadlineExceeded: echo-00001 had no ready pod for 3 seconds" in text
        assert cause in text
        found = platform.status()["services"][0]["revisions"][0]
        assert found["failure"].startswith("ProgressDeadlineExceeded")
        if environment == "CRASH":
            assert found["pods"][0]["phase"] in (Phase.BACK_OFF, Phase.STARTING)
            assert found["pods"][0]["restarts"] >= 2


async def test_a_restarting_container_shows_its_last_end_and_its_probe(tmp_path: Path) -> None:
    manifest = echo_service(environment={"NEVER_READY": "1"})
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        waiting = asyncio.create_task(fetch(session, platform.url("echo")))
        await until(lambda: [pod.trouble for pod in revision(platform).pods] == ["readiness probe: {}"])
        pod = revision(platform).pods[0]
        with pytest.raises(aiohttp.ClientConnectionError):
            await fetch(session, f"http://127.0.0.1:{pod.proxy.function_port}/crash")
        await until(lambda: pod.restarts == 1 and "readiness probe" in pod.trouble)
        assert pod.trouble.startswith("exit status 7; readiness probe: ")
        waiting.cancel()


async def test_a_leaving_pod_finishes_its_requests_and_answers_until_it_is_quiet(tmp_path: Path) -> None:
    release = tmp_path / "release"
    async with running_platform(tmp_path, echo_service()) as platform, client() as session:
        await fetch(session, platform.url("echo") + "/pid")
        pod, url = revision(platform).pods[0], _pod_url(platform)
        held = asyncio.create_task(fetch(session, f"{url}/hold?until={release}"))
        await until(lambda: pod.proxy.all.in_flight == 1)
        leaving = asyncio.create_task(pod.leave())
        await until(lambda: pod.phase is Phase.LEAVING)
        assert (await fetch(session, f"{url}/pid"))[0] == 200
        release.touch()
        assert (await held)[0] == 200
        await leaving
        assert pod.phase is Phase.GONE
        with pytest.raises(aiohttp.ClientConnectorError):
            await fetch(session, f"{url}/pid")


@pytest.mark.slow
async def test_a_pod_over_its_memory_limit_is_killed_and_the_reason_shown(tmp_path: Path) -> None:
    manifest = echo_service(container={"resources": {"limits": {"memory": "64Mi"}}})
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        await fetch(session, f"{platform.url('echo')}/eat?{100 * 2**20}")
        pod = revision(platform).pods[0]
        await until(lambda: pod.restarts == 1)
        assert "OOMKilled" in platform.status()["services"][0]["revisions"][0]["pods"][0]["last_end"]


@pytest.mark.slow
async def test_a_new_revision_takes_over_once_it_is_ready(tmp_path: Path) -> None:
    async with running_platform(tmp_path, echo_service(environment={"WORD": "old"})) as platform, client() as session:
        url = platform.url("echo") + "/environment?WORD"
        assert await fetch(session, url) == (200, "old")
        await platform.apply([echo_service(environment={"WORD": "new"}, annotations={"initial-scale": "1"})])
        assert await fetch(session, url) == (200, "old")
        await until(lambda: platform.services["default", "echo"].traffic[0].revision is revision(platform, index=1))
        assert await fetch(session, url) == (200, "new")
        assert not revision(platform, index=0).reachable


@pytest.mark.slow
async def test_a_revision_that_fails_gets_no_traffic(tmp_path: Path) -> None:
    async with running_platform(tmp_path, echo_service()) as platform, client() as session:
        bad = echo_service(
            environment={"CRASH": "1"},
            annotations={"initial-scale": "1"},
            full_annotations={"serving.knative.dev/progress-deadline": "2s"},
        )
        await platform.apply([bad])
        await until(lambda: revision(platform, index=1).failure is not None)
        assert (await fetch(session, platform.url("echo") + "/pid"))[0] == 200


@pytest.mark.slow
async def test_traffic_is_split_by_percent(tmp_path: Path) -> None:
    async with running_platform(tmp_path, echo_service(environment={"WORD": "old"})) as platform, client() as session:
        split = [{"revisionName": "echo-00001", "percent": 50}, {"latestRevision": True, "percent": 50}]
        await platform.apply([echo_service(environment={"WORD": "new"}, traffic=split)])
        await until(lambda: len(platform.services["default", "echo"].traffic) == 2)
        url = platform.url("echo") + "/environment?WORD"
        words = {text for _, text in await asyncio.gather(*(fetch(session, url) for _ in range(60)))}
        assert words == {"old", "new"}


async def test_a_revision_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    async with running_platform(tmp_path, _named("echo-first", WORD="old")) as platform, client() as session:
        stay = [{"revisionName": "echo-first", "percent": 100}]
        await platform.apply([_named("echo-second", traffic=stay, WORD="new")])
        assert await fetch(session, platform.url("echo") + "/environment?WORD") == (200, "old")
        await platform.apply([_named("echo-second", WORD="new")])
        await until(lambda: platform.services["default", "echo"].traffic[0].revision is revision(platform))
        assert await fetch(session, platform.url("echo") + "/environment?K_REVISION") == (200, "echo-second")
        with pytest.raises(ManifestRefused, match="'echo-first' is another template's"):
            await platform.apply([_named("echo-first", WORD="third")])


def _named(name: str, traffic: list[dict[str, Any]] | None = None, **environment: str) -> dict[str, Any]:
    manifest = echo_service(environment=environment, **({} if traffic is None else {"traffic": traffic}))
    manifest["spec"]["template"]["metadata"]["name"] = name
    return manifest


async def test_traffic_to_a_revision_that_does_not_exist_starts_nothing(tmp_path: Path) -> None:
    async with running_platform(tmp_path, echo_service(environment={"WORD": "old"})) as platform:
        elsewhere = [{"revisionName": "echo-00007", "percent": 100}]
        with pytest.raises(UnknownRevision, match="'echo-00007' does not exist; there are echo-00001, echo-00002"):
            await platform.apply([echo_service(environment={"WORD": "new"}, traffic=elsewhere)])
        assert [each.name.revision for each in platform.services["default", "echo"].revisions] == ["echo-00001"]


async def test_ignored_fields_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = echo_service()
    manifest["metadata"]["annotations"] = {"serving.knative.dev/rollout-duration": "380s"}
    async with running_platform(tmp_path, manifest):
        pass
    assert "serving.knative.dev/rollout-duration: traffic moves at once here, not over 380s" in caplog.text


async def test_placement_of_pods_is_ignored(tmp_path: Path) -> None:
    placed = {"nodeSelector": {"disk": "fast"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    pull = {"imagePullSecrets": [{"name": "pull"}]}
    async with running_platform(tmp_path, echo_service(pod=placed | pull)) as platform, client() as session:
        assert (await fetch(session, platform.url("echo") + "/pid"))[0] == 200


@pytest.mark.slow
async def test_the_hpa_class_keeps_a_pod_without_requests(tmp_path: Path) -> None:
    annotations = {"class": "hpa.autoscaling.knative.dev", "metric": "cpu", "min-scale": "1"}
    manifest = echo_service(annotations=annotations, container={"resources": {"requests": {"cpu": "100m"}}})
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        await until(lambda: len(revision(platform).ready_pods) == 1)
        assert (await fetch(session, platform.url("echo") + "/pid"))[0] == 200


async def test_a_mounted_secret_is_a_file(tmp_path: Path) -> None:
    """In a given folder, or in one that is written for this run and removed after it; pods see its changes."""
    given = tmp_path / "given"
    given.mkdir()
    (given / "keys").write_text("one")
    mounts = [{"name": f"v-{name}", "mountPath": f"/etc/{name}"} for name in ("given", "made", "scratch")]
    paths = {"name": "PATHS", "value": "/etc/given/keys,/etc/made/keys"}
    volumes = [
        {"name": "v-given", "secret": {"secretName": "given"}},
        {"name": "v-made", "secret": {"secretName": "made", "items": [{"key": "keys", "path": "keys"}]}},
        {"name": "v-scratch", "emptyDir": {}},
    ]
    manifest = echo_service(container={"env": [paths], "volumeMounts": mounts}, pod={"volumes": volumes})
    secrets = {"given": {"keys": "one"}, "made": {"keys": "two"}}
    more = {"secrets": secrets, "secret_folders": {"given": given}}
    async with running_platform(tmp_path, manifest, **more) as platform, client() as session:
        seen = (await fetch(session, platform.url("echo") + "/environment?PATHS"))[1].split(",")
        assert [Path(path).read_text() for path in seen] == ["one", "two"]
        assert Path(seen[0]) == given / "keys"
        assert Path(seen[1]).parent == platform.secret_folders["made"]
        assert Path(seen[1]).parent.parent.stat().st_mode & 0o077 == 0
    assert (given / "keys").exists()
    assert not Path(seen[1]).exists()


async def test_a_container_gets_knatives_environment_secrets_and_local_urls(tmp_path: Path) -> None:
    container = {
        "env": [
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "token"}}},
            {"name": "OTHER", "value": "0:1=http://other.default.svc.cluster.local"},
        ],
        "envFrom": [{"secretRef": {"name": "store"}}],
    }
    manifests = (echo_service(container=container), echo_service("other"))
    secrets = {"keys": {"token": "sesame"}, "store": {"AWS_ACCESS_KEY_ID": "mine"}}
    async with running_platform(tmp_path, *manifests, secrets=secrets) as platform, client() as session:
        url = platform.url("echo") + "/environment?"
        await fetch(session, platform.url("echo"))
        expected = {
            "TOKEN": "sesame",
            "AWS_ACCESS_KEY_ID": "mine",
            "OTHER": "0:1=" + platform.url("other"),
            "K_SERVICE": "echo",
            "K_CONFIGURATION": "echo",
            "K_REVISION": "echo-00001",
            "LAMINA_LISTEN": "127.0.0.1",
            "LAMINA_METRICS_PORT": str(revision(platform).pods[0].metrics_port),
        }
        for name, value in expected.items():
            assert await fetch(session, url + name) == (200, value)


@pytest.mark.parametrize(
    ("manifest", "error", "message"),
    [
        (
            echo_service(container={"env": [{"name": "T", "valueFrom": {"secretKeyRef": {"name": "no", "key": "k"}}}]}),
            UnsupportedManifest,
            "env T: secretKeyRef 'no' with key 'k' is not here; there are none",
        ),
        (echo_service(annotations={"initial-scale": "-1"}), ManifestRefused, "initial-scale"),
        (echo_service(concurrency=1001), ManifestRefused, "containerConcurrency"),
        (echo_service(pod={"hostNetwork": True}), ManifestRefused, r"kubernetes\.podspec-hostnetwork"),
        (echo_service(traffic=[{"revisionName": "echo-00009", "percent": 100}]), UnknownRevision, "echo-00009"),
        (
            echo_service(traffic=[{"latestRevision": True, "percent": 100, "tag": "new"}]),
            UnsupportedManifest,
            r"echo: spec.traffic\[0\].tag: a tag has no URL",
        ),
        (
            echo_service(container={"workingDir": "/app", "ports": [{"name": "h2c", "containerPort": 8080}]}),
            UnsupportedManifest,
            r"containers\[0\].workingDir: .*containers\[0\].ports\[0\].name: h2c",
        ),
        (
            echo_service(container={"startupProbe": {"httpGet": {"path": "/"}}}),
            UnsupportedManifest,
            r"containers\[0\].startupProbe",
        ),
    ],
)
async def test_manifests_that_cannot_run_are_refused(
    tmp_path: Path, manifest: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        async with running_platform(tmp_path, manifest):
            pass


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    async with running_platform(tmp_path, echo_service()) as first:
        port = int(first.url("echo").rpartition(":")[2])
        with pytest.raises(PortInUse, match=rf"port {port} of 127\.0\.0\.1 is in use .*--port"):
            async with running_platform(tmp_path, echo_service(), ports={"echo": port}):
                pass


def _pod_url(platform: Platform) -> str:
    return f"http://127.0.0.1:{revision(platform).pods[0].proxy.port}"
