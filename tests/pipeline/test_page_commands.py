"""Runs the `curl` commands of the pages, as they stand there, against a real pipeline."""

import re
import shutil
import subprocess

import pytest

from tests.support.functions.functions import FunctionProcess
from tests.support.house.pages import PAGES, by_hand

TIMED_OUT = 28  # curl's status after --max-time; a stream that does not end by itself is cut off
COMMANDS = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"(?:^    .+\n)+", by_hand(page), re.MULTILINE)
    if block.lstrip().startswith("curl") and "http://127.0.0.1:8080/" in block
]

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def test_pages_show_how_to_ask() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_the_command_is_answered(gateway: FunctionProcess, page: str, command: str) -> None:
    script = command.replace("http://127.0.0.1:8080/", f"http://127.0.0.1:{gateway.port}/")
    script = 'curl() { command curl --silent --show-error --fail-with-body --max-time 10 "$@"; }\n' + script
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 or (done.returncode == TIMED_OUT and "event: snapshot" in done.stdout), done
    assert "generate.response" in done.stdout or "snapshot" in done.stdout or '"text"' in done.stdout, done.stdout
