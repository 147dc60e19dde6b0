"""`python -m knative run` of a tiny model in a process of its own, and the processes that outlive it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from knative.local.platform import ROOT

DEADLINE_SECONDS = 90


class Run:
    def __init__(self, checkpoint: Path, state: Path) -> None:
        self.state = state
        self._arguments = [
            *("--model", str(checkpoint), "--stages", "2", "--dtype", "float32", "--port", "0"),
            *("--prompt", "ab", "--max-tokens", "3", "--state", str(state)),
        ]
        self.process: subprocess.Popen[str] | None = None
        self.seen = ""

    def start(self, *more: str, inside: Sequence[str] = ()) -> None:
        """inside: a command to run the command with, such as unshare."""
        command = [*inside, sys.executable, "-m", "knative", "run", *self._arguments, *more]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def read_until(self, text: str) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        while text not in self.seen:
            line = self.process.stdout.readline()
            assert line, self.seen
            self.seen += line

    def finish(self) -> int:
        assert self.process is not None
        rest, _ = self.process.communicate(timeout=DEADLINE_SECONDS)
        self.seen += rest
        return self.process.returncode

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def processes(self) -> list[str]:
        """Command lines of all processes with this run's state folder or store in their arguments or environment."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:
                continue
            if folder.name.isdigit() and folder.name != str(os.getpid()) and self._marks(text):
                found.append(text.split(b"\0LAMINA")[0].decode(errors="replace"))
        return found

    def _marks(self, text: bytes) -> bool:
        endpoint = self.store_endpoint
        return str(self.state).encode() in text or (endpoint is not None and endpoint.encode() in text)

    store_endpoint: str | None = None

    def note_store(self) -> None:
        self.store_endpoint = json.loads((self.state / "platform.json").read_text())["store"]["endpoint_url"]
