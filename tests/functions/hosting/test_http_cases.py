"""The server of functions against a table of raw requests, over a real socket; and against Java's own client."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.functions.http_cases import CASES, EITHER, Case, outcome
from tests.support.functions.java_client import ask_as_java, has_java
from tests.support.functions.server import Serving, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(4, tells=True) as running:
        yield running


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_request_gets_what_the_rfc_says(server: Serving, case: Case) -> None:
    replies, after = outcome(case, server.port)
    assert replies == case.replies
    assert after == case.after or case.after == EITHER


def test_the_table_is_a_table() -> None:
    assert len(CASES) >= 150
    assert len({case.sent for case in CASES}) == len(CASES)


@pytest.mark.skipif(not has_java(), reason="java is not installed")
def test_javas_client_is_served_in_every_framing(server: Serving, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.port}/a?b=c"
    seen = f"200 POST /a?b=c 127.0.0.1:{server.port} "
    assert ask_as_java(url, tmp_path) == [seen, seen] + 4 * [f"{seen}hello"]
