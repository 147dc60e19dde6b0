"""The page loads nothing from elsewhere, and its policy allows its own script and style only."""

import base64
import hashlib
import re

from flask.testing import FlaskClient

from tests.support.functions.scripted_gateway import Pipeline, client_of


def test_the_policy_has_the_hashes_of_script_and_style(client: FlaskClient) -> None:
    reply = client.get("/")
    assert (reply.status_code, reply.content_type) == (200, "text/html; charset=utf-8")
    policy = dict(each.split(" ", 1) for each in reply.headers["Content-Security-Policy"].split("; "))
    for element in ("script", "style"):
        ((text),) = re.findall(rf"<{element}>(.*?)</{element}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in reply.headers["Content-Security-Policy"]


def test_the_page_loads_nothing_from_elsewhere(client: FlaskClient) -> None:
    html = client.get("/").text
    assert not re.findall(r"""(?:src|href|action)\s*=\s*(?!["']data:)[^ >]*""", html)
    assert not re.search(r"""\son\w+=|style=|@import|url\(|innerHTML|eval\(|localStorage\.setItem\([^)]*key""", html)
    assert "https://" not in html.replace("https://www.w3.org", "")


def test_the_page_can_be_turned_off() -> None:
    reply = client_of(Pipeline(), LAMINA_PAGE="off").get("/")
    assert reply.status_code == 405
    assert "POST" in reply.headers["Allow"]
