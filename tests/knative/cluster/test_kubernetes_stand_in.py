"""The stand-in for the Kubernetes API behaves as a real one was seen to behave."""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.support.knative.admission import refusal, unknown_fields
from tests.support.knative.manifests import objects
from tests.support.knative.site import GATEWAY, Site
from tests.support.paths import DATA

CASES = json.loads((DATA / "webhook-cases.json").read_text())
NOT_JUDGED_BY_FIELD = {
    "2 containers, no port",  # a missing field was refused
    "requests > limits",  # two fields that are valid one by one
    "volume not mounted",  # likewise
}


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_it_gives_the_recorded_verdicts(case: dict[str, Any]) -> None:
    said = refusal(case["manifest"], set())
    if case["accepted"]:
        assert (said, unknown_fields(case["manifest"], set())) == (None, [])
    elif case["case"] not in NOT_JUDGED_BY_FIELD:
        assert said is not None or unknown_fields(case["manifest"], set())


def test_a_field_without_a_recorded_verdict_is_an_error(site: Site) -> None:
    rendered = objects()[-1]
    rendered["spec"]["template"]["spec"]["dnsConfig"] = {"nameservers": ["192.0.2.1"]}
    with pytest.raises(Exception, match="stand-in does not know a verdict on "):
        site.cluster.apply(rendered)
    assert site.api.unknown.pop() == "a verdict on spec.template.spec.dnsConfig.nameservers.* of chat"


def test_objects_have_the_metadata_that_a_server_adds(serving: Site) -> None:
    gateway = serving.api.objects[GATEWAY]
    metadata = gateway["metadata"]
    assert {"uid", "creationTimestamp", "resourceVersion", "generation", "managedFields"} <= metadata.keys()
    (managed,) = metadata["managedFields"]
    assert (managed["manager"], managed["operation"], managed["fieldsType"]) == ("lamina", "Apply", "FieldsV1")
    assert "f:containers" in managed["fieldsV1"]["f:spec"]["f:template"]["f:spec"]
    assert "f:traffic" not in managed["fieldsV1"]["f:spec"], "Knative's default has no owner"


def test_conditions_come_in_the_order_seen_on_a_cluster(site: Site) -> None:
    seen: list[str] = []

    def note(key: tuple[str, str, str, str]) -> None:
        status = site.api.objects[key].get("status") if key == GATEWAY else None
        if status:
            ready = next(each for each in status["conditions"] if each["type"] == "Ready")
            seen.append(ready.get("reason", ready["status"]))

    site.api.on_change = note
    site.deployer.deploy(objects())
    assert list(dict.fromkeys(seen)) == ["OutOfDate", "RevisionMissing", "IngressNotConfigured", "Uninitialized", "True"]


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "reason"),
    [
        ("GET", "/api/v1/namespaces/default/secrets/absent", None, 404, "NotFound"),
        ("POST", "/api/v1/namespaces/default/secrets", {"metadata": {"name": "lamina-store"}}, 409, "AlreadyExists"),
        (
            "PUT",
            "/api/v1/namespaces/default/secrets/lamina-store",
            {"metadata": {"name": "lamina-store", "resourceVersion": "1"}},
            409,
            "Conflict",
        ),
        ("GET", "/api/v1/namespaces/default/events", None, 403, "Forbidden"),
        ("GET", "/api/v1/nodes/one/proxy", None, 501, "NotImplemented"),
        ("GET", "/api/v1/namespaces/default/pods?fieldSelector=status.phase=Failed", None, 501, "NotImplemented"),
        ("GET", "/api/v1/namespaces/default/pods?labelSelector=a%20in%20(b)", None, 501, "NotImplemented"),
    ],
)
def test_refusals_and_unknown_requests_get_status_objects(
    site: Site, method: str, path: str, body: dict[str, Any] | None, code: int, reason: str
) -> None:
    site.api.forbidden.add(("list", "events"))
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(site.api.url + path, data, {"Content-Type": "application/json"}, method=method)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(asked)
    status = json.load(error.value)
    assert (status["kind"], status["status"], status["code"], status["reason"]) == ("Status", "Failure", code, reason)
    assert len(site.api.unknown) == (code == 501)
    site.api.unknown.clear()
