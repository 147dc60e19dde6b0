"""Which hosts and pages a gateway answers, and which media types it takes, decided by a request's head."""

import pytest

from eventing.problems import CrossSite, Problem, Unauthorized, UnknownHost, UnsupportedMediaType
from functions.configuration.config import read_config
from functions.configuration.settings import ConfigError
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.app import gateway_admission
from functions.hosting.requests import REFUSED, BodyBudget, RequestReader
from tests.support.environments import GATEWAY, STAGE, gateway_config
from tests.support.functions.scripted_gateway import Pipeline, client_of

JSON = "Content-Type: application/json"
POST, GET = "POST /v1/completions", "GET /v1/models"
CLUSTER = {"K_SERVICE": "chat-gateway", "LAMINA_NAMESPACE": "prod"}
PAGE = "https://chat.example"
KEYS = {"LAMINA_API_KEYS": "key"}


def refusal(request: str, *headers: str, **environ: str) -> type[Problem] | None:
    """The class of the Problem with which a gateway of this environment refuses a request by its head; None: it takes it."""
    config = gateway_config(**environ)
    admit = gateway_admission(config, KeyRing(config.api_keys), client_of(Pipeline()).application)
    reader = RequestReader(admit, BodyBudget(2**20), {})
    lines = [f"{request} HTTP/1.1", *headers, "", ""]
    reader.feed("\r\n".join(lines).encode())
    assert reader.complete
    return type(reader.environ[REFUSED]) if REFUSED in reader.environ else None


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8080",
        "10.244.1.7:8012",
        "203.0.113.9",
        "[::1]",
        "[::1]:8080",
        "[fd00::7%25eth0]:8012",
        "localhost",
        "LocalHost:3000",
        "localhost.:3000",
        "chat.localhost",
        "host.docker.internal:8080",
        "lamina:8080",  # a name of docker compose, or of this machine
        "chat-gateway.prod.svc",
        "chat-gateway.prod.svc.cluster.local",
        "chat-gateway.prod.svc.cluster.local.:80",
        "",
    ],
)
def test_an_open_gateway_answers_to_addresses_and_names_that_no_page_can_have(host: str) -> None:
    for request in (POST, GET, "GET /", "OPTIONS /v1/models"):
        assert refusal(request, f"Host: {host}", JSON) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "svc.cluster.local.evil.example",
        "chat-gateway.prod.evil.example",
        "chat-gateway.prod.svc.evil.example",
        "127.1",
        "evil.example..",
        "x" * 300 + ".localhost",
    ],
)
def test_it_refuses_names_that_a_page_may_have_given_it(host: str) -> None:
    for request in (POST, GET, "GET /", "GET /v1/pipeline/events", "OPTIONS /v1/models"):
        assert refusal(request, f"Host: {host}", JSON) is UnknownHost
    assert refusal(POST, f"Host: {host}", JSON, "Authorization: Bearer key", **KEYS) is None


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("chat-gateway.prod.example.org", None),
        ("chat-gateway.prod.10.0.0.9.sslip.io:80", None),
        ("next-chat-gateway.prod.example.org", None),  # a traffic target with the tag `next`
        ("chat-gateway.prod", None),
        ("other.prod.example.org", UnknownHost),
        ("chat-gateway.other.example.org", UnknownHost),
        ("evil.example", UnknownHost),
    ],
)
def test_behind_an_ingress_it_answers_to_its_services_url_without_a_setting(host: str, expected: type | None) -> None:
    assert refusal(POST, f"Host: {host}", JSON, **CLUSTER) is expected
    local = refusal(POST, f"Host: {host}", JSON, **CLUSTER, LAMINA_LISTEN="127.0.0.1")
    assert local is UnknownHost, "no ingress checks names on one machine"


@pytest.mark.parametrize(
    ("hosts", "host", "expected"),
    [
        ("chat.example", "Chat.example:443", None),
        ("chat.example", "a.chat.example", UnknownHost),
        ("a.example, *.corp.example", "x.y.corp.example", None),
        ("a.example, *.corp.example", "x.xcorp.example", UnknownHost),
        ("*", "any.example", None),
    ],
)
def test_more_names_can_be_configured(hosts: str, host: str, expected: type | None) -> None:
    assert refusal(POST, f"Host: {host}", JSON, LAMINA_HOSTS=hosts) is expected


def test_names_are_checked_and_knatives_name_of_a_service_is_known_to_every_function() -> None:
    for wrong in ("chat.example:80", "https://chat.example", "Chat.example", "a,,b", "*.*"):
        with pytest.raises(ConfigError, match=r"LAMINA_HOSTS: .* names such as"):
            read_config(GATEWAY | {"LAMINA_HOSTS": wrong})
    assert read_config(STAGE | {"K_SERVICE": "chat-s0"}).service == "chat-s0"


@pytest.mark.parametrize(
    ("request_", "headers", "expected"),
    [
        # Programs send neither header, and the gateway's own page is not another site.
        (POST, [], None),
        (POST, ["Sec-Fetch-Site: same-origin", "Origin: http://localhost:8080"], None),
        (POST, ["Sec-Fetch-Site: none"], None),
        (POST, ["Sec-Fetch-Mode: cors"], None),  # Node's fetch
        (POST, ["Origin: http://localhost:8080"], None),
        (POST, ["Sec-Fetch-Site: cross-site", f"Origin: {PAGE}"], CrossSite),
        (POST, ["Sec-Fetch-Site: same-site", "Origin: http://localhost:3000"], CrossSite),
        (POST, ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Origin: null"], CrossSite),  # a form
        (POST, [f"Origin: {PAGE}"], CrossSite),
        (POST, ["Origin: http://localhost:3000"], CrossSite),
        (POST, ["Origin: null"], CrossSite),
        (POST, ["Origin: http://localhost:8080.evil.example"], CrossSite),
        ("POST /", [f"Origin: {PAGE}"], CrossSite),
        ("GET /v1/pipeline/events", ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"], CrossSite),
        (GET, [f"Origin: {PAGE}"], CrossSite),
        ("GET /", ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"], None),  # a link to the page
        ("OPTIONS /v1/completions", ["Sec-Fetch-Site: cross-site", f"Origin: {PAGE}"], None),  # gets no CORS headers
    ],
)
def test_pages_of_other_sites_are_refused_unless_their_origin_is_listed(
    request_: str, headers: list[str], expected: type | None
) -> None:
    sent = ["Host: localhost:8080", JSON, *headers]
    assert refusal(request_, *sent) is expected
    assert refusal(request_, *sent, "Authorization: Bearer key", **KEYS) is expected
    listed = ",".join(line[8:] for line in headers if line.startswith("Origin: http"))
    if listed:
        assert refusal(request_, *sent, LAMINA_CORS_ORIGINS=listed) is None
    assert refusal(request_, *sent, LAMINA_CORS_ORIGINS="*") is None


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", None),
        ("application/json; charset=utf-8", None),
        ("Application/JSON;charset=UTF-8", None),
        ("application/vnd.api+json", None),
        ("text/plain", UnsupportedMediaType),
        ("text/plain; application/json", UnsupportedMediaType),
        ("text/plain;charset=application/json", UnsupportedMediaType),
        ("application/x-www-form-urlencoded", UnsupportedMediaType),
        ("multipart/form-data; boundary=a+json", UnsupportedMediaType),
        ("application/jsonp", UnsupportedMediaType),
        ("", UnsupportedMediaType),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize", "/"])
def test_a_body_must_be_said_to_be_json(path: str, content_type: str, expected: type | None) -> None:
    said = [f"Content-Type: {content_type}"] if content_type else []
    assert refusal(f"POST {path}", "Host: localhost", *said) is expected


def test_cloudevents_have_media_types_of_their_own_and_may_have_no_data() -> None:
    for kind in ("application/cloudevents+json", "application/cloudevents-batch+json"):
        assert refusal("POST /", "Host: localhost", f"Content-Type: {kind}") is None
    assert refusal("POST /", "Host: localhost", "ce-specversion: 1.0") is None
    assert refusal(POST, "Host: localhost", "ce-specversion: 1.0") is UnsupportedMediaType


def test_a_request_without_a_key_is_told_so_first() -> None:
    assert refusal(POST, "Host: evil.example", "Content-Type: text/plain", **KEYS) is Unauthorized
