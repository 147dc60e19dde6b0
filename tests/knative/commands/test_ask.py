"""`ask` reports the time that its caller waited, not the gateway's."""

import asyncio
import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from eventing.wire.generation import GenerateResponse, ProgressEvent, Timings, TokenEvent, Usage
from knative.commands import ask
from knative.commands.ask import Answer, Question
from tests.support import http_server
from tests.support.knative.manifests import fleet_document, member_document
from tests.support.knative.site import Site
from tests.support.paths import ROOT


@pytest.mark.parametrize("tokens", [0, 3])
def test_times_are_those_of_the_caller(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway was scaled to zero, and answered quickly once it ran."""
    now = 100.0

    async def answers(url: str, question: Question, on_progress: None) -> AsyncIterator[Answer]:
        nonlocal now
        now += 4.28
        for index in range(tokens):
            yield TokenEvent(index, 7, "a")
            now += 0.5
        now += 0.5 if tokens else 0.0
        timings = Timings(0.0, 0.02, 0.03, 1000.0)
        yield GenerateResponse("aaa", (7,) * tokens, "stop", Usage(5, tokens + 1, tokens + 6), timings)

    monkeypatch.setattr(ask, "stream_answer", answers)
    monkeypatch.setattr(ask.time, "monotonic", lambda: now)
    out = io.StringIO()
    asyncio.run(ask.show_answer(Console(file=out), "http://gateway", Question("hello", 8)))
    rate = "1.5" if tokens else "0.0"
    assert f"({5} + {tokens + 1} tokens, first after 4.28 s, then {rate} tokens/s, stop)" in out.getvalue()


@pytest.fixture
def ingress() -> Iterator[str]:
    """URL of what answers like Knative's ingress for a host that no Route has."""
    with http_server.serving(lambda exchange: exchange.answer(404)) as server:
        yield server.origin


def refused(kubeconfig: Path, *arguments: str) -> str:
    """What `ask` says that fails. A process of its own, because the client of Kubernetes reads KUBECONFIG when imported."""
    command = [sys.executable, "-m", "knative", "ask", *arguments]
    environ = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    return done.stderr


def test_a_host_that_the_ingress_does_not_know_is_told_with_those_that_it_knows(
    ingress: str, serving: Site, tmp_path: Path
) -> None:
    said = refused(tmp_path / "kubeconfig", ingress, "hello", "--host", "chatt.default.example")
    assert "404: the ingress there knows no host chatt.default.example; context stand-in at" in said
    assert "has chat.default.example" in said


def test_without_a_cluster_it_says_how_to_list_them(ingress: str, tmp_path: Path) -> None:
    said = refused(tmp_path / "none", ingress, "hello")
    assert f"knows no host {ingress.removeprefix('http://')}; python -m knative list shows the hosts" in said


def test_the_first_member_of_a_fleet_is_asked(tmp_path: Path) -> None:
    members = [member_document("code"), member_document("a")]
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet_document(members=members)))
    with http_server.serving(lambda exchange: exchange.answer(500)) as server:
        for more in ([], ["--model", "a"]):
            CliRunner().invoke(ask.ask, [server.origin, "hello", "--spec", str(tmp_path / "fleet.yaml"), *more])
        assert [each.path for each in server.requests] == ["/?model=code", "/?model=a"]


def test_a_terminal_shows_what_an_answer_awaits(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()

    async def answers(url: str, question: Question, on_progress: ask.OnProgress) -> AsyncIterator[Answer]:
        on_progress(ProgressEvent("start", "stage 2 of 3 loading, 41 %", stage=2, stages=3, percent=41))
        yield TokenEvent(0, 7, "Paris")
        yield GenerateResponse("Paris", (7,), "stop", Usage(5, 1, 6), Timings(0.0, 0.02, 0.03, 1000.0))

    monkeypatch.setattr(ask, "stream_answer", answers)
    monkeypatch.setattr(ask, "Console", lambda: Console(file=out, force_terminal=True, width=120))
    assert CliRunner().invoke(ask.ask, ["http://gateway", "Capital?"]).exit_code == 0
    before, _, after = out.getvalue().partition("Paris")
    assert "waiting: stage 2 of 3 loading, 41 %" in before
    assert "waiting" not in after
