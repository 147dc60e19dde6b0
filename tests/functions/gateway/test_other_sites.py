"""Pages of other sites in a real browser, against a gateway without API keys. The access log says what each request got."""

import json
from collections.abc import Iterator

import pytest

from tests.support.functions.browser import Browser, browser, needs_browser
from tests.support.functions.functions import FunctionProcess, gateway_environment
from tests.support.http_server import serving
from tests.support.storage.published import Published

pytestmark = [needs_browser, pytest.mark.slow, pytest.mark.timeout(200)]
SITE = "evil.example"


@pytest.fixture(scope="module")
def gateway(published: Published) -> Iterator[FunctionProcess]:
    with FunctionProcess(gateway_environment(published, ["http://127.0.0.1:1"] * 3, LAMINA_ACCESS_LOG="on")) as started:
        yield started.wait_ready()


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    """All names are this machine's address, as after DNS rebinding."""
    with browser(f"--host-resolver-rules=MAP {SITE} 127.0.0.1") as page:
        yield page


@pytest.fixture(scope="module")
def other_site() -> Iterator[str]:
    with serving(lambda asked: asked.answer(200, b"<title>another site</title>", Content_Type="text/html")) as server:
        yield f"http://{SITE}:{server.server_port}/"


def logged(gateway: FunctionProcess) -> list[tuple[str, str, int]]:
    """Method, path and status of each request so far."""
    lines = [json.loads(line) for line in gateway.log.splitlines() if line.startswith('{"time"')]
    return [(line["method"], line["path"], line["status"]) for line in lines if "path" in line]


def test_a_page_of_another_site_can_send_nothing(gateway: FunctionProcess, page: Browser, other_site: str) -> None:
    page.open(other_site)
    script = """
        const [url, method, body, type, done] = arguments;
        fetch(url, { method, body, mode: "no-cors", ...(type && { headers: { "content-type": type } }) }).then(
          () => done("sent"), (error) => done(String(error)));
    """
    requests = (
        ("POST", "/tokenize", '{"prompt": "Hi"}', "text/plain"),
        ("POST", "/v1/completions", '{"prompt": "Hi"}', None),
        ("GET", "/v1/pipeline/events", None, None),
    )
    for method, path, body, content_type in requests:
        sent = page.driver.execute_async_script(script, gateway.url + path, method, body, content_type)  # type: ignore[no-untyped-call]
        assert sent == "sent"
        page.until(lambda asked=(method, path, 403): asked in logged(gateway), f"{method} {path} refused")


def test_a_page_that_gives_the_gateway_a_name_of_its_own_reads_nothing(gateway: FunctionProcess, page: Browser) -> None:
    for path in ("/", "/v1/models", "/openapi.json"):
        page.open(f"http://{SITE}:{gateway.port}{path}")
        assert "LAMINA_HOSTS" in page.text("body")
        page.until(lambda asked=("GET", path, 421): asked in logged(gateway), f"{path} refused")


def test_a_link_to_the_gateways_page_works_and_the_page_may_ask(
    gateway: FunctionProcess, page: Browser, other_site: str
) -> None:
    page.open(other_site)
    page.run("location.href = arguments[0]", f"{gateway.url}/")
    page.until(lambda: page.find("#question"), "the page")
    headers = "{ 'content-type': 'application/json' }"
    asked = f"const got = await fetch('/tokenize', {{ method: 'POST', headers: {headers}, body: arguments[0] }});"
    count = page.run(f"{asked} return (await got.json()).count", json.dumps({"prompt": "Hi"}))
    assert count > 0
