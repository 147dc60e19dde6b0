"""The command `check`, and its warnings."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from knative.commands.check import check
from knative.webhook.check import validate, warnings
from tests.support.knative.manifests import service

GROUP = "autoscaling.knative.dev/"
OFF = "must not set the field(s) (config-features has kubernetes.podspec-{} off)"


def run(*files: Path) -> Result:
    return CliRunner().invoke(check, [str(file) for file in files])


def written(folder: Path, *documents: Any, name: str = "service.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump_all(documents) if name.endswith("yaml") else json.dumps(documents[0]))
    return file


@pytest.mark.parametrize("name", ["service.yaml", "service.json"])
def test_one_service(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, service(), name=name)
    result = run(file)
    assert (result.exit_code, result.output) == (0, f"{file}: accepted\n")


def test_a_refusal_names_the_field(tmp_path: Path) -> None:
    file = written(tmp_path, service({"nodeSelector": {"a": "b"}}))
    result = run(file)
    assert result.exit_code == 1
    assert result.output == f"{file}: refused: {OFF.format('nodeselector')}: spec.template.spec.nodeSelector\n"


def test_several_services_are_named_and_other_kinds_ignored(tmp_path: Path) -> None:
    other = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "core"}}
    listed = {"apiVersion": "v1", "kind": "List", "items": [service(name="b"), service({"hostNetwork": True}, name="c")]}
    file = written(tmp_path, service(name="a"), other, None, listed)
    result = run(file)
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        f"{file}: note: Service core is not a Knative Service and was skipped",
        f"{file} a: accepted",
        f"{file} b: accepted",
        f"{file} c: refused: {OFF.format('hostnetwork')}: spec.template.spec.hostNetwork",
    ]


def test_a_warning_does_not_refuse(tmp_path: Path) -> None:
    file = written(tmp_path, service(annotations={f"{GROUP}min-scael": "1"}))
    result = run(file)
    assert result.exit_code == 0
    accepted, warning = result.output.splitlines()
    assert accepted == f"{file}: accepted"
    assert warning.startswith(f"{file}: warning: spec.template.metadata.annotations.{GROUP}min-scael")
    assert warning.endswith(f"did you mean {GROUP}min-scale?")


def test_a_key_that_stands_twice_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(yaml.safe_dump(service()).replace("metadata:\n  name: v", "metadata:\n  name: w\n  name: v"))
    assert "warning: name (line" in run(file).output


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [b"a: [1,", b"\xff\xfe\x00", b"- 1\n- 2\n", b"just text", b"a: !!python/object:os.system {}", b"\x00", b"[" * 5000],
)
def test_an_unreadable_file_says_so_and_the_rest_is_checked(tmp_path: Path, content: bytes) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_bytes(content)
    good = written(tmp_path, service())
    result = run(broken, tmp_path / "absent.yaml", good)
    assert result.exit_code == 1
    assert f"{good}: accepted" in result.stdout
    assert f"{broken}: " in result.stderr
    assert f"{tmp_path / 'absent.yaml'}: No such file" in result.stderr
    assert "Traceback" not in result.output


def test_an_empty_file_holds_no_service(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("---\n")
    result = run(file)
    assert (result.exit_code, result.output) == (0, f"{file}: note: it has no Knative Service\n")


def test_dates_and_keys_are_strings_as_kubernetes_takes_them(tmp_path: Path) -> None:
    file = tmp_path / "dates.yaml"
    file.write_text(yaml.safe_dump(service()).replace("annotations: {}", "annotations: {when: 2026-11-24, 1: one}"))
    assert run(file).output == f"{file}: accepted\n"


HPA = {f"{GROUP}class": "hpa.autoscaling.knative.dev"}


@pytest.mark.parametrize(
    ("manifest", "part"),
    [
        (service(annotations={f"{GROUP}maxscale": "2"}), f"did you mean {GROUP}max-scale?"),
        (service(annotations={f"{GROUP}minSacle": "2"}), f"did you mean {GROUP}min-scale?"),
        (service(annotations={"autoscaling.knative.io/min-scale": "2"}), f"did you mean {GROUP}min-scale?"),
        (
            service(annotations={"serving.knative.dev/progres-deadline": "2s"}),
            "did you mean serving.knative.dev/progress-deadline?",
        ),
        (service(annotations={f"{GROUP}bogus": "1"}), "knows no such annotation and ignores it"),
        (service(annotations={"serving.knative.dev/rollout-duration": "10s"}), "it belongs under metadata.annotations"),
        (service(annotations={f"{GROUP}minScale": "1", f"{GROUP}min-scale": "2"}), "is set too"),
        (service({"containerConcurrency": 2}, annotations={f"{GROUP}target": "10"}), "above containerConcurrency 2"),
        (service(annotations={f"{GROUP}target-burst-capacity": "-1"}), "reads no queue-proxy"),
        (service(annotations={f"{GROUP}metric-aggregation-algorithm": "exponential"}), "averages linearly"),
        (service(annotations={f"{GROUP}initial-scale": "5", f"{GROUP}max-scale": "3"}), "above max-scale 3"),
        (service(annotations=HPA | {f"{GROUP}scale-down-delay": "30s"}), "HPA class does not read it"),
        (service({"timeoutSeconds": 600}), "within 300 s unless responseStartTimeoutSeconds"),
        (service({"responseStartTimeoutSeconds": 400}), "timeoutSeconds is 300 s"),
        (service({"idleTimeoutSeconds": 400}), "timeoutSeconds is 300 s"),
        (service(container={"env": [{"name": "A"}, {"name": "A"}]}), "A is set twice"),
        (service(labels={f"{GROUP}min-scale": "1"}), "ignores it as a label"),
        (service() | {"metadata": {"name": "v", "annotations": {"networking.knative.dev/visibility": "x"}}}, None),
    ],
)
def test_warnings(manifest: dict[str, Any], part: str | None) -> None:
    assert not validate(manifest)
    (warning,) = warnings(manifest)
    assert part is None or part in warning.reason


@pytest.mark.parametrize(
    "manifest",
    [
        service(),
        service({"containerConcurrency": 8}, annotations={f"{GROUP}target": "8", f"{GROUP}minScale": "1"}),
        service({"containerConcurrency": 8}, annotations={f"{GROUP}target": "50", f"{GROUP}metric": "rps"}),
        service({"timeoutSeconds": 600, "responseStartTimeoutSeconds": 600, "idleTimeoutSeconds": 60}),
        service(annotations=HPA | {f"{GROUP}target": "60", f"{GROUP}window": "60s"}),
        service(annotations={"other.example/x": "1", "queue.sidecar.serving.knative.dev/cpu-resource-request": "50m"}),
    ],
)
def test_good_services_get_no_warnings(manifest: dict[str, Any]) -> None:
    assert not validate(manifest)
    assert not warnings(manifest)
