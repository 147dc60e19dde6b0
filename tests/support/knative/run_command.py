"""`python -m knative run` of a tiny model in a process of its own, and the processes that outlive it."""

import json
import os
import signal
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
        self.store_endpoint: str | None = None

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

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

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
        marks = [mark.encode() for mark in (str(self.state), self.store_endpoint) if mark is not None]
        found = []
        for folder in Path("/proc").iterdir():
            try:
                text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:
                continue
            if folder.name.isdigit() and folder.name != str(os.getpid()) and any(mark in text for mark in marks):
                found.append(text.split(b"\0LAMINA")[0].decode(errors="replace"))
        return found

    def note_store(self) -> None:
        """Remembers the store's URL, by which its process is found, if the store runs already."""
        file = self.state / "platform.json"
        if file.exists():
            self.store_endpoint = json.loads(file.read_text())["store"]["endpoint_url"]
